import doctest
import os
import sys
import types

import pytest

from evaluation.doctests import docstrings, doctest_check
from evaluation.problems import load_problems
from runtime.errors import UserError
from sandbox.pool import Sandbox

HUMANEVAL = os.environ.get("HUMANEVAL_FILE")
PROMPT = 'def double(x):\n    """\n    >>> double(2)\n    4\n    >>> double(0)\n    0\n    """\n'
RULES = '''def f(x):
    """
    >>> f("ellipsis")  # doctest: +ELLIPSIS
    'ab...z'
    >>> f("raises")
    Traceback (most recent call last):
      ...
    ValueError: bad
    >>> f("detail")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    some.where.KeyError: anything
    >>> f("skipped")  # doctest: +SKIP
    99
    >>> for i in range(2):
    ...     print(i)
    0
    1
    >>> f("space")  # doctest: +NORMALIZE_WHITESPACE
    [1,
     2]
    >>> f("blank")
    a
    <BLANKLINE>
    b
    >>> f("one")
    1
    >>> f("strict")  # doctest: +DONT_ACCEPT_TRUE_FOR_1
    True
    >>> y = 3; f("nothing")
    >>> f("leaves")
    Traceback (most recent call last):
    SystemExit: 4
    >>> f(x f)
    Traceback (most recent call last):
    SyntaxError: invalid syntax. Perhaps you forgot a comma?
    """
'''
BODY = """    if x == "raises": raise ValueError("bad")
    if x == "detail": raise KeyError(1)
    if x == "blank": return print("a\\n\\nb")
    if x == "leaves": raise SystemExit(4)
    return {"ellipsis": "abcz", "space": [1, 2], "one": True, "strict": True}.get(x)
"""
WRONG = [  # a change to BODY, and what is said of it
    ("", "", ""),
    ("abcz", "bcz", "'ab...z', got 'bcz'"),
    ('("bad")', '("worse")', "ValueError: bad, got ValueError: worse"),
    ('if x == "raises"', "if False", "ValueError: bad, got nothing"),
    ("KeyError", "TypeError", "some.where.KeyError: anything, got TypeError: 1"),
    ("[1, 2]", "[1, 3]", "[1, 2], got [1, 3]"),
    ("a\\n\\nb", "a\\nb", "a <BLANKLINE> b, got a b"),
    ('"one": True', '"one": 2', "1, got 2"),
    ('"strict": True', '"strict": 1', "True, got 1"),
    ("get(x)", "get(x, 5)", "nothing, got 5"),
    ("raise SystemExit(4)", "return 4", "SystemExit: 4, got 4"),
]


def test_a_completion_passes_if_all_doctests_of_the_prompt_do():
    check = doctest_check(PROMPT, "verify", "tests")
    bodies = [
        "    return 2 * x\n",
        "    return 4\n",
        "    return 0\n\ndef double(x):\n    return 2 * x\n",  # again, without its docstring
        "    return 0\n\ndef double(x):\n    return 0\n",
        "    return 0\n\nimport doctest, builtins\ndoctest.OutputChecker.check_output = lambda *a: True\n"
        "builtins.len = builtins.repr = lambda x: 0\n",
    ]
    with Sandbox(preload=["doctest"]) as sandbox:
        results = dict(sandbox.run_many((PROMPT + body, check, "") for body in bodies))
    assert [results[i].passed for i in range(5)] == [True, False, True, False, False]
    assert "1 of 2 doctests fail; the first: double(0): expected 0, got 4" in results[1].detail
    assert not any(result.shared for result in results.values())


def by_doctest(program: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether doctest itself finds no fault in a program."""
    module = types.ModuleType("program")
    monkeypatch.setitem(sys.modules, "program", module)
    exec(program, module.__dict__)
    runner = doctest.DocTestRunner(verbose=False)
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, "program")
    return not any(runner.run(test, out=lambda text: None).failed for test in tests)


def test_examples_are_compared_by_doctests_rules(monkeypatch):
    check = doctest_check(RULES, "verify", "tests")
    programs = [RULES + BODY.replace(old, new) for old, new, _ in WRONG]
    with Sandbox(preload=["doctest"]) as sandbox:
        results = dict(sandbox.run_many((program, check, "") for program in programs))
    for i, (_, _, message) in enumerate(WRONG):
        assert results[i].passed == by_doctest(programs[i], monkeypatch) == (message == ""), results[i].detail
        assert not message or (
            "1 of 11 doctests fail" in results[i].detail and f"expected {message}" in results[i].detail
        )


@pytest.mark.skipif(HUMANEVAL is None, reason="HUMANEVAL_FILE is not set")
def test_verdicts_on_humaneval_are_doctests_own(monkeypatch):
    jobs, wanted = [], []
    for problem in load_problems(HUMANEVAL):
        try:
            check = doctest_check(problem.prompt, "verify", "tests")
        except UserError:
            continue
        for body in (problem.solution, "    return None\n", "    raise ValueError(3)\n"):
            jobs.append((problem.prompt + body, check, ""))
            wanted.append(by_doctest(problem.prompt + body, monkeypatch))
    with Sandbox(preload=["doctest"]) as sandbox:
        results = dict(sandbox.run_many(jobs))
    assert [results[i].passed for i in range(len(jobs))] == wanted and 60 < sum(wanted) < len(wanted) / 2


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("'a' 'b'\ndef f(): pass\n", ["ab"]),
        ("class A:\n  r'''\\d'''\n  async def f(x):\n    # comment\n    'two'\n    'not this'", ["\\d", "two"]),
        ("def f():\n  x = '''no'''\n  def g():\n    '''nor this'''\nif 1:\n  'nor'\n  def h():\n    'h'\n", ["h"]),
        ("def f():\n  '''whole'''\n  return (", ["whole"]),
        ('def f():\n  """broken off', ["broken off\n"]),
        ("f'{x}'\n", [""]),
        ("def f(:\n)", []),
    ],
)
def test_docstrings_of_text_that_may_break_off(source, found):
    assert docstrings(source) == found


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("x = 1\n", "has no doctests"),
        (">>> f(1)\n1\n", "has no doctests, >>> lines in docstrings"),
        ('"""\n>>> f(1) # doctest: +SKIP\n"""', "has no doctests"),
        ('"""\n>>>x\n"""', "malformed: line 2"),
    ],
)
def test_a_prompt_without_usable_doctests_says_what_asked_and_what_to_give_instead(prompt, why):
    with pytest.raises(UserError, match=rf"^verify: the prompt.*{why}"):
        doctest_check(prompt, "verify", "tests")
