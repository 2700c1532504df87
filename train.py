"""Train a GPT on token shards, or go on with a run that was interrupted: the same command does both.

    python train.py configs/tiny.py                   # two CPU cores, minutes
    python train.py configs/70m.py                    # one A100: the recipe of CodeGPT-70M
    python train.py configs/70m.py --batch_size=8     # any setting can be changed
    torchrun --nproc_per_node=8 train.py configs/70m.py   # a process a GPU; each step is shared out among them
    python train.py configs/tiny.py --out_dir=out/tuned --init_from=out/tiny --dataset=mine   # fine-tune

Everything goes to `out_dir`: checkpoints (checkpoint.py says which) and metrics.jsonl. On a CPU a run that was killed
and started again ends with the same weights, bit for bit, as one that was not.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import (
    Run,
    build_model,
    keep_best,
    open_run,
    read_newest,
    require_continuation,
    require_same,
    restore_run,
    rng_state,
    save_run,
    set_rng_state,
)
from config import format_config, run_stage
from dataloader import Loader, Prefetcher
from device import (
    autocast,
    keep_freed_memory,
    peak_flops,
    peak_memory_bytes,
    resolve_device,
    resolve_dtype,
    warn_if_slow,
)
from distributed import agree, average, highest, own_device, rank_0_first, rank_and_world, seed_rank, started
from errors import UserError
from eval_perplexity import evaluate_loss
from interruption import Interruption
from metrics import MetricsLog, Throughput, start_wandb
from model import GPT, IGNORE
from quick_score import QuickScore
from recipe import Recipe, learning_rate, make_optimizers
from sample import generate
from sampling import Sampling
from shards import Shards, TokenStream, open_shards
from tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainConfig(Recipe):
    dataset: str = "local"  # shards to train on: a folder under data/shards, or a path
    out_dir: str = "out/run"  # where checkpoints and metrics go; a run found there is continued
    init_from: str | None = None  # start from the weights of this run (a folder or a .pt file): fine-tuning
    batch_size: int | None = 16  # sequences a micro-step; None finds what fits in memory, which then halves it
    eval_interval: int = 250  # steps between evaluations
    eval_tokens: int = 2**20  # validation tokens an evaluation, at most
    sample_interval: int | None = 500  # steps between printed samples; None prints none
    sample_prompt: str = "def "  # what they begin with
    humaneval_interval: int | None = None  # steps between scorings by running what the model writes; None does none
    humaneval_problems: str = "humaneval"  # on these: a set by name, or a file, as in eval_humaneval.py
    humaneval_first: int = 10  # as many of them from the beginning
    log_interval: int = 10  # steps between lines in metrics.jsonl
    checkpoint_interval: int = 250  # steps between checkpoints
    checkpoint_minutes: float = 10.0  # and the longest time between two, minutes
    seed: int = 1337  # of the initial weights, dropout and the order of the data
    device: str | None = None  # cuda, mps or cpu; None takes the best there is
    dtype: str | None = None  # of the matrix products: float32, bfloat16, float16; None takes the device's native one
    chunked_loss: bool = True  # the loss by chunks of rows (loss.py); False holds all logits at once
    compile: bool = True  # torch.compile the model; where that fails, a warning, and on without
    verify: bool = False  # compare the shards' checksums before starting
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "codegpt"  # its project there

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("batch_size", "eval_interval", "eval_tokens", "log_interval")
        for name in (*counts, "checkpoint_interval", "sample_interval", "humaneval_interval", "humaneval_first"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.checkpoint_minutes < 0 or not 0 <= self.seed < 2**63:
            raise UserError("checkpoint_minutes and seed must be 0 or more, and seed below 2**63")
        if self.sample_interval is not None and not self.sample_prompt:
            raise UserError("sample_prompt is empty; give it a character, or set --sample_interval=None")
        micro_tokens = (self.batch_size or 1) * self.block_size
        if self.tokens_per_step % micro_tokens:
            nearest = max(1, round(self.tokens_per_step / micro_tokens)) * micro_tokens
            raise UserError(
                f"tokens_per_step is {self.tokens_per_step}, not a multiple of batch_size x block_size, "
                f"{micro_tokens}; set --tokens_per_step={nearest}, or another --batch_size"
            )


def train(config: TrainConfig) -> dict[str, Any]:
    """Train until `max_steps`, from the run in `out_dir` if there is one. Returns the last evaluation's figures, which
    under torchrun rank 0 alone has.

    Raises UserError for settings that do not fit the data or the run found, SystemExit after saving on a signal.
    """
    with started(own_device(resolve_device(config.device))):
        return train_rank(config)


def train_rank(config: TrainConfig) -> dict[str, Any]:
    """`train`, in one of the processes that are at it."""
    rank, world_size = rank_and_world()
    with rank_0_first():
        config = share_out(config)
        print(format_config(config))
        shards = open_dataset(config)
        sequences = config.tokens_per_step // config.block_size
        places = {"rank": rank, "world_size": world_size, "tokens_before": config.tokens_before}
        loader = Loader(shards.split("train"), config.block_size, sequences, config.seed, **places)
        val_stream = shards.split("val")
        Loader(val_stream, config.block_size, 1, config.seed)  # too short a split fails now, not at an evaluation
        run = start_run(config, shards)
        if config.batch_size is None:
            run.config = config = dataclasses.replace(
                config, batch_size=fitting_batch_size(run, config.step_sizes()[-1] // world_size)
            )
            print(f"batch_size: {config.batch_size}")
    if run.step != highest(run.step):
        raise UserError(f"{config.out_dir}: not the same in every process; name a folder that all machines share")
    if agree(run.dtype == torch.float32):  # on a CPU each process has measured for itself
        run.dtype = torch.float32
    metrics = start_metrics(run) if rank == 0 else None
    where = str(run.device) if world_size == 1 else f"{world_size} x {run.device.type}"
    print(
        f"{config.out_dir}: {run.model.n_parameters():,} parameters, {where}, {str(run.dtype).removeprefix('torch.')}, "
        f"{len(loader.stream):,} tokens of {shards.path}, from step {run.step} to {config.max_steps}"
    )
    try:
        if config.compile and run.step < config.max_steps:
            compile_model(run, Path(config.out_dir) / "compile_cache")
        with start_scoring(config) if rank == 0 else nullcontext() as scoring:
            figures = train_loop(run, loader, val_stream, metrics, scoring)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory at batch_size {run.config.batch_size}; the run is as last saved: go on with a smaller "
            "--batch_size (the tokens of a step stay the same), or on a larger device"
        ) from None
    if rank:
        return {}
    print(
        f"{config.out_dir}: step {run.step}, {run.tokens:,} tokens, validation loss "
        f"{figures['val_loss']:.4f}, perplexity {figures['perplexity']:.3f}, {figures['val_bpb']:.4f} bits per byte"
    )
    return figures


def train_loop(
    run: Run, loader: Loader, val_stream: TokenStream, metrics: MetricsLog | None, scoring: QuickScore | None = None
) -> dict[str, Any]:
    """Step, report, evaluate, sample and save until `max_steps`; returns the last evaluation's figures. Ranks other
    than 0 only step."""
    config, rank = run.config, loader.rank
    figures: dict[str, Any] = {}
    meter = Throughput(run.model.flops_per_token() // loader.world_size, peak_flops(run.device))
    saved_at, begun, expected = time.monotonic(), run.step, ""
    with (
        Interruption(patient=loader.world_size > 1) as interruption,
        Prefetcher(loader, run.step, run.device) as batches,
        progress_bar(config, run.step, rank) as bar,
    ):
        while run.step < config.max_steps:
            seed_rank(config.seed, run.step)
            rng = rng_state(run.device)
            with meter:
                lr = learning_rate(run.step, config)
                result = train_step(run, batches.batch(run.step), lr, interruption)
                if result is None:
                    if rank == 0:
                        save_run(run, rng)  # the run, and with `rng` its randomness, stand where the step began
                    agree(True)  # the others wait: torchrun ends all as soon as one has left
                    saved = f"saved step {run.step} in {config.out_dir}; the same command goes on"
                    interruption.leave(saved if rank == 0 else None)
                run.step += 1
                meter.tokens += config.tokens_at(run.step - 1)
                last = run.step == config.max_steps
                reporting = last or run.step % config.log_interval == 0
                saving = last or run.step % config.checkpoint_interval == 0
                saving = saving or time.monotonic() - saved_at > 60 * config.checkpoint_minutes
                if reporting:  # reading the loss waits for the device, so not at every step
                    loss, grad_norm = require_finite(result, run)
            if rank:
                continue
            bar.update()
            if reporting:
                event = {**seen(run, loader.stream), "loss": loss, "lr": lr, "grad_norm": grad_norm}
                event |= {**meter.read(), "peak_memory_bytes": peak_memory_bytes(run.device)}
                metrics.write(event)
                bar.set_postfix_str(f"loss {loss:.3f}, {event['tokens_per_s']:,.0f} tokens/s", refresh=False)
                if not expected and run.step >= begun + 3 and not last:
                    expected = expected_time(config, run.step, event["tokens_per_s"], loader.world_size)
                    tqdm.write(expected)
            if last or run.step % config.eval_interval == 0:
                figures = {**seen(run, loader.stream), **evaluate(run, val_stream)}
                metrics.write(figures)
                keep_best(run, figures["val_loss"])
            if config.sample_interval is not None and (last or run.step % config.sample_interval == 0):
                text = generate(run.model, run.tokenizer, config.sample_prompt, Sampling(max_new_tokens=64))[0].text
                tqdm.write(f"--- sample at step {run.step}\n{config.sample_prompt}{text}\n---")
            if scoring is not None and (last or run.step % config.humaneval_interval == 0):
                score(run, scoring, metrics)
            if saving:
                save_run(run, rng_state(run.device))
                saved_at = time.monotonic()
    return figures if figures or rank else {**seen(run, loader.stream), **evaluate(run, val_stream)}


def start_metrics(run: Run) -> MetricsLog:
    """The run's metrics.jsonl, and its wandb run if that is asked for."""
    config, wandb_run = run.config, None
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if config.wandb_log:
        wandb_run = start_wandb(config.wandb_project, run.wandb_id, dataclasses.asdict(config))
        run.wandb_id = wandb_run.id if wandb_run is not None else run.wandb_id
    return MetricsLog(out_dir / "metrics.jsonl", run.step, wandb_run)


