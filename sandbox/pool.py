"""Runs untrusted Python programs, each in a process of its own, and returns their results.

    with Sandbox() as sandbox:
        result = sandbox.run("def add(a, b):\\n    return a + b\\n", "assert add(1, 2) == 3")
        print(result.outcome, result.error, result.line)  # passed None None

Every worker serves one program at a time. Its fork server forks the program (forkserver.py), and its judge runs the
check and asks the program for what the check calls (judge.py, channel.py); confine.py says what both may do. A worker
that dies or hangs is replaced, and its program runs again.
"""

import contextlib
import json
import marshal
import os
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sandbox.checks import prepare
from sandbox.confine import remove
from sandbox.verdict import COMMON, FAILED, GRACE_S, HEADER, KILLED, PATIENCE, SHARED, TIMED_OUT, Limits, Result

ROOT = Path(__file__).parents[1]
TRIES = 5  # of a program whose worker dies, and of starting a worker
COMPARED = "the check compares two objects of the program, which did it"

Program = tuple[str, str, str]  # program, check, entry_point


class _Job(NamedTuple):
    index: int  # of the program among those of a run
    program: Program
    needs_sharing: str | None  # why it has to run in one interpreter with its check
    tries: int = 1


class Sandbox(contextlib.AbstractContextManager):
    """`workers` processes, at most one per core, that run programs under `limits`. A context manager.

    `preload` names modules that each worker imports once, before it runs programs. `without` names protections to leave
    out, for tests. A check that cannot run apart from its program runs in one interpreter with it, and the result is
    flagged `shared`; `strict` fails it instead, with the error SHARED. Prints a warning for each protection that this
    machine lacks, once per process. Raises OSError if no worker starts.
    """

    _warned: ClassVar[set[str]] = set()

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits | None = None,
        preload: Collection[str] = (),
        without: Collection[str] = (),
        strict: bool = False,
    ):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        limits = limits or Limits()
        self.strict = strict
        settings = {"limits": asdict(limits), "preload": [*COMMON, *preload], "without": list(without)}
        self._running = threading.Lock()
        self._workers: list[_Worker] = []
        weakref.finalize(self, _end, self._workers)  # if nobody closes it
        try:
            for _ in range(max(1, min(workers or cores, cores))):
                self._workers.append(_Worker(settings))
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise
        self.missing = self._workers[0].missing or []
        for protection in self.missing:
            if protection not in Sandbox._warned:
                Sandbox._warned.add(protection)
                print(f"warning: sandbox without {protection}", file=sys.stderr)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and the programs that they run."""
        _end(self._workers)

    def run(self, program: str, check: str = "", entry_point: str = "") -> Result:
        """Run `program`, then `check`, and return the result. `check` looks up a name first among its own, then among
        Python's builtins, then among the program's; but `entry_point`, the function to check, is never a builtin."""
        ((_, result),) = self.run_many([(program, check, entry_point)])
        return result

    def run_many(self, programs: Iterable[Program]) -> Iterator[tuple[int, Result]]:
        """Run each (program, check, entry_point). Yields its index and its result, in the order in which they end.

        The time limit of a program whose processor others take is longer (watch.py), so that a loaded machine
        fails no correct program. A program whose worker died runs again. Raises RuntimeError if the sandbox is closed,
        or busy with another run, and OSError if a worker cannot be replaced.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("the sandbox is running other programs; use one for each caller")
        workers, busy = [*self._workers], dict[_Worker, _Job]()
        fresh = (_Job(index, program, prepare(program[1]).needs_sharing) for index, program in enumerate(programs))
        again: deque[_Job] = deque()
        try:
            while True:
                if not self._workers:
                    raise RuntimeError("the sandbox is closed")
                for worker in self._workers:
                    while worker not in busy and (job := again.popleft() if again else next(fresh, None)) is not None:
                        if job.needs_sharing and self.strict:
                            yield job.index, Result(FAILED, SHARED, message=job.needs_sharing, shared=True)
                        else:
                            busy[worker] = job
                            worker.send(job)
                if not busy:
                    return
                for worker in _Worker.ready(busy):
                    answer, job = worker.receive(), busy.pop(worker)
                    if not self._workers:
                        break
                    too_long = answer is None and worker.process.poll() == -signal.SIGVTALRM
                    if answer is None or answer.pop("last", False):
                        worker.restart()
                    if too_long:
                        yield job.index, Result(TIMED_OUT, message="its check computed without end")
                    elif answer is None and job.tries < TRIES:
                        again.append(job._replace(tries=job.tries + 1))
                    elif answer is None:
                        yield job.index, Result(KILLED, "sandbox", message="the process that ran it died or hung")
                    elif "needs_sharing" not in answer:
                        result = Result(**answer)
                        if job.tries == 1 and result.outcome == TIMED_OUT and _may_have_starved(result):
                            again.append(job._replace(tries=2))
                            continue
                        if self.strict and result.passed and result.shared:
                            result = replace(result, outcome=FAILED, error=SHARED, message=COMPARED)
                        yield job.index, result
                    else:
                        again.append(job._replace(needs_sharing=answer["needs_sharing"]))
        finally:
            for worker in workers:
                if worker.ended:  # `close` was called meanwhile
                    worker.close_pipes()
                elif worker in busy:  # the caller left early
                    worker.restart()
            self._running.release()


