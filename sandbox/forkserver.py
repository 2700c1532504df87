"""The sandbox's worker: two processes, a judge that runs checks and a fork server that forks the programs they check.

It gets its settings as JSON, and splits in two before it has read any request, so that the memory that a program
inherits from the fork server never held a check. The judge (judge.py) serves one check after the other. The fork server
forks each program, watches it (watch.py), and answers with the result. A fork takes a millisecond where a new
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
import signal
import socket
import struct
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any, ClassVar

from sandbox.channel import read_exactly
from sandbox.confine import Confinement
from sandbox.judge import serve_checks
from sandbox.namespaces import DIRECTORY
from sandbox.runner import run_program
from sandbox.shared import run_shared
from sandbox.verdict import GRACE_S, HEADER, Limits, Result
from sandbox.watch import SET_UP_FAILED, Watch, verdict_of_judge, verdict_of_shared

PROGRAM_FD = 3  # on which a program is asked, or reports if it shares an interpreter with its check


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
        # When a child ends, its SIGCHLD makes `wake_fd` readable, which wakes `Watch`.
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
        watched = output_fd, self.wake_fd
        watch = Watch(self.limits, program, shared, report, watched, self.clock, self.confinement.namespaces)
        try:
            watch.run()
        finally:
            used = self.confinement.end(directory, program)
            os.close(output_fd)
            if shared:
                report.close()
        last, report = False, None
        if shared:
            found = verdict_of_shared(watch.said, watch.status)
        else:
            report = self._rest_of_report(watch.said)
            found = verdict_of_judge(report if watch.is_complete() else None, watch.status)
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


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
