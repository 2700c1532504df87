import dataclasses
import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dataloader import Loader
from model import IGNORE
from runtime.config import load_config
from train import TrainConfig, train, train_step
from training.metrics import start_metrics, time_left
from training.recipe import learning_rate, make_optimizers
from training.run import open_dataset, start_run
from weights.checkpoint import read

ROOT = Path(__file__).parent.parent


def losses(out_dir: Path) -> list[tuple[int, float]]:
    events = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [(event["step"], event.get("loss", event.get("val_loss"))) for event in events]


def assert_same_run(a: Path, b: Path) -> None:
    """The weights, the optimizer's state and the loss of every step are equal, bit for bit."""
    one, other = read(a / "last.pt"), read(b / "last.pt")
    assert one["step"] == other["step"]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    for mine, theirs in zip(one["optimizers"], other["optimizers"], strict=True):
        for key, state in mine["state"].items():
            assert all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())
    assert losses(a) == losses(b)


def test_resume_matches_uninterrupted_run_after_kill_9(run_arguments, tmp_path, kills):
    """Killed at random moments, many of them while saving, because every step is saved, and started again. Muon and a
    batch that doubles at steps 50 and 100 have the most state to restore."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = [*run_arguments, f"--max_steps={100 * kills}", "--checkpoint_interval=1"]
    settings += ["--optimizer=muon", "--ramp_doublings=2", "--ramp_steps=100", "--batch_size=2"]
    train(load_config(TrainConfig, [*settings, f"--out_dir={whole}"]))
    command = [sys.executable, "train.py", *settings, f"--out_dir={cut}"]
    chance, killed_at = random.Random(1), []
    while len(killed_at) < kills:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = (cut / "last.pt").stat().st_mtime if killed_at and (cut / "last.pt").exists() else 0.0
        while process.poll() is None:  # wait until it trains, so that the moment falls within the training
            if (cut / "last.pt").exists() and (cut / "last.pt").stat().st_mtime != begun:
                time.sleep(chance.uniform(0.0, 0.8))
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        killed_at.append(losses(cut)[-1][0])
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    print("killed at steps", killed_at)
    assert_same_run(whole, cut)


def test_a_run_whose_evaluation_fails_is_saved_and_makes_up_for_it(run_config, tmp_path, monkeypatch):
    config = dataclasses.replace(run_config, eval_interval=5, checkpoint_interval=1000)
    whole = train(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("train.evaluate", lambda *args: 1 / 0)
        train(config)
    assert read(tmp_path / "run" / "last.pt")["step"] == 5 and not (tmp_path / "run" / "best.pt").exists()
    assert train(config) == whole
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    best = [read(tmp_path / name / "best.pt") for name in ("whole", "run")]
    assert best[0]["best_val_loss"] == best[1]["best_val_loss"] and best[0]["step"] == best[1]["step"]


def test_a_continued_run_remembers_an_evaluation_that_came_after_its_checkpoint(run_config, tmp_path):
    train(dataclasses.replace(run_config, max_steps=4, eval_interval=4))
    best = read(tmp_path / "run" / "best.pt")
    assert math.isinf(read(tmp_path / "run" / "last.pt")["best_val_loss"]) and best["step"] == 4
    run = start_run(run_config, open_dataset(run_config))
    start_metrics(run, {}, None)
    assert run.best_val_loss == best["best_val_loss"]


@pytest.mark.parametrize("failing", ["train.generate", "small_corpus.FakeScore.score"])
def test_nothing_of_a_report_is_lost_or_repeated_when_it_fails(failing, run_config, tmp_path, monkeypatch):
    """A sample, or a quick score, that comes before the first evaluation and fails."""
    from small_corpus import FakeScore

    monkeypatch.setattr("train.QuickScore", FakeScore)
    intervals = {"eval_interval": 6, "sample_interval": 3, "humaneval_interval": 3, "checkpoint_interval": 1000}
    config = dataclasses.replace(run_config, **intervals)
    train(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(failing, lambda *arguments: 1 / 0)
        train(config)
    assert read(tmp_path / "run" / "last.pt")["step"] == 3
    train(config)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "run"))
    scored = [[json.loads(line)["step"] for line in lines if "humaneval" in line] for lines in (whole, cut)]
    assert scored[0] == scored[1] == [3, 6, 9, 12] and losses(tmp_path / "whole") == losses(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_leaving_and_the_run_goes_on(number, run_arguments, tmp_path):
    never = ["--checkpoint_interval=1000000", "--max_steps=300", "--eval_interval=1000000"]
    command = [sys.executable, "train.py", *run_arguments, *never, f"--out_dir={tmp_path / 'cut'}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    step = read(tmp_path / "cut" / "last.pt")["step"]
    assert 0 < step < 300 and f"saved step {step}" in err
    settings = [*run_arguments, *never]
    train(load_config(TrainConfig, [*settings, f"--out_dir={tmp_path / 'cut'}"]))
    train(load_config(TrainConfig, [*settings, f"--out_dir={tmp_path / 'whole'}"]))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_says_how_long_it_will_take_from_its_first_steps(run_config, capsys):
    train(dataclasses.replace(run_config, max_steps=6))
    said = re.findall(r"^about 1 min to go: 768 tokens at .* tokens/s, evaluations: 2$", capsys.readouterr().out, re.M)
    assert len(said) == 1
    whole_day = dataclasses.replace(run_config, tokens_per_step=2**14, max_steps=5912, eval_tokens=2**20)
    assert time_left(whole_day, 1, 5, 2**20, 1000).startswith(
        "about 141.8 h to go: 96,845,824 tokens at 1,000 tokens/s"
    )


def test_a_reader_that_leaves_is_an_interruption_and_the_run_is_saved(run_arguments, tmp_path):
    never = ["--checkpoint_interval=1000000", "--max_steps=100000", "--eval_interval=20"]
    command = [sys.executable, "train.py", *run_arguments, *never]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        time.sleep(0.01)
    process.stdout.close()  # as `| tee log` does at Ctrl-C
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert read(tmp_path / "run" / "last.pt")["step"] > 0


def test_accumulated_gradients_equal_large_batch(run_config):
    shards = open_dataset(run_config)
    batch = Loader(shards.split("train"), run_config.block_size, 8, run_config.seed).batch(0)
    after = []
    for batch_size in (8, 2):
        config = dataclasses.replace(run_config, batch_size=batch_size, dropout=0.0, grad_clip=None)
        run = start_run(config, shards)
        loss, norm = train_step(run, batch, lr=1e-3)
        after.append((loss, norm, torch.cat([p.detach().flatten() for p in run.model.parameters()])))
    (loss, norm, weights), (other_loss, other_norm, other_weights) = after
    assert loss.item() == pytest.approx(other_loss.item(), rel=1e-6)
    assert norm.item() == pytest.approx(other_norm.item(), rel=1e-5)
    assert torch.allclose(weights, other_weights, atol=1e-5)  # of a step of 1e-3: AdamW makes much of tiny gradients
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("chunked", [True, False])
def test_the_loss_of_a_step_is_the_mean_over_the_targets_that_count(run_config, chunked):
    """Also over micro-steps with unequal numbers of targets, one of them without any. Without any target, it is 0."""
    shards = open_dataset(run_config)
    config = dataclasses.replace(run_config, dropout=0.0, grad_clip=None, chunked_loss=chunked)
    inputs, targets = Loader(shards.split("train"), config.block_size, 8, config.seed).batch(0)
    targets[:2] = IGNORE
    targets[2:4, 5:] = IGNORE

    def step(batch_size: int, targets: torch.Tensor) -> tuple[float, float]:
        run = start_run(dataclasses.replace(config, batch_size=batch_size), shards)
        loss, norm = train_step(run, (inputs, targets), lr=0.0)
        return loss.item(), norm.item()

    model = start_run(config, shards).model
    counted = targets != IGNORE
    nats = -model(inputs).log_softmax(-1)[counted].gather(1, targets[counted].long()[:, None])
    nats.mean().backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    for batch_size in (8, 2, 1):
        assert step(batch_size, targets) == pytest.approx((nats.mean().item(), norm.item()), rel=1e-5)
    assert step(2, torch.full_like(targets, IGNORE)) == (0.0, 0.0)


def test_learning_rate_has_the_right_endpoints():
    config = TrainConfig(max_steps=1000, warmup_steps=100, learning_rate=6e-4, min_lr=6e-5)
    assert learning_rate(0, config) == pytest.approx(6e-6)
    assert learning_rate(99, config) == learning_rate(100, config) == 6e-4
    assert learning_rate(550, config) == pytest.approx((6e-4 + 6e-5) / 2)
    assert learning_rate(1000, config) == pytest.approx(6e-5) and learning_rate(2000, config) == pytest.approx(6e-5)
    rates = [learning_rate(step, config) for step in range(100, 1001)]
    assert rates == sorted(rates, reverse=True)


def test_decay_falls_on_2d_weights_only(run_config):
    model = start_run(run_config, open_dataset(run_config)).model
    for group in make_optimizers(model, run_config, torch.device("cpu"))[0].param_groups:
        assert {p.dim() for p in group["params"]} == ({2} if group["weight_decay"] == 0.01 else {1})


def test_training_lowers_the_loss_and_reports_it(run_config):
    config = dataclasses.replace(run_config, max_steps=60, learning_rate=3e-3, dropout=0.0, eval_interval=20)
    figures = train(config)
    assert figures["val_loss"] < math.log(512) - 0.5
    assert figures["perplexity"] == pytest.approx(math.exp(figures["val_loss"]))
    events = [json.loads(line) for line in (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    assert [event["step"] for event in steps] == list(range(1, 61))
    expected = {"step", "tokens", "bytes", "flops", "loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_bytes"}
    assert set(steps[0]) == expected and steps[-1]["tokens"] == 60 * 256
    split = open_dataset(config).meta["splits"]["train"]
    assert steps[-1]["bytes"] == round(60 * 256 * split["bytes"] / split["tokens"])
    assert [event["step"] for event in events if "val_bpb" in event] == [20, 40, 60]


def test_a_finished_run_started_again_reports_and_changes_nothing(run_config):
    first = train(run_config)
    before = (Path(run_config.out_dir) / "last.pt").read_bytes()
    assert train(run_config)["val_loss"] == first["val_loss"]
    assert (Path(run_config.out_dir) / "last.pt").read_bytes() == before
    train(dataclasses.replace(run_config, max_steps=14, log_interval=7, learning_rate=1e-4))
    assert read(Path(run_config.out_dir) / "last.pt")["step"] == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--dataset=missing", "data/shards/missing/meta.json: not found; prepare the data with"),
        ("--vocab_size=640", "meta.json: vocab_size is 512, the model has 640; set --vocab_size=512"),
        ("--vocab_size=511", "meta.json: vocab_size is 512, the model has 511; set --vocab_size=512"),
        ("--tokens_per_step=288", "tokens_per_step is 288, not a multiple of batch_size x block_size, 128; set"),
        ("--n_head=5", "n_embd is 32, not a multiple of n_head, 5"),
        ("--device=tpu", "--device=tpu: not a device; use cuda, cuda:1, mps or cpu"),
        ("--dtype=int8", "--dtype=int8: not one of float32, bfloat16, float16"),
        ("--init_from=nowhere", "nowhere: no such checkpoint"),
        ("--beta1=1.5", "beta1 is 1.5, beta2 0.999, momentum 0.95; each must be"),
        ("--seed=-1", "seed is -1; it must be 0 or more"),
        ("--document_end=3", "document_end is 3, but documents of"),
        ("--learning_rate=1e30", "a weight is not finite|loss is nan|gradient norm nan"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_checkpoint(change, message, run_arguments, run_config, run_program):
    code, _, err = run_program(train, TrainConfig, *run_arguments, "--grad_clip=None", change)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and any(part in errors[0] for part in message.split("|"))
    assert not (Path(run_config.out_dir) / "last.pt").exists()


def test_in_fp16_an_overflow_anywhere_keeps_every_optimizer_from_its_step(run_config):
    config = dataclasses.replace(run_config, optimizer="muon", dropout=0.0)
    run = start_run(config, open_dataset(config))
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)
    run.model.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * math.nan)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    batch = torch.zeros(8, 32, dtype=torch.int32), torch.ones(8, 32, dtype=torch.int32)
    scale = run.scaler.get_scale()
    train_step(run, batch, 1e-3)
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    assert run.scaler.get_scale() < scale


def test_compiled_training_agrees_with_eager(run_config):
    config = dataclasses.replace(run_config, n_layer=1, dropout=0.0)
    eager = train(config)
    compiled = train(dataclasses.replace(config, compile=True, out_dir=f"{run_config.out_dir}-compiled"))
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-5)
    state = read(Path(f"{run_config.out_dir}-compiled") / "last.pt")["model"]
    assert "wte.weight" in state and not any("_orig_mod" in name for name in state)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_fifty_steps_of_the_chunked_loss_follow_the_plain_one(run_config, dtype, tolerance):
    losses = []
    for chunked in (True, False):
        out_dir = f"{run_config.out_dir}-{chunked}"
        settings = {"dtype": dtype, "chunked_loss": chunked, "max_steps": 50, "log_interval": 1, "dropout": 0.0}
        train(dataclasses.replace(run_config, out_dir=out_dir, eval_interval=50, **settings))
        events = map(json.loads, (Path(out_dir) / "metrics.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in events if "loss" in event])
    assert len(losses[0]) == 50 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
