"""From units to shards: choose the documents, write the splits, sum up.

Choosing needs all units at once, but little of each document: exact duplicates by digest, near ones by sketch, then
max_tokens. Shards are whole units' chosen documents in order. Everything here is a function of the units alone, so
that a run killed here does the same again, except for shards that are written already.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cleaning import duplicates
from data.pipeline.work_units import DOCUMENT, read_notes
from data.shards import SPLITS, write_shard
from runtime.files import write_json

KEPT, EXACT, NEAR, BEYOND = range(4)
STATUS = {EXACT: "exact duplicate", NEAR: "near duplicate", BEYOND: "beyond max_tokens"}


@dataclass
class Units:
    """The units up to the first that is missing: names, notes, and every document's row."""

    work: Path
    names: list[str]
    notes: list[dict[str, Any]]
    complete: bool  # do they hold the tokens that were asked for, or all of the source?
    at_end: bool  # are they all of the source?

    def __post_init__(self) -> None:
        counts = [note["documents"] for note in self.notes]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # of each unit's rows, and the end

    def path(self, name: str, kind: str) -> Path:
        return self.work / f"{name}.{kind}.npy"

    def documents(self) -> np.ndarray:
        """A DOCUMENT row each, unit after unit."""
        rows = np.empty(self.starts[-1], DOCUMENT)
        for place, name in enumerate(self.names):
            rows[self.starts[place] : self.starts[place + 1]] = np.load(self.path(name, "documents"))
        return rows

    def bands(self) -> Iterator[np.ndarray]:
        """The keys of each band in turn, uint64 (n,)."""
        n_bands = len(np.load(self.path(self.names[0], "keys"), mmap_mode="r"))
        for band in range(n_bands):
            yield np.concatenate([np.load(self.path(name, "keys"), mmap_mode="r")[band] for name in self.names])

    def signatures(self) -> "RowsOnDisk":
        """All signatures, uint8 (n, PERMUTATIONS), brought together in one file."""
        path = self.work / "signatures.npy"
        shape = (int(self.starts[-1]), duplicates.PERMUTATIONS)
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for name in self.names:
                file.write(np.load(self.path(name, "signatures")).data)
        return RowsOnDisk(path)


class RowsOnDisk:
    """Rows of an .npy file by their numbers, read anew each time: a memory map kept open would grow to the file's
    size."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")[rows]


def finished_units(work: Path, n_inputs: int, wanted: int | None = None) -> Units:
    """The units in order, up to the first that is not done, or the one with which they hold `wanted` tokens."""
    names, notes, n_tokens = [], [], 0
    for number in range(n_inputs):
        of_input = read_notes(work, number)
        for chunk, note in enumerate(of_input):
            names.append(f"{number:05d}_{chunk:05d}")
            notes.append(note)
            n_tokens += note["tokens"]
            if wanted is not None and n_tokens >= wanted:
                at_end = number == n_inputs - 1 and note["last"]
                return Units(work, names, notes, complete=True, at_end=at_end)
        if not (of_input and of_input[-1]["last"]):
            return Units(work, names, notes, complete=False, at_end=False)
    return Units(work, names, notes, complete=True, at_end=True)


def choose(units: Units, rows: np.ndarray, config: duplicates.DedupConfig, max_tokens: int | None) -> np.ndarray:
    """What becomes of each document, uint8 (n,): KEPT, EXACT, NEAR or BEYOND."""
    status = np.zeros(len(rows), np.uint8)
    if config.exact_duplicates:
        status[duplicates.exact_duplicates(rows["digest"])] = EXACT
    if config.near_threshold is not None and len(rows):
        alive = (status == KEPT) & rows["sketched"]
        first = duplicates.near_duplicates(units.bands(), units.signatures(), alive, config.near_threshold)
        status[(first != np.arange(len(rows))) & alive] = NEAR
    if max_tokens is not None:
        before = np.cumsum(np.where(status == KEPT, tokens_of(rows), 0))
        before = np.concatenate([[0], before[:-1]]) if len(before) else before
        status[(status == KEPT) & (before >= max_tokens)] = BEYOND
    return status


def tokens_of(rows: np.ndarray) -> np.ndarray:
    """The tokens each document puts into the shards, copies counted, int64."""
    return rows["tokens"].astype(np.int64) * rows["copies"]


@dataclass
class Shard:
    """A shard to write: its split, its language if it is validation's, and documents of units, by row in the unit."""

    split: str
    language: str | None
    parts: list[tuple[int, np.ndarray]]
    n_tokens: int = 0


