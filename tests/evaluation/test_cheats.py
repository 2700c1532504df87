import pytest

from evaluation.cheats import interpreter_tricks
from sandbox.pool import Sandbox


def test_a_program_that_fools_the_judge_is_found_by_its_words():
    program = "class Yes:\n    def __eq__(self, other):\n        return True\ndef double(n):\n    return Yes()\n"
    with Sandbox(1) as sandbox:
        assert sandbox.run(program, "assert double(2) == 4").passed
    assert interpreter_tricks(program) == ["__eq__"]


@pytest.mark.parametrize(
    ("code", "tricks"),
    [
        ("import gc\ne.__traceback__.f_back", ["__traceback__", "f_back", "gc"]),
        ("import math as m\nm.fabs = abs\nm.pi == 3", ["m.fabs ="]),
        ("import os\nif 1:\n    os.path.sep = 1", ["os.path.sep ="]),
        ("def equal(a, b):\n    return a == b  # gcd, exit", []),
    ],
)
def test_tricks_are_whole_words_and_changed_modules(code, tricks):
    assert interpreter_tricks(code) == tricks
