"""Turn source code into token shards.

    python -m data.prepare configs/data/local.py               # this machine's Python, into data/shards/local/
    python -m data.prepare --source='files:data/raw/*.json.gz' --name=mine --tokenizer=gpt2
    python -m data.prepare configs/data/local.py --verify      # read it all again and compare the checksums

The records of a source are cut into units of about `shard_bytes` of text. A unit is read, split by repository, encoded
and written as one shard a split, and only then noted as done: a run that is killed goes on after the last unit done,
and ends with the same bytes. Memory holds one unit's tokens at most. The folder gets its name when it is complete.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from atomic import atomic_write
from config import format_config, run_stage
from data.sources import Document, Rejection, Source, fraction, open_source
from dataloader import SPLITS, open_shards, shards_path, write_shard
from tokenizer import Tokenizer, load_tokenizer, train_tokenizer

BATCH_BYTES = 2**22  # text encoded at a time, shared among the threads


@dataclass(frozen=True)
class PrepareConfig:
    name: str = "local"  # the folder under data/shards, or a path of its own
    source: str = "local"  # local: the Python on this machine; files:GLOB: JSON lines, .gz or plain
    package_bytes: int | None = None  # of `local`, take about this much of a package at most; None takes all
    tokenizer: str = "train:4096"  # cl100k_base, gpt2, the path of a tokenizer.json, or train:N for a BPE of N ids
    tokenizer_sample_bytes: int = 2**25  # train:N learns from about this much of the training text
    val_fraction: float = 0.05  # share of the repositories that goes to validation, each as a whole
    max_tokens: int | None = None  # stop once train and validation hold this many; None takes all
    shard_bytes: int = 2**26  # text a unit, bytes
    seed: int = 0  # picks the validation repositories and the tokenizer's sample
    verify: bool = False  # prepare nothing: compare the checksums of the shards that are there

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it must be above 0 and below 1")
        for name in ("shard_bytes", "tokenizer_sample_bytes", "max_tokens", "package_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not self.name:
            raise ValueError("name is empty; give the folder to make under data/shards")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare the shards that `config` describes, or finish what a killed run left; returns meta.json's content.

    Shards that are there already, with the same settings, are left as they are.
    """
    path = shards_path(config.name)
    if config.verify:
        shards = open_shards(config.name)
        shards.verify()
        print(f"{path}: every file is as it was written")
        return shards.meta
    print(format_config(config))
    if os.path.lexists(path):
        return _existing(path, config)
    source = open_source(config.source, config.package_bytes)
    work = path.with_name(path.name + ".partial")
    _begin(work, {**_settings(config), "source_fingerprint": source.fingerprint})
    try:
        tokenizer = _tokenizer(work, source, config)
    except ValueError:
        shutil.rmtree(work)
        raise
    units = _write_units(work, source, tokenizer, config)
    splits = {split: _total([unit[split] for unit in units if unit[split]]) for split in SPLITS}
    rejected = dict(sum((Counter(unit["rejected"]) for unit in units), Counter()))
    if not all(splits[split]["tokens"] for split in SPLITS):
        shutil.rmtree(work)
        raise ValueError(
            f"--source={config.source}: {splits['train']['documents']} documents for training, "
            f"{splits['val']['documents']} for validation, skipped: {rejected or 'none'}; each split needs one: "
            "mend what was skipped, add repositories or change --val_fraction"
        )
    meta = {
        "settings": _settings(config),
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "rejected": rejected,
        "splits": splits,
    }
    _write_json(work / "meta.json", meta)
    os.replace(work, path)  # before the notes go: without them an unfinished folder would lose its finished units
    _remove_notes(path)
    _report(path, meta)
    return meta


def split_of(repo: str, seed: int, val_fraction: float) -> str:
    """The split of a repository, from a hash of its name: the same whatever else there is."""
    return "val" if fraction(f"split {seed} {repo}") < val_fraction else "train"


def _write_units(work: Path, source: Source, tokenizer: Tokenizer, config: PrepareConfig) -> list[dict[str, Any]]:
    """Write every unit that is not done yet; returns the notes of all."""
    units = [json.loads(note.read_text()) for note in sorted(work.glob("unit_*.json"))]
    done_bytes = sum(unit["bytes_read"] for unit in units)
    records = source.records(skip=sum(unit["records"] for unit in units))
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        _progress_bar("tokenizing", source.size_bytes, done_bytes) as bar,
    ):
        while not (units and units[-1]["last"]):
            tokens_left = None
            if config.max_tokens is not None:
                tokens_left = config.max_tokens - sum(unit[s]["tokens"] for unit in units for s in SPLITS if unit[s])
            unit = _write_unit(work, len(units), records, tokenizer, config, tokens_left, pool, bar)
            _write_json(work / f"unit_{len(units):05d}.json", unit)
            units.append(unit)
    return units


def _write_unit(
    work: Path,
    number: int,
    records: Iterator[Document | Rejection],
    tokenizer: Tokenizer,
    config: PrepareConfig,
    tokens_left: int | None,
    pool: ThreadPoolExecutor,
    bar: tqdm,
) -> dict[str, Any]:
    """Read, split, encode and write about `shard_bytes` of text; returns the unit's note."""
    unit: dict[str, Any] = {"records": 0, "bytes_read": 0, "rejected": Counter(), "last": False}
    shards: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    counts = {split: Counter() for split in SPLITS}
    while unit["bytes_read"] < config.shard_bytes and not unit["last"]:
        limit = min(BATCH_BYTES, config.shard_bytes - unit["bytes_read"])
        documents, n_bytes = _read_batch(records, unit, limit)
        unit["bytes_read"] += n_bytes
        bar.update(n_bytes)
        for document, ids in zip(documents, tokenizer.encode_documents([d.text for d in documents], pool), strict=True):
            if tokens_left is not None and tokens_left <= 0:
                unit["last"] = True
                break
            if ids is None:
                _reject(Rejection("cannot be tokenized", f"{document.repo}: {document.path}"), unit)
                continue
            split = split_of(document.repo, config.seed, config.val_fraction)
            shards[split].append(ids)
            counts[split].update(documents=1, bytes=len(document.text.encode()))
            tokens_left = None if tokens_left is None else tokens_left - len(ids)
    for split in SPLITS:
        unit[split] = None
        if shards[split]:
            path = work / f"{split}_{number:05d}.npy"
            unit[split] = {**write_shard(path, np.concatenate(shards[split]), tokenizer.vocab_size), **counts[split]}
    return unit