def plan(units: Units, rows: np.ndarray, status: np.ndarray, shard_tokens: int) -> list[Shard]:
    """The shards, validation first: each language's by itself, so that perplexity can be given by language."""
    open_shards: dict[tuple[str, str | None], Shard] = {}
    done: list[Shard] = []
    for place, note in enumerate(units.notes):
        of_unit, kept = (array[units.starts[place] : units.starts[place + 1]] for array in (rows, status == KEPT))
        keys = [(split, language if split == "val" else None) for split, language in note["groups"]]
        for key in sorted(set(keys), key=str):
            groups = [group for group, of_group in enumerate(keys) if of_group == key]
            chosen = np.flatnonzero(kept & np.isin(of_unit["group"], groups))
            if not len(chosen):
                continue
            shard = open_shards.setdefault(key, Shard(*key, []))
            copies = of_unit["copies"][chosen]
            order = np.concatenate([chosen[copies > copy] for copy in range(copies.max())])
            shard.parts.append((place, order))
            shard.n_tokens += int(of_unit["tokens"][order].sum(dtype=np.int64))
            if shard.n_tokens >= shard_tokens:
                done.append(open_shards.pop(key))
    return sorted(
        [*done, *open_shards.values()], key=lambda s: (-SPLITS.index(s.split), s.language or "", s.parts[0][0])
    )


def write(units: Units, rows: np.ndarray, shards: list[Shard], folder: Path, vocab_size: int) -> dict[str, Any]:
    """Write the shards that are not written yet into `folder`; returns meta.json's `splits`. A unit's tokens are
    deleted with the last shard that takes from it, so that the disk holds them once."""
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    numbers: Counter[str] = Counter()
    last_use = {place: number for number, shard in enumerate(shards) for place, _ in shard.parts}
    for number, shard in enumerate(shards):
        stem = shard.split if shard.language is None else f"{shard.split}_{file_name(shard.language)}"
        path = folder / f"{stem}_{numbers[stem]:05d}.npy"
        numbers[stem] += 1
        note = units.work / f"{path.stem}.entry.json"
        if not note.exists():
            pieces = _pieces(units, rows, shard)
            entry = write_shard(path, pieces, shard.n_tokens, vocab_size)
            entry |= _counts(units, rows, shard)
            if shard.language is not None:
                entry["language"] = shard.language
            write_json(note, entry)
        entries[shard.split].append(json.loads(note.read_text(encoding="utf-8")))
        for place, _ in shard.parts:
            if last_use[place] == number:
                units.path(units.names[place], "tokens").unlink(missing_ok=True)
    return {split: {**_sums(entries[split]), "shards": entries[split]} for split in SPLITS}


def file_name(language: str) -> str:
    """A language's name as part of a file's."""
    return language.replace("#", "-sharp").replace("+", "p").replace(" ", "-").replace("/", "-")


def _pieces(units: Units, rows: np.ndarray, shard: Shard) -> Iterator[np.ndarray]:
    for place, order in shard.parts:
        of_unit = rows["tokens"][units.starts[place] : units.starts[place + 1]]
        ends = np.cumsum(of_unit, dtype=np.int64)
        tokens = np.load(units.path(units.names[place], "tokens"), mmap_mode="r")
        if len(order) == len(of_unit) and (order == np.arange(len(order))).all():
            yield tokens
        else:
            yield np.concatenate([tokens[ends[row] - of_unit[row] : ends[row]] for row in order])


def _counts(units: Units, rows: np.ndarray, shard: Shard) -> dict[str, int]:
    n_bytes = sum(int(rows["bytes"][units.starts[place] + order].sum(dtype=np.int64)) for place, order in shard.parts)
    return {"documents": sum(len(order) for _, order in shard.parts), "bytes": n_bytes}


def _sums(entries: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(entry[key] for entry in entries) for key in ("documents", "bytes", "tokens")}
