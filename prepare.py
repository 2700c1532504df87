"""Turn source code into token shards: read, clean, decontaminate, redact, tokenize, deduplicate, write.

    python prepare.py configs/data/local.py               # this machine's Python, into data/shards/local/
    python prepare.py --source='files:data/raw/*.json.gz' --name=mine --tokenizer=gpt2 --filters=codeparrot
    python prepare.py configs/data/local.py --filters=codeparrot_v2 --dry_run=1000      # what would be dropped
    python prepare.py configs/data/codeparrot.py --part=1/4     # one quarter, on one of four machines
    python prepare.py configs/data/codeparrot.py --merge=4      # join the four parts' folders into shards
    python prepare.py configs/data/local.py --verify      # read all shards and compare their checksums

The input is read once. Workers turn it into units (data/pipeline/work_units.py). Then the documents are chosen and the
shards written (data/pipeline/assemble_shards.py). A run that was killed continues after its last complete unit. The
result is the same to the byte, with any number of workers. The folder gets its name when it is complete.
"""

import dataclasses
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cleaning.filters import split_names
from data.documents import Input, digest_of
from data.pipeline import report, workers
from data.pipeline.assemble_shards import KEPT, Units, choose, finished_units, plan, tokens_of, write
from data.pipeline.dry_run import preview
from data.pipeline.learn_tokenizer import tokenizer_for
from data.pipeline.machines import compare, gather, part_folder, part_of, read_json
from data.pipeline.split import is_validation
from data.pipeline.steps import PipelineConfig, Refinery
from data.pipeline.work_units import Maker, Task, is_done
from data.shards import SPLITS, open_shards, shards_path, tokenizer_file
from data.sources.open import open_source
from data.tokenizer import NAMED, load_tokenizer
from runtime.config import format_config, run_stage
from runtime.errors import UserError
from runtime.files import write_json

# Settings that do not change the content of the shards, and so may differ when a run continues.
FREE = ("name", "verify", "workers", "part", "merge", "dry_run", "retry_s")


@dataclass(frozen=True)
class PrepareConfig(PipelineConfig):
    name: str = "local"  # folder to make under data/shards, or any path with a slash in it
    max_tokens: int | None = None  # stop once training and validation together hold this many; None takes all
    unit_bytes: int = 2**24  # bytes of text per unit of work; each worker of a killed run loses at most one unit
    shard_tokens: int = 2**27  # tokens per shard, roughly
    workers: int | None = None  # number of worker processes; None starts one per core
    part: str | None = None  # I/N: process only every Nth input, beginning with the Ith, into NAME.part-I-of-N
    merge: int | None = None  # N: join the N parts that were made with --part into shards
    dry_run: int | None = None  # write nothing; show which of about this many documents would be dropped
    verify: bool = False  # prepare nothing; compare existing shards with their recorded checksums

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "unit_bytes", "shard_tokens", "workers", "merge", "dry_run"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not self.name:
            raise UserError("name is empty; give the folder to make under data/shards")
        modes = [mode for mode in ("part", "merge", "dry_run", "verify") if getattr(self, mode)]
        if len(modes) > 1:
            raise UserError(f"--{modes[0]} and --{modes[1]}: one run does one of them")
        if self.part is not None:
            part_of(self.part)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepares the shards that `config` describes, or finishes what a killed run left. Shards that exist already with
    the same settings stay as they are. Returns the content of meta.json; for a part the content of its settings.json,
    for a dry run the number of dropped documents by reason."""
    path = shards_path(config.name)
    if config.verify:
        shards = open_shards(config.name)
        shards.verify()
        print(f"{path}: every file is as it was written")
        return shards.meta
    print(format_config(config))
    if config.dry_run is not None:
        with tempfile.TemporaryDirectory() as downloads:
            return preview(config, _inputs(config, Path(downloads), {}), config.dry_run)
    if os.path.lexists(path):
        return _existing(path, config)
    refinery = Refinery(config) if config.merge is None else None  # first: raises if it needs anything that is missing
    work = part_folder(path, *part_of(config.part)) if config.part else path.with_name(f"{path.name}.partial")
    with _locked(work):
        if os.path.lexists(path):  # another preparation made it while this one waited for the lock
            return _existing(path, config)
        if config.merge is not None:
            gather(path, work, config.merge, _settings(config))
            return _publish(path, work, read_json(work / "settings.json"), [], None, config)
        inputs, state = _begin(work, config)
        refinery.tokenizer = tokenizer_for(config, inputs, work)
        tasks = [Task(index, item, is_validation(item, config.val_files)) for index, item in enumerate(inputs)]
        if config.part is None:
            return _publish(path, work, state, tasks, refinery, config)
        part, n_parts = part_of(config.part)
        _make_units(work, tasks[part - 1 :: n_parts], refinery, config, None)
        write_json(work / "complete.json", state)
        print(f"{work}: done; bring the parts' folders together and join them with --merge={n_parts}")
        return state


def _inputs(config: PrepareConfig, downloads: Path, pins: dict[str, str]) -> list[Input]:
    """The source's inputs, those for validation first. Commits of hub repositories are kept in `pins`."""
    inputs = open_source(config, downloads, pins)
    inputs.sort(key=lambda item: not is_validation(item, config.val_files))  # a stable sort
    if config.val_files and not is_validation(inputs[0], config.val_files):
        raise UserError(f"--val_files={config.val_files}: matches none of {len(inputs)} inputs, {inputs[0].name} …")
    return inputs


