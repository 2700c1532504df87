"""Processes that make the units of a source's inputs, in order, and end with the process that started them."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from data.refine import Refinery
from data.sources import Input
from data.units import make_units


def run(
    work: Path,
    inputs: list[tuple[int, Input, bool]],
    refinery: Refinery,
    workers: int,
    unit_bytes: int,
    progress: Callable[[int], bool],
) -> None:
    """Make what is missing of the units of `inputs`: number, input, and whether it all goes to validation.

    `progress` is told now and then how many bytes more were read, and answers whether to go on. With fewer inputs than
    workers, each process tokenizes with several threads. Raises what a worker raised.
    """
    n_processes = min(workers, len(inputs))
    threads = workers // max(1, n_processes)
    if n_processes <= 1:
        for number, item, to_val in inputs:
            go_on = True

            def tell(n_bytes: int) -> bool:
                nonlocal go_on
                go_on = progress(n_bytes)
                return go_on

            make_units(work, number, item, to_val, refinery, threads, unit_bytes, tell)
            if not go_on:
                return
        return
    # A fork shares the tokenizer and the lock on the folder; the parent has not started threads of its own.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    tasks, failures = context.SimpleQueue(), context.SimpleQueue()
    for task in inputs:
        tasks.put(task[0])
    for _ in range(n_processes):
        tasks.put(None)
    read, stop = context.Value("q", 0), context.Event()
    arguments = (work, inputs, refinery, threads, unit_bytes, tasks, failures, read, stop, os.getpid())
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(n_processes)]
    for process in processes:
        process.start()
    try:
        _watch(processes, failures, read, stop, progress)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _watch(processes: list[Any], failures: Any, read: Any, stop: Any, progress: Callable[[int], bool]) -> None:
    told = 0
    while any(process.is_alive() for process in processes):
        connection.wait([process.sentinel for process in processes if process.is_alive()], timeout=0.1)
        told, now = read.value, told
        if not progress(told - now):
            stop.set()
        _raise_failure(processes, failures)
    _raise_failure(processes, failures)
    progress(read.value - told)


def _raise_failure(processes: list[Any], failures: Any) -> None:
    if not failures.empty():
        kind, message = failures.get()
        raise OSError(message) if kind == "OSError" else RuntimeError(f"a worker failed:\n{message}")
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes:
        raise OSError(
            f"a worker ended with exit code {codes[0]}; if memory was short, set fewer --workers; "
            "the same command goes on"
        )


def _work(
    work: Path,
    inputs: list[tuple[int, Input, bool]],
    refinery: Refinery,
    threads: int,
    unit_bytes: int,
    tasks: Any,
    failures: Any,
    read: Any,
    stop: Any,
    parent: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers

    def progress(n_bytes: int) -> bool:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed
        with read.get_lock():
            read.value += n_bytes
        return not stop.is_set()

    by_number = {task[0]: task for task in inputs}
    try:
        while (number := tasks.get()) is not None and not stop.is_set():
            make_units(work, *by_number[number], refinery, threads, unit_bytes, progress)
    except OSError as error:
        failures.put(("OSError", str(error)))
    except BaseException:
        failures.put(("bug", traceback.format_exc()))
