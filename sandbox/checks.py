"""What a worker needs to know of a check: its code, its imports, and whether it can run apart from its program."""

import ast
import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from sandbox.verdict import COMMON

LONG_LINE = re.compile(r"^([ \t]*)\S.{5000,}$", re.MULTILINE)  # data, whose syntax tree would take a gigabyte
USED = re.compile(r"(?<![\w.])(\w+)\.\w")
MODULES = {name: name for name in COMMON} | {"np": "numpy", "numpy": "numpy"}
# Names of what works on the interpreter that runs the check, and is meant for that of the program.
WORKS_ON_INTERPRETER = {
    "assertLogs", "assertNoLogs", "assertWarns", "assertWarnsRegex", "catch_warnings", "chdir", "environ", "getcontext",
    "globals", "inspect", "localcontext", "patch", "putenv", "redirect_stderr", "redirect_stdout", "set_state",
    "setcontext", "setlocale", "setrecursionlimit", "setstate", "simplefilter", "__globals__",
}  # fmt: skip


class Check(NamedTuple):
    code: Any  # its code, which all programs that it checks share; its text if it does not compile
    imports: list[str]  # at its top level, which its program may use
    modules: dict[str, str]  # that it uses, by what it calls them; they are not the program's, if that imported them
    seeds: list[str]  # modules that it seeds, with effect for its program too
    needs_sharing: str | None  # why it must share an interpreter with its program


@functools.lru_cache(maxsize=256)
def prepare(text: str) -> Check:
    """Compile a check, once for all its programs."""
    modules = {name: MODULES[name] for name in USED.findall(text) if name in MODULES}
    seeds = [name for name in ("random", "numpy.random") if "seed(" in text and name.partition(".")[0] in text]
    try:
        tree = ast.parse(LONG_LINE.sub(r"\1pass", text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = ast.Module([], [])
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = compile(text, "<check>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            code = text  # the judge will say why
    return Check(code, imports, modules, seeds, next(_reasons_to_share(tree), None))


def _reasons_to_share(tree: ast.Module) -> Iterator[str]:
    nodes = [*ast.walk(tree)]
    aliases = [alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    imported = {alias.asname or alias.name.partition(".")[0] for alias in aliases}
    for node in nodes:
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            root = node
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            if isinstance(root, ast.Name) and root.id in imported:
                yield f"the check changes {ast.unparse(node)[:80]}"
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in WORKS_ON_INTERPRETER:
            yield f"the check uses {name}"
        if isinstance(node, (ast.AsyncFor, ast.AsyncWith)) or getattr(node, "is_async", False):
            yield "the check awaits an object of the program"
