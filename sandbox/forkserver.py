"""The sandbox's worker: two processes, a judge that runs checks and a fork server that forks the programs they check.

It gets its settings as JSON, and splits in two before it has read any request, so that the memory that a program
inherits from the fork server never held a check. The judge (judge.py) serves one check after the other.
The fork server forks each program, watches it, and answers with the result. A fork takes a millisecond where a new
interpreter takes twenty, and the modules that programs import are already there.

What a check says, where it fails, goes from the judge to the parent: programs would find it in the memory of the fork
server, and in it what the check expects. The judge stays outside of the namespaces of processes that programs have
(confine.py), so that none can reach it, and tells the verdict through a socket that no program has. Where a check
needs the program in its own interpreter, the fork server has a child run both (shared.py).
"""

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any, ClassVar

from sandbox.channel import read_exactly, sender_of
from sandbox.confine import Confinement
from sandbox.judge import read_clock, serve_checks
from sandbox.namespaces import DIRECTORY
from sandbox.runner import run_program
from sandbox.shared import SECRET_BYTES, has_passed, run_shared
from sandbox.verdict import FAILED, GRACE_S, HEADER, KILLED, OUT_OF_MEMORY, PASSED, PATIENCE, TIMED_OUT, Limits, Result

PARENT_FD = 0  # the parent writes requests here, and closes it when it ends
PROGRAM_FD = 3  # on which a program is asked, or reports if it shares an interpreter with its check
SET_UP_S = 60.0  # seconds that a program has to read its half of the request
SET_UP_FAILED = 120  # exit status
UNDISTURBED = 0.97  # of the time limit: a program that used as much of a processor in it was not held up by others
DISTURBED = 1.25  # times the limit: what a program may use that was, because it computes more slowly beside others
ASLEEP = 0.05  # of the time: a program that uses less waits for something else than a processor
MAX_REPORT_BYTES = 2**18
CPUCLOCK_SCHED = 2  # of the clock of another process, see clock_getcpuclockid(3)


