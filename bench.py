"""How fast training, evaluation, loading and decoding are on this machine, beside nanoGPT and transformers if asked.

    python bench.py configs/70m.py                                  # this project alone
    python bench.py configs/70m.py --peer=.peers/nanoGPT            # in turn with nanoGPT, at the same shapes
    python bench.py configs/70m.py --parts=decode --hf              # decoding beside transformers' GPT-2
    python bench.py configs/70m.py --parts=train --profile          # what a step spends its time on, and a trace

Each system runs in a process of its own. They take turns, in rounds, one working while the others wait, so that what
else the machine does slows all alike. It needs no data: without the dataset's shards it makes some of random ids.
"""

import dataclasses
import importlib.util
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.round_robin import Worker, alternate
from benchmark.systems import SYSTEMS, Decoding, write_random_shards
from data.shards import shards_path
from inference.optimize import QUANTIZATIONS
from runtime.config import format_config, run_stage
from runtime.device import DTYPES, resolve_device, resolve_dtype
from runtime.errors import UserError
from runtime.files import write_json
from train import TrainConfig, train_step
from training.run import open_dataset

PARTS = ("train", "eval", "loader", "decode")
OURS = "codegpt"
PROFILED_STEPS = 3
UNITS = {"tflop/s": "TFLOP/s", "mfu": "MFU", "mb": "MB", "gb/s": "GB/s"}
Figures = dict[str, dict[str, list[float]]]  # by figure, by system: a value a round
# Settings of which the peers have the defaults alone
OURS_ALONE = (
    "n_kv_head",
    "mlp_width",
    "swiglu",
    "rms_norm",
    "rope_theta",
    "qk_norm",
    "tied",
    "document_end",
    "optimizer",
)


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    parts: str = "train,eval,loader,decode"  # what to time, joined by commas
    peer: str | None = None  # folder of a nanoGPT checkout to time beside this project; None times none
    hf: bool = False  # time decoding with transformers' GPT-2 too
    rounds: int = 5  # rounds in which the systems take turns; of decoding, decode_rounds
    steps: int = 10  # optimizer steps, evaluation batches or loader batches a round
    micro_steps: int = 1  # micro-steps an optimizer step; tokens_per_step becomes as many times a micro-batch's
    decode_prompt: int = 64  # tokens of the prompt
    decode_tokens: int = 200  # tokens decoded after it
    decode_batches: str = "1,20,200"  # rows decoded side by side, each number in turn
    peer_batches: str = "1,20"  # those of the numbers that the other systems decode too
    decode_rounds: int = 3  # rounds of decoding
    decode_dtype: str = "float32"  # of weights and cache when decoding: float32, bfloat16, float16
    quantize: str | None = None  # weights of our decoding in fewer bytes: float16, or int8
    profile: bool = False  # name the ten costliest operations of a training step, and write a Chrome trace
    output: str | None = None  # JSON file of the figures; None is out/bench/NAME.json, NAME of out_dir

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "micro_steps", "decode_prompt", "decode_tokens", "decode_rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_size is None:
            raise UserError("batch_size is None; a benchmark wants a number, such as --batch_size=16")
        object.__setattr__(self, "tokens_per_step", self.micro_steps * self.batch_size * self.block_size)
        for name in ("ramp_doublings", "ramp_steps"):
            object.__setattr__(self, name, 0)
        super().__post_init__()
        for part in self.parts.split(","):
            if part not in PARTS:
                raise UserError(f"--parts={self.parts}: {part!r} is not one of {', '.join(PARTS)}")
        for name in ("decode_batches", "peer_batches"):
            if not all(number.isdecimal() and int(number) > 0 for number in getattr(self, name).split(",")):
                raise UserError(f"--{name}={getattr(self, name)}: wants numbers joined by commas, such as 1,20")
        if self.quantize not in (None, *QUANTIZATIONS):
            raise UserError(f"--quantize={self.quantize}: not one of {', '.join(QUANTIZATIONS)}")
        if self.decode_dtype not in DTYPES:
            raise UserError(f"--decode_dtype={self.decode_dtype}: not one of {', '.join(DTYPES)}")


