"""Turn source code into token shards: read, clean, decontaminate, redact, tokenize, deduplicate, write.

    python -m data.prepare configs/data/local.py               # this machine's Python, into data/shards/local/
    python -m data.prepare --source='files:data/raw/*.json.gz' --name=mine --tokenizer=gpt2 --filters=codeparrot
    python -m data.prepare configs/data/local.py --filters=codeparrot_v2 --dry_run=1000      # what would be dropped
    python -m data.prepare configs/data/codeparrot.py --part=1/4     # a quarter, on one of four machines; and at last
    python -m data.prepare configs/data/codeparrot.py --merge=4      # the four folders, brought together, become shards
    python -m data.prepare configs/data/local.py --verify      # read it all again and compare the checksums

The input is read once. Workers turn it into units (data/units.py); when all are done, the documents are chosen and the
shards written (data/publish.py). A run that is killed goes on after the last unit done, and ends with the same bytes,
whatever the number of workers. The folder gets its name when it is complete.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from atomic import atomic_write
from config import format_config, run_stage
from data import report, workers
from data.preview import preview
from data.publish import KEPT, Units, choose, finished_units, plan, tokens_of, write
from data.refine import RefineConfig, Refinery, is_validation
from data.sources import Input, digest_of, open_source
from data.units import read_notes
from data.vocabulary import tokenizer_for
from shards import SPLITS, open_shards, shards_path

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
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not self.name:
            raise ValueError("name is empty; give the folder to make under data/shards")
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
        inputs, _ = _inputs(config, path.with_name(f"{path.name}.dry"), {})
        return preview(config, inputs, config.dry_run)
    work = path.with_name(path.name + (".part-{}-of-{}".format(*part_of(config.part)) if config.part else ".partial"))
    if os.path.lexists(path):
        return _existing(path, config)
    with _locked(work):
        if os.path.lexists(path):  # made by the preparation that was waited for
            return _existing(path, config)
        if config.merge is not None:
            _gather_parts(path, work, config)
        return _prepare(path, work, config)


def part_of(setting: str) -> tuple[int, int]:
    """I and N of the setting I/N. Raises ValueError."""
    part, _, n_parts = setting.partition("/")
    if not (part.isdecimal() and n_parts.isdecimal() and 1 <= int(part) <= int(n_parts)):
        raise ValueError(f"--part={setting}: wants I/N with I in 1 .. N, such as 1/4")
    return int(part), int(n_parts)


def _prepare(path: Path, work: Path, config: PrepareConfig) -> dict[str, Any]:
    state = _read_json(work / "settings.json") if (work / "tokenizer.json").exists() else {}
    if config.merge is None:
        inputs, pins = _inputs(config, work, state.get("pins", {}))
        state = _begin(work, state, inputs, pins, config)
    else:
        inputs = [None] * state["n_inputs"]
    try:
        tokenizer = tokenizer_for(config, inputs, work)
        refinery = Refinery(config, tokenizer)
    except (ValueError, FileNotFoundError):
        shutil.rmtree(work)
        raise
    units, rows, status = _make_units(work / "units", inputs, refinery, config)
    if config.part is not None:
        _write_json(work / "complete.json", state)
        print(f"{work}: done; bring the parts' folders together and join them with --merge={part_of(config.part)[1]}")
        return state
    t0 = time.perf_counter()
    splits = write(units, rows, plan(units, rows, status, config.shard_tokens), work, tokenizer.vocab_size)
    summary = report.sum_up(units.notes, rows, status)
    summary["seconds"]["shards"] = round(time.perf_counter() - t0, 3)
    summary["tokenizers"] = _read_json(work / "tokenizers.json") if (work / "tokenizers.json").exists() else {}
    if not all(splits[split]["tokens"] for split in SPLITS):
        shutil.rmtree(work)
        raise ValueError(
            f"--source={config.source}: {splits['train']['documents']} documents for training, "
            f"{splits['val']['documents']} for validation, dropped: {summary['rejected'] or 'none'}; each split needs "
            "one: mend what was dropped, add repositories, change --val_fraction or set --split_by=file"
        )
    meta = {
        "settings": _settings(config),
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "rejected": summary["rejected"],
        "splits": splits,
    }
    _write_json(work / "report.json", summary)
    _write_json(work / "meta.json", meta)
    os.replace(work, path)  # before the units go: without them an unfinished folder would lose its finished ones
    _remove_leftovers(path)
    _print_report(path, meta)
    return meta


def _inputs(config: PrepareConfig, work: Path, pins: dict[str, str]) -> tuple[list[Input], dict[str, str]]:
    """The source's inputs, those of `val_files` first, and the commits of hub repositories, found or given."""
    pins = dict(pins)
    inputs = open_source(config, work / "download", pins)
    first = [item for item in inputs if is_validation(item, config)]
    if config.val_files and not first:
        raise ValueError(f"--val_files={config.val_files}: matches none of {len(inputs)} inputs, {inputs[0].name} …")
    return first + [item for item in inputs if not is_validation(item, config)], pins


def _begin(
    work: Path, state: dict[str, Any], inputs: list[Input], pins: dict[str, str], config: PrepareConfig
) -> dict[str, Any]:
    """Take up what a killed run left, if it was making the same; else begin anew. Returns settings.json's content."""
    wanted = {
        **_settings(config),
        "source_fingerprint": digest_of(item.version for item in inputs),
        "n_inputs": len(inputs),
        "pins": pins,
    }
    if state:
        _compare(work, state, wanted)
        print(f"{work}: going on where an earlier run stopped")
        return state
    _check_disk(work, inputs, config)
    for leftover in work.iterdir():  # without a tokenizer nothing is worth keeping
        if leftover.name != "lock":
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    (work / "units").mkdir()
    _write_json(work / "settings.json", wanted)
    return wanted


