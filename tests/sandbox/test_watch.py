"""What a program is watched for, and the verdicts that follow."""

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

from sandbox.verdict import Limits
from sandbox.watch import SET_UP_FAILED, Watch, how_it_ended, verdict_of_judge, verdict_of_shared

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
    assert found(verdict_of_judge(report, ended)) == expected


def test_that_a_check_needs_sharing_is_passed_on():
    assert verdict_of_judge({"needs_sharing": "why", "last": False}, status(7))["needs_sharing"] == "why"


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
    assert found(verdict_of_shared(said, ended)) == expected


def test_how_a_program_ended_is_told():
    assert found(how_it_ended(status(signum=signal.SIGKILL))) == ("killed", "SIGKILL")
    assert found(how_it_ended(status(signum=signal.SIGXCPU))) == ("timed out", "SIGXCPU")
    assert found(how_it_ended(status(signum=40))) in [("killed", "signal 40"), ("killed", "SIGRTMIN+6")]
    assert how_it_ended(status(7))["message"] == "left with status 7 before the end of the check"


@pytest.fixture
def watch(monkeypatch) -> Iterator[Callable[..., Watch]]:
    """A function that forks a program, which gets the socket for reports and the pipe for output, and watches it."""
    parent, parent_end = os.pipe()
    wake, signal_fd = os.pipe()
    for fd in (wake, signal_fd):
        os.set_blocking(fd, False)
    monkeypatch.setattr("sandbox.watch.PARENT_FD", parent)
    before = signal.signal(signal.SIGCHLD, lambda *_: None), signal.set_wakeup_fd(signal_fd)
    started: list[tuple[Watch, socket.socket]] = []

    def watch(program: Callable[[socket.socket, int], object], shared: bool = False) -> Watch:
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
        watched = Watch(Limits(timeout_s=0.5), pid, shared, report, (output, wake), mmap.mmap(-1, 8), False)
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
    monkeypatch.setattr("sandbox.watch.SET_UP_S", 0.3)
    seen = watch(lambda end, output: time.sleep(9))
    assert 0.3 <= seen.seconds < 0.7 and seen.said == b""
