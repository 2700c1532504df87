"""A process that runs programs for the sandbox: it forks itself for each, watches it, and says what became of it.

It is started as a script, never imported, so that what it imports has flat names: a package that held it would lead a
program to it. It gets its settings as JSON, confines itself, and then reads a program a line. A fork takes two
milliseconds where a new interpreter takes twenty, and the modules that programs import are there already.

A program passes if its code and then the check ran to their ends. The child says so with a secret of 32 random bytes
that no name in the process leads to: it is drawn and told to this process before the program starts, then held by the
arguments of a C function alone, and sent again by that function after the last line of the check. Whoever leaves before
has not sent it. The check has names of its own, behind them the builtins as they were, and then the program's names.
"""

import ast
import builtins
import contextlib
import functools
import gc
import importlib
import json
import os
import re
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from confine import Confinement
from verdict import COMMON, FAILED, GRACE_S, KILLED, OUT_OF_MEMORY, PASSED, TIMED_OUT, Limits, Result

REPORT_FD = 3
FILENAME = "<program>"


def _serve(settings: dict[str, Any]) -> None:
    """Run programs from standard input, one JSON line each, until it ends; answer on standard output."""
    sys.path.pop(0)  # the folder of this file is not for programs
    limits = Limits(**settings["limits"])
    confinement = Confinement(settings["directory"], limits.file_bytes, settings["without"])
    sys.modules["ctypes"] = sys.modules["_ctypes"] = None  # what reads memory is not for programs
    for name in settings["preload"]:
        with contextlib.suppress(ImportError):  # a program that imports it will say so
            __import__(name)
    import resource  # noqa: F401 (POSIX only; here once for all children)

    wake, woken = os.pipe()
    for fd in (wake, woken):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    behind = _Behind(builtins.__dict__)
    gc.collect()
    gc.freeze()  # so that a child's collections do not copy what it shares with this process
    _write_line({"missing": confinement.missing})
    inbox: list[bytes] = []
    # The child empties both lists: no name in a frame there leads to the check's text, or to what is behind its names.
    shelf = [behind]
    del behind
    with contextlib.suppress(_ParentHasGone):
        while _read_request(inbox):
            _write_line(asdict(_attend(inbox, shelf, confinement, limits, wake)))
    confinement.leave()  # the parent may have been killed


class _ParentHasGone(Exception):
    pass


def _read_request(inbox: list[bytes]) -> bool:
    inbox.clear()
    while not (inbox and inbox[-1].endswith(b"\n")):
        piece = os.read(0, 2**20)
        if not piece:
            return False
        inbox.append(piece)
    return True


def _write_line(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def _attend(inbox: list[bytes], shelf: list["_Behind"], confinement: Confinement, limits: Limits, wake: int) -> Result:
    """Fork, run the program of `inbox` in the child, watch it, and leave nothing of it."""
    directory = confinement.begin()
    ours, theirs = socket.socketpair()  # unlike a pipe, it cannot be opened for reading through /proc
    if hasattr(socket, "SO_PASSCRED"):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # each message tells which process sent it
    output, output_end = os.pipe()
    t0 = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_program(inbox, shelf, directory, theirs.fileno(), output_end, confinement, limits)
    theirs.close()
    os.close(output_end)
    try:
        said, printed, status = _watch(pid, ours, output, wake, t0 + limits.timeout_s, limits.output_bytes)
    finally:
        cpu_seconds = confinement.end(pid, directory)
        ours.close()
        os.close(output)
    seconds = time.monotonic() - t0
    if status is not None:
        status, cpu_seconds = status
    text = printed.decode("utf-8", "replace")
    return Result(**_verdict(said, status), output=text, seconds=seconds, cpu_seconds=cpu_seconds)


def _watch(
    pid: int, report: socket.socket, output: int, wake: int, deadline: float, output_bytes: int
) -> tuple[bytes, bytes, tuple[int, float] | None]:
    """Read what the program reports and prints until it ends, or passes and had time to end, or its time is up. Returns
    both, and its exit status with its seconds of the processor, None if it was still running."""
    said, printed, status = b"", b"", None
    poll = select.poll()
    for fd in (report.fileno(), output, wake):
        poll.register(fd, select.POLLIN)
    poll.register(0, 0)  # tells when the parent has gone
    while True:
        ended = status is not None
        events = dict(poll.poll(0 if ended else max(0.0, deadline - time.monotonic()) * 1000))
        if 0 in events:
            raise _ParentHasGone
        if wake in events:
            os.read(wake, 4096)
        if report.fileno() in events:
            piece, sender = _receive(report)
            if not piece or len(said) > 2**16:
                poll.unregister(report.fileno())
            if sender in (None, pid):  # a process that the program forked has nothing to say
                said += piece
            if _has_passed(said):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if output in events:
            piece = os.read(output, 2**16)
            if not piece:
                poll.unregister(output)
            printed += piece[: output_bytes - len(printed)]
        if time.monotonic() >= deadline or (ended and not events.keys() & {output, report.fileno()}):
            break
        if not ended:
            found, code, usage = os.wait4(pid, os.WNOHANG)
            if found:
                status = code, usage.ru_utime + usage.ru_stime
                deadline = min(deadline, time.monotonic() + GRACE_S)  # others may hold its output, and write for ever
    return said, printed, status


def _receive(report: socket.socket) -> tuple[bytes, int | None]:
    """What was sent, and by which process, where the system tells."""
    piece, extra, _, _ = report.recvmsg(2**16, socket.CMSG_SPACE(12))
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, getattr(socket, "SCM_CREDENTIALS", None)):
            return piece, struct.unpack("iII", data)[0]
    return piece, None