def _make_units(
    work: Path, inputs: list[Input | None], refinery: Refinery, config: PrepareConfig
) -> tuple[Units, np.ndarray, np.ndarray]:
    """Make units until the source ends or they hold `max_tokens` after duplicates are dropped; returns those that
    count, their documents' rows, and what becomes of each."""
    n_workers = config.workers or os.cpu_count() or 1
    part, n_parts = part_of(config.part or "1/1")
    wanted = config.max_tokens if config.part is None else None
    while True:
        todo = [
            (number, item, is_validation(item, config))
            for number, item in enumerate(inputs)
            if item is not None and number % n_parts == part - 1 and not _is_done(work, number)
        ]
        if todo and not (wanted and finished_units(work, len(inputs), wanted).complete):
            with report.progress_bar("tokenizing", sum(item.text_bytes for _, item, _ in todo)) as bar:
                workers.run(
                    work, todo, refinery, n_workers, config.unit_bytes, _Progress(bar, work, len(inputs), wanted)
                )
        if config.part is not None:
            return Units(work, [], [], True, True), np.empty(0), np.empty(0)
        units = finished_units(work, len(inputs), wanted)
        rows = units.documents()
        status = choose(units, rows, config, config.max_tokens)
        kept = int(tokens_of(rows)[status == KEPT].sum())
        if wanted is None or units.at_end or kept >= config.max_tokens:
            return units, rows, status
        wanted = int(wanted * max(1.05, 1.02 * config.max_tokens / max(1, kept)))


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


def _is_done(work: Path, number: int) -> bool:
    notes = read_notes(work, number)
    return bool(notes) and notes[-1]["last"]


def _gather_parts(path: Path, work: Path, config: PrepareConfig) -> None:
    """Move the units of all parts into one folder of work."""
    folders = [path.with_name(f"{path.name}.part-{part}-of-{config.merge}") for part in range(1, config.merge + 1)]
    left = [folder for folder in folders if not (work / f"{folder.name}.merged").exists()]
    for folder in left:
        if not (folder / "complete.json").exists():
            setting = f"--part={folders.index(folder) + 1}/{config.merge}"
            raise ValueError(f"{folder}: not there or not complete; run {setting} to its end first")
    known = work if (work / "tokenizer.json").exists() else left[0]
    for folder in (known, *left):
        for wanted in (_settings(config), _read_json(known / "settings.json")):
            _compare(folder, _read_json(folder / "settings.json"), wanted)
        if (folder / "tokenizer.json").read_bytes() != (known / "tokenizer.json").read_bytes():
            raise ValueError(f"{folder}: its tokenizer is not the other parts'; delete it and make it again")
    (work / "units").mkdir(exist_ok=True)
    for name in ("tokenizers.json", "settings.json", "tokenizer.json"):
        if known is not work and (known / name).exists():
            shutil.copy(known / name, work / name)
    for folder in left:
        for file in sorted((folder / "units").iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
            os.replace(file, work / "units" / file.name)  # a unit's note after its arrays
        _write_json(work / f"{folder.name}.merged", {})
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


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
                if work.exists() and not any(name.name != "lock" for name in work.iterdir()):
                    shutil.rmtree(work)
            return


def _existing(path: Path, config: PrepareConfig) -> dict[str, Any]:
    if not (path / "meta.json").is_file():
        raise ValueError(f"{path}: is there already, and holds no shards; delete it, or choose another --name")
    meta = open_shards(config.name).meta
    _remove_leftovers(path)
    _compare(path, meta["settings"], _settings(config))
    print(f"{path}: prepared already; delete it to prepare it again")
    _print_report(path, meta)
    return meta


def _compare(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if wanted.get("source_fingerprint") not in (None, found.get("source_fingerprint")):
        raise ValueError(f"{path}: the source's files have changed since it was begun; delete it to begin anew")
    different = [f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{path}: made with other settings: {'; '.join(different)}; delete it, or choose another --name"
        )


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the shards' content, and so what must not change between a run and its continuation."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}


def _remove_leftovers(path: Path) -> None:
    shutil.rmtree(path / "units", ignore_errors=True)
    shutil.rmtree(path / "download", ignore_errors=True)
    for leftover in (*path.glob("*.merged"), *(path / name for name in ("lock", "settings.json", "tokenizers.json"))):
        leftover.unlink(missing_ok=True)


def _print_report(path: Path, meta: dict[str, Any]) -> None:
    summary = _read_json(path / "report.json") if (path / "report.json").exists() else None
    if summary:
        print(report.table(summary))
        for name, bytes_per_token in summary["tokenizers"].items():
            print(f"tokenizer {name}: {bytes_per_token:.3f} bytes a token on held-out text")
    print(f"{path}: tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids")
    for split, total in meta["splits"].items():
        print(
            f"  {split:5} {total['documents']:>9,} documents {total['tokens']:>13,} tokens {total['bytes']:>14,} bytes"
            f"  {total['bytes'] / total['tokens']:.2f} bytes a token"
        )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, indent=1)


if __name__ == "__main__":
    run_stage(prepare, PrepareConfig)
