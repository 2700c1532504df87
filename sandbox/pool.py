"""Run untrusted Python programs, each in a process of its own, and say what became of them.

    with Sandbox() as sandbox:
        result = sandbox.run("def add(a, b):\\n    return a + b\\n", "assert add(1, 2) == 3")
        print(result.outcome, result.error, result.line)  # passed None None

Programs run in worker processes, one at a time in each: forkserver.py says what a pass is, confine.py what a program
may do. A worker that dies or hangs is replaced.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, ClassVar

from sandbox.confine import remove
from sandbox.verdict import COMMON, GRACE_S, KILLED, TIMED_OUT, Limits, Result

FORK_SERVER = Path(__file__).with_name("forkserver.py")

LOST = "worker"  # the error of a program whose worker died
ALONE = 0.9  # share of the time that a program had the processor for, if no other wanted it


class Sandbox:
    """`workers` processes, at most one a core, that run programs under `limits`. A context manager.

    `preload` are modules to import once, before the programs. Prints once which protections this machine lacks.
    """

    _said: ClassVar[set[str]] = set()

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
        settings = {
            "limits": asdict(limits),
            "preload": [*COMMON, *preload],
            "without": list(without),
        }
        self._running = threading.Lock()
        self._workers = [_Worker(settings) for _ in range(max(1, min(workers or cores, cores)))]
        self.missing = self._workers[0].hello()["missing"]
        for worker in self._workers[1:]:
            worker.hello()
        for protection in self.missing:
            if protection not in Sandbox._said:
                Sandbox._said.add(protection)
                print(f"warning: sandbox without {protection}", file=sys.stderr)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and whatever they run."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()

    def run(self, program: str, check: str = "", entry_point: str = "") -> Result:
        """What became of `program` followed by `check`, code that sees the program's names, and the builtins unless one
        has the name of `entry_point`, the function to check."""
        ((_, result),) = self.run_many([(program, check, entry_point)])
        return result

    def run_many(self, programs: Iterable[tuple[str, str, str]]) -> Iterator[tuple[int, Result]]:
        """Place and result of each (program, check, entry_point), as they end. One run of a sandbox at a time.

        A program that timed out is tried once more at the end, with no other beside it, so that a loaded machine fails
        no correct program; unless it had a processor to itself all the time. So is one whose worker died.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("the sandbox is running other programs; use one for each caller")
        waiting = enumerate(programs)
        again: list[tuple[int, tuple[str, str, str]]] = []
        busy: dict[_Worker, tuple[int, tuple[str, str, str]]] = {}
        try:
            while True:
                if not self._workers:
                    raise RuntimeError("the sandbox is closed")
                for worker in self._workers:
                    if worker not in busy and (job := next(waiting, None)) is not None:
                        worker.send(*job[1])
                        busy[worker] = job
                if not busy:
                    break
                for worker in _Worker.ready(busy):
                    result, (place, job) = worker.receive(), busy.pop(worker)
                    starved = result.outcome == TIMED_OUT and result.cpu_seconds < ALONE * self.timeout_s
                    if starved or result.error == LOST:
                        again.append((place, job))
                    else:
                        yield place, result
            for place, job in again:
                worker = self._workers[0]
                busy[worker] = (place, job)
                worker.send(*job)
                result = worker.receive()
                busy.clear()
                yield place, result
        finally:
            for worker in busy:  # the caller left early
                if worker in self._workers:
                    worker.restart()
            self._running.release()


class _Worker:
    """The parent's side of one process that forks programs."""

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.timeout_s = settings, settings["limits"]["timeout_s"]
        self.start()

    def start(self) -> None:
        # An environment of its own. Hashes are fixed, so that sets have one order and verdicts repeat.
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        environment |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        environment |= {"HOME": os.path.expanduser("~"), "PYTHONDONTWRITEBYTECODE": "1"}
        self.directory = tempfile.mkdtemp(prefix="sandbox-")  # for those of programs, where they are not in memory
        settings = json.dumps({**self.settings, "directory": self.directory})
        command = [sys.executable, str(FORK_SERVER), settings]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/", start_new_session=True
        )
        self.deadline = time.monotonic() + 60

    def hello(self) -> dict[str, Any]:
        """What the process says when it is ready. Raises RuntimeError if it never is."""
        line = self._read_line()
        if line is None:
            self.close()
            raise RuntimeError("the sandbox does not start; the reason stands above")
        return json.loads(line)

    def send(self, *program: str) -> None:
        self.deadline = time.monotonic() + self.timeout_s + GRACE_S + 60
        message = json.dumps(program).encode() + b"\n"
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except BrokenPipeError:  # `receive` finds out
            pass

    def receive(self) -> Result:
        """The verdict. A worker that died or is stuck is replaced, and its program counts as killed."""
        line = self._read_line()
        if line is None:
            self.restart()
            return Result(KILLED, LOST, message="the process that ran it died or hung")
        return Result(**json.loads(line))

    def restart(self) -> None:
        self.close()
        self.start()
        self.hello()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died
            self.process.stdin.close()
        try:
            self.process.wait(0 if time.monotonic() > self.deadline else 5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        remove(self.directory)

    def _read_line(self) -> bytes | None:
        line = self.process.stdout.readline() if _readable([self.process.stdout], self.deadline) else b""
        return line if line.endswith(b"\n") else None

    @staticmethod
    def ready(workers: Collection["_Worker"]) -> list["_Worker"]:
        """Those that have something to say, or are late; waits for one."""
        outputs = {worker.process.stdout: worker for worker in workers}
        soonest = min(worker.deadline for worker in workers)
        found = _readable(outputs, soonest)
        late = [worker for worker in workers if time.monotonic() > worker.deadline]
        return [outputs[output] for output in found] or late


def _readable(files: Iterable[IO[bytes]], deadline: float) -> list[IO[bytes]]:
    """Those from which something, or the end, can be read; waits for one until `deadline`."""
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))]