def _has_passed(said: bytes) -> bool:
    """The secret, and once more."""
    return len(said) >= 64 and said[:32] == said[32:64]


def _verdict(said: bytes, status: int | None) -> dict[str, Any]:
    """Outcome, error, line and message from what the process reported and how it ended."""
    if _has_passed(said):
        return {"outcome": PASSED}
    if len(said) < 32:
        return {"outcome": KILLED, "error": "sandbox", "message": said.decode("utf-8", "replace")}
    if len(said) > 32:
        try:
            report = json.loads(said[32:])
            error = re.sub(r"[^\w.]", "?", str(report["error"])[:80])
            found = {"error": error, "line": report["line"], "message": str(report["message"])[:2000]}
            if found["line"] is None or isinstance(found["line"], int):
                return {"outcome": OUT_OF_MEMORY if found["error"] == "MemoryError" else FAILED, **found}
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        return {"outcome": FAILED, "error": "report", "message": "wrote to the judge's channel"}
    if status is None:
        return {"outcome": TIMED_OUT}
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        return {"outcome": TIMED_OUT if name == "SIGXCPU" else KILLED, "error": name}
    return {"outcome": FAILED, "error": "exit", "message": f"left with status {code} before the end of the check"}


def _be_program(
    inbox: list[bytes],
    shelf: list["_Behind"],
    directory: str,
    report_fd: int,
    output_fd: int,
    confinement: Confinement,
    limits: Limits,
) -> None:
    """In the child: run the program and its check; never returns."""
    # _steps empties this module; what is used after that, kept here
    known = {"os": os, "sys": sys, "json": json, "REPORT_FD": REPORT_FD, "FILENAME": FILENAME}
    report_failure, leave = types.FunctionType(_report_failure.__code__, known), os._exit
    call = functools.partial.__call__
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        report_fd = os.dup(report_fd) if report_fd < REPORT_FD else report_fd
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, place in ((nothing, 0), (output_fd, 1), (output_fd, 2), (report_fd, REPORT_FD)):
            if fd != place:
                os.dup2(fd, place)
        os.closerange(REPORT_FD + 1, 256)  # this process opens few
        os.chdir(directory)
        os.environ |= {"HOME": directory, "TMPDIR": directory, "USER": "program", "LOGNAME": "program"}
        tempfile.tempdir = None
        _limit_resources(limits, confinement.namespaces)
        confinement.enter(directory)
        for fd, name in enumerate(("stdin", "stdout", "stderr")):
            stream = open(fd, "w" if fd else "r", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        sys.argv = [FILENAME]
        sys.addaudithook(_audit)
        # A row of C functions, called by C: neither the secret nor the last of them is in any frame's names.
        sorted(_steps(inbox, shelf), key=call)
    except BaseException as error:
        try:
            report_failure(error)
        finally:
            leave(1)
    finally:
        leave(1)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse to list all objects, to read memory, to listen to the judge: the ways to a secret that has no name."""
    if event.startswith(("gc.get_", "ctypes.")) or event in ("sys.addaudithook", "sys._current_frames"):
        raise ValueError("not for programs that are judged")
    if event == "import" and arguments[0] in ("ctypes", "_ctypes"):
        raise ImportError("not for programs that are judged")  # numpy and others do without


def _steps(inbox: list[bytes], shelf: list["_Behind"]) -> list[Callable[[], object]]:
    """What to call, in order: the program, its check with names of its own, the report that both came to their ends."""
    program, check, entry_point = json.loads(b"".join(inbox))
    inbox.clear()
    secret = os.urandom(32)
    os.write(REPORT_FD, secret)
    code = compile(program + "\n\n", FILENAME, "exec", dont_inherit=True)  # it may end in a backslash
    place = "\n" * (program.count("\n") + (not program.endswith("\n")))
    check_code = compile(place + check, FILENAME, "exec", dont_inherit=True)
    statements, imports = _imports(place + check)
    imports_code = compile(ast.Module(statements, []), FILENAME, "exec", dont_inherit=True)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    names, call = module.__dict__, functools.partial
    behind = shelf.pop()
    behind.names = names
    behind.pop(entry_point, None)
    modules = _modules_named(check, imports)
    steps = [
        call(exec, code, names),
        call(sys.modules.update, modules),
        *(call(module.__dict__.update, dict(module.__dict__)) for module in modules.values()),
        call(exec, imports_code, names),  # as in one text, the program may use what the check imports
        call(exec, check_code, {"__builtins__": behind}),
        call(os.write, REPORT_FD, secret),
        *map(call, (sys.stdout.flush, sys.stderr.flush)),
        call(os._exit, 0),
    ]
    # What is reachable by name as the judge is no more: its module, and those that it imports.
    sys.modules["__main__"] = module
    for name in ("confine", "verdict"):
        sys.modules.pop(name).__dict__.clear()
    globals().clear()
    return steps


class _Behind(dict):
    """What a check finds behind its own names: the builtins as they are now, then the program's names as they will
    be."""

    names: dict[str, Any]

    def __missing__(self, name: str) -> Any:
        return self.names[name]


def _modules_named(check: str, imports: list[ast.stmt]) -> dict[str, types.ModuleType]:
    """The modules that a check may use, as they are now: what it imports, and what of COMMON it names."""
    names = {name for name in COMMON if re.search(rf"\b{name}\b", check)}
    for node in imports:
        for name in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
            with contextlib.suppress(Exception):  # the check itself will fail, and say so
                importlib.import_module(name)
                names |= {name, name.partition(".")[0]}
    return {name: sys.modules[name] for name in names}


def _imports(check: str) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """The imports of a check: those among its statements, and all."""
    if not re.search(r"\bimport\b", check):
        return [], []
    tree = ast.parse(check)
    kinds = (ast.Import, ast.ImportFrom)
    return [n for n in tree.body if isinstance(n, kinds)], [n for n in ast.walk(tree) if isinstance(n, kinds)]


def _limit_resources(limits: Limits, count_processes: bool) -> None:
    import resource  # POSIX only

    cpu_s = int(limits.timeout_s) + 2
    for name, value in {
        "RLIMIT_CPU": cpu_s,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
        # Counts all of a user's threads, but in a namespace of its own; elsewhere a program can start no process.
        **({"RLIMIT_NPROC": limits.processes} if count_processes else {}),
    }.items():
        try:
            hard = resource.getrlimit(getattr(resource, name))[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(getattr(resource, name), (value, value))
        except (OSError, ValueError, AttributeError):
            pass  # macOS has no limit on address space


def _report_failure(error: BaseException) -> None:
    """Tell the exception's type, the line of the program where it came up, and its message."""
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
    report = {"error": type(error).__name__, "line": line, "message": message}
    os.write(REPORT_FD, json.dumps(report).encode())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
