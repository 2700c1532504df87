"""Runs a program and its check in one interpreter, where the check does what cannot cross to another process.

What says "passed" is 32 random bytes, sent before the program starts and again after the last line of the check. In
between an audit hook holds them, to which no name leads. It sends them only if it is called with the token, from the
frame and in the process that this module had at first, and if the descriptor still is that of the fork server.

What is left: a program can reach its check through a traceback, change what the check uses while it runs, from a thread
or from `__eq__`, and read memory through extension modules such as numpy. So a result says that it was shared.
"""

import ast
import builtins
import contextlib
import functools
import importlib
import json
import marshal
import os
import re
import sys
import types
from collections.abc import Callable
from typing import Any

from sandbox.verdict import COMMON

FILENAME = "<program>"
SECRET_BYTES = 32
STATELESS = {*COMMON, "numpy", "json", "decimal", "fractions", "statistics", "unittest"}
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class whose attributes can be set
REFUSED = frozenset((
    "sys.addaudithook", "sys._current_frames", "sys._current_exceptions", "sys.settrace", "sys.setprofile",
    "code.__new__", "gc.get_objects", "gc.get_referrers", "gc.get_referents",
))  # fmt: skip


def run_shared(report_fd: int, request: list[bytes], own: list[dict[str, Any]]) -> None:
    """Run both and exit; report on a socket: the secret, then the secret again, or an exception as JSON. `request`:
    what judge.serve_checks reads, with the check as text, and the payload of runner.run_program. `own`: the names of
    the sandbox's modules, which are emptied."""
    # The program may change every module and builtin, so what is needed after it is kept in local variables.
    survivors = {"os": os, "sys": sys, "json": json, "FILENAME": FILENAME, "fd": report_fd}
    survivors["__builtins__"] = dict(builtins.__dict__)
    report_failure = types.FunctionType(_report_failure.__code__, survivors)
    make_call, leave = functools.partial.__call__, os._exit
    try:
        # Make the calls in order: `sorted` calls its key function on one item after the other. A loop would hold them
        # in local variables, and a program can read those of every frame on the stack. `sorted` is C and has no frame.
        sorted(_calls(request, report_fd, own, sys._getframe()), key=make_call)
    except BaseException as error:
        report_failure(error)
    finally:
        leave(1)


def has_passed(said: bytes) -> bool:
    """Checks that the secret came twice."""
    return len(said) >= 2 * SECRET_BYTES and said[:SECRET_BYTES] == said[SECRET_BYTES : 2 * SECRET_BYTES]


def _calls(
    request: list[bytes], report_fd: int, own: list[dict[str, Any]], frame: types.FrameType
) -> list[Callable[[], object]]:
    """Returns the calls to make, in order. Empties `request` and `own`: no name leads to the calls or to ctypes."""
    check, entry_point, n_lines, *_ = marshal.loads(request.pop(0))
    program, imports = marshal.loads(request.pop(0))
    secret, token = os.urandom(SECRET_BYTES), os.urandom(SECRET_BYTES).hex()
    os.write(report_fd, secret)
    program_code = compile(program + "\n\n", FILENAME, "exec", dont_inherit=True)
    check_code = compile("\n" * n_lines + check, FILENAME, "exec", dont_inherit=True)
    imports_code = compile("".join(f"try: {line}\nexcept Exception: pass\n" for line in imports), "<imports>", "exec")
    module = types.ModuleType("program")
    names = module.__dict__
    names_of_check = _CheckBuiltins(builtins.__dict__)
    names_of_check.program_names = names
    names_of_check.pop(entry_point, None)
    put_back = _put_back(_modules_named(check))
    sys.modules["program"] = sys.modules["__main__"] = module
    sys.modules["ctypes"] = sys.modules["_ctypes"] = None  # it reads and writes memory
    hooks = _hooks(token, secret, report_fd, frame)
    call = functools.partial
    calls = [
        call(exec, program_code, names),
        call(exec, imports_code, names),  # as in one text, the program may use what the check imports
        call(put_back),
        call(exec, check_code, {"__builtins__": names_of_check}),
        call(sys.audit, token),
        call(sys.stdout.flush),
        call(sys.stderr.flush),
        call(os._exit, 0),
    ]
    for hook in hooks:
        sys.addaudithook(hook)
    for contents in own:
        contents.clear()
    return calls


