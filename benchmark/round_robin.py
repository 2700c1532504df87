"""Systems in processes of their own that take turns, so that whatever else the machine does slows them all alike."""

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.device import is_out_of_memory
from runtime.errors import UserError

SPAWN = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA


class Worker(SPAWN.Process):
    """A process that builds the system `build(*arguments)` and waits to be asked for something. Prints to stderr."""

    def __init__(self, name: str, build: Callable[..., Any], *arguments: Any):
        super().__init__(name=name, daemon=True)
        self.build, self.arguments = build, arguments
        self.pipe, self.inner_pipe = SPAWN.Pipe()
        self.start()
        self.inner_pipe.close()  # so that it ends with the process

    def run(self) -> None:
        """Body of the process: answers each call with a result or an exception, until the other end closes."""
        self.pipe.close()
        sys.stdout, system = sys.stderr, None
        while True:
            try:
                method, values = self.inner_pipe.recv()
                system = system or self.build(*self.arguments)
                answer = getattr(system, method)(*values)
            except (EOFError, KeyboardInterrupt):  # the parent has left, or is about to
                return
            except UserError as error:
                answer = error
            except Exception as error:
                if is_out_of_memory(error):
                    answer = UserError(f"{self.name}: out of memory on the device; set a lower --batch_size")
                else:
                    answer = RuntimeError(f"{self.name} failed in {method}:\n{traceback.format_exc()}")
            self.inner_pipe.send(answer)

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the system's method returns. Raises UserError for a user's mistake, and if the process has ended."""
        try:
            self.pipe.send((method, arguments))
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.join()
            ended = f"{self.name}: its process ended with {self.exitcode} in {method}"
            raise UserError(f"{ended}; if memory was short, lower --batch_size") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process: an idle one leaves when its pipe closes, a busy one is stopped after 5 s."""
        self.pipe.close()
        self.join(timeout=5)
        self.terminate()
        self.join()


def alternate(workers: Sequence[Worker], rounds: int, method: str, *arguments: Any) -> np.ndarray:
    """Ask every worker the same once per round, in an order that is reversed after each round. Returns the numbers
    that they answer, (workers, rounds); None becomes NaN."""
    answers = np.empty((len(workers), rounds))
    order = list(range(len(workers)))
    for number in range(rounds):
        for index in order:
            answers[index, number] = workers[index].ask(method, *arguments)
        order.reverse()
    return answers
