"""Worker processes that make the units of a source's inputs, in order, and end with the process that started them."""

import dataclasses
import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing import connection
from typing import Any

from data.pipeline.work_units import Maker, Progress, Task
from runtime.errors import UserError


def run(maker: Maker, tasks: list[Task], n_workers: int, progress: Progress) -> None:
    """Makes the missing units of tasks, in order, until `progress` says to stop. If there are more workers than tasks,
    they become threads. Raises the UserError or OSError of a worker that failed, and OSError if one was killed."""
    n_processes = min(n_workers, len(tasks))
    maker = dataclasses.replace(maker, threads=n_workers // max(1, n_processes))
    if n_processes <= 1:
        for task in tasks:
            if not maker.make(task, progress):
                break
        return
    # A fork shares the tokenizer and the lock on the folder. This process has no other thread that a fork could break.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    board = _Board(context)
    processes = [context.Process(target=_work, args=(maker, tasks, board), daemon=True) for _ in range(n_processes)]
    for process in processes:
        process.start()
    try:
        _watch(processes, board, progress)
    finally:
        for process in processes:
            process.kill()
            process.join()


class _Board:
    """What the parent and its workers tell each other; every process sees the same values."""

    def __init__(self, context: Any):
        self.parent = os.getpid()
        self.next_task = context.Value("q", 0)
        self.bytes_read = context.Value("q", 0)
        self.stop = context.Event()  # set once there are enough units
        self.failures = context.SimpleQueue()  # (class of the exception, message)

    def take_task(self) -> int:
        """The index of the next task, which no other worker gets."""
        with self.next_task.get_lock():
            self.next_task.value += 1
            return self.next_task.value - 1

    def progress(self, n_bytes: int) -> bool:
        """Counts bytes that a worker has read; returns whether to go on. Ends the worker if its parent was killed."""
        if os.getppid() != self.parent:
            os._exit(1)
        with self.bytes_read.get_lock():
            self.bytes_read.value += n_bytes
        return not self.stop.is_set()


def _watch(processes: list[Any], board: _Board, progress: Progress) -> None:
    """Passes the progress on until all workers have ended. Raises the failure of any of them."""
    reported = 0
    while alive := [process.sentinel for process in processes if process.is_alive()]:
        connection.wait(alive, timeout=0.1)
        n_read = board.bytes_read.value
        if not progress(n_read - reported):
            board.stop.set()
        reported = n_read
        _raise_failure(processes, board)
    _raise_failure(processes, board)
    progress(board.bytes_read.value - reported)


def _raise_failure(processes: list[Any], board: _Board) -> None:
    if not board.failures.empty():
        kind, message = board.failures.get()
        raise kind(message)
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes:
        raise OSError(f"a worker ended with exit code {codes[0]}; if memory was short, continue with fewer --workers")


def _work(maker: Maker, tasks: list[Task], board: _Board) -> None:
    """What a worker process does: makes the units of one task after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    try:
        while not board.stop.is_set() and (index := board.take_task()) < len(tasks):
            maker.make(tasks[index], board.progress)
    except (UserError, OSError) as error:
        board.failures.put((UserError if isinstance(error, UserError) else OSError, str(error)))
    except BaseException:
        board.failures.put((RuntimeError, f"a worker failed:\n{traceback.format_exc()}"))
