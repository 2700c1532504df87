import json
import time
from itertools import pairwise

import pytest
import torch
from test_eval_humaneval import PROBLEMS

from data.tokenizer import load_tokenizer
from evaluation.during_training import QuickScore, describe_score
from runtime.config import load_config
from train import TrainConfig, train
from weights.checkpoint import read


@pytest.fixture
def problems_file(tmp_path) -> str:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return str(path)


def test_scoring_takes_its_share_of_the_time_and_no_more(problems_file, monkeypatch):
    with QuickScore(problems_file, 4) as scoring:
        runs = []

        def run(model, tokenizer, problems):
            runs.append(len(problems))
            scoring.spent_s += 0.1 * len(problems)
            return [], 0.1 * len(problems)

        monkeypatch.setattr(scoring, "_run", run)
        monkeypatch.setattr("evaluation.during_training.statistics.fmean", lambda values: 0.0)
        times = []
        for second in range(0, 300, 2):
            monkeypatch.setattr(time, "monotonic", lambda second=second: scoring.began + second)
            if scoring.score(None, None) is not None:
                times.append(second)
            assert scoring.spent_s <= 0.1 or scoring.spent_s <= 0.02 * second
        monkeypatch.undo()
    assert runs[0] == 1, "one problem tells how long all would take"
    assert len(times) > 10 and times[0] >= 25 and min(b - a for a, b in pairwise(times)) >= 18


def test_training_reports_what_runs_and_its_weights_are_the_same(run_arguments, problems_file, tmp_path, monkeypatch):
    monkeypatch.setattr(QuickScore, "MAX_SHARE", 1e9)
    settings = [
        *run_arguments,
        "--humaneval_interval=6",
        f"--humaneval_problems={problems_file}",
        "--humaneval_first=3",
    ]
    train(load_config(TrainConfig, settings))
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [event for event in events if "humaneval_pass@1" in event]
    assert [event["step"] for event in scores] == [6, 12]
    assert all(event["humaneval_problems"] == 3 and event["humaneval_pass@1"] == 0.0 for event in scores)
    assert all(0 <= event["humaneval_compiles"] <= 1 for event in scores)
    train(load_config(TrainConfig, [*run_arguments, f"--out_dir={tmp_path / 'plain'}"]))
    scored, plain = (read(tmp_path / name / "last.pt")["model"] for name in ("run", "plain"))
    assert all(torch.equal(scored[name], plain[name]) for name in plain)


def test_a_sandbox_that_fails_does_not_end_the_training(problems_file, shards, lively_model, monkeypatch, capsys):
    def fail(programs):
        raise OSError("no room")
        yield

    monkeypatch.setattr(QuickScore, "MAX_SHARE", 1e9)
    with QuickScore(problems_file, 2) as scoring:
        monkeypatch.setattr(scoring.sandbox, "run_many", fail)
        tokenizer = load_tokenizer(str(shards.path / "bpe.json"))
        assert [scoring.score(lively_model, tokenizer) for _ in range(3)] == [{}] * 3
    assert capsys.readouterr().err.count("warning: the model is not scored by running any more: no room\n") == 1
    assert describe_score({}) == "not scored by running: the sandbox has failed"


def test_a_set_that_is_not_there_ends_the_run_before_it_begins(run_arguments, run_program, tmp_path):
    settings = [*run_arguments, "--humaneval_interval=6", "--humaneval_problems=missing.jsonl"]
    code, _, err = run_program(train, TrainConfig, *settings)
    assert code == 2 and "error: --problems=missing.jsonl: no such file" in err