class _CheckBuiltins(dict):
    """The `__builtins__` of a check, where Python looks up a name that is not the check's own: first among the builtins
    as they were before the program started, then among the program's names as they are at that moment."""

    program_names: dict[str, Any]

    def __missing__(self, name: str) -> Any:
        return self.program_names[name]


def _hooks(token: str, secret: bytes, report_fd: int, frame: types.FrameType) -> list[Callable[[str, tuple], None]]:
    """Audit hooks: one refuses ways to a value that has no name; one sends the secret. They are two because a program
    can read the variables of a hook that raises."""
    pid, getpid, getframe, write, fstat = os.getpid(), os.getpid, sys._getframe, os.write, os.fstat
    channel = fstat(report_fd).st_ino
    refused = REFUSED

    def refuse(event: str, arguments: tuple) -> None:
        is_code = event == "object.__setattr__" and arguments[1] == "__code__"
        if is_code or event in refused or event.startswith("ctypes."):
            raise ValueError("not for programs that share the judge's interpreter")
        if event == "import" and arguments[0] in ("ctypes", "_ctypes"):
            raise ImportError("not for programs that share the judge's interpreter")  # numpy and others do without

    def finish(event: str, arguments: tuple) -> None:
        if event == token and getframe(1) is frame and getpid() == pid and fstat(report_fd).st_ino == channel:
            write(report_fd, secret)

    return [finish, refuse]  # the latter refuses further hooks


def _put_back(modules: list[types.ModuleType]) -> Callable[[], None]:
    """Returns a function that gives modules the contents that they have now; so it does with their classes, and with
    the lists, sets and dicts of those that keep no state of the program (re's cache, copy's table). The function uses
    only what it holds itself."""
    module_type, kind_of, set_attribute, delete_attribute = types.ModuleType, type, type.__setattr__, type.__delattr__
    loaded, classes, containers = [], [], [(builtins.__dict__, builtins.__dict__.copy())]
    for module in modules:
        loaded.append((module.__name__, module, module.__dict__, module.__dict__.copy()))
        for value in [value for name, value in module.__dict__.items() if name != "__builtins__"]:
            if type(value) in (dict, set, list) and module.__name__.partition(".")[0] in STATELESS:
                containers.append((value, value.copy()))
            elif isinstance(value, type) and value.__module__ == module.__name__ and value.__flags__ & HEAP_TYPE:
                classes.append((value, dict(value.__dict__)))
    all_modules = sys.modules

    def put_back() -> None:
        for name, module, names, copy in loaded:
            all_modules[name] = module
            for added in [added for added in names if added not in copy and kind_of(names[added]) is not module_type]:
                del names[added]
            names.update(copy)
        for value, names in classes:
            present = kind_of.__dict__["__dict__"].__get__(value)
            for added in [added for added in present if added not in names]:
                delete_attribute(value, added)
            for name, attribute in names.items():
                if present.get(name) is not attribute:
                    set_attribute(value, name, attribute)
        for value, copy in containers:
            if kind_of(value) is kind_of([]):
                value[:] = copy
            else:
                for added in [added for added in value if added not in copy]:
                    value.pop(added) if kind_of(value) is kind_of({}) else value.remove(added)
                value.update(copy)

    return put_back


def _modules_named(check: str) -> list[types.ModuleType]:
    """Import and return the modules that a check may use: what it imports, and those of COMMON that it names."""
    names = {name for name in COMMON if re.search(rf"\b{name}\b", check)}
    for node in ast.walk(ast.parse(check)) if "import" in check else ():
        for name in _imported(node):
            with contextlib.suppress(Exception):  # the check itself will fail, and report the error
                importlib.import_module(name)
                names |= {name, name.partition(".")[0]}
    packages = tuple(f"{name}." for name in names)
    return [m for name, m in [*sys.modules.items()] if m is not None and (name in names or name.startswith(packages))]


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def _report_failure(error: BaseException) -> None:
    """Send the exception's type, its message, and the innermost line of the program or check that it passed."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILENAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        message = str(error)[:2000]
    except Exception:
        message = ""
    report = {"error": type(error).__name__[:80], "line": line, "message": message}
    os.write(fd, json.dumps(report).encode() + b"\n")  # noqa: F821
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
