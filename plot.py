"""Curves and a table of one or several runs, from their metrics.jsonl.

    python plot.py --runs=out/tiny                                   # out/tiny/curves.svg
    python plot.py --runs='out/tiny;out/short' --output=out/both.png     # two runs in one picture
    python plot.py --runs='out/ablation/fast_without/*/seed*' --output=out/ablation.svg --table=out/ablation.md

The picture shows the learning rate, throughput, loss and perplexity (training and validation), and bits per byte
against bytes of text and against seconds of training. Folders seed1, seed2 … in one folder are one experiment: the
table has their mean and spread, and the improvement over a baseline seed by seed, because runs of one seed on the same
shards see the same text in the same order. Pictures need matplotlib (pip install matplotlib).
"""

import glob
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.config import run_stage
from runtime.errors import UserError
from runtime.files import atomic_write

GREY = "#808080"  # readable on white and on black, as are matplotlib's own colours for lines
SMOOTHING = 0.05  # each point of the training loss is the mean over this share of a run's reports


@dataclass(frozen=True)
class PlotConfig:
    runs: str = "out/tiny"  # folders of runs, or patterns such as out/ablation/*/seed*, joined by ;
    output: str | None = None  # file of the picture, .svg or .png; None is curves.svg in the first run's folder
    table: str | None = None  # file to write the table to, as Markdown; None only prints it
    baseline: str | None = None  # experiment that the table compares the others with; None takes the first

    def __post_init__(self) -> None:
        if self.output is not None and Path(self.output).suffix not in (".svg", ".png"):
            raise UserError(f"--output={self.output}: the name must end in .svg or .png")


class Curves(NamedTuple):
    """The metrics.jsonl of a run."""

    experiment: Path  # the folder with the folders of its seeds, or the run's own folder
    seed: str  # the name of the seed's folder, such as seed1, or ""
    train: list[dict[str, Any]]  # reports of training, in order
    val: list[dict[str, Any]]  # evaluations, in order

    @property
    def name(self) -> str:
        return self.experiment.name

    def seconds(self, tokens: list[int]) -> np.ndarray:
        """Seconds of training until each of these numbers of tokens, without evaluations and interruptions."""
        seen = np.array([0, *(event["tokens"] for event in self.train)])
        rates = np.array([event["tokens_per_s"] for event in self.train])
        return np.interp(tokens, seen, np.concatenate([[0], np.cumsum(np.diff(seen) / rates)]))

    def end(self) -> dict[str, float]:
        """The figures of the last evaluation."""
        last = self.val[-1]
        figures = {key: last.get(key) for key in ("tokens", "bytes", "flops", "val_bpb")}
        return {**figures, "seconds": float(self.seconds([last["tokens"]])[0])}


def plot(config: PlotConfig) -> dict[str, dict[str, Any]]:
    """Draw the runs, print their table and return its rows by experiment. Raises UserError if a run has no evaluation
    or matplotlib is missing."""
    found = [Path(name) for pattern in config.runs.split(";") for name in sorted(glob.glob(pattern.strip()))]
    folders = list(dict.fromkeys(folder.resolve() for folder in found if folder.is_dir()))
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise UserError(f"--runs={config.runs}: no such folder; name folders that train.py wrote")
    rows = ends_by_experiment(runs)
    if config.baseline is not None and config.baseline not in rows:
        raise UserError(f"--baseline={config.baseline}: not among {', '.join(rows)}")
    text = markdown_table(rows, config.baseline or next(iter(rows)))
    print(text)
    if config.table is not None:
        Path(config.table).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(config.table)) as file:
            file.write(text + "\n")
    output = Path(config.output) if config.output is not None else folders[0] / "curves.svg"
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, output)
    print(output)
    return rows


def read_run(folder: Path) -> Curves:
    """The metrics of the run in `folder`. Raises UserError if there are none, or no evaluation yet."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: not found; name the folder of a run")
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise UserError(f"{path}: a line is not JSON; continue the run, which removes it") from None
    events = [event for event in events if isinstance(event, dict)]
    train = [event for event in events if None not in map(event.get, ("tokens", "loss", "lr", "tokens_per_s"))]
    val = [event for event in events if None not in map(event.get, ("tokens", "val_loss", "perplexity", "val_bpb"))]
    if not train or not val:
        raise UserError(f"{path}: no evaluation yet; wait, or set a smaller --eval_interval")
    if re.fullmatch(r"seed\d+", folder.name):
        return Curves(folder.parent, folder.name, train, val)
    return Curves(folder, "", train, val)


def ends_by_experiment(runs: list[Curves]) -> dict[str, dict[str, Any]]:
    """For each experiment, the means of its runs' last figures, and under "seeds" the bits per byte of each seed."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run.name for run in runs):
        folders = sorted({str(run.experiment) for run in runs if run.name == name})
        if len(folders) > 1:
            raise UserError(f"--runs: {folders[0]} and {folders[1]} are both called {name}; rename one")
        ends = {run.seed: run.end() for run in runs if run.name == name}
        figures = {key: [end[key] for end in ends.values()] for key in next(iter(ends.values()))}
        means = {key: None if None in values else statistics.mean(values) for key, values in figures.items()}
        rows[name] = {**means, "seeds": {seed: end["val_bpb"] for seed, end in ends.items()}}
    return rows


