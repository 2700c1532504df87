"""From units to shards: chooses the documents and writes the splits.

Choosing needs all units at once, but little of each document: a digest, a sketch and a number of tokens. A shard holds
the chosen documents of whole units, in order. All this depends on the units alone, so a run that is killed here repeats
the same work, except for shards that are written already.
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
    """The complete units in order, up to the first that is missing."""

    work: Path
    names: list[str]
    notes: list[dict[str, Any]]
    complete: bool  # no more units are needed: these hold the tokens that were asked for, or the whole source
    at_end: bool  # these hold the whole source

    def __post_init__(self) -> None:
        counts = [note["documents"] for note in self.notes]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # first row of each unit, then the end

    def rows_of(self, index: int) -> slice:
        """Where the documents of a unit are among all rows."""
        return slice(self.starts[index], self.starts[index + 1])

    def path(self, name: str, kind: str) -> Path:
        return self.work / f"{name}.{kind}.npy"

    def documents(self) -> np.ndarray:
        """One DOCUMENT row per document, unit after unit."""
        rows = np.empty(self.starts[-1], DOCUMENT)
        for index, name in enumerate(self.names):
            rows[self.rows_of(index)] = np.load(self.path(name, "documents"))
        return rows

    def bands(self) -> Iterator[np.ndarray]:
        """The keys of all documents, one band after the other, uint64 (n,)."""
        n_bands = len(np.load(self.path(self.names[0], "keys"), mmap_mode="r"))
        for band in range(n_bands):
            yield np.concatenate([np.load(self.path(name, "keys"), mmap_mode="r")[band] for name in self.names])

    def signatures(self) -> "RowsOnDisk":
        """The signatures of all documents, uint8 (n, PERMUTATIONS), copied into one file."""
        path = self.work / "signatures.npy"
        shape = (int(self.starts[-1]), duplicates.PERMUTATIONS)
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for name in self.names:
                file.write(np.load(self.path(name, "signatures")).data)
        return RowsOnDisk(path)


class RowsOnDisk:
    """Rows of an .npy file by index. Each access opens the file: a memory map kept open would grow to its size."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")[rows]


def finished_units(work: Path, n_inputs: int, wanted: int | None = None) -> Units:
    """The complete units in order, up to the first that is missing, or up to the one that reaches `wanted` tokens."""
    names, notes, n_tokens = [], [], 0
    for number in range(n_inputs):
        notes_of_input = read_notes(work, number)
        for chunk, note in enumerate(notes_of_input):
            names.append(f"{number:05d}_{chunk:05d}")
            notes.append(note)
            n_tokens += note["tokens"]
            if wanted is not None and n_tokens >= wanted:
                at_end = number == n_inputs - 1 and note["last"]
                return Units(work, names, notes, complete=True, at_end=at_end)
        if not (notes_of_input and notes_of_input[-1]["last"]):
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
        tokens = np.where(status == KEPT, tokens_of(rows), 0)
        before = np.cumsum(tokens) - tokens  # tokens kept ahead of each document
        status[(status == KEPT) & (before >= max_tokens)] = BEYOND
    return status


def tokens_of(rows: np.ndarray) -> np.ndarray:
    """The tokens of each document in the shards, all copies together, int64."""
    return rows["tokens"].astype(np.int64) * rows["copies"]


@dataclass
class Shard:
    """A shard to write."""

    split: str
    language: str | None  # of a validation shard; training shards mix languages
    parts: list[tuple[int, np.ndarray]]  # index of a unit, and the rows of its documents in the order they are written
    n_tokens: int = 0


def plan(units: Units, rows: np.ndarray, status: np.ndarray, shard_tokens: int) -> list[Shard]:
    """The shards to write, of `shard_tokens` or a little more. Validation comes first; each of its languages has shards
    of its own, so that perplexity can be measured by language."""
    finished: list[Shard] = []
    unfinished: dict[tuple[str, str | None], Shard] = {}
    for index, note in enumerate(units.notes):
        unit_rows = rows[units.rows_of(index)]
        kept = status[units.rows_of(index)] == KEPT
        groups_by_key: dict[tuple[str, str | None], list[int]] = {}
        for group, (split, language) in enumerate(note["groups"]):
            groups_by_key.setdefault((split, language if split == "val" else None), []).append(group)
        for key, groups in groups_by_key.items():
            chosen = np.flatnonzero(kept & np.isin(unit_rows["group"], groups))
            if not len(chosen):
                continue
            copies = unit_rows["copies"][chosen]
            order = np.concatenate([chosen[copies > copy] for copy in range(copies.max())])  # all first copies first
            shard = unfinished.setdefault(key, Shard(*key, parts=[]))
            shard.parts.append((index, order))
            shard.n_tokens += int(unit_rows["tokens"][order].sum(dtype=np.int64))
            if shard.n_tokens >= shard_tokens:
                finished.append(unfinished.pop(key))
    shards = [*finished, *unfinished.values()]
    return sorted(shards, key=lambda shard: (shard.split != "val", shard.language or "", shard.parts[0][0]))


def write(units: Units, rows: np.ndarray, shards: list[Shard], folder: Path, vocab_size: int) -> dict[str, Any]:
    """Writes the missing shards into `folder`; returns `splits` for meta.json. A unit's tokens are deleted after the
    last shard that uses them, so that the disk holds them once."""
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    numbers: Counter[str] = Counter()
    last_use = {index: number for number, shard in enumerate(shards) for index, _ in shard.parts}
    for number, shard in enumerate(shards):
        stem = shard.split if shard.language is None else f"{shard.split}_{file_name(shard.language)}"
        path = folder / f"{stem}_{numbers[stem]:05d}.npy"
        numbers[stem] += 1
        note = units.work / f"{path.stem}.entry.json"  # written after the shard
        if not note.exists():
            pieces = _pieces(units, rows, shard)
            entry = write_shard(path, pieces, shard.n_tokens, vocab_size) | _counts(units, rows, shard)
            if shard.language is not None:
                entry["language"] = shard.language
            write_json(note, entry)
        entries[shard.split].append(json.loads(note.read_text(encoding="utf-8")))
        for index, _ in shard.parts:
            if last_use[index] == number:
                units.path(units.names[index], "tokens").unlink(missing_ok=True)
    return {split: {**_sums(entries[split]), "shards": entries[split]} for split in SPLITS}


def file_name(language: str) -> str:
    """A language's name as part of a file name."""
    return language.replace("#", "-sharp").replace("+", "p").replace(" ", "-").replace("/", "-")


def _pieces(units: Units, rows: np.ndarray, shard: Shard) -> Iterator[np.ndarray]:
    """The tokens of a shard, unit by unit."""
    for index, order in shard.parts:
        lengths = rows["tokens"][units.rows_of(index)]
        tokens = np.load(units.path(units.names[index], "tokens"), mmap_mode="r")
        if np.array_equal(order, np.arange(len(lengths))):  # the whole unit as it is
            yield tokens
        else:
            ends = np.cumsum(lengths, dtype=np.int64)
            yield np.concatenate([tokens[ends[row] - lengths[row] : ends[row]] for row in order])


def _counts(units: Units, rows: np.ndarray, shard: Shard) -> dict[str, int]:
    sizes = [rows["bytes"][units.rows_of(index)][order] for index, order in shard.parts]
    return {"documents": sum(map(len, sizes)), "bytes": sum(int(some.sum(dtype=np.int64)) for some in sizes)}


def _sums(entries: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(entry[key] for entry in entries) for key in ("documents", "bytes", "tokens")}
