"""The verdicts of the fork server, what its watch waits for, and what a program finds that it has forked."""

import json
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sandbox.forkserver import SET_UP_FAILED, _ended, _verdict, _verdict_of_shared, _Watch
from sandbox.pool import Sandbox
from sandbox.verdict import Limits

SECRET = b"s" * 32
ERROR = {"error": "KeyError", "line": 3, "message": "'x'"}


def status(code: int = 0, signum: int = 0) -> int:
    return code << 8 | signum


def found(verdict: dict[str, Any]) -> tuple[str, str | None]:
    json.dumps(verdict)
    return verdict["outcome"], verdict.get("error")


@pytest.mark.parametrize(
    ("report", "ended", "expected"),
    [
        ({"passed": True}, None, ("passed", None)),
        ({"passed": True}, status(7), ("passed", None)),  # after its last answer it may do what it likes
        (ERROR, status(signum=9), ("failed", "KeyError")),
        ({**ERROR, "error": "MemoryError"}, None, ("out of memory", "MemoryError")),
        ({**ERROR, "error": "worker\n" + "E" * 10**7}, None, ("failed", "worker?" + "E" * 73)),
        ({"fault": "left"}, status(7), ("failed", "exit")),
        ({"fault": "left"}, status(), ("failed", "exit")),
        ({"fault": "left"}, status(signum=signal.SIGSEGV), ("killed", "SIGSEGV")),
        ({"fault": "left"}, None, ("timed out", None)),  # it closed the channel, and runs on
        ({"fault": "sent what is no message"}, status(), ("failed", "report")),
        (None, None, ("timed out", None)),
        (None, status(), ("failed", "exit")),
        (None, status(SET_UP_FAILED), ("killed", "sandbox")),
    ],
)
def test_the_verdict_follows_from_what_the_judge_reports_and_how_the_program_ended(report, ended, expected):
    assert found(_verdict(report, ended)) == expected


def test_that_a_check_needs_sharing_is_passed_on():
    assert _verdict({"needs_sharing": "why", "last": False}, status(7))["needs_sharing"] == "why"


@pytest.mark.parametrize(
    ("said", "ended", "expected"),
    [
        (SECRET + SECRET, status(), ("passed", None)),
        (SECRET + SECRET + b"more", None, ("passed", None)),
        (SECRET + b"t" * 32, status(), ("failed", "report")),
        (SECRET + SECRET[:-1], status(), ("failed", "report")),
        (SECRET, status(), ("failed", "exit")),
        (SECRET, None, ("timed out", None)),
        (b"", status(SET_UP_FAILED), ("killed", "sandbox")),
        (SECRET + json.dumps(ERROR).encode(), status(1), ("failed", "KeyError")),
        (SECRET + json.dumps({**ERROR, "error": "MemoryError"}).encode(), None, ("out of memory", "MemoryError")),
        (SECRET + json.dumps({**ERROR, "line": "x"}).encode(), status(1), ("failed", "report")),
        (SECRET + b"[1]", status(1), ("failed", "report")),
        (SECRET + b"[" * 10**5, status(1), ("failed", "report")),
        (SECRET + b'{"passed": true}', status(), ("failed", "report")),
        (SECRET + b'{"error": {}, "line": null, "message": {}}', status(), ("failed", "??")),
    ],
)
def test_the_verdict_on_a_program_with_its_check_takes_its_secret_and_nothing_else(said, ended, expected):
    assert found(_verdict_of_shared(said, ended)) == expected


def test_how_a_program_ended_is_told():
    assert found(_ended(status(signum=signal.SIGKILL))) == ("killed", "SIGKILL")
    assert found(_ended(status(signum=signal.SIGXCPU))) == ("timed out", "SIGXCPU")
    assert found(_ended(status(signum=40))) in [("killed", "signal 40"), ("killed", "SIGRTMIN+6")]
    assert _ended(status(7))["message"] == "left with status 7 before the end of the check"


@pytest.fixture
def watch(monkeypatch) -> Iterator[Callable[..., _Watch]]:
    """A function that forks a program, which gets the socket for reports and the pipe for output, and watches it."""
    parent, parent_end = os.pipe()
    wake, signal_fd = os.pipe()
    for fd in (wake, signal_fd):
        os.set_blocking(fd, False)
    monkeypatch.setattr("sandbox.forkserver.PARENT_FD", parent)
    before = signal.signal(signal.SIGCHLD, lambda *_: None), signal.set_wakeup_fd(signal_fd)
    started: list[tuple[_Watch, socket.socket]] = []

    def watch(program: Callable[[socket.socket, int], object], shared: bool = False) -> _Watch:
        report, end = socket.socketpair()
        report.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        output, child_output = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(parent_end)
                report.close()
                os.close(output)
                program(end, child_output)
            finally:
                os._exit(0)
        os.close(child_output)
        if shared:  # the program alone has it, where otherwise the judge has
            end.close()
        watched = _Watch(Limits(timeout_s=0.5), pid, shared, report, (output, wake), mmap.mmap(-1, 8), False)
        started.append((watched, end))
        watched.run()
        return watched

    yield watch
    signal.set_wakeup_fd(before[1])
    signal.signal(signal.SIGCHLD, before[0])
    for watched, end in started:
        if watched.status is None:
            os.kill(watched.program, signal.SIGKILL)
            os.waitpid(watched.program, 0)
        os.close(watched.output_fd)
        watched.report.close()
        end.close()
    for fd in (parent, parent_end, wake, signal_fd):
        os.close(fd)


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the confinement is Linux's")


