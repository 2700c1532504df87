"""Systems in processes of their own, which take turns: what else the machine does slows all of them alike."""

import multiprocessing
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmark.systems import SYSTEMS
from runtime.errors import UserError


class Worker:
    """A system in a process of its own, which waits whenever it has not been asked for something."""

    def __init__(self, name: str, arguments: tuple[Any, ...]):
        self.name = name
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the system's method returns. Raises UserError for a user's mistake and for a process that ended."""
        try:
            self.pipe.send((method, arguments))
            kind, answer = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            raise UserError(
                f"{self.name}: its process ended with {code} in {method}; if memory was short, lower --batch_size"
            ) from None
        if kind == "mistake":
            raise UserError(answer)
        if kind == "failure":
            raise RuntimeError(f"{self.name} failed in {method}:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process: it leaves by itself when its pipe does, unless it is in the middle of something."""
        self.pipe.close()
        self.process.join(timeout=5)
        self.process.terminate()
        self.process.join()


def work(name: str, arguments: tuple[Any, ...], pipe: Connection) -> None:
    """Build the system called `name` and answer until the other end closes. Prints go to stderr."""
    sys.stdout = sys.stderr
    system = None
    while True:
        try:
            method, values = pipe.recv()
            system = system or SYSTEMS[name](*arguments)
            answer = "answer", getattr(system, method)(*values)
        except (EOFError, KeyboardInterrupt):  # the parent has left, or is about to
            return
        except UserError as error:
            answer = "mistake", str(error)
        except torch.OutOfMemoryError:
            answer = "mistake", f"{name}: out of memory on the device; set a lower --batch_size"
        except Exception:
            answer = "failure", traceback.format_exc()
        pipe.send(answer)


def alternate(
    workers: Sequence[Worker], rounds: int, method: str, *arguments: Any, warm: bool = True
) -> dict[str, list[float]]:
    """By system, what the method returns in each of `rounds` rounds, in which one after the other is asked, the order
    reversed each time. With `warm` each is asked once before that counts."""
    answers: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for worker in workers if warm else ():
        worker.ask(method, *arguments)
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            answers[worker.name].append(worker.ask(method, *arguments))
    return answers
