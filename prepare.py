"""Turn source code into token shards: read, clean, decontaminate, redact, tokenize, deduplicate, write.

    python prepare.py configs/data/local.py               # this machine's Python, into data/shards/local/
    python prepare.py --source='files:data/raw/*.json.gz' --name=mine --tokenizer=gpt2 --filters=codeparrot
    python prepare.py configs/data/local.py --filters=codeparrot_v2 --dry_run=1000      # what would be dropped
    python prepare.py configs/data/codeparrot.py --part=1/4     # a quarter, on one of four machines; and at last
    python prepare.py configs/data/codeparrot.py --merge=4      # the four folders, brought together, become shards
    python prepare.py configs/data/local.py --verify      # read it all again and compare the checksums

The input is read once. Workers turn it into units (data/units.py); when all are done, the documents are chosen and the
shards written (data/publish.py). A run that is killed goes on after the last unit done, and ends with the same bytes,
whatever the number of workers. The folder gets its name when it is complete.
"""

import dataclasses
import fcntl
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
from tqdm import tqdm

from data.documents import Input, digest_of
from data.pipeline import report, workers
from data.pipeline.assemble_shards import KEPT, Units, choose, finished_units, plan, tokens_of, write
from data.pipeline.dry_run import preview
from data.pipeline.learn_tokenizer import tokenizer_for
from data.pipeline.machines import compare, gather, part_folder, part_of, read_json
from data.pipeline.steps import RefineConfig, Refinery, files_named, is_validation
from data.pipeline.work_units import Maker, Task, is_done
from data.shards import SPLITS, open_shards, shards_path, tokenizer_file
from data.sources.open import open_source
from data.tokenizer import load_tokenizer
from runtime.config import format_config, run_stage
from runtime.errors import UserError
from runtime.files import write_json

# Settings that do not decide the shards' content.
FREE = ("name", "verify", "workers", "part", "merge", "dry_run", "retry_s")


@dataclass(frozen=True)
class PrepareConfig(RefineConfig):
    name: str = "local"  # the folder under data/shards, or a path of its own
    max_tokens: int | None = None  # stop once train and validation hold this many; None takes all
    unit_bytes: int = 2**24  # text a unit of work, which is what a kill loses at most; bytes
    shard_tokens: int = 2**27  # tokens a shard, about
    workers: int | None = None  # processes; None takes one a core
    part: str | None = None  # I/N: make the units of every Nth input file alone, into NAME.part-I-of-N
    merge: int | None = None  # N: join the N parts into shards
    dry_run: int | None = None  # write nothing: show what would be dropped of this many documents
    verify: bool = False  # prepare nothing: compare the checksums of the shards that are there

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
    """Prepare the shards that `config` describes, or finish what a killed run left; returns meta.json's content, of a
    part its settings, of a dry run the rejections.

    Shards that are there already, with the same settings, are left as they are.
    """
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
    refinery = Refinery(config) if config.merge is None else None  # what is missing is said before anything is made
    work = part_folder(path, *part_of(config.part)) if config.part else path.with_name(f"{path.name}.partial")
    with _locked(work):
        if os.path.lexists(path):  # made by the preparation that was waited for
            return _existing(path, config)
        if config.merge is not None:
            gather(path, work, config.merge, _settings(config))
            return _publish(path, work, read_json(work / "settings.json"), [], None, config)
        inputs, state = _begin(work, config)
        refinery.tokenizer = tokenizer_for(config, inputs, work)
        tasks = [Task(number, item, is_validation(item, config)) for number, item in enumerate(inputs)]
        if config.part is None:
            return _publish(path, work, state, tasks, refinery, config)
        part, n_parts = part_of(config.part)
        _make_units(work, tasks[part - 1 :: n_parts], refinery, config, None)
        write_json(work / "complete.json", state)
        print(f"{work}: done; bring the parts' folders together and join them with --merge={n_parts}")
        return state