def _may_have_starved(result: Result) -> bool:
    """Whether a program that seemed to sleep may have got no processor at all: it runs again if the machine has much
    more to do than it can."""
    return result.cpu_seconds < 0.5 * result.seconds and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)


def _end(workers: list["_Worker"]) -> None:
    """End workers and the programs that they run, and empty the list. Another thread may be waiting for them."""
    ending = [*workers]
    workers.clear()
    for worker in ending:
        worker.end()


def _request(program: str, check: str, entry_point: str, shared: bool) -> bytes:
    """Returns what a worker reads: how many bytes each half has, the judge's half, the program's half."""
    n_lines = program.count("\n") + (not program.endswith("\n"))
    prepared = prepare(check)
    code = check if shared else prepared.code
    check_half = marshal.dumps((code, entry_point, n_lines, prepared.modules, prepared.seeds))
    halves = check_half, marshal.dumps((program, prepared.imports))
    return struct.pack(HEADER, shared, *map(len, halves)) + b"".join(halves)


class _Worker:
    """The parent's side of one fork server."""

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.timeout_s = settings, settings["limits"]["timeout_s"]
        self.missing: list[str] | None = None  # protections that this machine lacks
        self.ended, self.ending = False, threading.Lock()
        self.start()

    def start(self) -> None:
        # It gets an environment of its own. Hashes are fixed, so that sets have one order and verdicts repeat.
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        environment |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        environment |= {"HOME": os.path.expanduser("~"), "PYTHONDONTWRITEBYTECODE": "1"}
        # The fork server makes this folder if programs' folders cannot be in memory.
        self.directory = os.path.join(_temporary_folder(), f"sandbox-{secrets.token_hex(8)}")
        settings = json.dumps({**self.settings, "directory": self.directory})
        command = [sys.executable, "-m", "sandbox.forkserver", settings]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, start_new_session=True
        )
        self.deadline = time.monotonic() + 60

    def wait_until_ready(self) -> None:
        """Start it again if it dies while it starts, or has fewer protections than before. Raises OSError if it never
        is ready."""
        for _ in range(TRIES):
            greeting = self._read_line()
            if self.ended:
                return
            if greeting is not None and self.missing in (None, greeting["missing"]):
                self.missing = greeting["missing"]
                return
            self.restart_process()
        self.end()
        raise OSError("the sandbox's worker does not start, for the reason above")

    def send(self, job: _Job) -> None:
        self.deadline = time.monotonic() + PATIENCE * self.timeout_s + GRACE_S + 120
        try:
            self.process.stdin.write(_request(*job.program, shared=job.needs_sharing is not None))
            self.process.stdin.flush()
        except BrokenPipeError:  # `receive` handles a worker that has died
            pass

    def receive(self) -> dict[str, Any] | None:
        """Returns the answer, None if the worker died or hangs. It may come after a line of the judge's."""
        answer, words = self._read_line(), None
        if answer is not None and answer.keys() == {"words"}:
            answer, words = self._read_line(buffered=True), answer["words"]
        if answer is not None and answer.pop("words", False):
            answer["needs_sharing" if "needs_sharing" in answer else "message"] = words
        return answer

    def restart(self) -> None:
        self.restart_process()
        self.wait_until_ready()

    def restart_process(self) -> None:
        with self.ending:
            if not self.ended:
                self._kill()
                self.close_pipes()
                self.start()

    def end(self) -> None:
        """End the process for good. Its pipes stay open, because another thread may be waiting for them."""
        with self.ending:
            if not self.ended:
                self.ended = True
                self._kill()

    def close_pipes(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process has died
            self.process.stdin.close()
        self.process.stdout.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # those outside of the group end with it
        self.process.wait()
        remove(self.directory)

    def _read_line(self, buffered: bool = False) -> dict[str, Any] | None:
        """Returns a whole line of JSON; None if the process died or `deadline` has passed. Raises OSError if it says
        that it cannot work."""
        output = self.process.stdout
        there = buffered or wait([output], max(0.0, self.deadline - time.monotonic()))
        line = output.readline() if there else b""
        message = json.loads(line) if line.endswith(b"\n") else None
        if message is not None and "cannot_work" in message:
            raise OSError(message["cannot_work"])
        return message

    @staticmethod
    def ready(workers: Collection["_Worker"]) -> list["_Worker"]:
        """Wait until a worker has an answer or is late. Returns those with answers, else those that are late."""
        outputs = {worker.process.stdout: worker for worker in workers}
        deadline = min(worker.deadline for worker in workers)
        answered = wait(outputs, max(0.0, deadline - time.monotonic()))
        late = [worker for worker in workers if time.monotonic() > worker.deadline]
        return [outputs[output] for output in answered] or late


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # no folder can be written, which matters only where the fork server needs one
        return os.environ.get("TMPDIR", "/tmp")
