import time

import pytest

from evaluation.cheats import interpreter_tricks


@pytest.mark.parametrize(
    ("code", "tricks"),
    [
        ("class Yes:\n    def __eq__(self, other):\n        return True\n", ["__eq__"]),
        ("import inspect\ne.__traceback__.f_back", ["__traceback__", "f_back", "inspect"]),
        ("import math as m\nm.fabs = abs\nm.pi == 3", ["m.fabs ="]),
        ("import os\nif 1:\n    os.path.sep = 1\n    self.os.x = 1", ["os.path.sep ="]),
        ("def equal(a, b):\n    return a == b  # signals, exit", []),
    ],
)
def test_tricks_are_whole_words_and_changed_modules(code, tricks):
    assert interpreter_tricks(code) == tricks


@pytest.mark.parametrize("part", ["\n", " ", "\t\n", "import a\na.b = 1\n", "as ", ".b", "from\n", "a.b ", "a.b=\n"])
def test_the_time_is_linear_in_the_length(part):
    """Ten times the text takes less than forty times as long; a hundred times, if it were quadratic."""

    def seconds(length: int) -> float:
        text = "import a\na" + part * (length // len(part))
        times = []
        for _ in range(3):
            began = time.process_time()
            interpreter_tricks(text)
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(40_000) < 40 * seconds(4_000) + 0.5