def mean_and(values: list[float], divisor: float, mean_format: str) -> str:
    """The mean of `values` and, if there are several, their standard deviation divided by `divisor`."""
    spread = f" ± {statistics.stdev(values) / divisor:.4f}" if len(values) > 1 else ""
    return format(statistics.mean(values), mean_format) + spread


def markdown_table(rows: dict[str, dict[str, Any]], baseline: str) -> str:
    """The table: bits per byte with the standard deviation over seeds, and the improvement over `baseline`."""
    header = ["experiment", "runs", "bits per byte", f"improvement over {baseline}, bits per byte"]
    header += ["MB of text", "tokens", "FLOPs", "seconds"]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for name, row in rows.items():
        gain = "" if name == baseline else gain_over(rows[baseline], row)
        megabytes = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
        flops = "" if row["flops"] is None else f"{row['flops']:.2e}"
        bits_per_byte = mean_and(list(row["seeds"].values()), 1, ".4f")
        cells = [name, str(len(row["seeds"])), bits_per_byte, gain]
        cells += [megabytes, f"{row['tokens']:,.0f}", flops, f"{row['seconds']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gain_over(base: dict[str, Any], row: dict[str, Any]) -> str:
    """How many bits per byte `row` is below `base`: the mean over shared seeds and its standard error, or if they share
    none, the difference of their means."""
    gains = [base["seeds"][seed] - bits for seed, bits in row["seeds"].items() if seed in base["seeds"]]
    if not gains:
        return f"{base['val_bpb'] - row['val_bpb']:+.4f}"
    gain = mean_and(gains, math.sqrt(len(gains)), "+.4f")
    all_paired = len(gains) == len(row["seeds"]) == len(base["seeds"])
    return gain if all_paired else f"{gain} (pairs: {len(gains)})"


def draw(runs: list[Curves], output: Path) -> None:
    """Write the six diagrams to one file."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
    style |= {"svg.hashsalt": "codegpt", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}
    names = list(dict.fromkeys(run.name for run in runs))
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
        for i, run in enumerate(runs):
            is_first = run.name not in [other.name for other in runs[:i]]  # of its experiment: one entry in the legend
            draw_run(axes, run, {"color": f"C{names.index(run.name) % 10}", "label": run.name if is_first else None})
        titles = ["learning rate", "throughput, tokens/s", "loss, nats/token (thin: train)", "perplexity (thin: train)"]
        titles += ["bits per byte, validation"] * 2
        x_labels = ["tokens"] * 4 + ["bytes of text seen", "seconds of training"]
        for ax, title, x_label in zip(axes.flat, titles, x_labels, strict=True):
            ax.set(title=title, xlabel=x_label)
            ax.grid(alpha=0.25, color=GREY)
            ax.patch.set_alpha(0)
        axes.flat[3].set_yscale("log")
        figure.legend(loc="outside lower center", ncols=min(6, len(names)), frameon=False)
        metadata = {"Date": None} if output.suffix == ".svg" else {}  # so that the same runs give the same bytes
        with atomic_write(output, "wb") as file:
            figure.savefig(file, format=output.suffix[1:], transparent=True, dpi=110, metadata=metadata)
        pyplot.close(figure)


def draw_run(axes: np.ndarray, run: Curves, style: dict[str, Any]) -> None:
    """Draw the lines of one run, those of training thin."""
    thin = {**style, "linewidth": 0.8, "alpha": 0.7, "label": None}
    tokens, val_tokens = ([event["tokens"] for event in events] for events in (run.train, run.val))
    loss, val_loss = smooth([event["loss"] for event in run.train]), [event["val_loss"] for event in run.val]
    bpb, dots = [event["val_bpb"] for event in run.val], {**style, "marker": ".", "label": None}
    axes[0, 0].plot(tokens, [event["lr"] for event in run.train], **style)
    axes[0, 1].plot(tokens, [event["tokens_per_s"] for event in run.train], **thin)
    axes[0, 2].plot(tokens, loss, **thin)
    axes[0, 2].plot(val_tokens, val_loss, **dots)
    axes[1, 0].plot(tokens, np.exp(loss), **thin)
    axes[1, 0].plot(val_tokens, np.exp(val_loss), **dots)
    if all(event.get("bytes") is not None for event in run.val):
        axes[1, 1].plot([event["bytes"] for event in run.val], bpb, **dots)
    axes[1, 2].plot(run.seconds(val_tokens), bpb, **dots)


def smooth(values: list[float]) -> np.ndarray:
    """The mean of each value and the few before it."""
    width = max(1, round(SMOOTHING * len(values)))
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - width)
    return (sums[ends] - sums[begins]) / (ends - begins)


if __name__ == "__main__":
    run_stage(plot, PlotConfig)
