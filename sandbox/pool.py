"""Runs untrusted Python programs, each in a process of its own, and returns their results.

    with Sandbox() as sandbox:
        result = sandbox.run("def add(a, b):\\n    return a + b\\n", "assert add(1, 2) == 3")
        print(result.outcome, result.error, result.line)  # passed None None

Every worker process runs one program at a time. forkserver.py times it and says when it passes, and confine.py what it
may do. A program that timed out while others took its processor runs once more, alone, at the end (`run_many`). A
worker that dies or hangs is replaced.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, ClassVar

from sandbox.confine import remove
from sandbox.verdict import COMMON, GRACE_S, KILLED, TIMED_OUT, Limits, Result

FORK_SERVER = Path(__file__).with_name("forkserver.py")

LOST = "worker"  # Result.error of a program whose worker died
UNDISTURBED = 0.9  # a program that had a processor to itself used it for at least this share of the time

Program = tuple[str, str, str]  # program, check, entry_point
Job = tuple[int, Program]  # a program and its index among the programs of a run


class Sandbox(contextlib.AbstractContextManager):
    """`workers` processes, at most one per core, that run programs under `limits`. A context manager.

    `preload` names modules that each worker imports once, before it runs programs. `without` names protections to leave
    out, for tests. Prints a warning for each protection that this machine lacks, once per process.
    """

    _warned: ClassVar[set[str]] = set()

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits | None = None,
        preload: Collection[str] = (),
        without: Collection[str] = (),
    ):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        limits = limits or Limits()
        self.timeout_s = limits.timeout_s
        settings = {"limits": asdict(limits), "preload": [*COMMON, *preload], "without": list(without)}
        self._running = threading.Lock()
        self._workers = [_Worker(settings) for _ in range(max(1, min(workers or cores, cores)))]
        greetings = [worker.wait_until_ready() for worker in self._workers]
        self.missing = greetings[0]["missing"]
        for protection in self.missing:
            if protection not in Sandbox._warned:
                Sandbox._warned.add(protection)
                print(f"warning: sandbox without {protection}", file=sys.stderr)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and the programs that they run."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()

    def run(self, program: str, check: str = "", entry_point: str = "") -> Result:
        """Run `program`, then `check`, and return the result. `check` looks up a name first among its own, then among
        Python's builtins, then among the program's; but `entry_point`, the function to check, is never a builtin."""
        ((_, result),) = self.run_many([(program, check, entry_point)])
        return result

    def run_many(self, programs: Iterable[Program]) -> Iterator[tuple[int, Result]]:
        """Run each (program, check, entry_point). Yields its index and its result, in the order in which they end.

        A loaded machine should fail no correct program. So a program that timed out without a processor to itself runs
        once more after all others, with no other beside it. So does one whose worker died. Raises RuntimeError if the
        sandbox is closed, or busy with another run.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("the sandbox is running other programs; use one for each caller")
        busy: dict[_Worker, Job] = {}
        again: list[Job] = []
        try:
            for job, result in self._run_parallel(programs, busy):
                starved = result.outcome == TIMED_OUT and result.cpu_seconds < UNDISTURBED * self.timeout_s
                if starved or result.error == LOST:
                    again.append(job)
                else:
                    yield job[0], result
            for index, program in again:
                ((_, result),) = self._run_parallel([program], busy)
                yield index, result
        finally:
            for worker in busy:  # the caller left early
                if worker in self._workers:
                    worker.restart()
            self._running.release()

    def _run_parallel(self, programs: Iterable[Program], busy: dict["_Worker", Job]) -> Iterator[tuple[Job, Result]]:
        """Run programs on all workers, and keep those that are running in `busy`. Yields results as programs end."""
        waiting = enumerate(programs)
        while True:
            if not self._workers:
                raise RuntimeError("the sandbox is closed")
            for worker in self._workers:
                if worker not in busy and (job := next(waiting, None)) is not None:
                    worker.send(*job[1])
                    busy[worker] = job
            if not busy:
                return
            for worker in _Worker.ready(busy):
                result = worker.receive()
                yield busy.pop(worker), result


class _Worker:
    """The parent's side of one fork server."""

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.timeout_s = settings, settings["limits"]["timeout_s"]
        self.start()

    def start(self) -> None:
        # It gets an environment of its own. Hashes are fixed, so that sets have one order and verdicts repeat.
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        environment |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        environment |= {"HOME": os.path.expanduser("~"), "PYTHONDONTWRITEBYTECODE": "1"}
        self.directory = tempfile.mkdtemp(prefix="sandbox-")  # holds programs' folders where they cannot be in memory
        command = [sys.executable, str(FORK_SERVER), json.dumps({**self.settings, "directory": self.directory})]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/", start_new_session=True
        )
        self.deadline = time.monotonic() + 60

    def wait_until_ready(self) -> dict[str, Any]:
        """Returns what the process says when it is ready. Raises RuntimeError if it never is."""
        line = self._read_line()
        if line is None:
            self.close()
            raise RuntimeError("the sandbox does not start; see the error above")
        return json.loads(line)

    def send(self, *program: str) -> None:
        self.deadline = time.monotonic() + self.timeout_s + GRACE_S + 60
        message = json.dumps(program).encode() + b"\n"
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except BrokenPipeError:  # `receive` handles a worker that has died
            pass

    def receive(self) -> Result:
        """Returns the result. Replaces a worker that died or hangs; its program counts as killed."""
        line = self._read_line()
        if line is None:
            self.restart()
            return Result(KILLED, LOST, message="the process that ran it died or hung")
        return Result(**json.loads(line))

    def restart(self) -> None:
        self.close()
        self.start()
        self.wait_until_ready()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process has died
            self.process.stdin.close()
        try:
            self.process.wait(0 if time.monotonic() > self.deadline else 5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        remove(self.directory)

    def _read_line(self) -> bytes | None:
        """Returns a whole line; None if the process died or `deadline` has passed."""
        output = self.process.stdout
        line = output.readline() if wait([output], max(0.0, self.deadline - time.monotonic())) else b""
        return line if line.endswith(b"\n") else None

    @staticmethod
    def ready(workers: Collection["_Worker"]) -> list["_Worker"]:
        """Wait until a worker has an answer or is late. Returns those with answers, else those that are late."""
        outputs = {worker.process.stdout: worker for worker in workers}
        deadline = min(worker.deadline for worker in workers)
        answered = wait(outputs, max(0.0, deadline - time.monotonic()))
        late = [worker for worker in workers if time.monotonic() > worker.deadline]
        return [outputs[output] for output in answered] or late
