"""Processes that make the units of a source's inputs, in order, and end with the process that started them."""

import dataclasses
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from data.pipeline.work_units import Maker, Task
from runtime.errors import UserError


def run(maker: Maker, tasks: list[Task], n_workers: int, progress: Callable[[int], bool]) -> None:
    """Make what is missing of the units of all tasks.

    `progress` is told now and then how many bytes more were read, and answers whether to go on. With fewer tasks than
    workers, each process tokenizes with several threads. Raises the UserError or OSError that a worker failed by, and
    OSError for one that was killed.
    """
    n_processes = min(n_workers, len(tasks))
    maker = dataclasses.replace(maker, threads=n_workers // max(1, n_processes))
    if n_processes <= 1:
        all(maker.make(task, progress) for task in tasks)
        return
    # A fork shares the tokenizer and the lock on the folder; no thread of ours runs that it could cut off.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    shared = _Shared(context.Value("q", 0), context.Value("q", 0), context.Event(), context.SimpleQueue(), os.getpid())
    arguments = (maker, tasks, shared)
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(n_processes)]
    for process in processes:
        process.start()
    try:
        _watch(processes, shared, progress)
    finally:
        for process in processes:
            process.kill()
            process.join()


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What the processes share."""

    next_task: Any  # number of the task to take next
    bytes_read: Any
    stop: Any  # an event: there is enough
    failures: Any  # a queue of (class of the exception, message)
    parent: int  # the parent's process id


def _watch(processes: list[Any], shared: _Shared, progress: Callable[[int], bool]) -> None:
    told = 0
    while alive := [process.sentinel for process in processes if process.is_alive()]:
        connection.wait(alive, timeout=0.1)
        now = shared.bytes_read.value
        if not progress(now - told):
            shared.stop.set()
        told = now
        _raise_failure(processes, shared)
    _raise_failure(processes, shared)
    progress(shared.bytes_read.value - told)


def _raise_failure(processes: list[Any], shared: _Shared) -> None:
    if not shared.failures.empty():
        kind, message = shared.failures.get()
        raise kind(message)
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes:
        raise OSError(
            f"a worker ended with exit code {codes[0]}; if memory was short, set fewer --workers; "
            "the same command goes on"
        )


def _work(maker: Maker, tasks: list[Task], shared: _Shared) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers

    def progress(n_bytes: int) -> bool:
        if os.getppid() != shared.parent:
            os._exit(1)  # the parent was killed
        with shared.bytes_read.get_lock():
            shared.bytes_read.value += n_bytes
        return not shared.stop.is_set()

    try:
        while not shared.stop.is_set():
            with shared.next_task.get_lock():
                place = shared.next_task.value
                shared.next_task.value += 1
            if place >= len(tasks):
                return
            maker.make(tasks[place], progress)
    except (UserError, OSError) as error:
        shared.failures.put((UserError if isinstance(error, UserError) else OSError, str(error)))
    except BaseException:
        shared.failures.put((RuntimeError, f"a worker failed:\n{traceback.format_exc()}"))
