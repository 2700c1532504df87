import gzip
import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest

from evaluation.problems import FUNCTION_STOPS, SCRIPT_STOPS, function_check, load_problems
from runtime.errors import UserError
from sandbox.pool import Sandbox

HUMANEVAL = {
    "task_id": "H/0",
    "prompt": "def add(a, b):\n    '''Add.'''\n",
    "canonical_solution": "    return a + b\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function that adds. ",
    "code": "import math\ndef helper(x):\n    return x\ndef sum(a, b):\n    return helper(a) + b",
    "test_list": ["assert sum(1, 2) == 3", "assert math.isclose(sum(1, 1), 2)"],
    "test_setup_code": "",
}
MBPP_PLUS = {
    "task_id": 2,
    "prompt": "Write a function that adds.",
    "code": "def add(a, b):\n    return a + b",
    "test_imports": ["import math"],
    "test_list": ["assert add(1, 2) == 3"],
    "test": "def assertion(x, y):\n    assert math.isclose(x, y)\n\nassertion(add(1, 2), 3)\n",
}


HELPERS = '''"""Helpers."""
import math as m
from typing import List

MOD: int = 7
LIMIT = 10
SEEN = []

class Node:
    pass

@staticmethod
def scale(x):  # comment
    return m.floor(x) % LIMIT

def note(x):
    global SEEN
    SEEN += [x]

@staticmethod
def solve(x: List[int]):
    """Solve.'''


def write(path, rows) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)) + "\n\n")
    return str(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.parquet"])
@pytest.mark.parametrize("row", [HUMANEVAL, MBPP, MBPP_PLUS], ids=["humaneval", "mbpp", "mbpp+"])
def test_each_schema_gives_problems_that_their_solutions_solve(name, row, tmp_path):
    (problem,) = load_problems(write(tmp_path / name, [row]))
    with Sandbox(1) as sandbox:
        assert sandbox.run(problem.prompt + problem.solution, problem.check, problem.entry_point).passed
        wrong = problem.solution.replace("a + b", "a - b").replace("helper(a) + b", "7")
        assert not sandbox.run(problem.prompt + wrong, problem.check, problem.entry_point).passed
    assert problem.task_id in ("H/0", "MBPP/11", "MBPP/2") and problem.entry_point in ("add", "sum")
    assert problem.stops == (FUNCTION_STOPS if row is HUMANEVAL else SCRIPT_STOPS)


def test_mbpp_is_prompted_with_its_text_and_tests(tmp_path):
    (problem,) = load_problems(write(tmp_path / "p.jsonl", [MBPP]))
    tests = "\n".join(MBPP["test_list"])
    assert problem.prompt == f'"""\nWrite a function that adds.\n{tests}\n"""\n'


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**HUMANEVAL, "test": None}], "row 1: no text 'test'; give HumanEval's schema"),
        ([{"prompt": "x", "entry_point": "f", "test": ""}], "row 1: no text 'task_id'"),
        ([HUMANEVAL, {**MBPP, "test_list": None}], "row 2: no entry_point and no list test_list"),
        ([HUMANEVAL, HUMANEVAL], "a task_id occurs twice"),
        ([], "no problems in it"),
        ([[1]], "row 1: not a JSON object"),
    ],
)
def test_what_is_no_problem_is_named(rows, message, tmp_path):
    with pytest.raises(UserError, match=r"p\.jsonl") as error:
        load_problems(write(tmp_path / "p.jsonl", rows))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sets_come_through_datasets(monkeypatch):
    calls = []

    class Datasets:
        @staticmethod
        def load_dataset(name, configuration, split):
            calls.append((name, configuration, split))
            if "mbpp" in name:
                raise ConnectionError("no network")
            return [HUMANEVAL]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert load_problems("humaneval")[0].task_id == "H/0"
    assert calls == [("openai/openai_humaneval", None, "test")]
    with pytest.raises(UserError, match=r"--problems=mbpp: could not be downloaded \(ConnectionError\); connect once"):
        load_problems("mbpp")
    with pytest.raises(UserError, match="no such file; give one, or a set: humaneval, mbpp"):
        load_problems("humanevil")


@pytest.mark.parametrize("name", ["scale", "m", "LIMIT", "List"])
def test_what_a_check_names_of_its_prompt_is_the_checks_own(name):
    test = f"def check(candidate):\n    assert {name}\n"
    check = function_check(HELPERS, test, "solve")
    assert check.startswith("\nimport math as m\nfrom typing import List\nLIMIT = 10\n\n@staticmethod\ndef scale(x):\n")
    assert check.endswith(f"% LIMIT\n\n{test}\ncheck(solve)")


@pytest.mark.parametrize("name", ["SEEN", "MOD", "Node", "note", "solve", "other"])
def test_state_and_classes_of_a_prompt_are_the_programs(name):
    test = f"def check(candidate):\n    assert {name}\n"
    assert function_check(HELPERS, test, "solve") == f"\n{test}\ncheck(solve)"


@pytest.mark.parametrize(
    "prompt", ["def helper(:\ndef solve(x):\n", "    def solve(x):\n", "def helper(): pass\n", "\0def solve("]
)
def test_a_prompt_that_is_no_python_has_no_helpers(prompt):
    assert function_check(prompt, "helper", "solve") == "\nhelper\ncheck(solve)"


@pytest.mark.skipif("HUMANEVAL_FILE" not in os.environ, reason="HUMANEVAL_FILE is not set")
def test_three_problems_of_humaneval_have_helpers_and_redefining_them_changes_nothing():
    wrong = {
        "find_zero": "    return 0.0\n\ndef poly(xs, x):\n    return 0.0\n",
        "decode_cyclic": "    return s\n\ndef encode_cyclic(s):\n    return s\n",
        "decode_shift": "    return s\n\ndef encode_shift(s):\n    return s\n",
    }
    problems = load_problems(os.environ["HUMANEVAL_FILE"])
    helped = [problem for problem in problems if problem.check.count("def ") > problem.check.count("def check")]
    assert [problem.entry_point for problem in helped] == list(wrong)
    right = [(problem.prompt + problem.solution, problem.check, problem.entry_point) for problem in helped]
    fooled = [
        (problem.prompt + wrong[problem.entry_point], *job[1:]) for problem, job in zip(helped, right, strict=True)
    ]
    with Sandbox() as sandbox:
        results = dict(sandbox.run_many(right + fooled))
    assert [results[i].passed for i in range(6)] == [True] * 3 + [False] * 3
    assert not any(result.shared for result in results.values())
