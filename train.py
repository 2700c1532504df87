"""Train a GPT on token shards, or continue a run that was interrupted: the same command does both.

    python train.py configs/tiny.py                   # two CPU cores, minutes
    python train.py configs/70m.py                    # one A100: the recipe of CodeGPT-70M
    python train.py configs/70m.py --batch_size=8     # any setting can be changed
    torchrun --nproc_per_node=8 train.py configs/70m.py   # one process per GPU, each with its share of every step
    python train.py configs/tiny.py --out_dir=out/tuned --init_from=out/tiny --dataset=mine   # fine-tune

Everything goes to `out_dir`: metrics.jsonl and the checkpoints (training/run.py says which). On a CPU, a run that was
killed and started again ends with the same weights, bit for bit, as one that was not.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from data.shards import TokenStream
from dataloader import Loader, Prefetcher
from evaluation.during_training import QuickScore, describe_score
from evaluation.likelihood import evaluate_loss
from inference.generate import generate
from inference.sampling import Sampling
from model import IGNORE
from runtime.config import format_config, run_stage
from runtime.device import (
    autocast,
    is_out_of_memory,
    peak_flops,
    peak_memory_bytes,
    resolve_device,
    rng_state,
    set_rng_state,
)
from runtime.errors import UserError
from runtime.interruption import Interruption
from training.batch_size import choose_batch_size, divide_among_ranks, smaller_divisor
from training.compilation import compile_model, save_compiled
from training.distributed import agree, average, highest, own_device, rank_0_first, rank_and_world, seed_rank, started
from training.metrics import MetricsLog, Throughput, progress, progress_bar, start_metrics, time_left
from training.recipe import learning_rate
from training.run import Run, RunConfig, keep_best, open_dataset, require_finite, save_run, start_run


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    eval_interval: int = 250  # steps between evaluations
    eval_tokens: int = 2**20  # validation tokens per evaluation, at most
    sample_interval: int | None = 500  # steps between printed samples; None: never
    sample_prompt: str = "def "  # text that printed samples begin with
    humaneval_interval: int | None = None  # steps between quick scores, which run generated code; None: never
    humaneval_problems: str = "humaneval"  # problems of the quick score: a set or a file, as in eval_humaneval.py
    humaneval_first: int = 10  # number of problems in the quick score, from the first of humaneval_problems
    log_interval: int = 10  # steps between lines in metrics.jsonl
    checkpoint_interval: int = 250  # steps between checkpoints
    checkpoint_minutes: float = 10.0  # longest time between checkpoints, minutes
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "codegpt"  # project at Weights & Biases

    def __post_init__(self) -> None:
        super().__post_init__()
        intervals = ("eval_interval", "log_interval", "checkpoint_interval", "sample_interval", "humaneval_interval")
        for name in (*intervals, "eval_tokens", "humaneval_first"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.checkpoint_minutes < 0:
            raise UserError(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be 0 or more")
        if self.sample_interval is not None and not self.sample_prompt:
            raise UserError("sample_prompt is empty; give it a character, or set --sample_interval=None")

    def report_intervals(self) -> tuple[int | None, ...]:
        return self.eval_interval, self.sample_interval, self.humaneval_interval


def train(config: TrainConfig) -> dict[str, Any]:
    """Train until `max_steps`, continuing the run in `out_dir` if there is one. Returns the figures of the last
    evaluation; under torchrun, ranks other than 0 return {}.

    Raises UserError if the settings do not fit the data or the run in `out_dir`; SystemExit after saving on a signal.
    """
    with started(own_device(resolve_device(config.device))):
        return train_rank(config)


def train_rank(config: TrainConfig) -> dict[str, Any]:
    """The body of `train`, run in every process."""
    rank, world_size = rank_and_world()
    with rank_0_first():
        batch_size = divide_among_ranks(config, config.batch_size, world_size)
        config = dataclasses.replace(config, batch_size=batch_size)
        print(format_config(config))
        shards = open_dataset(config)
        sequences = config.tokens_per_step // config.block_size
        loader = Loader(
            shards.split("train"), config.block_size, sequences, config.seed, rank, world_size, config.tokens_before
        )
        val_stream = shards.split("val")
        Loader(val_stream, config.block_size, 1, config.seed)  # a split that is too short fails here, before training
        run = start_run(config, shards)
    if run.step != highest(run.step):
        raise UserError(f"{config.out_dir}: not the same in every process; name a folder that all machines share")
    if agree(run.dtype == torch.float32):  # each process on a CPU measures whether bf16 is fast, and may differ
        run.dtype = torch.float32
    project = config.wandb_project if config.wandb_log else None
    metrics = start_metrics(run, dataclasses.asdict(config), project) if rank == 0 else None
    device = str(run.device) if world_size == 1 else f"{world_size} x {run.device.type}"
    print(
        f"{config.out_dir}: {run.model.n_parameters():,} parameters, {device}, {run.dtype_name}, "
        f"{len(loader.stream):,} tokens of {shards.path}, from step {run.step} to {config.max_steps}"
    )
    scores_here = config.humaneval_interval is not None and rank == 0
    try:
        if config.compile and run.step < config.max_steps:
            compile_model(run, partial(choose_batch_size, run, world_size))
            if rank == 0 and run.model.is_compiled:
                save_compiled(run)
        choose_batch_size(run, world_size)
        config = run.config
        with QuickScore(config.humaneval_problems, config.humaneval_first) if scores_here else nullcontext() as scoring:
            figures = train_loop(run, config, loader, val_stream, metrics, scoring)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory at batch_size {run.config.batch_size}; continue from the last checkpoint with a smaller "
            "--batch_size (tokens_per_step stays as it is), or on a larger device"
        ) from None
    if rank == 0:
        print(
            f"{config.out_dir}: step {run.step}, {run.tokens:,} tokens, validation loss {figures['val_loss']:.4f}, "
            f"perplexity {figures['perplexity']:.3f}, {figures['val_bpb']:.4f} bits per byte"
        )
    return figures


def train_loop(
    run: Run,
    config: TrainConfig,
    loader: Loader,
    val_stream: TokenStream,
    metrics: MetricsLog | None,
    scoring: QuickScore | None,
) -> dict[str, Any]:
    """Step, report, evaluate, sample and save until `max_steps`; returns the figures of the last evaluation. Every
    rank trains; rank 0 alone does the rest."""
    rank, world_size = loader.rank, loader.world_size
    meter = Throughput(run.model.flops_per_token() // world_size, peak_flops(run.device))
    saved_at, first_step, time_left_shown = time.monotonic(), run.step, False
    reporting = run, config, loader.stream, val_stream, metrics, scoring
    figures: dict[str, Any] = {}
    reported = False
    if rank == 0 and run.step and missed_report(run, config, metrics):
        figures, reported = report(*reporting), True

    with (
        Interruption(patient=world_size > 1) as interruption,
        Prefetcher(loader, run.step, run.device) as batches,
        progress_bar(config.max_steps, run.step, rank) as bar,
    ):
        while run.step < config.max_steps:
            seed_rank(config.seed, run.step)
            rng = rng_state(run.device)
            with meter:
                lr = learning_rate(run.step, config)
                result = train_step(run, batches.batch(run.step), lr, interruption)
                if result is None:  # interrupted: the weights and `rng` are from before this step
                    save_and_exit(run, rng, rank, interruption)
                run.step += 1
                meter.tokens += config.tokens_at(run.step - 1)
                if due(run, config.log_interval):  # not at every step: reading the loss waits for the device
                    loss, grad_norm = require_finite(result, run)
            if rank > 0:
                continue
            bar.update()
            if due(run, config.log_interval):
                event = {**progress(run, loader.stream), "loss": loss, "lr": lr, "grad_norm": grad_norm}
                event |= {**meter.read(), "peak_memory_bytes": peak_memory_bytes(run.device)}
                metrics.write(event)
                bar.set_postfix_str(f"loss {loss:.3f}, {event['tokens_per_s']:,.0f} tokens/s", refresh=False)
                if not time_left_shown and first_step + 3 <= run.step < config.max_steps:
                    time_left_shown = True
                    evaluations = config.eval_interval, config.eval_tokens
                    tqdm.write(time_left(config, run.step, *evaluations, event["tokens_per_s"], world_size))
            reporting_due = any(due(run, interval) for interval in config.report_intervals())
            late = time.monotonic() - saved_at > 60 * config.checkpoint_minutes
            if due(run, config.checkpoint_interval) or late or (reporting_due and not reported):
                save_run(run, rng_state(run.device))  # before the report, which may fail where nothing has yet
                saved_at = time.monotonic()
            if reporting_due:
                figures, reported = report(*reporting) or figures, True
    if rank == 0 and not figures:  # the run was complete already
        figures = {**progress(run, loader.stream), **evaluate(run, val_stream, config.eval_tokens)}
    return figures


def train_step(
    run: Run,
    batch: tuple[torch.Tensor, torch.Tensor],
    lr: float,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Take one optimizer step on the mean loss over the targets of all ranks' batches that are not IGNORE. `batch` is
    this rank's inputs and targets, (sequences, T) each; gradients are accumulated in micro-steps of `batch_size`.

    Returns the mean loss and the norm of the gradient before clipping, scalars on the device. Returns None and leaves
    weights and optimizers as they were if `interrupted()` is true between two micro-steps, in any rank.
    """
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
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
    overflowed = run.scaler.is_enabled() and not grad_norm.isfinite()  # in fp16; all optimizers skip this step
    if not overflowed:
        with autocast(run.device, run.dtype):  # Muon multiplies matrices
            for optimizer in run.optimizers:
                run.scaler.step(optimizer)
    run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    return mean_loss, grad_norm