def _main(settings: dict[str, Any]) -> None:
    sys.path.pop(0)  # programs must not import what is in the project
    os.chdir("/")
    limits = Limits(**settings["limits"])
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:  # as in a fresh process
        ignored = signum in (signal.SIGPIPE, signal.SIGINT, getattr(signal, "SIGXFSZ", None))
        signal.signal(signum, signal.SIG_IGN if ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    control, judge_control = socket.socketpair()
    clock = mmap.mmap(-1, 8)  # shared by both processes: the judge's processor time
    be_judge = functools.partial(_be_judge, judge_control, control, clock)
    try:
        confinement = Confinement(settings["directory"], limits, settings["without"], be_judge)
    except OSError as error:
        print(json.dumps(_cannot_work(error)), flush=True)
        return
    judge_control.close()
    if sys.version_info >= (3, 14):  # its way to start processes needs sockets, and would run this file again
        importlib.import_module("multiprocessing").set_start_method("fork")
    for name in settings["preload"]:
        with contextlib.suppress(ImportError):  # a program that imports it will report the error
            __import__(name)
    _Child.streams = {
        name: open(fd, "w" if fd else "r", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for fd, name in enumerate(("stdin", "stdout", "stderr"))
    }
    _Child.own_modules = [name for name in sys.modules if name.partition(".")[0] == "sandbox"]
    gc.collect()
    gc.freeze()  # so that a child's collections do not copy what it shares with this process
    server = _ForkServer(control, confinement, limits, clock)
    try:
        control.sendall(json.dumps(confinement.layers).encode())
        print(json.dumps({"missing": confinement.missing}), flush=True)
        while not confinement.changed_limits():
            answer = server.serve()
            print(json.dumps(answer), flush=True)
            if answer.get("last"):
                break
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent or the judge has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    finally:
        confinement.leave()  # not the parent's task, because it may have been killed


def _cannot_work(error: OSError) -> dict[str, str]:
    """What the parent is told if programs cannot have folders."""
    return {"cannot_work": f"the sandbox cannot make a folder for programs ({error}); free space, or set TMPDIR"}


def _be_judge(control: socket.socket, other_end: socket.socket, clock: mmap.mmap, confinement: Confinement) -> None:
    """Serve checks until the parent or the fork server has gone, and exit."""
    try:
        signal.signal(signal.SIGCHLD, lambda *_: os._exit(0))  # the fork server has gone, whatever a check does
        other_end.close()
        answers_fd = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        confinement.layers = json.loads(control.recv(2**12))  # now it has made the file system that both see
        confinement.enter(DIRECTORY if confinement.namespaces else confinement.directory, judge=True)
        serve_checks(control, answers_fd, clock, confinement.limits.timeout_s)
        control.close()
        os.wait()  # the fork server removes what is left
    except ValueError:
        pass  # the fork server did not start, and said why
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


class _ForkServer:
    """Runs one program after the other, as the judge asks for it."""

    def __init__(self, control: socket.socket, confinement: Confinement, limits: Limits, clock: mmap.mmap):
        self.control, self.confinement, self.limits, self.clock = control, confinement, limits, clock
        # When a child ends, its SIGCHLD makes `wake_fd` readable, which wakes `_Watch`.
        self.wake_fd, signal_fd = os.pipe()
        for fd in (self.wake_fd, signal_fd):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(signal_fd)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> dict[str, Any]:
        """Run the next program in a forked child, watch it, and remove everything that it leaves. Returns the fields of
        its Result, or only `needs_sharing`; with `last`, if the judge must be replaced, and `words`, if the judge has
        written an answer of its own."""
        message, fds, _, _ = socket.recv_fds(self.control, struct.calcsize(HEADER), 1)
        if len(message) < struct.calcsize(HEADER):
            raise EOFError
        shared, check_size, program_size = struct.unpack(HEADER, message)
        try:
            directory = self.confinement.begin()
        except OSError as error:
            return _cannot_work(error) | {"last": True}
        report, end = self.control, None
        if shared:
            report, end = socket.socketpair()  # unlike a pipe, it cannot be opened for reading through /proc
            if hasattr(socket, "SO_PASSCRED"):
                report.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # each message tells which process sent it
            fds = [end.fileno()]
        output_fd, child_output_fd = os.pipe()
        child = _Child(self.confinement, directory, fds[0], child_output_fd, self.clock)
        program = child.fork(lambda: child.run_shared(check_size, program_size) if shared else child.run(program_size))
        os.close(child_output_fd)
        end.close() if shared else os.close(fds[0])
        fds = output_fd, self.wake_fd
        watch = _Watch(self.limits, program, shared, report, fds, self.clock, self.confinement.namespaces)
        try:
            watch.run()
        finally:
            used = self.confinement.end(directory, program)
            os.close(output_fd)
            if shared:
                report.close()
        last, report = False, None
        if shared:
            found = _verdict_of_shared(watch.said, watch.status)
        else:
            report = self._rest_of_report(watch.said)
            found = _verdict(report if watch.is_complete() else None, watch.status)
            last = report is None or report["last"]
        last = last or not watch.started  # it may have died before it had read its half of the request
        with contextlib.suppress(OSError):
            self.control.sendall(b".")  # the judge may read the next request
        words = {"words": True} if report and "words" in report else {}
        if "needs_sharing" in found:
            return {"needs_sharing": True, "last": last, **words}
        cpu_seconds = watch.cpu_seconds if watch.cpu_seconds is not None else used.get(program, 0.0)
        text = watch.printed.decode("utf-8", "replace")
        shared = shared or bool(report and report.get("shared"))
        result = Result(**found, output=text, seconds=watch.seconds, cpu_seconds=cpu_seconds, shared=shared)
        return asdict(result) | {"last": last} | words

    def _rest_of_report(self, said: bytes) -> dict[str, Any] | None:
        """Wait for the judge's verdict, which it tells at the latest when it notices that the program has ended. None
        if it does not."""
        self.control.settimeout(GRACE_S)
        with contextlib.suppress(OSError):
            while not said.endswith(b"\n") and (piece := self.control.recv(2**16)):
                said += piece
        self.control.settimeout(None)
        with contextlib.suppress(ValueError):
            return json.loads(said.removeprefix(b".")) if said.endswith(b"\n") else None
        return None


class _Child:
    """What runs in the child of one request."""

    # Made once, in the fork server: what a child does not touch it need not copy.
    streams: ClassVar[dict[str, IO[str]]] = {}
    own_modules: ClassVar[list[str]] = []

    def __init__(self, confinement: Confinement, directory: str, channel_fd: int, output_fd: int, clock: mmap.mmap):
        self.confinement, self.directory, self.clock = confinement, directory, clock
        self.channel_fd, self.output_fd = channel_fd, output_fd

    def fork(self, action: Callable[[], None]) -> int:
        """Returns the id of a child that does `action` and exits."""
        pid = os.fork()
        if pid:
            return pid
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(SET_UP_FAILED)

    def run(self, size: int) -> None:
        payload = read_exactly(size)
        self.set_up()
        run_program(socket.socket(fileno=PROGRAM_FD), payload, self.directory)

    def run_shared(self, check_size: int, program_size: int) -> None:
        request = [read_exactly(check_size), read_exactly(program_size)]
        own = [vars(sys.modules["__main__"]), *map(vars, self.set_up())]
        run_shared(PROGRAM_FD, request, own)

    def set_up(self) -> list[types.ModuleType]:
        """Give this process its own signals, descriptors, environment and streams, and confine it to its directory.
        Returns the sandbox's modules, which cannot be imported any more."""
        self.clock.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        os.umask(0o022)
        nothing = os.open(os.devnull, os.O_RDONLY)
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (nothing, self.output_fd, self.output_fd, self.channel_fd)]
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        os.closerange(PROGRAM_FD + 1, max(fds) + 1)
        os.chdir(self.directory)
        os.environ |= {"HOME": self.directory, "TMPDIR": self.directory, "USER": "program", "LOGNAME": "program"}
        tempfile.tempdir = None
        self.confinement.enter(self.directory)
        for name, stream in self.streams.items():
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        sys.argv = ["<program>"]
        return [sys.modules.pop(name) for name in self.own_modules]


class _Watch:
    """Watches a program and what is reported on it: by the judge, or by itself if it runs its check too."""

    def __init__(
        self,
        limits: Limits,
        program: int,
        shared: bool,
        report: socket.socket,
        fds: tuple[int, int],
        clock: mmap.mmap,
        many: bool,
    ):
        """`fds`: the program's output, and what a signal makes readable. `many`: whether it may start processes."""
        self.limits, self.program, self.shared, self.report = limits, program, shared, report
        (self.output_fd, self.wake_fd), self.many = fds, many
        self.clock, self.judge_before = clock, read_clock(clock)
        self.said, self.printed = b"", b""
        self.status: int | None = None  # the program's exit status
        self.cpu_seconds: float | None = None  # of the program, once it has ended
        self.seconds = 0.0  # since the program started

    def run(self) -> None:
        """Watch until the report is complete or the time is over. Raises EOFError if parent or judge have gone."""
        poll = select.poll()
        for fd in (self.report.fileno(), self.output_fd, self.wake_fd):
            poll.register(fd, select.POLLIN)
        poll.register(PARENT_FD, 0)  # reports only that the parent has gone
        limit = self.limits.timeout_s
        began, started, over = time.monotonic(), None, False
        deadline, looked_at, used = began + SET_UP_S, 0.0, 0.0
        while True:
            wait_s = 0.0 if over and not self._lacks_status() else max(0.0, deadline - time.monotonic())
            events = dict(poll.poll(wait_s * 1000))
            now = time.monotonic()
            self.seconds = now - (started or began)
            if PARENT_FD in events:
                raise EOFError
            if self.wake_fd in events:
                os.read(self.wake_fd, 4096)
            if self.output_fd in events and not self._read_output():
                poll.unregister(self.output_fd)
            if self.report.fileno() in events and not self._read_report():
                poll.unregister(self.report.fileno())
            if self.status is None:
                ended, status, usage = os.wait4(self.program, os.WNOHANG)
                if ended:
                    self.status, self.cpu_seconds = status, usage.ru_utime + usage.ru_stime
            silent = not events.keys() & {self.output_fd, self.report.fileno()}
            if over:
                if now >= deadline or (silent and not self._lacks_status()):
                    return
            elif self.is_complete() or (self.shared and self.status is not None and silent):
                over, deadline = True, now + GRACE_S  # not for ever: other processes may hold its output and write
            elif started is None and self.said:
                started, looked_at, deadline = now, now, now + limit
            elif now >= deadline and started is None:
                return
            elif now >= deadline:
                before, used = used, self._processor_seconds()
                asleep = used - before < ASLEEP * (now - looked_at)
                share = UNDISTURBED if now - started < 1.1 * limit else DISTURBED
                had_its_share = used >= share * limit
                if asleep or had_its_share or self.seconds >= PATIENCE * limit:
                    return
                looked_at, deadline = now, now + limit / 4  # others took its processor

    def _read_output(self) -> bool:
        piece = os.read(self.output_fd, 2**16)
        self.printed += piece[: self.limits.output_bytes - len(self.printed)]
        return bool(piece)

    def _read_report(self) -> bool:
        piece, extra, _, _ = self.report.recvmsg(2**16, socket.CMSG_SPACE(12))
        if not piece and not self.shared:
            raise EOFError
        if sender_of(extra) in (None, self.program):  # not from a process that the program forked
            self.said += piece
        return bool(piece) and len(self.said) < MAX_REPORT_BYTES

    @property
    def started(self) -> bool:
        """Whether the program said that it has read its half of the request."""
        return len(self.said) >= SECRET_BYTES if self.shared else self.said.startswith(b".")

    def is_complete(self) -> bool:
        return has_passed(self.said) if self.shared else self.said.endswith(b"\n")

    def _lacks_status(self) -> bool:
        """Whether the program has not ended, and the verdict depends on how it does, or it has output to write."""
        return self.status is None and (self.shared or b'{"fault"' in self.said[:16])

    def _processor_seconds(self) -> float:
        """What the judge and the program's processes that still run have used so far, as far as the system tells."""
        total = read_clock(self.clock) - self.judge_before
        for pid in range(self.program, self.program + (500 if self.many else 1)):  # in a namespace, its children follow
            with contextlib.suppress(OSError, OverflowError):
                total += time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)
        return total


