"""Watches a program while it runs, and says what came of it."""

import contextlib
import json
import mmap
import os
import re
import select
import signal
import socket
import time
from typing import Any

from sandbox.channel import sender_of
from sandbox.judge import read_clock
from sandbox.shared import SECRET_BYTES, has_passed
from sandbox.verdict import FAILED, GRACE_S, KILLED, OUT_OF_MEMORY, PASSED, PATIENCE, TIMED_OUT, Limits

PARENT_FD = 0  # the parent writes requests here, and closes it when it ends
SET_UP_S = 60.0  # seconds that a program has to read its half of the request
SET_UP_FAILED = 120  # exit status
UNDISTURBED = 0.97  # of the time limit: a program that used as much of a processor in it was not held up by others
DISTURBED = 1.25  # times the limit: what a program may use that was, because it computes more slowly beside others
ASLEEP = 0.05  # of the time: a program that uses less waits for something else than a processor
MAX_REPORT_BYTES = 2**18
CPUCLOCK_SCHED = 2  # of the clock of another process, see clock_getcpuclockid(3)


class Watch:
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


def verdict_of_judge(report: dict[str, Any] | None, status: int | None) -> dict[str, Any]:
    """Returns outcome, error, line and message, from what the judge reported, None if nothing, and the program's exit
    status, None if it was still running."""
    if report is None:
        return how_it_ended(status)
    if report.get("passed"):
        return {"outcome": PASSED}
    if "needs_sharing" in report:
        return report
    if "error" in report:
        return _failed(report)
    if report["fault"] == "left":
        return how_it_ended(status)
    return {"outcome": FAILED, "error": "report", "message": f"to its judge it {report['fault']}"}


def verdict_of_shared(said: bytes, status: int | None) -> dict[str, Any]:
    """The same, from what a program said that shares its interpreter with its check."""
    if has_passed(said):
        return {"outcome": PASSED}
    if len(said) <= SECRET_BYTES:
        return how_it_ended(status)
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


def how_it_ended(status: int | None) -> dict[str, Any]:
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