def bench(config: BenchConfig) -> dict[str, Any]:
    """Time what `config` asks for, print the table, save the figures as JSON and return them.

    Raises UserError for a peer that is not there, or a system that does not fit in memory.
    """
    print(format_config(config))
    require_here(config)
    output = Path(config.output or f"out/bench/{Path(config.out_dir).name}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, start_workers(config, Path(folder)) as workers:
        machine = workers[0].ask("facts")
        figures = measure(config, workers, machine)
        machine["compiled"] = workers[0].ask("is_compiled")
        result = {"config": dataclasses.asdict(config), "machine": machine, "notes": notes(config, machine)}
        result |= {"figures": summary(figures), "ratios": ratios(figures)}
        print("\n".join([*result["notes"], figures_table(result)]))
        if config.profile:
            result["trace"] = str(output.with_suffix(".trace.json"))
            result["profile"] = workers[0].ask("profile", PROFILED_STEPS, result["trace"])
            print(profile_table(result["profile"], result["trace"]))
    write_json(output, result)
    print(f"saved {output}")
    return result


def require_here(config: BenchConfig) -> None:
    """Raise UserError if the device, the peer or transformers is not on this machine."""
    resolve_device(config.device)
    if config.peer is not None and not (Path(config.peer) / "model.py").is_file():
        raise UserError(
            f"--peer={config.peer}: no model.py there; git clone https://github.com/karpathy/nanoGPT {config.peer}"
        )
    if config.hf and importlib.util.find_spec("transformers") is None:
        raise UserError("--hf: transformers is not installed; pip install transformers, or leave it out")


@contextmanager
def start_workers(config: BenchConfig, folder: Path) -> Iterator[list[Worker]]:
    """The systems to time, ours first, each started; with data in `folder` unless the dataset is there."""
    dataset = choose_dataset(config, folder)
    dtype = resolve_dtype(
        config.dtype, resolve_device(config.device), config.batch_size * config.block_size, config.n_embd
    )
    chosen = {"dataset": dataset, "dtype": str(dtype).removeprefix("torch."), "init_from": None}
    settings = dataclasses.replace(config, out_dir=str(folder / "run"), **chosen)
    common = settings, Decoding(config.decode_prompt, DTYPES[config.decode_dtype], quantize=config.quantize)
    arguments: dict[str, tuple[Any, ...]] = {OURS: (*common, train_step)}
    if config.peer is not None:
        arguments["nanoGPT"] = (*common, config.peer)
    if config.hf:
        arguments["transformers"] = common
    with ExitStack() as stack:
        workers = []
        for name, given in arguments.items():
            workers.append(Worker(name, given))
            stack.callback(workers[-1].close)
        yield workers


def choose_dataset(config: BenchConfig, folder: Path) -> str:
    """The dataset, if its shards are there and fit the model, else shards of random ids in `folder`; says which."""
    reason = "there are no such shards"
    if (shards_path(config.dataset) / "meta.json").exists():
        try:
            open_dataset(config)
            return config.dataset
        except UserError as error:
            reason = str(error)
    n_val = config.steps * config.batch_size * config.block_size + 1
    path = folder / "random"
    write_random_shards(path, config.vocab_size, max(2**22, 16 * config.tokens_per_step + 1), n_val)
    print(f"random ids in the place of dataset {config.dataset}: {reason}")
    return str(path)


def measure(config: BenchConfig, workers: Sequence[Worker], machine: dict[str, Any]) -> Figures:
    """All figures of all parts, in the order of the table."""
    figures: Figures = {}
    parts = config.parts.split(",")
    trainers = [worker for worker in workers if hasattr(SYSTEMS[worker.name], "train")]
    if "train" in parts:
        figures |= measure_training(config, trainers, machine)
    if "eval" in parts:
        figures["eval_tokens_per_s"] = alternate(trainers, config.rounds, "evaluate", config.steps)
    if "loader" in parts:
        loaded = alternate(workers[:1], config.rounds, "load", config.steps)
        figures["loader_tokens_per_s"] = loaded
        if "train" in parts:
            trained = statistics.median(figures["train_tokens_per_s"][OURS])
            figures["loader_percent_of_a_step"] = {OURS: [100 * trained / rate for rate in loaded[OURS]]}
    if "decode" in parts:
        for number in config.decode_batches.split(","):
            decoders = workers if number in config.peer_batches.split(",") else workers[:1]
            figures |= measure_decoding(config, decoders, int(number), machine["weight_bytes"])
    return figures


def measure_training(config: BenchConfig, workers: Sequence[Worker], machine: dict[str, Any]) -> Figures:
    """Speed, and the peak memory of each system's process: on CUDA what torch held in the timed steps, elsewhere all
    that was resident until then, the libraries' code included."""
    for worker in workers:
        worker.ask("train", 2)
        worker.ask("reset_peak_memory")
    rates = alternate(workers, config.rounds, "train", config.steps, warm=False)
    flops = {name: [rate * machine["flops_per_token"] for rate in values] for name, values in rates.items()}
    figures = {"train_tokens_per_s": rates}
    figures["train_tflop_per_s"] = {name: [value / 1e12 for value in values] for name, values in flops.items()}
    if (peak := machine["peak_flops"]) is not None:
        figures["train_mfu_percent"] = {
            name: [100 * value / peak for value in values] for name, values in flops.items()
        }
    peaks = {worker.name: worker.ask("peak_memory") for worker in workers}
    if None not in peaks.values():
        figures["train_peak_memory_mb"] = {name: [peak / 1e6] for name, peak in peaks.items()}
    return figures


def measure_decoding(config: BenchConfig, workers: Sequence[Worker], batch: int, weight_bytes: int) -> Figures:
    """Of `batch` rows: time to the first token, the prompt's reading included; tokens/s of all rows together, from the
    prompt on; and the rate at which the steps after the first read the weights, in GB/s."""
    n_tokens = config.decode_tokens
    for worker in workers:  # ours may compile; what does not is warm after a token or two
        worker.ask("decode", batch, n_tokens if worker is workers[0] else min(2, n_tokens))
    firsts = alternate(workers, config.decode_rounds, "decode", batch, 1, warm=False)
    wholes = alternate(workers, config.decode_rounds, "decode", batch, n_tokens, warm=False)
    name = f"decode_{batch}"
    figures = {f"{name}_first_token_ms": {system: [1000 * s for s in values] for system, values in firsts.items()}}
    figures[f"{name}_tokens_per_s"] = {
        system: [batch * n_tokens / s for s in values] for system, values in wholes.items()
    }
    first_s = {system: statistics.median(values) for system, values in firsts.items()}
    if n_tokens > 1 and all(min(values) > first_s[system] for system, values in wholes.items()):
        n_bytes = (n_tokens - 1) * weight_bytes
        figures[f"{name}_weights_gb_per_s"] = {
            system: [n_bytes / (s - first_s[system]) / 1e9 for s in values] for system, values in wholes.items()
        }
    return figures


def summary(figures: Figures) -> dict[str, dict[str, Any]]:
    """By figure and system: median, least and greatest, and the value of each round."""
    return {row: {name: _spread(values) for name, values in systems.items()} for row, systems in figures.items()}


def ratios(figures: Figures) -> dict[str, dict[str, Any]]:
    """By figure and other system: ours over theirs, of the two values of each round."""
    pairs: Figures = {}
    for row, systems in figures.items():
        others = {name: values for name, values in systems.items() if name != OURS}
        for name, values in others.items():
            quotients = [ours / theirs for ours, theirs in zip(systems[OURS], values, strict=True)]
            pairs.setdefault(row, {})[name] = quotients
    return summary(pairs)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def notes(config: BenchConfig, machine: dict[str, Any]) -> list[str]:
    """What one must know to read the figures."""
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; {machine['parameters']:,} "
        f"parameters, {config.batch_size} x {config.block_size} tokens, micro-steps: {config.micro_steps}, "
        f"{machine['dtype']}, {'compiled' if machine['compiled'] else 'eager'}",
        f"medians of {config.rounds} rounds of {config.steps} steps; in brackets the range, % of the median",
    ]
    if "decode" in config.parts:
        lines.append(
            f"decoding: {config.decode_prompt} tokens of prompt, {config.decode_tokens} more, {config.decode_dtype}, "
            f"medians of {config.decode_rounds} rounds; GB/s are the weights' bytes times the steps a second"
        )
    if config.peer is not None:
        lines.append(
            f"nanoGPT of {config.peer} trains under autocast in {machine['dtype']}, on a CPU too, where its own "
            f"train.py would use float32; it decodes without a cache, under autocast in {config.decode_dtype}"
        )
    ours = {name: getattr(config, name) for name in OURS_ALONE}
    changed = [f"{name}={value}" for name, value in ours.items() if value != getattr(TrainConfig, name)]
    if (config.peer is not None or config.hf) and changed:
        lines.append(f"the others have GPT-2's architecture of these sizes, ours has {' '.join(changed)}")
    return lines


