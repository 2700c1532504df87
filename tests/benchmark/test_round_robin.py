import pytest

from benchmark.round_robin import Worker, alternate


class Recorder:
    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def ask(self, method: str, *arguments: int) -> int:
        self.calls.append(self.name)
        return len(self.calls)


def test_the_order_is_reversed_every_round_and_warming_up_does_not_count():
    calls: list[str] = []
    answers = alternate([Recorder("a", calls), Recorder("b", calls)], 3, "train", 1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert answers == {"a": [3, 6, 7], "b": [4, 5, 8]}


def test_what_goes_wrong_in_a_worker_is_told_with_its_name():
    worker = Worker("codegpt", ())
    with pytest.raises(RuntimeError, match=r"(?s)codegpt failed in train.*missing 3 required positional arguments"):
        worker.ask("train", 1)
    worker.process.kill()
    with pytest.raises(ValueError, match="codegpt: its process ended with -9 in train"):
        worker.ask("train", 1)
    worker.close()
