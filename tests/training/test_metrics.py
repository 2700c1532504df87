import json
import sys
import types

from training.metrics import MetricsLog, Throughput, start_wandb


def test_a_resumed_log_holds_each_event_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / 3})
    path.write_text(path.read_text() + '{"step": 6, "lo')  # cut short by a kill
    MetricsLog(path, 3).write({"step": 4, "loss": 0.5})
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 2, 3, 4] and events[0]["loss"] == 1 / 3


def test_wandb_can_never_stop_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert start_wandb("codegpt", None, {}) is None
    assert "continuing without it (pip install wandb; wandb login)" in capsys.readouterr().err

    def fail(event, step):
        raise ConnectionError("gone")

    log = MetricsLog(tmp_path / "metrics.jsonl", 0, types.SimpleNamespace(log=fail))
    log.write({"step": 1})
    log.write({"step": 2})
    assert capsys.readouterr().err.count("warning: wandb: gone") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_throughput_counts_only_time_within():
    meter = Throughput(flops_per_token=10, peak_flops=1e4)
    with meter:
        meter.tokens += 100
    meter.seconds = 0.5
    assert meter.read() == {"tokens_per_s": 200.0, "mfu": 0.2}
    assert meter.tokens == 0 and meter.seconds == 0.0
