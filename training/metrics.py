"""What a run reports: metrics.jsonl, one JSON object per event, and Weights & Biases if it is asked for."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.shards import TokenStream
from runtime.files import atomic_write
from training.recipe import Recipe
from training.run import Run


class MetricsLog:
    """Appends events, each with its `step`, to a file with one JSON object per line.

    First it removes the events after `resume_step`, which a continued run reports again, and a last line cut short by a
    kill. So the file has each event once, however often the run was interrupted.
    """

    def __init__(self, path: Path, resume_step: int, wandb_run: Any = None):
        self.path, self.wandb_run = path, wandb_run
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= resume_step]
        events = [json.loads(line) for line in kept]
        self.of_resumed_step = {key for event in events if event["step"] == resume_step for key in event}
        self.lowest_val_loss = min((event.get("val_loss") or math.inf for event in events), default=math.inf)
        with atomic_write(path) as file:
            file.writelines(line + "\n" for line in kept)

    def write(self, *events: dict[str, Any]) -> None:
        written = []
        for event in events:  # JSON has no infinity: the norm of an overflow becomes null
            infinite = [key for key, value in event.items() if isinstance(value, float) and not math.isfinite(value)]
            written.append({**event, **dict.fromkeys(infinite)})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(event) + "\n" for event in written))
        for event in written if self.wandb_run is not None else ():
            try:
                self.wandb_run.log(event, step=event["step"])
            except Exception as error:  # a service must not stop a run
                print(f"warning: wandb: {error}; continuing without it", file=sys.stderr)
                self.wandb_run = None
                return


def start_metrics(run: Run, settings: dict[str, Any], wandb_project: str | None) -> MetricsLog:
    """The log in the run's metrics.jsonl, and at Weights & Biases too if `wandb_project` is given."""
    out_dir = Path(run.config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    wandb_run = None if wandb_project is None else start_wandb(wandb_project, run.wandb_id, settings)
    if wandb_run is not None:
        run.wandb_id = wandb_run.id
    log = MetricsLog(out_dir / "metrics.jsonl", run.step, wandb_run)
    run.best_val_loss = min(run.best_val_loss, log.lowest_val_loss)  # of an evaluation just after saving
    return log


def start_wandb(project: str, run_id: str | None, config: dict[str, Any]) -> Any:
    """A wandb run, or `run_id` continued. If wandb is missing or unreachable, prints a warning and returns None."""
    try:
        import wandb

        settings = wandb.Settings(login_timeout=30)
        return wandb.init(project=project, id=run_id, resume="allow", config=config, settings=settings)
    except Exception as error:
        reason = str(error).split("\n")[0]
        print(f"warning: wandb: {reason}; continuing without it (pip install wandb; wandb login)", file=sys.stderr)
        return None


def progress(run: Run, stream: TokenStream) -> dict[str, Any]:
    """How far the run is: steps, tokens, bytes of text (estimated from the split's bytes per token) and FLOPs."""
    n_bytes = round(run.tokens * stream.bytes_per_token) if stream.bytes_per_token else None
    flops = run.tokens * run.model.flops_per_token()
    return {"step": run.step, "tokens": run.tokens, "bytes": n_bytes, "flops": flops}


def progress_bar(max_steps: int, step: int, rank: int) -> tqdm:
    """A bar over all steps, at `step` now; ranks other than 0 show none."""
    wait_s = 0.5 if sys.stderr.isatty() else 10.0  # a log file gets few lines
    return tqdm(total=max_steps, initial=step, unit="step", mininterval=wait_s, dynamic_ncols=True, disable=rank > 0)


class Throughput:
    """A stopwatch that is entered for each training step, so that evaluations do not count, and read at each report."""

    def __init__(self, flops_per_token: int, peak_flops: float | None):
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.tokens, self.seconds, self.t0 = 0, 0.0, 0.0

    def __enter__(self) -> None:
        self.t0 = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self.t0

    def read(self) -> dict[str, float]:
        """`tokens_per_s` since the last reading, and `mfu`, the share of the device's peak FLOP/s, if that is known."""
        tokens_per_s = self.tokens / self.seconds
        self.tokens, self.seconds = 0, 0.0
        if self.peak_flops is None:
            return {"tokens_per_s": tokens_per_s}
        return {"tokens_per_s": tokens_per_s, "mfu": tokens_per_s * self.flops_per_token / self.peak_flops}


def time_left(
    recipe: Recipe, step: int, eval_interval: int, eval_tokens: int, tokens_per_s: float, world_size: int = 1
) -> str:
    """Says how long the rest of a run takes after `step`, at `tokens_per_s` of all processes together. Evaluating a
    token takes a third of the time of training on it, and one process alone evaluates."""
    tokens = recipe.tokens_before(recipe.max_steps) - recipe.tokens_before(step)
    evaluations = -(-recipe.max_steps // eval_interval) - (step - 1) // eval_interval
    minutes = (tokens + evaluations * eval_tokens * world_size / 3) / tokens_per_s / 60
    duration = f"{max(1, minutes):.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    return f"about {duration} to go: {tokens:,} tokens at {tokens_per_s:,.0f} tokens/s, evaluations: {evaluations}"


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity if the line is damaged."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
