"""Two processes of the real command, connected through gloo, against one."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime.config import load_config
from train import TrainConfig, train
from training.distributed import seed_rank
from weights.checkpoint import read

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(*arguments: str) -> subprocess.Popen:
    """The command of two processes, as torchrun starts it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*torchrun, "train.py", *arguments], cwd=ROOT, text=True, **pipes)


def ranks(*arguments: str, program: tuple[str, ...] = ("train.py",)) -> list[subprocess.Popen]:
    """Two processes with torchrun's variables but without torchrun, which would pass on signals."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *program, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    variables = [{**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [subprocess.Popen(command, cwd=ROOT, text=True, env=env, **pipes) for env in variables]


def succeeded(process: subprocess.Popen, err: str) -> bool:
    """Exit code 0; or, seen in one of some hundred runs, torch aborts a process that has done all its work and is
    leaving Python (docs/log.md). What the work came to is asserted by the tests."""
    return process.returncode == 0 or "terminate called without an active exception" in err


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for the processes, which must succeed."""
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert all(map(succeeded, processes, errors)), errors


def events(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_end_with_the_weights_of_one(run_arguments, tmp_path):
    """Each process takes its four sequences in two micro-steps, and each event and line is written once."""
    settings = [*run_arguments, "--dropout=0.0", "--batch_size=2", "--max_steps=5"]
    process = launch(*settings, f"--out_dir={tmp_path / 'two'}")
    train(load_config(TrainConfig, [*settings, f"--out_dir={tmp_path / 'one'}"]))
    out, err = process.communicate(timeout=60)
    assert succeeded(process, err), err
    assert out.count("parameters, 2 x cpu") == 1 and out.count("bits per byte") == 2  # the evaluation, the end
    one, two = (flat_weights(tmp_path / name) for name in ("one", "two"))
    # Sums in another order differ by some 1e-6 of a gradient in fp32, and AdamW moves a weight by about its rate.
    moved = 5 * 1e-3 * math.sqrt(len(one))
    assert (one - two).norm() < 1e-4 * moved
    for a, b in zip(events(tmp_path / "one"), events(tmp_path / "two"), strict=True):
        assert a["step"] == b["step"]
        for key in {"loss", "grad_norm", "val_loss"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=1e-5)


MASKED_STEP = """
import sys, torch
from runtime.config import load_config
from dataloader import Loader
from training.distributed import rank_and_world, started
from model import IGNORE
from training.run import open_dataset, start_run
from train import TrainConfig, train_step
config = load_config(TrainConfig, sys.argv[2:])
rank, world_size = rank_and_world()
with started(torch.device("cpu")):
    shards = open_dataset(config)
    inputs, targets = Loader(shards.split("train"), config.block_size, 8, config.seed).batch(0)
    targets[0::4] = IGNORE  # with the next line, three quarters of rank 0's targets and none of rank 1's
    targets[2::4, 16:] = IGNORE
    run = start_run(config, shards)
    loss, norm = train_step(run, (inputs[rank::world_size], targets[rank::world_size]), lr=1e-3)
    if rank == 0:
        torch.save((loss, norm, run.model.state_dict()), sys.argv[1])
"""


def test_ranks_weigh_by_their_targets_that_count(run_arguments, tmp_path):
    settings = [*run_arguments, "--dropout=0.0", "--batch_size=2"]
    finish(ranks(str(tmp_path / "two"), *settings, program=("-c", MASKED_STEP)))
    subprocess.run([sys.executable, "-c", MASKED_STEP, tmp_path / "one", *settings], cwd=ROOT, check=True)
    (loss, norm, weights), (other_loss, other_norm, other_weights) = (torch.load(tmp_path / n) for n in ("one", "two"))
    assert loss.item() == pytest.approx(other_loss.item(), rel=1e-6)
    assert norm.item() == pytest.approx(other_norm.item(), rel=1e-5)
    assert all(torch.allclose(weights[name], other_weights[name], atol=1e-5) for name in weights)


def test_processes_that_measure_differently_compute_alike(run_arguments, tmp_path):
    """Rank 0 finds bf16 fast and rank 1 does not: both train in fp32."""
    program = (
        "import os; from runtime import device; from train import *; "
        "device._relative_time = lambda *_: 0.5 if os.environ['RANK'] == '0' else 9.0; run_stage(train, TrainConfig)"
    )
    settings = [argument for argument in run_arguments if not argument.startswith("--dtype")]
    finish(ranks(*settings, "--max_steps=2", f"--out_dir={tmp_path / 'two'}", program=("-c", program)))
    assert read(tmp_path / "two" / "last.pt")["dtype"] == "float32"


def test_a_signal_to_one_process_stops_both_and_the_same_command_goes_on(run_arguments, tmp_path):
    settings = [
        *run_arguments,
        "--dropout=0.0",
        "--max_steps=150",
        "--eval_interval=1000",
        "--checkpoint_interval=1000",
    ]
    cut, metrics = tmp_path / "cut", tmp_path / "cut" / "metrics.jsonl"
    processes = ranks(*settings, f"--out_dir={cut}")
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    (_, err), (_, other_err) = (process.communicate(timeout=30) for process in processes)
    step = read(cut / "last.pt")["step"]
    assert [process.returncode for process in processes] == [128, 128 + signal.SIGTERM]
    assert 0 < step < 150 and f"saved step {step}" in err and "Traceback" not in err + other_err
    for out_dir in (cut, tmp_path / "whole"):
        finish(ranks(*settings, f"--out_dir={out_dir}"))
    assert [event["step"] for event in events(cut)] == [*range(1, 151), 150]
    assert torch.equal(flat_weights(cut), flat_weights(tmp_path / "whole")), "as if it had not been interrupted"


def flat_weights(out_dir: Path) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in read(out_dir / "last.pt")["model"].values()])


def test_other_ranks_have_randomness_of_their_own_which_a_continued_run_repeats(monkeypatch):
    """Rank 0's random state is in the checkpoint and is not seeded."""

    def drawn(rank: int, step: int) -> float:
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(1337)
        seed_rank(1337, step)
        return torch.rand(()).item()

    assert len({drawn(rank, step) for rank in (1, 2) for step in (0, 1)} | {drawn(0, 0), drawn(0, 1)}) == 5
    assert drawn(1, 5) == drawn(1, 5)