def _begin(work: Path, config: PrepareConfig) -> tuple[list[Input], dict[str, Any]]:
    """Opens the source. Continues what a killed run left in `work`, or empties `work` and begins again. Returns the
    inputs and the content of settings.json. Raises UserError if the killed run had other settings or source files."""
    continues = tokenizer_file(work).exists()  # whatever was made before the tokenizer is not worth keeping
    state = read_json(work / "settings.json") if continues else {}
    pins = dict(state.get("pins", {}))
    inputs = _inputs(config, work / "download", pins)
    wanted = _settings(config) | {
        "source_fingerprint": digest_of(item.version for item in inputs),
        "n_inputs": len(inputs),
        "pins": pins,
    }
    if continues:
        compare(work, state, wanted)
        print(f"{work}: continuing where an earlier run stopped")
        return inputs, state
    _check_disk(work, _disk_bytes(inputs, config))
    for leftover in work.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != "lock":
            leftover.unlink()
    (work / "units").mkdir()
    write_json(work / "settings.json", wanted)
    return inputs, wanted


def _publish(
    path: Path, work: Path, state: dict[str, Any], tasks: list[Task], refinery: Refinery | None, config: PrepareConfig
) -> dict[str, Any]:
    """Makes the missing units, writes the shards and renames the folder. Returns the content of meta.json. Raises
    UserError if a split is empty."""
    units, rows, status = _choose_enough(work, state["n_inputs"], tasks, refinery, config)
    tokenizer = load_tokenizer(str(tokenizer_file(work)))
    t0 = time.perf_counter()
    splits = write(units, rows, plan(units, rows, status, config.shard_tokens), work, tokenizer.vocab_size)
    summary = report.sum_up(units.notes, rows, status)
    summary["seconds"]["shards"] = round(time.perf_counter() - t0, 3)
    summary["tokenizers"] = read_json(work / "tokenizers.json") if (work / "tokenizers.json").exists() else {}
    if not all(splits[split]["tokens"] for split in SPLITS):
        shutil.rmtree(work)  # these settings would give the same again
        raise UserError(
            f"--source={config.source}: {splits['train']['documents']} documents for training, "
            f"{splits['val']['documents']} for validation, dropped: {summary['rejected'] or 'none'}; each split needs "
            "one: fix what was dropped, add repositories, change --val_fraction or set --split_by=file"
        )
    meta = {
        "settings": _settings(config),
        "source": {"fingerprint": state["source_fingerprint"], "commits": state["pins"]},
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "rejected": summary["rejected"],
        "splits": splits,
    }
    write_json(work / "report.json", summary)
    write_json(work / "meta.json", meta)
    os.replace(work, path)  # before the units are removed: a killed run finds its units or the finished folder
    _remove_leftovers(path)
    report.print_summary(path, meta)
    return meta


