import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from evaluation.judging import fate, judge, read_samples, self_test
from evaluation.problems import Problem, load_problems
from runtime.errors import UserError
from sandbox.pool import Sandbox
from sandbox.verdict import PASSED, SHARED, Limits, Result

ADD = Problem("T/add", "def add(a, b):\n", "assert add(1, 2) == 3", "add", "    return a + b\n", ())
LOOSE = ADD._replace(task_id="T/loose", check="add(1, 2)")
BASE = ADD._replace(  # its check derives a class from one of the program, so they share an interpreter
    task_id="T/base", prompt="class Base: pass\n\ndef add(a, b):\n", check=f"class Mine(Base): pass\n{ADD.check}"
)
YES = "    return Yes()\nclass Yes:\n    def __eq__(self, other): return True\n"
HUMANEVAL = os.environ.get("HUMANEVAL_FILE")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(limits=Limits(timeout_s=1.0)) as sandbox:
        yield sandbox


def test_a_judge_that_cannot_be_trusted_here_does_not_start(sandbox):
    self_test(sandbox, [ADD, ADD._replace(solution=None)])
    with pytest.raises(UserError, match=r"solutions of 1 of 2 .*\(T/slow; the first timed out\)"):
        self_test(sandbox, [ADD, ADD._replace(task_id="T/slow", solution="    while True: pass\n")])
    with pytest.raises(UserError, match=r"a wrong answer passes \(T/loose\); leave these out with --exclude"):
        self_test(sandbox, [ADD, LOOSE])


def test_samples_get_their_outcomes_in_order(sandbox):
    completions = ["    return a + b\n", "    return a - b\n", "    return (\n", "    while True: pass\n", YES]
    samples = [{"task_id": "T/add", "completion": completion} for completion in completions]
    results, seconds = judge(sandbox, [ADD], samples)
    fates = [("passed", ""), ("failed", "line 3: AssertionError"), ("failed", results[2]["detail"]), ("timed out", "")]
    fates.append(("failed", "line 5: AssertionError"))
    assert [fate(result) for result in results] == [
        {"task_id": "T/add", "passed": i == 0, "outcome": outcome, "detail": detail, "shared": False}
        for i, (outcome, detail) in enumerate(fates)
    ]
    assert "SyntaxError" in results[2]["detail"] and seconds > 1


def test_a_program_that_must_share_an_interpreter_with_its_check_is_flagged_or_refused(sandbox):
    samples = [{"task_id": "T/base", "completion": completion} for completion in (BASE.solution, YES)]
    results, _ = judge(sandbox, [BASE], samples)
    assert [(r["passed"], r["shared"], r["detail"]) for r in results] == [(True, True, ""), (True, True, "uses __eq__")]
    assert self_test(sandbox, [ADD, BASE]) == ["T/base"]
    with Sandbox(1, strict=True) as strict:
        assert self_test(strict, [ADD, BASE]) == ["T/base"]
        results, _ = judge(strict, [BASE], samples)
    assert [(r["outcome"], r["shared"], r["error"]) for r in results] == [("failed", True, SHARED)] * 2


def test_what_programs_print_is_not_kept():
    class Talkative:
        """In the place of a sandbox, which would take minutes for so many programs."""

        def run_many(self, programs):
            for index, _ in enumerate(programs):
                yield index, Result(PASSED, message="\U0001f600" * 2000, output="x" * 2**16)

    samples = [{"task_id": "T/add", "completion": ""}] * 300
    tracemalloc.start()
    try:
        judge(Talkative(), [ADD], samples)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300 * 8_000, "8 kB for each sample; its output alone has 64"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task_id": "T/add"}], "row 1: wants task_id and completion, both texts"),
        (
            [{"task_id": "T/add", "completion": ""}, {"task_id": "x", "completion": ""}],
            "row 2: no problem is called x; set --problems",
        ),
        ([], "no samples of these problems"),
    ],
)
def test_what_is_no_sample_is_named(rows, message, tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        read_samples(str(path), [ADD], [ADD])
    with pytest.raises(UserError, match="no such file"):
        read_samples("missing.jsonl", [ADD], [ADD])


@pytest.mark.skipif(HUMANEVAL is None, reason="HUMANEVAL_FILE is not set")
def test_every_solution_of_humaneval_passes_and_every_wrong_body_fails_on_a_busy_machine():
    problems = load_problems(HUMANEVAL)
    right = [{"task_id": p.task_id, "completion": p.solution} for p in problems]
    wrong = [{"task_id": p.task_id, "completion": "    return None\n"} for p in problems]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        with Sandbox() as sandbox:
            results, _ = judge(sandbox, problems, right + wrong)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [result["passed"] for result in results] == [True] * 164 + [False] * 164
    assert {result["outcome"] for result in results[164:]} == {"failed"}


def test_samples_of_a_subset_are_taken_from_a_file_of_all(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps({"task_id": name, "completion": ""}) + "\n" for name in ("T/loose", "T/add")))
    assert [sample["task_id"] for sample in read_samples(str(path), [ADD], [ADD, LOOSE])] == ["T/add"]
