import math

import pytest

from evaluation.pass_at_k import best_of, pass_at_k, pass_at_k_table, summarize, sweep_table


def test_pass_at_k_is_the_combinatorial_formula():
    for n in (1, 2, 7, 20, 200):
        for c in {0, 1, n // 3, n - 1, n}:
            for k in {1, 2, min(10, n), n}:
                if k <= n:
                    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


ABOUT = {"problems": "mine", "shared_problems": [], "seconds": {"judging": 1.0}}


def samples_and_results(n_right: list[int], n: int, error: str = "AssertionError") -> tuple[list, list]:
    results = [
        {"task_id": f"T/{task}", "passed": i < right, "outcome": "passed" if i < right else "failed"}
        for task, right in enumerate(n_right)
        for i in range(n)
    ]
    results = [{**r, "detail": "", "shared": False, "error": None if r["passed"] else error} for r in results]
    return [{"task_id": r["task_id"], "completion": ""} for r in results], results


def test_a_summary_averages_problems_and_skips_what_there_are_too_few_samples_for():
    samples, results = samples_and_results([0, 2, 4], 4, error="SyntaxError")
    summary = summarize(samples, results, [1, 2, 10])
    assert summary["pass@k"] == {"1": pytest.approx(0.5), "2": pytest.approx((0 + 5 / 6 + 1) / 3), "10": None}
    assert summary["standard_error"]["1"] == pytest.approx(0.5 / math.sqrt(3))
    assert summary["outcomes"]["passed"] == 6 and summary["syntax_error_rate"] == 0.5
    text = pass_at_k_table({**summary, **ABOUT})
    assert "pass@10    skipped: needs 10 samples per problem, there are 4" in text and "interpreter" not in text


def test_samples_that_shared_an_interpreter_with_their_check_are_counted():
    samples, results = samples_and_results([2], 4)
    results[0] |= {"shared": True, "detail": "uses __eq__"}
    results[1]["shared"] = results[2]["shared"] = True
    summary = summarize(samples, results, [1])
    assert (summary["shared"], summary["passed_shared"], summary["passed_with_tricks"]) == (3, 2, 1)
    text = pass_at_k_table({**summary, **ABOUT, "shared_problems": ["T/0"]})
    assert "with their check: 3 samples, of which passed 2 (1 suspicious); the solutions of 1 problems" in text


def test_a_sweep_marks_the_best_of_each_k():
    summaries = []
    for temperature, right in ((0.2, [4, 0]), (0.8, [1, 1])):
        summary = summarize(*samples_and_results(right, 4), [1, 4, 9])
        summaries.append({**summary, "temperature": temperature})
    best = best_of(summaries)
    assert best == {"1": 0.2, "4": 0.8, "9": None}
    rows = sweep_table({"best": best, "sweep": summaries}).splitlines()
    assert rows[1].split() == ["0.2", "50.00%*", "50.00%", "skipped"]
    assert rows[2].split() == ["0.8", "25.00%", "100.00%*", "skipped"]
