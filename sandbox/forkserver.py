"""The sandbox's fork server: a process that forks itself for each program, watches it, and answers with its result.

It is started as a script and never imported, and what it imports has flat names: a package would lead a program to the
judge. It gets its settings as JSON, confines itself, and then reads one program per line. A fork takes two milliseconds
where a new interpreter takes twenty, and the modules that programs import are already there.

A program passes if its code and then the check ran to their ends. The child proves it with a secret of random bytes: it
sends them before the program starts, and again after the last line of the check. In between only the arguments of a C
function hold the secret, and no name in the process leads there. A program that leaves early has not sent it again.
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
import resource
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

PARENT_FD = 0  # the parent writes requests here, and closes it when it ends
REPORT_FD = 3  # the child's end of the socket on which it reports
SECRET_BYTES = 32
FILENAME = "<program>"


def _serve(settings: dict[str, Any]) -> None:
    """Run the programs that standard input holds, one JSON line each, until it ends; answer on standard output."""
    sys.path.pop(0)  # programs must not import from the folder of this file
    limits = Limits(**settings["limits"])
    confinement = Confinement(settings["directory"], limits.file_bytes, settings["without"])
    sys.modules["ctypes"] = sys.modules["_ctypes"] = None  # programs must not read memory
    for name in settings["preload"]:
        with contextlib.suppress(ImportError):  # a program that imports it will report the error
            __import__(name)
    # When a child ends, its SIGCHLD makes `wake_fd` readable, which wakes `_watch`.
    wake_fd, signal_fd = os.pipe()
    for fd in (wake_fd, signal_fd):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(signal_fd)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The child takes the builtins of its check, and the request, out of these lists and leaves them empty. So no name
    # in this process's frames, which the child inherits, leads a program to them.
    builtins_box = [_CheckBuiltins(builtins.__dict__)]
    request: list[bytes] = []
    gc.collect()
    gc.freeze()  # so that a child's collections do not copy what it shares with this process
    print(json.dumps({"missing": confinement.missing}), flush=True)
    with contextlib.suppress(EOFError):  # the parent has gone
        while True:
            _read_request(request)
            # No name for the result: the next program could read it in this frame.
            print(json.dumps(asdict(_run_request(request, builtins_box, confinement, limits, wake_fd))), flush=True)
    confinement.leave()  # not the parent's task, because it may have been killed


def _read_request(request: list[bytes]) -> None:
    """Replace the contents of `request` by the pieces of the next line. Raises EOFError if there is none."""
    request.clear()
    while not (request and request[-1].endswith(b"\n")):
        piece = os.read(PARENT_FD, 2**20)
        if not piece:
            raise EOFError
        request.append(piece)


def _run_request(
    request: list[bytes], builtins_box: list["_CheckBuiltins"], confinement: Confinement, limits: Limits, wake_fd: int
) -> Result:
    """Run the requested program in a forked child, watch it, and remove everything that it leaves."""
    directory = confinement.begin()
    ours, theirs = socket.socketpair()  # unlike a pipe, it cannot be opened for reading through /proc
    if hasattr(socket, "SO_PASSCRED"):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # each message tells which process sent it
    output_fd, child_output_fd = os.pipe()
    t0 = time.monotonic()
    pid = os.fork()
    if pid == 0:
        descriptors = theirs.fileno(), child_output_fd
        _run_in_child(request, builtins_box, lambda: _set_up_child(directory, *descriptors, confinement, limits))
    theirs.close()
    os.close(child_output_fd)
    try:
        said, printed, end = _watch(pid, ours, output_fd, wake_fd, t0 + limits.timeout_s, limits.output_bytes)
    finally:
        cpu_seconds = confinement.end(pid, directory)
        ours.close()
        os.close(output_fd)
    seconds = time.monotonic() - t0
    status, cpu_seconds = end or (None, cpu_seconds)
    text = printed.decode("utf-8", "replace")
    return Result(**_verdict(said, status), output=text, seconds=seconds, cpu_seconds=cpu_seconds)


def _watch(
    pid: int, report: socket.socket, output_fd: int, wake_fd: int, deadline: float, output_bytes: int
) -> tuple[bytes, bytes, tuple[int, float] | None]:
    """Read what a program reports and prints, until it has ended and nothing is left to read, or until `deadline`.

    Once it has passed or ended, GRACE_S is the longest wait: other processes may hold its output and write for ever.
    Returns what it reported, what it printed, and its exit status and CPU seconds (None if it was still running).
    Raises EOFError if the parent has gone.
    """
    said, printed, end = b"", b"", None
    poll = select.poll()
    for fd in (report.fileno(), output_fd, wake_fd):
        poll.register(fd, select.POLLIN)
    poll.register(PARENT_FD, 0)  # reports only that the parent has gone
    while True:
        wait_s = 0.0 if end else max(0.0, deadline - time.monotonic())
        events = dict(poll.poll(wait_s * 1000))
        if PARENT_FD in events:
            raise EOFError
        if wake_fd in events:
            os.read(wake_fd, 4096)
        if report.fileno() in events:
            piece, sender = _receive(report)
            if not piece or len(said) > 2**16:
                poll.unregister(report.fileno())
            if sender in (None, pid):  # not from a process that the program forked
                said += piece
        if output_fd in events:
            piece = os.read(output_fd, 2**16)
            if not piece:
                poll.unregister(output_fd)
            printed += piece[: output_bytes - len(printed)]
        all_read = not events.keys() & {output_fd, report.fileno()}
        if time.monotonic() >= deadline or (end and all_read):
            return said, printed, end
        if not end:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            end = (status, usage.ru_utime + usage.ru_stime) if ended else None
        if end or _has_passed(said):
            deadline = min(deadline, time.monotonic() + GRACE_S)  # the first time, because later sums are larger


def _receive(report: socket.socket) -> tuple[bytes, int | None]:
    """Returns a message and the process that sent it; None for that where the system does not tell."""
    piece, extra, _, _ = report.recvmsg(2**16, socket.CMSG_SPACE(12))
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, getattr(socket, "SCM_CREDENTIALS", None)):
            return piece, struct.unpack("iII", data)[0]
    return piece, None


def _has_passed(said: bytes) -> bool:
    """Checks that the secret came twice."""
    return len(said) >= 2 * SECRET_BYTES and said[:SECRET_BYTES] == said[SECRET_BYTES : 2 * SECRET_BYTES]


def _verdict(said: bytes, status: int | None) -> dict[str, Any]:
    """Returns outcome, error, line and message. `said` is the secret, then the secret again or an exception as JSON;
    `status` is the exit status, None if the program was still running."""
    if _has_passed(said):
        return {"outcome": PASSED}
    if len(said) < SECRET_BYTES:
        return {"outcome": KILLED, "error": "sandbox", "message": said.decode("utf-8", "replace")}
    if len(said) > SECRET_BYTES:
        try:
            report = json.loads(said[SECRET_BYTES:])
            error = re.sub(r"[^\w.]", "?", str(report["error"])[:80])
            found = {"error": error, "line": report["line"], "message": str(report["message"])[:2000]}
            if found["line"] is None or isinstance(found["line"], int):
                return {"outcome": OUT_OF_MEMORY if error == "MemoryError" else FAILED, **found}
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


def _run_in_child(request: list[bytes], builtins_box: list["_CheckBuiltins"], set_up: Callable[[], None]) -> None:
    """In the child: set up this process, run the program and its check; never returns."""
    # _program_calls empties this module, so what is needed after that is kept in local variables.
    survivors = {"os": os, "sys": sys, "json": json, "REPORT_FD": REPORT_FD, "FILENAME": FILENAME}
    report_failure, leave = types.FunctionType(_report_failure.__code__, survivors), os._exit
    make_call = functools.partial.__call__
    try:
        set_up()
        # Make the calls in order: `sorted` calls its key function on one item after the other. A loop would hold them
        # in local variables, with the secret among their arguments, and a program can read those of every frame on the
        # stack. `sorted` is C code and has no frame.
        sorted(_program_calls(request, builtins_box), key=make_call)
    except BaseException as error:
        try:
            report_failure(error)
        finally:
            leave(1)
    finally:
        leave(1)


def _set_up_child(directory: str, report_fd: int, output_fd: int, confinement: Confinement, limits: Limits) -> None:
    """Give this process its own signals, descriptors, environment and streams, and confine it to `directory`."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    report_fd = os.dup(report_fd) if report_fd < REPORT_FD else report_fd
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((nothing, 0), (output_fd, 1), (output_fd, 2), (report_fd, REPORT_FD)):
        if fd != target:
            os.dup2(fd, target)
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


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse to list all objects, to read memory and to listen to the judge: ways to a secret that has no name."""
    if event.startswith(("gc.get_", "ctypes.")) or event in ("sys.addaudithook", "sys._current_frames"):
        raise ValueError("not for programs that are judged")
    if event == "import" and arguments[0] in ("ctypes", "_ctypes"):
        raise ImportError("not for programs that are judged")  # numpy and others do without


def _program_calls(request: list[bytes], builtins_box: list["_CheckBuiltins"]) -> list[Callable[[], object]]:
    """Returns the calls to make, in order: the program, then its check, then the report that both came to their ends.

    Sends the secret for the first time. Empties both arguments, this module, and those that it imported as the judge:
    afterwards no name leads a program to any of them.
    """
    program, check, entry_point = json.loads(b"".join(request))
    request.clear()
    secret = os.urandom(SECRET_BYTES)
    os.write(REPORT_FD, secret)
    program_code = compile(program + "\n\n", FILENAME, "exec", dont_inherit=True)  # it may end in a backslash
    n_lines = program.count("\n") + (not program.endswith("\n"))
    check = "\n" * n_lines + check  # its lines are numbered after the program's
    check_code = compile(check, FILENAME, "exec", dont_inherit=True)
    statements, imports = _imports(check)
    imports_code = compile(ast.Module(statements, []), FILENAME, "exec", dont_inherit=True)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    names = module.__dict__
    check_builtins = builtins_box.pop()
    check_builtins.program_names = names
    check_builtins.pop(entry_point, None)
    modules = _modules_named(check, imports)
    call = functools.partial
    calls = [
        call(exec, program_code, names),
        # Undo what the program did to modules that the check uses.
        call(sys.modules.update, modules),
        *(call(module.__dict__.update, dict(module.__dict__)) for module in modules.values()),
        call(exec, imports_code, names),  # as in one text, the program may use what the check imports
        call(exec, check_code, {"__builtins__": check_builtins}),
        call(os.write, REPORT_FD, secret),
        call(sys.stdout.flush),
        call(sys.stderr.flush),
        call(os._exit, 0),
    ]
    sys.modules["__main__"] = module
    for name in ("confine", "verdict"):
        sys.modules.pop(name).__dict__.clear()
    globals().clear()
    return calls


class _CheckBuiltins(dict):
    """The `__builtins__` of a check, where Python looks up a name that is not the check's own: first among the builtins
    as they were before the program started, then among the program's names as they are at that moment."""

    program_names: dict[str, Any]

    def __missing__(self, name: str) -> Any:
        return self.program_names[name]


