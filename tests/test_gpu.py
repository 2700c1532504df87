"""What only a GPU can show; runs/gpu_report.sh runs these alone. No data is needed: shards of random ids do."""

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from benchmark.systems import write_random_shards
from inference.generate import generate_tokens
from inference.optimize import compile_step
from ops.cross_entropy import linear_cross_entropy
from runtime.config import load_config
from runtime.device import autocast
from train import TrainConfig, evaluate, train, train_step
from training.compilation import compile_model
from training.run import open_dataset, start_run

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
def test_loss_is_finite_and_falls_in_half_precision(dtype, compiled, make):
    """In fp16 with the gradient scaler, whose first steps may be left out while it finds its scale."""
    run = new_run(make(f"--dtype={dtype}"))
    assert run.scaler.is_enabled() == (dtype == "float16")
    if compiled:
        compile_model(run)
        assert run.model.is_compiled, "the compiler failed"
    losses = losses_on_one_batch(run, 40)
    assert all(torch.tensor(losses).isfinite()) and losses[-1] < 0.9 * losses[0]
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_loss_equals_eager(dtype, make):
    run = new_run(make(f"--dtype={dtype}"))
    inputs, targets = (half.to(DEVICE) for half in one_batch(run.config))
    with autocast(run.device, run.dtype):
        eager = run.model(inputs[: run.config.batch_size], targets[: run.config.batch_size]).item()
        compile_model(run)
        assert run.model.is_compiled, "the compiler failed"
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


def test_dropout_drops_its_share_when_compiled(make):
    """Two passes differ, the loss stays near the one without dropout, and an evaluation right after drops nothing."""
    run = new_run(make("--dtype=bfloat16", "--dropout=0.5"))
    compile_model(run)
    assert run.model.is_compiled, "the compiler failed"
    inputs, targets = (half[: run.config.batch_size].to(DEVICE) for half in one_batch(run.config))
    with autocast(run.device, run.dtype), torch.no_grad():
        dropped = [run.model(inputs, targets).item() for _ in range(2)]
        run.model.eval()
        kept = [run.model(inputs, targets).item() for _ in range(2)]
    assert dropped[0] != dropped[1] and kept[0] == kept[1]
    assert dropped[0] == pytest.approx(kept[0], rel=0.1)


def test_evaluation_right_after_compiling_equals_eager(make):
    eager, compiled = new_run(make("--dtype=float32")), new_run(make("--dtype=float32"))
    compile_model(compiled)
    assert compiled.model.is_compiled, "the compiler failed"
    stream = open_dataset(eager.config).split("val")
    losses = [evaluate(run, stream, 4096)["val_loss"] for run in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_micro_batch_that_does_not_fit_is_halved(make, capsys):
    """Memory is bounded to what a micro-batch of 32 needs and one of 64 does not."""
    wide = ("--vocab_size=512", "--n_embd=512", "--n_head=8", "--n_layer=8", "--tokens_per_step=8192")
    peaks = {}
    for batch_size in (16, 64):
        run = new_run(make(*wide, f"--batch_size={batch_size}"))
        torch.cuda.reset_peak_memory_stats()
        first = losses_on_one_batch(run, 2)
        peaks[batch_size] = torch.cuda.max_memory_allocated()
        del run
        torch.cuda.empty_cache()
    run = new_run(make(*wide, "--batch_size=64"))
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((peaks[16] + 0.5 * (peaks[64] - peaks[16])) / total)
    try:
        halved = losses_on_one_batch(run, 2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.config.batch_size in (16, 32) and "out of memory; continuing with" in capsys.readouterr().err
    assert halved == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_cached_decode_equals_full_forward(rows, compiled, make):
    """In fp32: the logits of each token decoded are those of a forward pass over all tokens so far. Compiled, that is
    one compilation; and a second text, which runs the CUDA graph of the first, gets the same tokens."""
    model = new_run(make("--dtype=float32")).model.eval()
    prompt = one_batch(model.config)[0][:1, :16].to(DEVICE)
    counters.clear()
    if compiled:
        compile_step(model, rows)
        assert model.compiled_decode is not None, "the compiler failed"
    for _ in range(2):
        seen: list[torch.Tensor] = []

        def choose(logits: torch.Tensor, seen=seen) -> torch.Tensor:
            seen.append(logits.float().clone())
            return logits.argmax(-1)

        steps = generate_tokens(model, prompt, choose, rows)
        chosen = torch.stack([next(steps).clone() for _ in range(40)], dim=1)  # (rows, 40)
        steps.close()
        tokens = torch.cat((prompt.expand(rows, -1), chosen), dim=1)
        with torch.no_grad():
            full = model(tokens)[:, 15:-1]  # (rows, 40, V)
        cached = torch.stack([logits.expand(rows, -1) for logits in seen], dim=1)
        torch.testing.assert_close(cached, full, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == compiled


def test_a_token_at_half_of_all_places_does_not_overflow_fp16():
    """cuBLAS may add in fp16 too; the scale leaves room for any sum."""
    torch.manual_seed(0)
    x = torch.full((4096, 64), 60.0, device=DEVICE).half().requires_grad_()
    weight = torch.randn(512, 64, device=DEVICE).requires_grad_()
    targets = torch.where(torch.arange(4096, device=DEVICE) % 2 == 0, 7, 9).int()
    linear_cross_entropy(x, weight, targets).backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all() and weight.grad[7].norm() > 1