def _verdict(report: dict[str, Any] | None, status: int | None) -> dict[str, Any]:
    """Returns outcome, error, line and message, from what the judge reported, None if nothing, and the program's exit
    status, None if it was still running."""
    if report is None:
        return _ended(status)
    if report.get("passed"):
        return {"outcome": PASSED}
    if "needs_sharing" in report:
        return report
    if "error" in report:
        return _failed(report)
    if report["fault"] == "left":
        return _ended(status)
    return {"outcome": FAILED, "error": "report", "message": f"to its judge it {report['fault']}"}


def _verdict_of_shared(said: bytes, status: int | None) -> dict[str, Any]:
    """The same, from what a program said that shares its interpreter with its check."""
    if has_passed(said):
        return {"outcome": PASSED}
    if len(said) <= SECRET_BYTES:
        return _ended(status)
    try:
        report = json.loads(said[SECRET_BYTES:])
        if report["line"] is None or isinstance(report["line"], int):
            return _failed(report)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return {"outcome": FAILED, "error": "report", "message": "wrote to the judge's channel"}


def _failed(report: dict[str, Any]) -> dict[str, Any]:
    error = re.sub(r"[^\w.]", "?", str(report["error"])[:80])
    outcome = OUT_OF_MEMORY if error == "MemoryError" else FAILED
    return {
        "outcome": outcome,
        "error": error,
        "line": report["line"],
        "message": str(report.get("message", ""))[:2000],
    }


def _ended(status: int | None) -> dict[str, Any]:
    """The verdict on a program that came to no end of its check: by its exit status, None if it was still running."""
    if status is None:
        return {"outcome": TIMED_OUT}
    code = os.waitstatus_to_exitcode(status)
    if code == SET_UP_FAILED:
        return {"outcome": KILLED, "error": "sandbox", "message": "it could not be started"}
    if code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        return {"outcome": TIMED_OUT if name == "SIGXCPU" else KILLED, "error": name}
    return {"outcome": FAILED, "error": "exit", "message": f"left with status {code} before the end of the check"}


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
