"""Times training, evaluation, loading and decoding on this machine, beside nanoGPT and transformers if asked.

    python bench.py configs/70m.py                                  # this project alone
    python bench.py configs/70m.py --peer=.peers/nanoGPT            # in turn with nanoGPT, at the same shapes
    python bench.py configs/70m.py --parts=decode --hf              # decoding, in turn with transformers' GPT-2
    python bench.py configs/70m.py --parts=train --profile          # what a step spends its time on, and a trace

Each system runs in a process of its own. The systems take turns, in rounds: one works while the others wait, so that
whatever else the machine does slows them all alike. Random ids replace a dataset that has no shards.
"""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.round_robin import Worker, alternate
from benchmark.systems import GPT2_SETTINGS, SERVED_ROWS, HuggingFace, NanoGPT, Ours, Served, dataset_or_random
from inference.optimize import QUANTIZATIONS
from model import GPTConfig
from runtime.config import format_config, run_stage
from runtime.device import DTYPES
from runtime.errors import UserError
from runtime.files import write_json
from train import TrainConfig, train_step

OURS = "codegpt"
PARTS = ("train", "eval", "loader", "decode", "serve")
PROFILED_STEPS = 3
UNITS = {"tflop/s": "TFLOP/s", "mfu": "MFU", "mb": "MB", "gb/s": "GB/s"}
Figures = dict[str, np.ndarray]  # by name, (systems, rounds): ours, then the others as far as they have the figure


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    parts: str = "train,eval,loader,decode"  # what to time, joined by commas; also serve, decoding as serve.py does it
    peer: str | None = None  # folder of a nanoGPT checkout to time beside this project; None times none
    hf: bool = False  # also time decoding with the GPT-2 of transformers
    rounds: int = 5  # rounds in which the systems take turns; decoding has decode_rounds
    steps: int = 10  # optimizer steps, evaluation batches or loader batches per round
    micro_steps: int = 1  # micro-steps per optimizer step, instead of tokens_per_step and its ramp
    decode_prompt: int = 64  # tokens in the prompts of decoding
    decode_tokens: int = 200  # tokens decoded after the prompt
    decode_batches: str = "1,20,200"  # numbers of rows to decode at once, joined by commas; each number is timed
    peer_batches: str = "1,20"  # numbers among decode_batches for which the other systems are timed too
    decode_rounds: int = 3  # rounds of decoding in which the systems take turns
    decode_dtype: str = "float32"  # dtype of weights and cache when decoding: float32, bfloat16, float16
    quantize: str | None = None  # decode with this project's weights in fewer bytes: float16, int8; None keeps them
    profile: bool = False  # print the ten costliest operations of a training step, and write a Chrome trace
    output: str | None = None  # JSON file of the figures; None is out/bench/NAME.json, where out_dir ends in NAME

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "micro_steps", "decode_prompt", "decode_tokens", "decode_rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_size is None:
            raise UserError("batch_size is None; a benchmark needs a number, such as --batch_size=16")
        self.training_config()
        for part in self.parts.split(","):
            if part not in PARTS:
                raise UserError(f"--parts={self.parts}: {part!r} is not one of {', '.join(PARTS)}")
        for name in ("decode_batches", "peer_batches"):
            if not all(number.isdecimal() and int(number) > 0 for number in getattr(self, name).split(",")):
                raise UserError(f"--{name}={getattr(self, name)}: wants numbers joined by commas, such as 1,20")
        for name, known in (("quantize", QUANTIZATIONS), ("decode_dtype", DTYPES)):
            if getattr(self, name) not in (None, *known):
                raise UserError(f"--{name}={getattr(self, name)}: not one of {', '.join(known)}")
        if self.peer is not None and not (Path(self.peer) / "model.py").is_file():
            remedy = f"git clone https://github.com/karpathy/nanoGPT {self.peer}"
            raise UserError(f"--peer={self.peer}: no model.py there; {remedy}")
        if self.hf and importlib.util.find_spec("transformers") is None:
            raise UserError("--hf: transformers is not installed; pip install transformers, or leave it out")

    def training_config(self) -> TrainConfig:
        """What is trained: steps of `micro_steps` micro-batches. Raises UserError for settings that do not fit."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        tokens_per_step = self.micro_steps * self.batch_size * self.block_size
        return TrainConfig(**settings | {"tokens_per_step": tokens_per_step, "ramp_doublings": 0, "ramp_steps": 0})


def bench(config: BenchConfig) -> dict[str, Any]:
    """Time what `config` asks for, print the table, save the figures as JSON and return them.

    Raises UserError for a device that is not there, and for a system that does not fit in memory.
    """
    config = dataclasses.replace(config, **dataclasses.asdict(config.training_config()))
    print(format_config(config))
    output = Path(config.output or f"out/bench/{Path(config.out_dir).name}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        workers = [stack.enter_context(closing(worker)) for worker in start_workers(config, Path(folder))]
        machine = workers[0].ask("facts")
        names = [worker.name for worker in workers]
        served = serving_worker(config, Path(folder)) if "serve" in config.parts.split(",") else None
        if served is not None:
            stack.enter_context(closing(served))
        figures = measure(config, workers, served, machine)
        ratios = {figure: rows[:1] / rows[1:] for figure, rows in figures.items() if len(rows) > 1}
        result = {"config": dataclasses.asdict(config), "machine": machine, "notes": notes(config, machine)}
        result |= {"figures": summary(figures, names), "ratios": summary(ratios, names[1:])}
        print("\n".join([*result["notes"], figures_table(result, names)]))
        if config.profile:
            result["trace"] = str(output.with_suffix(".trace.json"))
            result["profile"] = workers[0].ask("profile", PROFILED_STEPS, result["trace"])
            print(f"the ten costliest operations of a training step; {PROFILED_STEPS} steps are in {result['trace']}")
            line = "{ms_per_step:10.3f} ms {percent:5.1f}% {calls_per_step:8.1f} calls  {operation:.80}"
            print("\n".join(line.format(**operation) for operation in result["profile"]))
    write_json(output, result)
    print(f"saved {output}")
    return result


def start_workers(config: BenchConfig, folder: Path) -> Iterator[Worker]:
    """A process for each system, ours first. What they write goes to `folder`."""
    compiled = config.compile and (config.profile or "train" in config.parts or "eval" in config.parts)
    here = {"dataset": dataset_or_random(config, folder / "random"), "out_dir": str(folder / "run")}
    settings = dataclasses.replace(config.training_config(), init_from=None, compile=compiled, **here)
    decode_dtype = DTYPES[config.decode_dtype]
    yield (ours := Worker(OURS, Ours, settings, decode_dtype, config.quantize, train_step))
    settings = dataclasses.replace(settings, dtype=ours.ask("facts")["dtype"])  # on a CPU it is measured, once
    if config.peer is not None:
        yield Worker("nanoGPT", NanoGPT, settings, decode_dtype, config.peer)
    if config.hf:
        yield Worker("transformers", HuggingFace, settings, decode_dtype)


def serving_worker(config: BenchConfig, folder: Path) -> Worker:
    """A process in which this project decodes as serve.py does. `folder` has the random shards, if there are any."""
    dataset = str(folder / "random") if (folder / "random").exists() else config.dataset
    settings = dataclasses.replace(config.training_config(), dataset=dataset)
    return Worker(OURS, Served, settings, DTYPES[config.decode_dtype], config.quantize)


def measure(config: BenchConfig, workers: Sequence[Worker], served: Worker | None, machine: dict[str, Any]) -> Figures:
    """All figures, in the order of the table."""
    parts, timed = config.parts.split(","), (config.rounds, "rate")
    ours, trainers = workers[:1], [worker for worker in workers if worker.name != "transformers"]
    figures: Figures = {}
    if "train" in parts:
        figures["train_tokens_per_s"] = trained = alternate(trainers, *timed, "train", config.steps)
        peak_bytes = alternate(trainers, 1, "peak_memory")
        flops = trained * machine["flops_per_token"]  # per second
        figures["train_tflop_per_s"] = flops / 1e12
        if machine["peak_flops"] is not None:
            figures["train_mfu_percent"] = 100 * flops / machine["peak_flops"]
        if not np.isnan(peak_bytes).any():
            figures["train_peak_memory_mb"] = peak_bytes / 1e6
    if "eval" in parts:
        figures["eval_tokens_per_s"] = alternate(trainers, *timed, "evaluate", config.steps)
    if "loader" in parts:
        figures["loader_tokens_per_s"] = loaded = alternate(ours, *timed, "load", config.steps)
        if "train" in parts:
            figures["loader_percent_of_a_step"] = 100 * np.median(trained[0]) / loaded
    for number in config.decode_batches.split(",") if "decode" in parts else ():
        decoders = workers if number in config.peer_batches.split(",") else ours
        figures |= measure_decoding(config, decoders, int(number), machine["weight_bytes"])
    if served is not None:
        figures |= measure_serving(config, ours, [served])
    return figures


def measure_serving(config: BenchConfig, ours: Sequence[Worker], served: Sequence[Worker]) -> Figures:
    """Decoding as serve.py does it: one stream beside the decoder alone, many streams beside one, and the first token
    of a long prompt that was not seen and of one of which all but its last tokens were."""
    rounds, asked = config.decode_rounds, (config.decode_prompt, config.decode_tokens)
    alone = alternate(ours, rounds, "rate", "decode", 1, *asked)
    one, many = (alternate(served, rounds, "rate", "serve", streams, *asked) for streams in (1, SERVED_ROWS))
    n_prompt = config.block_size * 7 // 8
    unseen, seen = (alternate(served, rounds, "first_token_s", n_prompt, n) for n in (0, n_prompt * 17 // 18))
    return {
        "serve_1_tokens_per_s": one,
        f"serve_{SERVED_ROWS}_tokens_per_s": many,
        "serve_1_percent_of_decode_1": 100 * one / alone,
        f"serve_{SERVED_ROWS}_times_serve_1": many / one,
        "serve_first_token_ms_unseen": 1000 * unseen,
        "serve_first_token_ms_seen": 1000 * seen,
        "serve_seen_percent_of_unseen": 100 * seen / unseen,
    }


def measure_decoding(config: BenchConfig, workers: Sequence[Worker], batch: int, weight_bytes: int) -> Figures:
    """Decoding `batch` rows: the time to the first token, reading the prompt included; tokens/s of all rows together
    after the prompt; and the speed in GB/s at which the steps after the first read the weights."""
    timed, n_tokens = (config.decode_rounds, "rate", "decode", batch, config.decode_prompt), config.decode_tokens
    first_s = batch / alternate(workers, *timed, 1)
    rates = alternate(workers, *timed, n_tokens)
    later_s = batch * n_tokens / rates - np.median(first_s, axis=1, keepdims=True)
    figures = {f"decode_{batch}_first_token_ms": 1000 * first_s, f"decode_{batch}_tokens_per_s": rates}
    if n_tokens > 1 and later_s.min() > 0:
        figures[f"decode_{batch}_weights_gb_per_s"] = (n_tokens - 1) * weight_bytes / later_s / 1e9
    return figures


def summary(figures: Figures, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By figure and system: median, least and greatest, and the value of each round."""

    def spread(values: np.ndarray) -> dict[str, Any]:
        return {"median": np.median(values), "min": values.min(), "max": values.max(), "rounds": values.tolist()}

    return {
        figure: {name: spread(values) for name, values in zip(names, rows, strict=False)}
        for figure, rows in figures.items()
    }


