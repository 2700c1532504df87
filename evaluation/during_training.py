"""Scores a model on a few problems while it is in training, in a small share of the time."""

import contextlib
import statistics
import sys
import time
from collections.abc import Sequence

from data.tokenizer import Tokenizer
from evaluation.completions import complete
from evaluation.judging import run_all, self_test
from evaluation.pass_at_k import SYNTAX_ERRORS
from evaluation.problems import Problem, load_problems
from inference.sampling import Sampling
from model import GPT
from sandbox.pool import Sandbox
from sandbox.verdict import Result


class QuickScore(contextlib.AbstractContextManager):
    """Scores a model in training: pass@1 of greedy completions of a few problems, and the share that compiles.

    All scorings together take at most MAX_SHARE of the time since this object was made: one that would exceed it is
    put off. A context manager.
    """

    MAX_SHARE = 0.02

    def __init__(self, name: str, n_problems: int, max_new_tokens: int = 96):
        self.problems = load_problems(name)[:n_problems]
        self.sampling = Sampling(max_new_tokens, temperature=0.0)
        self.sandbox = Sandbox(1)
        self_test(self.sandbox, self.problems)
        self.failed = False
        self.began, self.spent_s = time.monotonic(), 0.0
        self.cost_s: float | None = None  # seconds of the last scoring; before the first, estimated from one problem

    def __exit__(self, *exception: object) -> None:
        self.sandbox.close()

    def score(self, model: GPT, tokenizer: Tokenizer) -> dict[str, float] | None:
        """Returns humaneval_pass@1, humaneval_compiles and humaneval_problems (their number); None if it is put off; {}
        once the sandbox has failed, because training shall go on."""
        try:
            return {} if self.failed else self._score(model, tokenizer)
        except OSError as error:
            self.failed = True
            print(f"warning: the model is not scored by running any more: {error}", file=sys.stderr)
            return {}

    def _score(self, model: GPT, tokenizer: Tokenizer) -> dict[str, float] | None:
        if self.cost_s is None:
            self.cost_s = len(self.problems) * self._run(model, tokenizer, self.problems[:1])[1]
        if self.spent_s + self.cost_s > self.MAX_SHARE * (time.monotonic() - self.began):
            return None
        results, self.cost_s = self._run(model, tokenizer, self.problems)
        compiled = [result.error not in SYNTAX_ERRORS for result in results]
        return {
            "humaneval_pass@1": statistics.fmean(result.passed for result in results),
            "humaneval_compiles": statistics.fmean(compiled),
            "humaneval_problems": len(results),
        }

    def _run(self, model: GPT, tokenizer: Tokenizer, problems: Sequence[Problem]) -> tuple[list[Result], float]:
        """Complete and run the problems. Returns their results and the seconds that it took."""
        t0 = time.monotonic()
        jobs = [(problem, complete(model, tokenizer, problem, self.sampling)[0].text) for problem in problems]
        results = run_all(self.sandbox, jobs)
        took_s = time.monotonic() - t0
        self.spent_s += took_s
        return results, took_s


def describe_score(figures: dict[str, float] | None) -> str:
    """Puts into words what `QuickScore.score` returned."""
    if not figures:
        late = f"that would take more than {QuickScore.MAX_SHARE:.0%} of the time"
        return f"not scored by running: {late if figures is None else 'the sandbox has failed'}"
    return (
        f"of {figures['humaneval_problems']} problems {figures['humaneval_pass@1']:.1%} solved, "
        f"{figures['humaneval_compiles']:.1%} compile"
    )
