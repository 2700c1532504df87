"""Checks the judge on this machine, then judges samples by running them."""

import dataclasses
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
from sandbox.verdict import SHARED, Result

DETAIL_CHARS = 500  # how much of a detail is reported


def self_test(sandbox: Sandbox, problems: Sequence[Problem]) -> list[str]:
    """Raise UserError unless every problem's own solution passes, and wrong answers and early exits fail. Returns the
    task_ids of those whose solution and check must share an interpreter, which a strict sandbox may refuse."""
    solved = [problem for problem in problems if problem.solution is not None]
    results = run_all(sandbox, [(problem, problem.solution) for problem in solved], "self-test")
    of_solved = [(p.task_id, result) for p, result in zip(solved, results, strict=True)]
    failures = [(task_id, result) for task_id, result in of_solved if not result.passed and result.error != SHARED]
    if failures:
        names = ", ".join(task_id for task_id, _ in failures[:5])
        outcome = f"{failures[0][1].outcome} {failures[0][1].detail[:DETAIL_CHARS]}".strip()
        raise UserError(
            f"self-test: the solutions of {len(failures)} of {len(solved)} problems do not pass here ({names}; the "
            f"first {outcome}); try a larger --timeout_s, or leave them out with --exclude"
        )
    fooled = [problem for problem in solved if problem.entry_point]  # problems that took every wrong answer so far
    for wrong in ("object()", "None", "()"):  # at least one of them is wrong, whatever the problem asks for
        answer = f"(*args, **kwargs):\n    return {wrong}\n"
        results = run_all(sandbox, [(p, f"{p.solution}\n\n\ndef {p.entry_point}{answer}") for p in fooled])
        fooled = [problem for problem, result in zip(fooled, results, strict=True) if result.passed]
    if fooled:
        names = ", ".join(problem.task_id for problem in fooled[:5])
        raise UserError(f"self-test: a wrong answer passes ({names}); leave these out with --exclude")
    exits = ("import sys; sys.exit()", "import os; os._exit(0)", "raise SystemExit", "print('passed')\nassert False")
    if any(result.passed for _, result in sandbox.run_many((code, "assert False", "") for code in exits)):
        raise UserError("self-test: a program that leaves early passes; results of this machine cannot be trusted")
    return [task_id for task_id, result in of_solved if result.shared]


def read_samples(name: str, problems: Iterable[Problem], every: Iterable[Problem]) -> list[dict[str, str]]:
    """Read a file in human-eval's format, and return the samples of `problems`. Raises UserError at the first row that
    is not a sample, or is a sample of a problem that is not in `every`, the whole set."""
    wanted = {problem.task_id for problem in problems}
    known = {problem.task_id for problem in every}
    if not Path(name).is_file():
        raise UserError(f"--samples={name}: no such file; give JSON lines with task_id and completion")
    samples = read_rows(Path(name))
    for number, sample in enumerate(samples, start=1):
        if not all(isinstance(sample.get(key), str) for key in ("task_id", "completion")):
            raise UserError(f"{name}, row {number}: wants task_id and completion, both texts")
        if sample["task_id"] not in known:
            raise UserError(f"{name}, row {number}: no problem is called {sample['task_id']}; set --problems")
    samples = [sample for sample in samples if sample["task_id"] in wanted]
    if not samples:
        raise UserError(f"{name}: no samples of these problems; give JSON lines with task_id and completion")
    return samples


def judge(
    sandbox: Sandbox, problems: Iterable[Problem], samples: Sequence[dict[str, str]]
) -> tuple[list[dict[str, Any]], float]:
    """Run every sample with its problem's check. Returns for each, in order, its task_id, passed, outcome, detail,
    shared (whether it had to share an interpreter with its check) and error (the exception's type); and the seconds
    that all took."""
    by_id = {problem.task_id: problem for problem in problems}
    t0 = time.monotonic()
    jobs = [(by_id[sample["task_id"]], sample["completion"]) for sample in samples]
    lines: list[Any] = [None] * len(jobs)
    for index, result in _run(sandbox, jobs, "judging"):
        lines[index] = _line(samples[index], result)  # not the result: there may be 100,000, with long outputs
    return lines, time.monotonic() - t0


def _line(sample: dict[str, str], result: Result) -> dict[str, Any]:
    detail = result.detail
    if result.passed and result.shared and (tricks := interpreter_tricks(sample["completion"])):
        detail = "uses " + ", ".join(tricks)
    line = {"task_id": sample["task_id"], "passed": result.passed, "outcome": result.outcome}
    return line | {"detail": detail[:DETAIL_CHARS], "shared": result.shared, "error": result.error}


def fate(result: dict[str, Any]) -> dict[str, Any]:
    """A sample's line in a results file: task_id, passed, outcome, detail, shared."""
    return {key: value for key, value in result.items() if key != "error"}


def run_all(sandbox: Sandbox, jobs: Sequence[tuple[Problem, str]], label: str | None = None) -> list[Result]:
    """Run each (problem, completion), and return the results in order, without what the programs printed. Shows a
    progress bar if it has a `label`."""
    results: list[Any] = [None] * len(jobs)
    for index, result in _run(sandbox, jobs, label):
        results[index] = dataclasses.replace(result, output="")
    return results


def _run(
    sandbox: Sandbox, jobs: Sequence[tuple[Problem, str]], label: str | None = None
) -> Iterable[tuple[int, Result]]:
    """Run each (problem, completion). Yields its index and its result, in the order in which they end."""
    programs = ((problem.prompt + completion, problem.check, problem.entry_point) for problem, completion in jobs)
    return tqdm(sandbox.run_many(programs), label, len(jobs), disable=label is None, mininterval=1.0)