def notes(config: BenchConfig, machine: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    arithmetic = f"{machine['dtype']}, {'compiled' if machine['compiled'] else 'eager'}"
    shape = f"{config.micro_steps} x {config.batch_size} x {config.block_size}"
    lines = [
        "{device}, {threads} threads, torch {torch}; {parameters:,} parameters, ".format(**machine) + arithmetic,
        f"medians of {config.rounds} rounds of {config.steps} steps, {shape} tokens each; in brackets the range, % of "
        "the median",
    ]
    if "decode" in config.parts:
        lines.append(
            f"decoding: {config.decode_rounds} rounds, {config.decode_prompt} tokens of prompt, {config.decode_tokens} "
            f"more, in {config.decode_dtype}; GB/s are the weights' bytes times the steps per second"
        )
    if config.peer is not None:
        lines.append(
            f"nanoGPT of {config.peer} trains under autocast in {machine['dtype']}, on a CPU too, where its own "
            f"train.py would use float32; it decodes without a cache, under autocast in {config.decode_dtype}; float32 "
            "is not rounded to TF32, which its scripts do"
        )
    ours_alone = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in GPT2_SETTINGS]
    changed = [name for name in (*ours_alone, "optimizer") if getattr(config, name) != getattr(TrainConfig, name)]
    if (config.peer is not None or config.hf) and changed:
        settings = " ".join(f"{name}={getattr(config, name)}" for name in changed)
        lines.append(f"the others have GPT-2's architecture of these sizes, ours has {settings}")
    return lines


def figures_table(result: dict[str, Any], names: Sequence[str]) -> str:
    """One row per figure. Columns: each system, then ours over each other one."""
    lines = [f"{'':30}" + "".join(f"{head:>20}" for head in [*names, *(f"ours/{name}" for name in names[1:])])]
    for figure, systems in result["figures"].items():
        quotients = result["ratios"].get(figure, {})
        cells = [systems.get(name) for name in names] + [quotients.get(name) for name in names[1:]]
        label = " ".join(UNITS.get(word, word) for word in figure.replace("_per_s", "/s").split("_"))
        lines.append(f"{label:30}" + "".join(f"{_cell(cell):>20}" for cell in cells))
    return "\n".join(lines)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    middle, width = cell["median"], cell["max"] - cell["min"]
    number = f"{middle:,.0f}" if middle >= 1000 else f"{middle:.3g}"
    return f"{number} ({100 * width / middle:.0f}%)" if len(cell["rounds"]) > 1 and middle else number


if __name__ == "__main__":
    run_stage(bench, BenchConfig)
