"""What a worker needs to know of a check: its code, its imports, and whether it can run apart from its program."""

import ast
import builtins
import functools
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

LONG_LINE = re.compile(r"^([ \t]*)\S.{5000,}$", re.MULTILINE)  # data, whose syntax tree would take a gigabyte
USED = re.compile(r"(?<![\w.])(\w+)\.(\w+)")
ALIASES = {"np": "numpy", "numpy": "numpy"}
# Names of what works on the interpreter that runs the check, and is meant for that of the program.
WORKS_ON_INTERPRETER = {
    "assertLogs", "assertNoLogs", "assertWarns", "assertWarnsRegex", "warns", "catch_warnings", "filterwarnings",
    "resetwarnings", "simplefilter", "addHandler", "redirect_stderr", "redirect_stdout", "patch", "setattr", "globals",
    "inspect", "__globals__", "chdir", "environ", "putenv", "getcontext", "localcontext", "setcontext", "setlocale",
    "seterr", "set_state", "setstate", "setrecursionlimit", "signal", "alarm", "setitimer",
    "Thread", "ThreadPoolExecutor", "Timer",  # which could all ask the program at once
}  # fmt: skip
# Names of what runs code that the program wrote: it would run in the judge.
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "import_module", "runpy", "pickle", "dill", "cloudpickle", "joblib",
    "marshal", "shelve", "yaml", "get_type_hints", "testmod", "testfile", "run_docstring_examples", "DocTestFinder",
}  # fmt: skip
CHANGES = {  # methods that change a container
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "remove",
    "reverse", "setdefault", "sort", "update",
}  # fmt: skip


class Check(NamedTuple):
    code: Any  # its code, which all programs that it checks share; its text if it does not compile
    imports: list[str]  # at its top level, which its program may use
    modules: dict[str, list[str]]  # that it may use without an import, and what of them: the judge's, not the program's
    seeds: list[str]  # modules that it seeds, with effect for its program too
    needs_sharing: str | None  # why it must share an interpreter with its program


@functools.lru_cache(maxsize=256)
def prepare(text: str) -> Check:
    """Compile a check, once for all its programs."""
    modules: dict[str, list[str]] = {}
    for name, attribute in {*USED.findall(text)}:
        if name in ALIASES or name in sys.stdlib_module_names:
            modules.setdefault(name, []).append(attribute)
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
    own = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)} | imported
    own |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}

    def is_of_program(node: ast.AST) -> bool:
        """Whether `node` is an attribute of an object, or a name of the program: the judge has a copy of such."""
        if isinstance(node, ast.Attribute):
            return not (isinstance(node.value, ast.Name) and node.value.id in {*imported, "self"})
        return isinstance(node, ast.Name) and node.id not in own and not hasattr(builtins, node.id)

    for node in nodes:
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            root = node
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            is_module = isinstance(root, ast.Name) and root.id in imported
            if is_module or (isinstance(node, ast.Subscript) and is_of_program(node.value)):
                yield f"the check changes {ast.unparse(node)[:80]}"
        changed = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if isinstance(changed, ast.Attribute) and node.func.attr in CHANGES and is_of_program(changed):
            yield f"the check changes {ast.unparse(changed)[:80]}"
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and is_of_program(b) for b in node.bases):
            yield f"the check derives {node.name} from a class of the program"
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in WORKS_ON_INTERPRETER or name in RUNS_CODE:
            yield f"the check uses {name}"
        if isinstance(node, (ast.AsyncFor, ast.AsyncWith)) or getattr(node, "is_async", False):
            yield "the check awaits an object of the program"
