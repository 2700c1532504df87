"""Units: what a worker makes at a time, and what a kill loses at most.

A unit is about `unit_bytes` of an input's text, cleaned, decontaminated, redacted, formatted and tokenized. Its files
are named by input and place within it, and their content depends neither on the worker that made them nor on what was
made before:

    00002_00000.tokens.npy        ids of its documents, end to end
    00002_00000.documents.npy     a row of DOCUMENT each: digest, tokens, bytes, group, copies
    00002_00000.keys.npy, .signatures.npy     MinHash sketches, if near duplicates are looked for
    00002_00000.json              its note, written last: what has a note is done
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from atomic import atomic_write
from data import dedup
from data.refine import Refined, Refinery, Tally, utf8_bytes
from data.sources import Document, Input, Rejection
from shards import token_dtype

BATCH_BYTES = 2**21  # text that goes through the steps together
DOCUMENT = np.dtype(
    [("digest", "<u8", 2), ("tokens", "<u4"), ("bytes", "<u4"), ("group", "<u2"), ("copies", "<u2"), ("sketched", "?")]
)


def make_units(
    work: Path,
    number: int,
    source: Input,
    to_val: bool,
    refinery: Refinery,
    threads: int,
    unit_bytes: int,
    progress: Callable[[int], bool],
) -> None:
    """Make the units of input `number` that are still missing, until the input ends or `progress`, which is told of the
    bytes read, says to stop."""
    notes = read_notes(work, number)
    if notes and notes[-1]["last"]:
        return
    records = source.records(skip=sum(note["records"] for note in notes))
    with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
        for chunk in count(len(notes)):
            name = f"{number:05d}_{chunk:05d}"
            note, go_on = _make_unit(work, name, records, to_val, refinery, pool, unit_bytes, progress)
            if note["last"]:
                break
            if not go_on:
                return
    source.release()


def read_notes(work: Path, number: int) -> list[dict[str, Any]]:
    """The notes of an input's units that are done, in order."""
    notes = []
    for chunk in count():
        path = work / f"{number:05d}_{chunk:05d}.json"
        if not path.exists():
            return notes
        notes.append(json.loads(path.read_text(encoding="utf-8")))


def _make_unit(
    work: Path,
    name: str,
    records: Iterator[Document | Rejection],
    to_val: bool,
    refinery: Refinery,
    pool: ThreadPoolExecutor | None,
    unit_bytes: int,
    progress: Callable[[int], bool],
) -> tuple[dict[str, Any], bool]:
    """Read, refine and write a unit; returns its note, and whether to go on."""
    tally = Tally()
    refined: list[Refined] = []
    n_records = n_bytes = 0
    last, go_on = False, True
    while not last and n_bytes < unit_bytes:
        with tally.timed("read"):
            limit = min(BATCH_BYTES, unit_bytes - n_bytes)
            documents, read, batch_bytes, last = _read(records, limit, tally)
        n_records, n_bytes = n_records + read, n_bytes + batch_bytes
        tally.passed("read", documents)
        refined += refinery.refine(documents, to_val, tally, pool)
        go_on = progress(batch_bytes)
    groups = sorted({(one.split, one.document.language or "unknown") for one in refined})
    with tally.timed("write"):
        _write(work, name, refined, groups, refinery)
    n_tokens = sum(len(one.ids) * one.copies for one in refined)
    note = {"records": n_records, "bytes_read": n_bytes, "tokens": n_tokens, "last": last, "groups": groups}
    note["documents"] = len(refined)
    note |= tally.note()
    with atomic_write(work / f"{name}.json") as file:
        json.dump(note, file)
    for reason, cases in tally.cases.items():
        if reason in LOUD:
            print(*(f"skipped, {reason}: {where}" for where, _ in cases), sep="\n", flush=True)
    return note, go_on


# Rejections that say something is wrong with a file, not with its content.
LOUD = ("file breaks off", "malformed line", "not UTF-8", "unreadable", "not a file", "symbolic link", "too large")


def _read(records: Iterator[Document | Rejection], limit: int, tally: Tally) -> tuple[list[Document], int, int, bool]:
    """Documents of `limit` bytes of text or a little more; the records read, their bytes, and whether that was all."""
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


def _write(work: Path, name: str, refined: list[Refined], groups: list[tuple[str, str]], refinery: Refinery) -> None:
    rows = np.zeros(len(refined), DOCUMENT)
    for place, one in enumerate(refined):
        group = groups.index((one.split, one.document.language or "unknown"))
        digest = np.frombuffer(one.digest, "<u8")
        rows[place] = (digest, len(one.ids), one.n_bytes, group, one.copies, one.sketch is not None)
    dtype = token_dtype(refinery.tokenizer.vocab_size)
    arrays = {
        "documents": rows,
        "tokens": np.concatenate([np.empty(0, dtype), *(one.ids.astype(dtype) for one in refined)]),
    }
    if refinery.minhash:
        none = (np.zeros(refinery.minhash.n_bands, np.uint64), np.zeros(dedup.PERMUTATIONS, np.uint8))
        sketches = [one.sketch or none for one in refined]
        arrays["keys"] = np.array([keys for keys, _ in sketches], np.uint64).reshape(-1, refinery.minhash.n_bands).T
        arrays["signatures"] = np.array([s for _, s in sketches], np.uint8).reshape(-1, dedup.PERMUTATIONS)
    for kind, array in arrays.items():
        with atomic_write(work / f"{name}.{kind}.npy", "wb") as file:
            np.save(file, np.ascontiguousarray(array))
