"""What a worker needs to know of a check: its code, its imports, and whether it can run apart from its program."""

import functools
import re
import warnings
from typing import Any, NamedTuple

from sandbox.verdict import COMMON

IMPORT = re.compile(r"^[ \t]*(?:import|from)[ \t][^\n;#(]*(?:\([^)]*\))?", re.MULTILINE)
BOUND = re.compile(r"(\w+)\s*(?:,|\)|$)")  # the names that an import binds
CHANGED = re.compile(  # an assignment to an attribute, perhaps among others
    r"^[ \t]*(?:[\w.]+[ \t]*,[ \t]*)*(\w+)((?:\.\w+)+)(?:\[[^\n]*\])?[ \t]*(?:,[\w., \t]*)?=(?!=)", re.MULTILINE
)
# What works on the interpreter that runs the check, and is meant for that of the program.
WORKS_ON_INTERPRETER = re.compile(
    r"\b(?:patch|redirect_std\w+|catch_warnings|simplefilter|assert(?:No)?Logs|assertWarns\w*|setrecursionlimit"
    r"|(?:get|set|local)context|setlocale|set_?state|environ|putenv|chdir|inspect|globals|__globals__)\b"
    r"|\basync[ \t]+(?:for|with)\b"
)


USED = re.compile(r"(?<![\w.])(\w+)\.\w")
MODULES = {name: name for name in COMMON} | {"np": "numpy", "numpy": "numpy"}


class Check(NamedTuple):
    code: Any  # its code, which all programs that it checks share; its text if it does not compile
    imports: list[str]  # at its top level, which its program may use
    modules: dict[str, str]  # that it uses, by what it calls them; they are not the program's, if that imported them
    seeds: list[str]  # modules that it seeds, with effect for its program too
    needs_sharing: str | None  # why it must share an interpreter with its program


@functools.lru_cache(maxsize=256)
def prepare(text: str) -> Check:
    """Compile a check, once for all its programs."""
    found = IMPORT.findall(text)
    bound = {name for line in found for name in BOUND.findall(line)}
    changed = next((name + rest for name, rest in CHANGED.findall(text) if name in bound), None)
    works = WORKS_ON_INTERPRETER.search(text)
    needs_sharing = f"the check changes {changed}" if changed else f"the check uses {works[0]}" if works else None
    imports = [line for line in found if not line[0].isspace()]
    seeds = [name for name in ("random", "numpy.random") if "seed(" in text and name.partition(".")[0] in text]
    modules = {name: MODULES[name] for name in USED.findall(text) if name in MODULES}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Check(compile(text, "<check>", "exec", dont_inherit=True), imports, modules, seeds, needs_sharing)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Check(text, imports, modules, seeds, None)  # the judge will say why