def start_scoring(config: TrainConfig) -> AbstractContextManager[QuickScore | None]:
    """The scoring that `config` asks for, if any."""
    if config.humaneval_interval is None:
        return nullcontext()
    return QuickScore(config.humaneval_problems, config.humaneval_first)


def score(run: Run, scoring: QuickScore, metrics: MetricsLog) -> None:
    """Score what the model writes, as an event of metrics.jsonl, unless that would take too much of the time."""
    figures = scoring.score(run.model, run.tokenizer)
    if figures is None:
        tqdm.write(
            f"step {run.step}: not scored by running, it would take more than {scoring.MAX_SHARE:.0%} of the time"
        )
        return
    metrics.write({"step": run.step, **figures})
    tqdm.write(
        f"step {run.step}: of {figures['humaneval_problems']} problems {figures['humaneval_pass@1']:.1%} solved, "
        f"{figures['humaneval_compiles']:.1%} compile"
    )


def train_step(
    run: Run,
    batch: tuple[torch.Tensor, torch.Tensor],
    lr: float,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One optimizer step on the mean loss over all targets that count (not IGNORE) of `batch`, inputs and targets of
    (sequences, T) each, and of the other ranks' batches. The gradient is accumulated in micro-steps of `batch_size`.

    Returns the mean loss and the norm of the gradient before clipping, scalars on the device; or None, with the run
    untouched, if `interrupted()` came true between two micro-steps, in whichever rank.
    """
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = lr * group["rate"]
    mean_loss = accumulate_gradients(run, batch, interrupted)
    if agree(mean_loss is None):
        run.model.zero_grad(set_to_none=True)
        return None
    average([mean_loss, *(p.grad for p in run.model.parameters())], weight=n_counted(batch[1]) / batch[1].numel())
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    max_norm = math.inf if run.config.grad_clip is None else run.config.grad_clip
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
    overflowed = run.scaler.is_enabled() and not grad_norm.isfinite()  # in fp16: then no optimizer takes the step
    with autocast(run.device, run.dtype):  # Muon's products
        for optimizer in () if overflowed else run.optimizers:
            run.scaler.step(optimizer)
    run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


def accumulate_gradients(
    run: Run, batch: tuple[torch.Tensor, torch.Tensor], interrupted: Callable[[], bool]
) -> torch.Tensor | None:
    """The gradients of the mean loss over the targets of `batch` that count, in micro-steps, and that loss; None if
    `interrupted()` came true.

    Out of memory, it begins again, from the same randomness, with a `batch_size` of half as many sequences.
    """
    rng = rng_state(run.device)
    while True:
        micro_batches = list(zip(*(half.split(run.config.batch_size) for half in batch), strict=True))
        mean_loss, n_targets = torch.zeros((), device=run.device), n_counted(batch[1]).to(run.device).clamp(min=1)
        try:
            for inputs, targets in micro_batches:
                if interrupted():
                    return None
                targets = targets.to(run.device)
                with autocast(run.device, run.dtype):
                    loss = run.model(inputs.to(run.device), targets) / (n_targets / n_counted(targets).clamp(min=1))
                run.scaler.scale(loss).backward()
                mean_loss += loss.detach()
            return mean_loss
        except torch.OutOfMemoryError:
            if run.config.batch_size == 1:
                raise
        loss = None  # and with it all that it holds
        run.model.zero_grad(set_to_none=True)
        set_rng_state(rng, run.device)
        torch.cuda.empty_cache()
        run.config = dataclasses.replace(run.config, batch_size=smaller_divisor(run.config.batch_size))
        tqdm.write(f"warning: out of memory; going on with --batch_size={run.config.batch_size}", file=sys.stderr)


def n_counted(targets: torch.Tensor) -> torch.Tensor:
    """How many of the targets count in the loss: a scalar on their device, which nothing waits for."""
    return (targets != IGNORE).sum()


def smaller_divisor(n: int) -> int:
    """The largest divisor of `n` that is at most half of it."""
    return next(n // d for d in range(2, n + 1) if n % d == 0)


def fitting_batch_size(run: Run, sequences: int) -> int:
    """The largest micro-step into which this rank's `sequences` a step divide, and that fits in a GPU's memory as two
    trials foretell it; of no more tokens than keep a GPU busy, or a CPU's caches useful."""
    most = max(1, (2**16 if run.device.type == "cuda" else 2**12) // run.config.block_size)
    if run.device.type == "cuda":
        try:
            peaks = [_peak_of_micro_step(run, batch_size) for batch_size in (1, 2)]
        except torch.OutOfMemoryError:
            return 1
        free, _ = torch.cuda.mem_get_info(run.device)
        adam_bytes = 0 if run.optimizers[0].state else 8 * run.model.n_parameters()  # not there before the first step
        room = 0.9 * (free + torch.cuda.memory_reserved(run.device)) - adam_bytes - peaks[0]
        most = max(1, min(most, 1 + int(room / max(1, peaks[1] - peaks[0]))))
    return max(n for n in range(1, sequences + 1) if fits_steps(run.config, n) and n <= most)


def _peak_of_micro_step(run: Run, batch_size: int) -> int:
    """The most bytes that a micro-step holds on a GPU, parameters and gradients included."""
    torch.cuda.reset_peak_memory_stats(run.device)
    try_micro_step(run, batch_size)
    return torch.cuda.max_memory_allocated(run.device)


def share_out(config: TrainConfig) -> TrainConfig:
    """`config` with micro-steps no larger than a rank's share of a step. Raises UserError if the ranks' shares are not
    equal, or not whole micro-steps."""
    _, world_size = rank_and_world()
    first, *_, last = *config.step_sizes(), config.step_sizes()[-1]
    batch_size = max(1, min(config.batch_size or 1, last // world_size))
    if not fits_steps(config, batch_size):
        nearest = max(1, round(first / (world_size * batch_size))) * world_size * batch_size
        tokens = nearest * config.block_size << config.ramp_doublings
        raise UserError(
            f"tokens_per_step is {config.tokens_per_step}, {first} sequences at first, which {world_size} processes "
            f"cannot share out in micro-steps of {batch_size}; set --tokens_per_step={tokens}, or another --batch_size "
            "or --nproc_per_node"
        )
    return dataclasses.replace(config, batch_size=config.batch_size and batch_size)


def fits_steps(config: TrainConfig, batch_size: int) -> bool:
    """Are the ranks' shares of every step whole micro-steps, or one smaller than that?"""
    _, world_size = rank_and_world()
    shares = [sequences / world_size for sequences in config.step_sizes()]
    return all(share == int(share) and share % min(batch_size, share) == 0 for share in shares)


def open_dataset(config: TrainConfig) -> Shards:
    """The shards to train on. Raises UserError if they are damaged or their vocabulary does not fit the model's."""
    shards = open_shards(config.dataset)
    if config.verify:
        shards.verify()
    if not shards.vocab_size <= config.vocab_size < shards.vocab_size + 128:
        raise UserError(
            f"{shards.path}/meta.json: vocab_size is {shards.vocab_size}, the model has {config.vocab_size}; "
            f"set --vocab_size={-(-shards.vocab_size // 128) * 128}, or prepare the data with another --tokenizer"
        )
    end = Tokenizer.from_json(shards.tokenizer_json(), f"{shards.path}/tokenizer.json").end_of_text
    if config.document_end not in (None, end):
        raise UserError(
            f"document_end is {config.document_end}, but documents of {shards.path} end with {end}; "
            f"set --document_end={end}"
        )
    return shards


def start_run(config: TrainConfig, shards: Shards) -> Run:
    """The run in `out_dir`, where its newest checkpoint left it, or a new one.

    Raises UserError if the run there, or the one of `init_from`, does not match what `config` asks for.
    """
    device = own_device(resolve_device(config.device))
    payload = read_newest(Path(config.out_dir), set_aside=True)
    shape = (config.batch_size or 1) * config.block_size, config.n_embd
    dtype = resolve_dtype(config.dtype, device, *shape, began_in=payload.get("dtype") if payload else None)
    warn_if_slow(dtype, device, *shape)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = Tokenizer.from_json(shards.tokenizer_json(), f"{shards.path}/tokenizer.json")
    torch.manual_seed(config.seed)
    if payload is not None:
        require_continuation(config, payload, shards.fingerprint())
        model = build_model(config, payload["model"], device)
    elif config.init_from is not None:
        model = fine_tuned(config, tokenizer, shards.path, device)
    else:
        model = GPT(config).to(device)
    model.chunked_loss = config.chunked_loss
    optimizers = make_optimizers(model, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(config, model, optimizers, scaler, tokenizer, shards.fingerprint(), device, dtype)
    if payload is not None:
        restore_run(run, payload)
    return run


def fine_tuned(config: TrainConfig, tokenizer: Tokenizer, shards_path: Path, device: torch.device) -> GPT:
    """The model of the run `init_from`, if its shapes and tokenizer are those asked for; else raises UserError."""
    source_tokenizer, payload = open_run(config.init_from, verify=True)
    where = f"--init_from={config.init_from}"
    require_same(config, payload["model_config"], where, "set those values here")
    if source_tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"{where}: trained with another tokenizer than {shards_path} has; prepare the data with "
            "--tokenizer=PATH of the tokenizer.json beside the shards of that run"
        )
    return build_model(config, payload["model"], device)


def evaluate(run: Run, stream: TokenStream) -> dict[str, Any]:
    """Loss, perplexity and bits per byte on the validation split, for metrics.jsonl."""
    limits = {"batch_size": run.config.batch_size, "max_tokens": run.config.eval_tokens}
    scored = evaluate_loss(run.model, stream, run.tokenizer, dtype=run.dtype, **limits)
    tqdm.write(
        f"step {run.step}: validation loss {scored['loss']:.4f}, perplexity {scored['perplexity']:.2f}, "
        f"{scored['bits_per_byte']:.4f} bits per byte"
    )
    return {"val_loss": scored["loss"], "perplexity": scored["perplexity"], "val_bpb": scored["bits_per_byte"]}


def seen(run: Run, stream: TokenStream) -> dict[str, Any]:
    """How far the run is, for metrics.jsonl: steps, tokens, bytes of text as `stream` has them a token, FLOPs."""
    n_bytes = round(run.tokens * stream.bytes_per_token) if stream.bytes_per_token else None
    flops = run.tokens * run.model.flops_per_token()
    return {"step": run.step, "tokens": run.tokens, "bytes": n_bytes, "flops": flops}


def expected_time(config: TrainConfig, step: int, tokens_per_s: float, world_size: int = 1) -> str:
    """How long the steps after `step`, and the evaluations from there on, take at the speed of all ranks: a token
    evaluated takes a third of the time of one trained on, in one rank alone."""
    tokens = config.tokens_before(config.max_steps) - config.tokens_before(step)
    evaluations = -(-config.max_steps // config.eval_interval) - (step - 1) // config.eval_interval
    minutes = (tokens + evaluations * config.eval_tokens * world_size / 3) / tokens_per_s / 60
    time_left = f"{max(1, minutes):.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    return f"about {time_left} to go: {tokens:,} tokens at {tokens_per_s:,.0f} tokens/s, evaluations: {evaluations}"


def compile_model(run: Run, cache_dir: Path) -> None:
    """Compile the model in place, trying it on one micro-batch; where that fails, warn and leave it as it was. On a GPU
    what was compiled is kept in `cache_dir`, for when the run goes on on another machine: a CPU's code is for that
    processor alone, and torch does not tell them apart."""
    if run.device.type == "cuda":
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir.absolute()))  # where torch looks for it
    run.model.compile_training()
    try:
        try_micro_step(run, run.config.batch_size)
    except torch.OutOfMemoryError:
        run.model.zero_grad(set_to_none=True)  # the first step runs out too, and finds what fits
    except Exception as error:  # no C++ compiler, an unsupported platform or Python: the compiler raises anything
        run.model.compile_training(False)
        run.model.zero_grad(set_to_none=True)
        reason = str(error).strip().split("\n")[0]
        print(f"warning: torch.compile failed ({reason}); going on without it, slower", file=sys.stderr)


def try_micro_step(run: Run, batch_size: int) -> None:
    """A micro-step of `batch_size` sequences that leaves nothing behind, neither gradients nor used-up randomness."""
    tokens = torch.zeros((batch_size, run.config.block_size), dtype=torch.int32, device=run.device)
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []), autocast(run.device, run.dtype):
        run.model(tokens, tokens.clone()).backward()  # two tensors, as in training: one would compile twice
    run.model.zero_grad(set_to_none=True)


def require_finite(result: tuple[torch.Tensor, torch.Tensor], run: Run) -> tuple[float, float]:
    """Loss and gradient norm as numbers. Raises UserError if one is not finite (in fp16 a norm may be: the scaler
    left that step out)."""
    loss, grad_norm = (value.item() for value in result)
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or run.scaler.is_enabled()):
        raise UserError(
            f"step {run.step}: loss is {loss}, gradient norm {grad_norm}; the checkpoints in {run.config.out_dir} are "
            "from before: go on from there with a lower --learning_rate or --dtype=float32"
        )
    return loss, grad_norm


def progress_bar(config: TrainConfig, step: int, rank: int = 0) -> tqdm:
    looks = {"unit": "step", "mininterval": 0.5 if sys.stderr.isatty() else 10.0, "dynamic_ncols": True}
    return tqdm(total=config.max_steps, initial=step, disable=rank > 0, **looks)


if __name__ == "__main__":
    run_stage(train, TrainConfig)
