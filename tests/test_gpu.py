"""What only a GPU can show; runs/gpu_report.sh runs these alone. No data is needed: shards of random ids do."""

import json
from pathlib import Path

import pytest
import torch

from benchmark.systems import write_random_shards
from inference.generate import generate_tokens
from runtime.config import load_config
from runtime.device import autocast
from train import TrainConfig, train, train_step
from training.run import compile_model, open_dataset, start_run

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device that torch can use on this machine"
)

SIZES = ("--n_layer=2", "--n_head=2", "--n_embd=128", "--block_size=128", "--vocab_size=512", "--dropout=0.0")
STEPS = ("--batch_size=4", "--tokens_per_step=1024", "--warmup_steps=0", "--learning_rate=1e-3", "--min_lr=1e-3")
EVENTS = ("--log_interval=1", "--eval_interval=100", "--eval_tokens=1024", "--sample_interval=None")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "random"
    write_random_shards(folder, 512, 100_000, 10_000)
    return folder


@pytest.fixture
def make(dataset, tmp_path):
    """A TrainConfig for DEVICE with these settings besides; the run's folder is tmp_path/run unless they name one."""

    def config(*arguments: str) -> TrainConfig:
        here = (f"--dataset={dataset}", f"--out_dir={tmp_path / 'run'}", f"--device={DEVICE}", "--compile=False")
        return load_config(TrainConfig, [*SIZES, *STEPS, *EVENTS, *here, *arguments])

    return config


def new_run(config: TrainConfig):
    return start_run(config, open_dataset(config))


def one_batch(config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step, (B, T) each."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.tokens_per_step // config.block_size, config.block_size + 1)
    rows = torch.randint(config.vocab_size, shape, generator=generator)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def losses_on_one_batch(run, steps: int) -> list[float]:
    batch = one_batch(run.config)
    return [train_step(run, batch, run.config.learning_rate)[0].item() for _ in range(steps)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loss_is_finite_and_falls_in_half_precision(dtype, compiled, make, tmp_path):
    """In fp16 with the gradient scaler, whose first steps may be left out while it finds its scale."""
    run = new_run(make(f"--dtype={dtype}"))
    assert run.scaler.is_enabled() == (dtype == "float16")
    if compiled:
        compile_model(run, tmp_path / "compile_cache")
        assert run.model.compiled_trunk is not None, "the compiler failed"
    losses = losses_on_one_batch(run, 40)
    assert all(torch.tensor(losses).isfinite()) and losses[-1] < 0.9 * losses[0]
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_loss_equals_eager(dtype, make, tmp_path):
    run = new_run(make(f"--dtype={dtype}"))
    inputs, targets = (half.to(DEVICE) for half in one_batch(run.config))
    with autocast(run.device, run.dtype):
        eager = run.model(inputs[: run.config.batch_size], targets[: run.config.batch_size]).item()
        compile_model(run, tmp_path / "compile_cache")
        assert run.model.compiled_trunk is not None, "the compiler failed"
        compiled = run.model(inputs[: run.config.batch_size], targets[: run.config.batch_size]).item()
    assert compiled == pytest.approx(eager, rel=1e-5 if dtype == "float32" else 2e-3)


def test_fused_optimizer_equals_unfused(make):
    fused, plain = new_run(make("--dtype=float32")), new_run(make("--dtype=float32"))
    assert all(group["fused"] for group in fused.optimizers[0].param_groups)
    for group in plain.optimizers[0].param_groups:
        group["fused"] = group["foreach"] = False
    one, other = losses_on_one_batch(fused, 5), losses_on_one_batch(plain, 5)
    assert one == pytest.approx(other, rel=1e-4)
    for a, b in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_resumed_run_continues_the_losses(dtype, make, tmp_path):
    def losses(name: str, *max_steps: int) -> list[float]:
        for n in max_steps:
            train(make(f"--dtype={dtype}", f"--max_steps={n}", f"--out_dir={tmp_path / name}"))
        events = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [event["loss"] for event in events if "loss" in event]

    whole, cut = losses("whole", 6), losses("cut", 3, 6)
    assert len(whole) == 6 and cut == pytest.approx(whole, rel=1e-3)


def test_cached_decode_equals_full_forward(make):
    """In fp32: the logits of each token decoded are those of a forward pass over all tokens so far."""
    model = new_run(make("--dtype=float32")).model.eval()
    prompt = one_batch(model.config)[0][:1, :16].to(DEVICE)
    seen: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.float().clone())
        return logits.argmax(-1)

    steps = generate_tokens(model, prompt, choose, 3)
    chosen = torch.stack([next(steps).clone() for _ in range(40)], dim=1)  # (3, 40)
    tokens = torch.cat((prompt.expand(3, -1), chosen), dim=1)
    with torch.no_grad():
        full = model(tokens)[:, 15:-1]  # (3, 40, V)
    cached = torch.stack([logits.expand(3, -1) for logits in seen], dim=1)
    torch.testing.assert_close(cached, full, rtol=1e-3, atol=1e-4)