def _read_batch(
    records: Iterator[Document | Rejection], unit: dict[str, Any], limit: int
) -> tuple[list[Document], int]:
    """Documents of `limit` bytes of text or a little more, and their size. What it reads and rejects, and the end, it
    notes in `unit`."""
    documents, n_bytes = [], 0
    while n_bytes < limit:
        record = next(records, None)
        if record is None:
            unit["last"] = True
            break
        unit["records"] += 1
        if isinstance(record, Rejection):
            _reject(record, unit)
        elif not record.text.strip():
            unit["rejected"]["empty"] += 1
        else:
            documents.append(record)
            n_bytes += len(record.text.encode())
    return documents, n_bytes


def _reject(rejection: Rejection, unit: dict[str, Any]) -> None:
    """Count a rejection in `unit`, and print the first few of each reason."""
    unit["rejected"][rejection.reason] += 1
    if unit["rejected"][rejection.reason] <= 5:
        tqdm.write(f"skipped, {rejection.reason}: {rejection.where}")


def _tokenizer(work: Path, source: Source, config: PrepareConfig) -> Tokenizer:
    """The tokenizer the settings ask for, kept in `work`, so that a run that goes on uses the same."""
    path = work / "tokenizer.json"
    if path.exists():
        return load_tokenizer(str(path))
    kind, _, size = config.tokenizer.partition(":")
    if kind != "train":
        tokenizer = load_tokenizer(config.tokenizer)
    elif size.isdecimal():
        tokenizer = train_tokenizer(_tokenizer_sample(source, config), int(size))
    else:
        raise ValueError(f"--tokenizer={config.tokenizer}: wants a number of ids, such as train:4096")
    tokenizer.save(path)
    return tokenizer


def _tokenizer_sample(source: Source, config: PrepareConfig) -> Iterator[str]:
    """Training documents, chosen by a hash of repository and path, up to `tokenizer_sample_bytes`."""
    rate = config.tokenizer_sample_bytes / max(1, source.size_bytes)
    left = config.tokenizer_sample_bytes
    with _progress_bar("sampling for the tokenizer", min(left, source.size_bytes)) as bar:
        for record in source.records(skip=0):
            if isinstance(record, Rejection) or split_of(record.repo, config.seed, config.val_fraction) == "val":
                continue
            if fraction(f"sample {config.seed} {record.repo} {record.path}") < rate:
                n_bytes = len(record.text.encode())
                bar.update(n_bytes)
                left -= n_bytes
                yield record.text
                if left <= 0:
                    return


def _begin(work: Path, settings: dict[str, Any]) -> None:
    """Make the folder of work, or take up the one a killed run left, if it was making the same."""
    if (work / "tokenizer.json").exists():  # before that nothing is worth keeping
        _compare(work, json.loads((work / "settings.json").read_text()), settings)
        print(f"{work}: going on where an earlier run stopped")
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _write_json(work / "settings.json", settings)


def _existing(path: Path, config: PrepareConfig) -> dict[str, Any]:
    if not (path / "meta.json").is_file():
        raise ValueError(f"{path}: is there already, and holds no shards; delete it, or choose another --name")
    meta = open_shards(config.name).meta
    _remove_notes(path)
    _compare(path, meta["settings"], _settings(config))
    print(f"{path}: prepared already; delete it to prepare it again")
    _report(path, meta)
    return meta


def _compare(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if "source_fingerprint" in wanted and found["source_fingerprint"] != wanted["source_fingerprint"]:
        raise ValueError(f"{path}: the source's files have changed since it was begun; delete it to begin anew")
    different = [f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{path}: made with other settings: {'; '.join(different)}; delete it, or choose another --name"
        )


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the shards' content, and so what must not change between a run and its continuation."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in ("name", "verify")}


def _remove_notes(path: Path) -> None:
    for note in (*path.glob("unit_*.json"), path / "settings.json"):
        note.unlink(missing_ok=True)


def _total(entries: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(entry[key] for entry in entries) for key in ("documents", "bytes", "tokens")}
    return {**sums, "shards": entries}


def _report(path: Path, meta: dict[str, Any]) -> None:
    print(f"{path}: tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids")
    for split, total in meta["splits"].items():
        print(
            f"  {split:5} {total['documents']:>9,} documents {total['tokens']:>13,} tokens {total['bytes']:>14,} bytes"
            f"  {total['bytes'] / total['tokens']:.2f} bytes a token"
        )
    for reason, count in sorted(meta["rejected"].items()):
        print(f"  skipped, {reason}: {count:,}")


def _progress_bar(what: str, total: int, initial: int = 0) -> tqdm:
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file gets few lines
    return tqdm(desc=what, total=total, initial=initial, unit="B", unit_scale=True, mininterval=interval)


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, indent=1)


if __name__ == "__main__":
    run_stage(prepare, PrepareConfig)
