import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from evaluation.problems import FUNCTION_STOPS, SCRIPT_STOPS, load_problems
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