def _inputs(config: PrepareConfig, downloads: Path, pins: dict[str, str]) -> list[Input]:
    """The source's inputs, those for validation first; the commits of hub repositories are taken from `pins` or, if
    they are not there, looked up and added."""
    inputs = open_source(config, downloads, pins)
    first = [item for item in inputs if is_validation(item, config)]
    if config.val_files and not first:
        raise UserError(f"--val_files={config.val_files}: matches none of {len(inputs)} inputs, {inputs[0].name} …")
    return first + [item for item in inputs if not is_validation(item, config)]


def _begin(work: Path, config: PrepareConfig) -> tuple[list[Input], dict[str, Any]]:
    """Open the source, and take up what a killed run left in `work`, if it was making the same; else begin anew.
    Returns the inputs, and settings.json's content."""
    begun = tokenizer_file(work).exists()  # before that nothing is worth keeping
    state = read_json(work / "settings.json") if begun else {}
    pins = dict(state.get("pins", {}))
    inputs = _inputs(config, work / "download", pins)
    wanted = _settings(config) | {
        "source_fingerprint": digest_of(item.version for item in inputs),
        "n_inputs": len(inputs),
        "pins": pins,
    }
    if begun:
        compare(work, state, wanted)
        print(f"{work}: going on where an earlier run stopped")
        return inputs, state
    _check_disk(work, inputs, config)
    for leftover in (path for path in work.iterdir() if path.name != "lock"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    (work / "units").mkdir()
    write_json(work / "settings.json", wanted)
    return inputs, wanted


def _publish(
    path: Path, work: Path, state: dict[str, Any], tasks: list[Task], refinery: Refinery | None, config: PrepareConfig
) -> dict[str, Any]:
    """Make the units that are missing, write the shards of the documents chosen, and give the folder its name."""
    units, rows, status = _choose_enough(work, state["n_inputs"], tasks, refinery, config)
    tokenizer = load_tokenizer(str(tokenizer_file(work)))
    t0 = time.perf_counter()
    splits = write(units, rows, plan(units, rows, status, config.shard_tokens), work, tokenizer.vocab_size)
    summary = report.sum_up(units.notes, rows, status)
    summary["seconds"]["shards"] = round(time.perf_counter() - t0, 3)
    summary["tokenizers"] = read_json(work / "tokenizers.json") if (work / "tokenizers.json").exists() else {}
    if not all(splits[split]["tokens"] for split in SPLITS):
        shutil.rmtree(work)  # with these settings it would be so again
        raise UserError(
            f"--source={config.source}: {splits['train']['documents']} documents for training, "
            f"{splits['val']['documents']} for validation, dropped: {summary['rejected'] or 'none'}; each split needs "
            "one: mend what was dropped, add repositories, change --val_fraction or set --split_by=file"
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
    os.replace(work, path)  # before the units go: without them an unfinished folder would lose its finished ones
    _remove_leftovers(path)
    _print_report(path, meta)
    return meta


def _choose_enough(
    work: Path, n_inputs: int, tasks: list[Task], refinery: Refinery | None, config: PrepareConfig
) -> tuple[Units, np.ndarray, np.ndarray]:
    """Make units until the source ends or they hold `max_tokens` after duplicates are dropped; returns those that
    count, their documents' rows, and what becomes of each."""
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
    """Make the units of the tasks that are missing, until they hold `wanted` tokens if that is not None."""
    todo = [task for task in tasks if not is_done(work / "units", task.number)]
    if not todo or (wanted and finished_units(work / "units", len(tasks), wanted).complete):
        return
    maker = Maker(work / "units", refinery, config.unit_bytes)
    with report.progress_bar("tokenizing", sum(task.source.text_bytes for task in todo)) as bar:
        progress = _Progress(bar, work / "units", len(tasks), wanted)
        workers.run(maker, todo, config.workers or os.cpu_count() or 1, progress)


class _Progress:
    """Moves a bar by the bytes read, and says whether to go on: until the finished units hold `wanted` tokens."""

    def __init__(self, bar: tqdm, work: Path, n_inputs: int, wanted: int | None):
        self.bar, self.arguments, self.wanted = bar, (work, n_inputs, wanted), wanted
        self.looked = time.monotonic()

    def __call__(self, n_bytes: int) -> bool:
        self.bar.update(n_bytes)
        if self.wanted is None or time.monotonic() < self.looked + 1:  # looking means reading every note
            return True
        self.looked = time.monotonic()
        return not finished_units(*self.arguments).complete


def _check_disk(work: Path, inputs: list[Input], config: PrepareConfig) -> None:
    """Print about how much disk this takes, and raise OSError if there is less."""
    text_bytes = sum(item.text_bytes for item in inputs)
    kind, _, size = config.tokenizer.partition(":")
    small = config.tokenizer == "gpt2" or (kind == "train" and size.isdecimal() and int(size) <= 2**16)
    tokens = text_bytes / 3 / (part_of(config.part)[1] if config.part else 1)
    if config.max_tokens is not None and config.part is None:
        tokens = min(tokens, 1.1 * config.max_tokens)
    need = int((tokens + min(tokens, config.shard_tokens)) * (2 if small else 4))
    if config.near_threshold is not None:
        need += int(tokens * 3 / 6000 * 900)  # a sketch, twice, for documents of 6 kB
    need += (config.workers or os.cpu_count() or 1) * max((getattr(item, "size", 0) for item in inputs), default=0)
    free = shutil.disk_usage(work).free
    print(f"disk: needs about {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    if need > free:
        raise OSError(
            f"{work}: needs about {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; free some, "
            "name a folder on another disk with --name=PATH/NAME, or set --max_tokens"
        )


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the folder of work, so that no two preparations write into it; workers a killed one left behind hold it for
    the moment they live on."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"{work}: another preparation is at work here; waiting for its end", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (work / "lock").exists() or not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                continue  # the other has ended and taken the folder away
            try:
                yield
            finally:
                if work.exists() and not tokenizer_file(work).exists():  # nothing worth keeping
                    shutil.rmtree(work)
            return


def _existing(path: Path, config: PrepareConfig) -> dict[str, Any]:
    if not (path / "meta.json").is_file():
        raise UserError(f"{path}: is there already, and holds no shards; delete it, or choose another --name")
    meta = open_shards(config.name).meta
    _remove_leftovers(path)
    compare(path, meta["settings"], _settings(config))
    print(f"{path}: prepared already; delete it to prepare it again")
    _print_report(path, meta)
    return meta


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the shards' content, and so what must not change between a run and its continuation."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    return settings | {"files": files_named(config)}


def _remove_leftovers(path: Path) -> None:
    shutil.rmtree(path / "units", ignore_errors=True)
    shutil.rmtree(path / "download", ignore_errors=True)
    for leftover in (*path.glob("*.merged"), *(path / name for name in ("lock", "settings.json", "tokenizers.json"))):
        leftover.unlink(missing_ok=True)


def _print_report(path: Path, meta: dict[str, Any]) -> None:
    summary = read_json(path / "report.json") if (path / "report.json").exists() else None
    if summary:
        print(report.report_table(summary))
        for name, bytes_per_token in summary["tokenizers"].items():
            print(f"tokenizer {name}: {bytes_per_token:.3f} bytes a token on held-out text")
    print(f"{path}: tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids")
    for split, total in meta["splits"].items():
        print(
            f"  {split:5} {total['documents']:>9,} documents {total['tokens']:>13,} tokens {total['bytes']:>14,} bytes"
            f"  {total['bytes'] / total['tokens']:.2f} bytes a token"
        )


if __name__ == "__main__":
    run_stage(prepare, PrepareConfig)
