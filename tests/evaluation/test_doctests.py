import pytest

from evaluation.doctests import doctest_check
from runtime.errors import UserError
from sandbox.pool import Sandbox

PROMPT = 'def double(x):\n    """\n    >>> double(2)\n    4\n    >>> double(0)\n    0\n    """\n'


def test_a_completion_passes_if_all_doctests_of_the_prompt_do():
    check = doctest_check(PROMPT, "verify", "tests")
    undone = "    return 0\n\ndef double(x):\n    return 0\n"  # defines the function again, without its docstring
    programs = [PROMPT + rest for rest in ("    return 2 * x\n", "    return 4\n", undone)]
    with Sandbox(preload=["doctest"]) as sandbox:
        results = dict(sandbox.run_many((program, check, "") for program in programs))
    assert [results[i].passed for i in range(3)] == [True, False, False]
    assert "1 of 2 doctests fail" in results[1].detail and "only 0 doctests are left" in results[2].detail


@pytest.mark.parametrize(("prompt", "why"), [("x = 1\n", "has no doctests"), (">>>x", "malformed: line 1")])
def test_a_prompt_without_usable_doctests_says_what_asked_and_what_to_give_instead(prompt, why):
    with pytest.raises(UserError, match=rf"^verify: the prompt.*{why}"):
        doctest_check(prompt, "verify", "tests")
