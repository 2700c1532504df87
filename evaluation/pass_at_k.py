"""Figures of judged samples: pass@k with standard errors, counts of outcomes and errors, and tables for a terminal.

Source: Chen et al., "Evaluating Large Language Models Trained on Code", 2021, which gives the unbiased estimator.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from sandbox.verdict import OUTCOMES

SYNTAX_ERRORS = ("SyntaxError", "IndentationError", "TabError")


def summarize(
    samples: Sequence[dict[str, str]], results: Sequence[dict[str, Any]], ks: Sequence[int]
) -> dict[str, Any]:
    """Returns pass@k and its standard error over the problems, both None if a problem has fewer than k samples, and
    counts: outcomes, errors, samples that had to share an interpreter with their check, suspicious ones of these."""
    passed: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        passed[result["task_id"]].append(result["passed"])
    fewest = min(map(len, passed.values()))
    scores = {k: [pass_at_k(len(p), sum(p), k) for p in passed.values()] if k <= fewest else None for k in ks}
    errors = Counter(result["error"] for result in results if result["outcome"] == "failed")
    return {
        "n_problems": len(passed),
        "n_samples": len(results),
        "fewest_samples": fewest,
        "pass@k": {str(k): statistics.fmean(values) if values else None for k, values in scores.items()},
        "standard_error": {
            str(k): statistics.stdev(values) / math.sqrt(len(values)) if values and len(values) > 1 else None
            for k, values in scores.items()
        },
        "outcomes": {outcome: sum(r["outcome"] == outcome for r in results) for outcome in OUTCOMES},
        "errors": dict(errors.most_common()),
        "syntax_error_rate": sum(errors[name] for name in SYNTAX_ERRORS) / len(results),
        "shared": sum(r["shared"] for r in results),
        "passed_shared": sum(r["passed"] and r["shared"] for r in results),
        "passed_with_tricks": sum(r["passed"] and bool(r["detail"]) for r in results),
        "cut_at_a_stop": sum(sample.get("finish") == "stop" for sample in samples),
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples passes, drawn from n of which c pass: 1 - C(n - c, k) / C(n, k)."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def pass_at_k_table(summary: dict[str, Any]) -> str:
    """Formats a summary for a terminal."""
    lines = [f"{summary['problems']}: {summary['n_problems']} problems, {summary['n_samples']} samples"]
    for k, value in summary["pass@k"].items():
        error = summary["standard_error"][k]
        if value is None:
            figure = f"skipped: needs {k} samples per problem, there are {summary['fewest_samples']}"
        else:
            figure = f"{value:7.2%}" + (f" ± {error:.2%}" if error is not None else "")
        lines.append(f"  pass@{k:<5} {figure}")
    outcomes = ", ".join(f"{outcome} {count:,}" for outcome, count in summary["outcomes"].items())
    errors = ", ".join(f"{error} {count:,}" for error, count in list(summary["errors"].items())[:6])
    seconds = ", ".join(f"{activity} {s:.1f}" for activity, s in summary["seconds"].items())
    lines += [
        f"  {outcomes}",
        f"  failed by: {errors or 'none'}",
        f"  syntax errors {summary['syntax_error_rate']:.1%}",
    ]
    if summary["shared"] or summary["shared_problems"]:
        lines.append(
            f"  had to share an interpreter with their check: {summary['shared']:,} samples, of which passed "
            f"{summary['passed_shared']:,} ({summary['passed_with_tricks']:,} suspicious); the solutions of "
            f"{len(summary['shared_problems']):,} problems"
        )
    lines.append(f"  seconds: {seconds}")
    return "\n".join(lines)


def best_of(summaries: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Returns for each k the temperature with the highest pass@k, or None if pass@k was skipped."""
    best: dict[str, float | None] = {}
    for k in summaries[0]["pass@k"]:
        scored = [s for s in summaries if s["pass@k"][k] is not None]
        best[k] = max(scored, key=lambda s: s["pass@k"][k])["temperature"] if scored else None
    return best


def sweep_table(sweep: dict[str, Any]) -> str:
    """Formats a table of temperatures and ks, with a star at the best temperature for each k."""
    lines = ["temperature  " + "  ".join(f"{'pass@' + k:>9}" for k in sweep["best"])]
    for summary in sweep["sweep"]:
        row = f"{summary['temperature']:11g}"
        for k, value in summary["pass@k"].items():
            star = "*" if sweep["best"][k] == summary["temperature"] else " "
            row += f"  {'skipped':>9}" if value is None else f"  {value:8.2%}{star}"
        lines.append(row)
    return "\n".join(lines)