def accumulate_gradients(
    run: Run, batch: tuple[torch.Tensor, torch.Tensor], interrupted: Callable[[], bool]
) -> torch.Tensor | None:
    """Add the gradients of the mean loss over the counted targets of `batch`, in micro-steps, and return that loss, or
    None if `interrupted()` is true before a micro-step. When memory runs out, it starts over from the same random
    state with `batch_size` halved."""
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
        except RuntimeError as error:
            if not is_out_of_memory(error) or run.config.batch_size == 1:
                raise
        loss = None  # frees the autograd graph
        run.model.zero_grad(set_to_none=True)
        set_rng_state(rng, run.device)
        torch.cuda.empty_cache()
        run.config = dataclasses.replace(run.config, batch_size=smaller_divisor(run.config.batch_size))
        tqdm.write(f"warning: out of memory; continuing with --batch_size={run.config.batch_size}", file=sys.stderr)


def n_counted(targets: torch.Tensor) -> torch.Tensor:
    """The number of targets that are not IGNORE, as a scalar on their device: reading it would wait for the device."""
    return (targets != IGNORE).sum()


def due(run: Run, interval: int | None) -> bool:
    """Whether the number of steps taken is a multiple of `interval`, or the run is complete."""
    return interval is not None and (run.step % interval == 0 or run.step == run.config.max_steps)