@LINUX
def test_a_watch_waits_for_what_the_verdict_depends_on_and_no_longer(watch):
    def leaves(end: socket.socket, output: int) -> None:
        end.sendall(b'.{"fault": "left", "last": false}\n')
        end.close()
        time.sleep(0.2)
        os.write(output, b"late")
        os._exit(7)

    seen = watch(leaves)
    assert (os.waitstatus_to_exitcode(seen.status), seen.printed, seen.is_complete()) == (7, b"late", True)

    def stays(end: socket.socket, output: int) -> None:
        os.write(output, b"x" * 100_000)
        end.sendall(b'.{"passed": true, "last": false}\n')
        time.sleep(9)

    seen = watch(stays)
    assert (seen.status, len(seen.printed), seen.is_complete()) == (None, 2**16, True) and seen.seconds < 0.4


@LINUX
def test_a_watch_hears_the_program_and_no_child_of_it(watch):
    def program(end: socket.socket, output: int) -> None:
        end.sendall(SECRET)
        pid = os.fork()
        if pid == 0:
            end.sendall(SECRET)
            os._exit(0)
        os.waitpid(pid, 0)
        end.sendall(b"more")

    seen = watch(program, shared=True)
    assert seen.said == SECRET + b"more" and os.waitstatus_to_exitcode(seen.status) == 0


@LINUX
def test_a_watch_ends_after_the_limit_and_where_nothing_is_set_up(watch, monkeypatch):
    seen = watch(lambda end, output: (end.sendall(b"."), time.sleep(9)))
    assert 0.5 <= seen.seconds < 0.9 and not seen.is_complete() and seen.status is None
    monkeypatch.setattr("sandbox.forkserver.SET_UP_S", 0.3)
    seen = watch(lambda end, output: time.sleep(9))
    assert 0.3 <= seen.seconds < 0.7 and seen.said == b""


FRESH = """
import os, resource, signal, sys
names = [s for s in signal.Signals if signal.getsignal(s) is not signal.SIG_DFL]
print(sorted(s.name for s in names), *signal.pthread_sigmask(signal.SIG_BLOCK, ()))
opened = []
for fd in range(256):
    try:
        os.fstat(fd)
        opened.append(fd)
    except OSError:
        pass
print(opened, repr(sys.stdin.read()), oct(os.umask(0)), os.listdir("."))
print([resource.getrlimit(getattr(resource, "RLIMIT_" + name))[0] for name in ("AS", "FSIZE", "NOFILE", "CORE", "CPU")])
print(sorted(os.environ), {os.environ["HOME"], os.environ["TMPDIR"]} == {os.getcwd()})
class Base: pass
"""
VARIABLES = ["HOME", "LANG", "LOGNAME", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH"]
VARIABLES += ["PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "TMPDIR", "USER"]
FOUND = f"""['SIGINT', 'SIGPIPE', 'SIGXFSZ']
[0, 1, 2, 3] '' 0o22 []
[{2**31}, {2**20}, 200, 0, 3]
{VARIABLES} True
"""
APART, SHARED = "Base()", "class Derived(Base): pass"


@pytest.fixture
def odd_parent(monkeypatch) -> Iterator[None]:
    """This process blocks and ignores signals, has an odd umask, and variables and descriptors that are inherited."""
    signals = {signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1}
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in signals}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*signals, signal.SIGCHLD})
    umask, fd = os.umask(0o077), os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(fd, True)
    monkeypatch.setenv("SECRET_TOKEN", "x")
    yield
    os.close(fd)
    os.umask(umask)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@LINUX
@pytest.mark.parametrize("without", [[], ["namespaces"]], ids=["namespaces", "no namespaces"])
def test_a_program_finds_what_a_fresh_process_has_whatever_its_parent_has(odd_parent, without):
    limits = Limits(timeout_s=1.0, memory_bytes=2**31, file_bytes=2**20, open_files=200)
    with Sandbox(1, limits, without=without) as sandbox:
        for check in (APART, SHARED):
            result = sandbox.run(FRESH, check)
            assert result.passed and result.shared == (check == SHARED), result.detail
            assert result.output == FOUND


ALARM = "import time\nfrom signal import *\nsignal(SIGALRM, lambda *_: 1 / 0)\nsetitimer(ITIMER_REAL, 0.1)\n"


@LINUX
def test_a_check_gets_its_alarm_and_an_exit_is_seen_at_once_whatever_the_parent_blocks(odd_parent):
    with Sandbox(1, Limits(timeout_s=2.0)) as sandbox:
        assert sandbox.run("x = 1", ALARM + "time.sleep(0.5)").error == "ZeroDivisionError"
        leaves = "import os\nclass Base:\n    def leave(self): os._exit(7)"
        for check in ("Base().leave()", "class Derived(Base): pass\nDerived().leave()"):
            result = sandbox.run(leaves, check)
            assert result.error == "exit" and result.seconds < 0.5


@LINUX
def test_a_sandbox_starts_with_all_its_walls_where_children_are_reaped_by_the_system():
    with Sandbox(1) as sandbox:
        missing = sandbox.missing
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Sandbox(1) as sandbox:
            assert sandbox.missing == missing
            assert sandbox.run("import subprocess\nsubprocess.run(['true'], check=True)").passed
    finally:
        signal.signal(signal.SIGCHLD, before)
