import gzip
import json
import os

import pytest

from data.cleaning.contamination import Decontaminator, needles_of, squeeze
from data.pipeline.steps import PipelineConfig
from runtime.errors import UserError

COLUMNS = PipelineConfig().contaminant_columns
MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements.",
    "code": "def f(a, b):\r\n  return tuple(set(a) & set(b))",
}
PROMPT = r'''from math import pi

def helper(x):
    """Something else."""

def grow(x: int) -> int:
    r"""Grow x by \alpha
    until it is large.
    """
'''
HUMANEVAL = {
    "task_id": "HumanEval/1",
    "prompt": PROMPT,
    "entry_point": "grow",
    "canonical_solution": "    while x < 100:\n        x = x * 2 + 1\n    return x\n",
}


def found(text: str, min_chars: int = 20) -> list[str]:
    return Decontaminator(needles_of([MBPP, HUMANEVAL], min_chars, COLUMNS, "MBPP")).problems(squeeze(text))


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("x = 1\n'''GROW x by \\Alpha until\nit  is large.'''", ["HumanEval/1"]),
        ("def f(x):\n\twhile x<100:\n\t\tx = x*2+1\n\treturn x", ["HumanEval/1"]),
        ("# write a function to FIND the shared elements.", ["MBPP/2"]),
        ("def f(a,b):\n  return tuple(set(a)&set(b))\n" + PROMPT, ["HumanEval/1", "MBPP/2"]),
        ("def helper(x):\n    '''Something else.'''", []),
        ("write a function to find the shared element", []),
        ("", []),
    ],
)
def test_docstrings_and_solutions_are_found_without_case_and_white_space(text, problems):
    assert found(text) == problems


def test_short_solutions_prove_nothing():
    short = {**HUMANEVAL, "canonical_solution": "    return x + y\n"}
    assert [needle.text for needle in needles_of([short], 20, COLUMNS, "x")] == [b"growxby\\alphauntilitislarge."]
    assert needles_of([short], 32, COLUMNS, "x") == [] and Decontaminator([]).problems("returnx+y") == []


def test_rows_that_are_no_problems_are_refused():
    with pytest.raises(UserError, match=r"quiz, problem 1: has none of the columns .*; set --contaminant_columns"):
        needles_of([{"riddle": "?"}], 32, COLUMNS, "quiz")
    assert needles_of([{"riddle": "What is it that walks on four legs?"}], 8, "riddle", "quiz")[0].problem == "quiz/1"


@pytest.mark.skipif("HUMANEVAL_FILE" not in os.environ, reason="needs HumanEval's file in HUMANEVAL_FILE")
def test_every_humaneval_problem_is_found_and_this_pythons_library_holds_none(corpus):
    with gzip.open(os.environ["HUMANEVAL_FILE"], "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    detector = Decontaminator(needles_of(problems, 32, COLUMNS, "HumanEval"))
    for problem in problems:
        for text in (problem["prompt"], problem["prompt"] + problem["canonical_solution"]):
            assert problem["task_id"] in detector.problems(squeeze("import os\n" + text + "\nprint()"))
    for path in corpus.glob("*.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            assert all(detector.problems(squeeze(json.loads(line)["content"])) == [] for line in file)