def _modules_named(check: str, imports: list[ast.stmt]) -> dict[str, types.ModuleType]:
    """Import and return the modules that a check may use: what it imports, and those of COMMON that it names."""
    names = {name for name in COMMON if re.search(rf"\b{name}\b", check)}
    for node in imports:
        for name in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
            with contextlib.suppress(Exception):  # the check itself will fail, and report the error
                importlib.import_module(name)
                names |= {name, name.partition(".")[0]}
    return {name: sys.modules[name] for name in names}


def _imports(check: str) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Returns the imports of a check: first those at its top level, then all of them."""
    if not re.search(r"\bimport\b", check):
        return [], []
    tree = ast.parse(check)
    kinds = (ast.Import, ast.ImportFrom)
    return [n for n in tree.body if isinstance(n, kinds)], [n for n in ast.walk(tree) if isinstance(n, kinds)]


def _limit_resources(limits: Limits, count_processes: bool) -> None:
    """Set this process's limits. That of processes only if asked: outside namespaces it counts all of the user's."""
    values = {"RLIMIT_CPU": int(limits.timeout_s) + 2, "RLIMIT_AS": limits.memory_bytes, "RLIMIT_CORE": 0}
    values |= {"RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_NOFILE": limits.open_files}
    if count_processes:
        values["RLIMIT_NPROC"] = limits.processes
    for name, value in values.items():
        try:
            hard = resource.getrlimit(getattr(resource, name))[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(getattr(resource, name), (value, value))
        except (OSError, ValueError, AttributeError):
            pass  # macOS has no limit on address space


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
    report = {"error": type(error).__name__, "line": line, "message": message}
    os.write(REPORT_FD, json.dumps(report).encode())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