def _choose_enough(
    work: Path, n_inputs: int, tasks: list[Task], refinery: Refinery | None, config: PrepareConfig
) -> tuple[Units, np.ndarray, np.ndarray]:
    """Makes units until they hold `max_tokens` without duplicates. Returns them, their rows, and the rows' status."""
    wanted = config.max_tokens
    while True:
        _make_units(work, tasks, refinery, config, wanted)
        units = finished_units(work / "units", n_inputs, wanted)
        rows = units.documents()
        status = choose(units, rows, config, config.max_tokens)
        kept = int(tokens_of(rows)[status == KEPT].sum())
        if wanted is None or units.at_end or kept >= config.max_tokens:
            return units, rows, status
        wanted = int(wanted * max(1.05, 1.02 * config.max_tokens / max(1, kept)))


def _make_units(
    work: Path, tasks: list[Task], refinery: Refinery | None, config: PrepareConfig, wanted: int | None
) -> None:
    """Makes the missing units of `tasks`; unless `wanted` is None, only until there are `wanted` tokens in all."""

    def is_enough() -> bool:  # reads every note
        return wanted is not None and finished_units(work / "units", len(tasks), wanted).complete

    todo = [task for task in tasks if not is_done(work / "units", task.number)]
    if not todo or is_enough():
        return
    maker = Maker(work / "units", refinery, config.unit_bytes)
    with report.progress_bar("tokenizing", sum(task.source.text_bytes for task in todo)) as bar:
        workers.run(maker, todo, config.workers or os.cpu_count() or 1, report.Progress(bar, is_enough))


def _disk_bytes(inputs: list[Input], config: PrepareConfig) -> int:
    """Estimates the bytes of disk for the units and one shard, the sketches, and one download per worker."""
    kind, _, size = config.tokenizer.partition(":")
    is_16_bit = config.tokenizer == "gpt2" or (kind == "train" and size.isdecimal() and int(size) <= 2**16)
    n_parts = part_of(config.part)[1] if config.part else 1
    tokens = sum(item.text_bytes for item in inputs) / 3 / n_parts  # 3 bytes of text per token
    if config.max_tokens is not None and config.part is None:
        tokens = min(tokens, 1.1 * config.max_tokens)
    need = int((tokens + min(tokens, config.shard_tokens)) * (2 if is_16_bit else 4))
    if config.near_threshold is not None:
        need += int(tokens * 3 / 6000 * 900)  # per document of 6 kB: a sketch, and its copy while choosing
    n_workers = config.workers or os.cpu_count() or 1
    return need + n_workers * max((getattr(item, "size", 0) for item in inputs), default=0)


def _check_disk(work: Path, need: int) -> None:
    """Prints how many bytes of disk are needed, and raises OSError if fewer are free."""
    free = shutil.disk_usage(work).free
    sizes = f"needs about {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free"
    print(f"{work}: {sizes}")
    if need > free:
        raise OSError(f"{work}: {sizes}; free some, name another disk with --name=PATH/NAME, or set --max_tokens")


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Makes and locks the folder `work`, so that only one preparation writes into it; workers of a killed run hold the
    lock until they notice and end. Afterwards a folder without a tokenizer is removed: it holds nothing of use."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"{work}: another preparation is working here; waiting until it ends", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (work / "lock").exists() or not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                continue  # the other preparation has ended and renamed or removed the folder
            try:
                yield
            finally:
                if work.exists() and not tokenizer_file(work).exists():
                    shutil.rmtree(work)
            return


def _existing(path: Path, config: PrepareConfig) -> dict[str, Any]:
    if not (path / "meta.json").is_file():
        raise UserError(f"{path}: exists already, but holds no shards; delete it, or choose another --name")
    meta = open_shards(config.name).meta
    _remove_leftovers(path)
    compare(path, meta["settings"], _settings(config))
    print(f"{path}: prepared already; delete it to prepare it again")
    report.print_summary(path, meta)
    return meta


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """The settings that must not change when a run continues, and the sha256 of each file that they name."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    patterns = [*split_names(config.decontaminate), *([config.opt_out] if config.opt_out else [])]
    if config.tokenizer not in NAMED and not config.tokenizer.startswith("train:"):
        patterns.append(config.tokenizer)
    names = sorted(name for pattern in patterns for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    return settings | {"files": {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in names}}


def _remove_leftovers(path: Path) -> None:
    shutil.rmtree(path / "units", ignore_errors=True)
    shutil.rmtree(path / "download", ignore_errors=True)
    for leftover in (*path.glob("*.merged"), *(path / name for name in ("lock", "settings.json", "tokenizers.json"))):
        leftover.unlink(missing_ok=True)


if __name__ == "__main__":
    run_stage(prepare, PrepareConfig)
