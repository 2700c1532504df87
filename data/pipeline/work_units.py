"""Units of work: a worker makes one at a time, and a killed run loses at most the units in progress.

A unit is about `unit_bytes` (a setting of prepare.py) of an input's text, taken through all steps. Its files are named
by the index of the input and the index of the unit within it. Their content depends neither on the worker nor on other
units:

    00002_00000.tokens.npy        ids of its documents, end to end
    00002_00000.documents.npy     one row of DOCUMENT per document: digest, tokens, bytes, group, copies, sketched
    00002_00000.keys.npy, .signatures.npy     MinHash sketches, if near duplicates are dropped
    00002_00000.json              its note, written last: a unit with a note is complete
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.cleaning import duplicates
from data.documents import Document, Input, Rejection, utf8_bytes
from data.pipeline.steps import Draft, Refinery
from data.pipeline.tally import Tally
from data.shards import token_dtype
from runtime.files import atomic_write, write_json

# Rejections that point to a problem with a file rather than with its content: they are printed.
LOUD = ("file breaks off", "malformed line", "not UTF-8", "unreadable", "not a file", "symbolic link", "too large")
BATCH_BYTES = 2**21  # text that goes through the steps together
DOCUMENT = np.dtype(
    [("digest", "<u8", 2), ("tokens", "<u4"), ("bytes", "<u4"), ("group", "<u2"), ("copies", "<u2"), ("sketched", "?")]
)
Records = Iterator[Document | Rejection]
Progress = Callable[[int], bool]  # is given a number of bytes that were read; returns whether to go on


class Task(NamedTuple):
    """An input to make units of."""

    number: int  # index of the input in the source
    source: Input
    to_val: bool  # True if the whole input goes to validation


@dataclass(frozen=True)
class Maker:
    """Makes units in the folder `work`, and tokenizes with `threads` threads."""

    work: Path
    refinery: Refinery
    unit_bytes: int
    threads: int = 1

    def make(self, task: Task, progress: Progress) -> bool:
        """Makes the units that an input lacks; stops after a unit if `progress` says so. Returns whether to go on."""
        notes = read_notes(self.work, task.number)
        records = task.source.records(skip=sum(note["records"] for note in notes))
        with ThreadPoolExecutor(self.threads) if self.threads > 1 else nullcontext() as pool:
            for chunk in count(len(notes)):
                name = f"{task.number:05d}_{chunk:05d}"
                last, go_on = self._make_unit(name, task.to_val, records, pool, progress)
                if last or not go_on:
                    return go_on

    def _make_unit(
        self, name: str, to_val: bool, records: Records, pool: ThreadPoolExecutor | None, progress: Progress
    ) -> tuple[bool, bool]:
        """Reads, refines and writes a unit; returns whether it is the input's last, and whether to go on."""
        tally = Tally()
        drafts: list[Draft] = []
        n_records = n_bytes = 0
        last, go_on = False, True
        while not last and n_bytes < self.unit_bytes:
            with tally.timed("read"):
                limit = min(BATCH_BYTES, self.unit_bytes - n_bytes)
                documents, read, batch_bytes, last = _read(records, limit, tally)
            n_records, n_bytes = n_records + read, n_bytes + batch_bytes
            tally.passed("read", documents)
            drafts += self.refinery.refine(documents, to_val, tally, pool)
            go_on = progress(batch_bytes)
        groups = sorted({(draft.split, draft.language) for draft in drafts})
        with tally.timed("write"):
            _write(self.work, name, drafts, groups, self.refinery)
        n_tokens = sum(len(draft.ids) * draft.copies for draft in drafts)
        note = {"records": n_records, "tokens": n_tokens, "last": last, "documents": len(drafts), "groups": groups}
        write_json(self.work / f"{name}.json", note | tally.counts())
        for reason in LOUD:
            for where, _ in tally.cases.get(reason, []):
                print(f"skipped, {reason}: {where}", flush=True)
        return last, go_on


def is_done(work: Path, number: int) -> bool:
    """True if all units of an input are complete."""
    notes = read_notes(work, number)
    return bool(notes) and notes[-1]["last"]


def read_notes(work: Path, number: int) -> list[dict[str, Any]]:
    """The notes of an input's complete units, in order, up to the first unit that is missing."""
    notes = []
    for chunk in count():
        path = work / f"{number:05d}_{chunk:05d}.json"
        if not path.exists():
            return notes
        notes.append(json.loads(path.read_text(encoding="utf-8")))


def _read(records: Records, limit: int, tally: Tally) -> tuple[list[Document], int, int, bool]:
    """About `limit` bytes of documents, the number of records read, their bytes, and whether the input has ended."""
    documents: list[Document] = []
    n_records = n_bytes = 0
    while n_bytes < limit:
        record = next(records, None)
        if record is None:
            return documents, n_records, n_bytes, True
        n_records += 1
        if isinstance(record, Rejection):
            tally.reject(record.reason, record.where)
        else:
            documents.append(record)
            n_bytes += utf8_bytes(record.text)
    return documents, n_records, n_bytes, False


def _write(work: Path, name: str, drafts: list[Draft], groups: list[tuple[str, str]], refinery: Refinery) -> None:
    rows = np.zeros(len(drafts), DOCUMENT)
    for index, draft in enumerate(drafts):
        group = groups.index((draft.split, draft.language))
        n_bytes = sum(map(utf8_bytes, draft.texts))
        digest = np.frombuffer(draft.digest, "<u8")
        rows[index] = (digest, len(draft.ids), n_bytes, group, draft.copies, draft.sketch is not None)
    dtype = token_dtype(refinery.tokenizer.vocab_size)
    tokens = np.concatenate([np.empty(0, dtype), *(draft.ids.astype(dtype) for draft in drafts)])
    arrays = {"documents": rows, "tokens": tokens}
    if refinery.minhash:
        none = (np.zeros(refinery.minhash.n_bands, np.uint64), np.zeros(duplicates.PERMUTATIONS, np.uint8))
        sketches = [draft.sketch or none for draft in drafts]
        arrays["keys"] = np.array([keys for keys, _ in sketches], np.uint64).reshape(-1, refinery.minhash.n_bands).T
        arrays["signatures"] = np.array([s for _, s in sketches], np.uint8).reshape(-1, duplicates.PERMUTATIONS)
    for kind, array in arrays.items():
        with atomic_write(work / f"{name}.{kind}.npy", "wb") as file:
            np.save(file, np.ascontiguousarray(array))