def missed_report(run: Run, config: TrainConfig, metrics: MetricsLog) -> bool:
    """Whether the run ended between saving this step and writing the report that was due. A quick score that was put
    off leaves no event; by itself it is tried again, and put off again."""
    if due(run, config.eval_interval):
        return "val_loss" not in metrics.of_resumed_step
    return due(run, config.humaneval_interval) and "humaneval_pass@1" not in metrics.of_resumed_step


def report(
    run: Run,
    config: TrainConfig,
    stream: TokenStream,
    val_stream: TokenStream,
    metrics: MetricsLog,
    scoring: QuickScore | None,
) -> dict[str, Any]:
    """Evaluate, sample and score the model, whatever is due after this step, and write the events. Returns the figures
    of the evaluation, or {}."""
    figures, events = {}, []
    if due(run, config.eval_interval):
        figures = {**progress(run, stream), **evaluate(run, val_stream, config.eval_tokens)}
        keep_best(run, figures["val_loss"])
        events.append(figures)
    if due(run, config.sample_interval):
        text = generate(run.model, run.tokenizer, config.sample_prompt, Sampling(max_new_tokens=64))[0].text
        tqdm.write(f"--- sample at step {run.step}\n{config.sample_prompt}{text}\n---")
    if scoring is not None and due(run, config.humaneval_interval):
        scored = scoring.score(run.model, run.tokenizer)
        events += [{"step": run.step, **scored}] if scored else []
        tqdm.write(f"step {run.step}: {describe_score(scored)}")
    metrics.write(*events)  # together: a run that is killed before repeats all of them
    return figures


def evaluate(run: Run, stream: TokenStream, max_tokens: int) -> dict[str, Any]:
    """Loss, perplexity and bits per byte on the validation split `stream`, as written to metrics.jsonl."""
    scored = evaluate_loss(
        run.model, stream, run.tokenizer, batch_size=run.config.batch_size, dtype=run.dtype, max_tokens=max_tokens
    )
    tqdm.write(
        f"step {run.step}: validation loss {scored['loss']:.4f}, perplexity {scored['perplexity']:.2f}, "
        f"{scored['bits_per_byte']:.4f} bits per byte"
    )
    return {"val_loss": scored["loss"], "perplexity": scored["perplexity"], "val_bpb": scored["bits_per_byte"]}


def save_and_exit(run: Run, rng: dict[str, torch.Tensor], rank: int, interruption: Interruption) -> NoReturn:
    """Save the run with the random state `rng`, in rank 0, and end the program as the signal would have."""
    if rank == 0:
        save_run(run, rng)
    agree(True)  # all wait until it is saved: torchrun ends every process as soon as one has left
    saved = f"saved step {run.step} in {run.config.out_dir}; run the same command to continue"
    interruption.leave(saved if rank == 0 else None)


if __name__ == "__main__":
    run_stage(train, TrainConfig)