def figures_table(result: dict[str, Any]) -> str:
    """A row a figure, a column a system, and ours over each other one."""
    names = [OURS, *dict.fromkeys(name for row in result["ratios"].values() for name in row)]
    lines = [f"{'':30}" + "".join(f"{head:>20}" for head in [*names, *(f"ours/{name}" for name in names[1:])])]
    for row, systems in result["figures"].items():
        quotients = result["ratios"].get(row, {})
        cells = [systems.get(name) for name in names] + [quotients.get(name) for name in names[1:]]
        label = " ".join(UNITS.get(word, word) for word in row.replace("_per_s", "/s").split("_"))
        lines.append(f"{label:30}" + "".join(f"{_cell(cell):>20}" for cell in cells))
    return "\n".join(lines)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    median, width = cell["median"], cell["max"] - cell["min"]
    number = f"{median:,.0f}" if median >= 1000 else f"{median:.3g}"
    return f"{number} ({100 * width / median:.0f}%)" if len(cell["rounds"]) > 1 and median else number


def profile_table(operations: Sequence[dict[str, Any]], trace: str) -> str:
    """The costliest operations, a row each."""
    lines = [f"the ten costliest operations of a training step by themselves; trace of {PROFILED_STEPS} steps: {trace}"]
    lines.append(f"{'ms/step':>10} {'%':>6} {'calls/step':>11}  operation")
    for row in operations:
        lines.append(
            f"{row['ms_per_step']:10.3f} {row['percent']:6.1f} {row['calls_per_step']:11.1f}  {row['operation'][:80]}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(bench, BenchConfig)
