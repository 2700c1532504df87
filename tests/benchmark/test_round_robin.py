import math

import numpy as np
import pytest

from benchmark.round_robin import Worker, alternate
from benchmark.systems import HuggingFace
from runtime.errors import UserError


class Recorder:
    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def ask(self, method: str, *arguments: int) -> int | None:
        self.calls.append(self.name)
        return len(self.calls) if method == "rate" else None


def test_the_order_is_reversed_every_round_and_rows_are_workers():
    calls: list[str] = []
    answers = alternate([Recorder("a", calls), Recorder("b", calls)], 3, "rate", "train", 1)
    assert "".join(calls) == "ab" + "ba" + "ab"
    assert np.array_equal(answers, [[1, 4, 5], [2, 3, 6]])


def test_a_figure_that_a_system_does_not_have_is_nan():
    assert math.isnan(alternate([Recorder("a", [])], 1, "peak_memory")[0, 0])


def test_what_goes_wrong_in_a_worker_is_told_with_its_name():
    worker = Worker("codegpt", HuggingFace)
    with pytest.raises(RuntimeError, match=r"(?s)codegpt failed in train.*missing 2 required positional arguments"):
        worker.ask("train", 1)
    worker.kill()
    with pytest.raises(UserError, match="codegpt: its process ended with -9 in train"):
        worker.ask("train", 1)
    worker.close()
