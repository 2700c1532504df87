"""Units: what a worker makes at a time, and what a kill loses at most.

A unit is about `unit_bytes` of an input's text, cleaned, decontaminated, redacted, formatted and tokenized. Its files
are named by input and place within it, and their content depends neither on the worker that made them nor on what was
made before:

    00002_00000.tokens.npy        ids of its documents, end to end
    00002_00000.documents.npy     a row of DOCUMENT each: digest, tokens, bytes, group, copies
    00002_00000.keys.npy, .signatures.npy     MinHash sketches, if near duplicates are looked for
    00002_00000.json              its note, written last: what has a note is done
"""

import glob
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atomic import atomic_write
from data import dedup, formats
from data.clean import (
    FILTERS,
    TOKEN_FILTERS,
    CleanConfig,
    filter_names,
    license_rejection,
    opted_out,
    split_names,
)
from data.decontaminate import Decontaminator, needles_of
from data.redact import Redactor
from data.rows import read_rows
from data.sources import Document, Input, Rejection, SourceConfig, fraction
from shards import token_dtype
from tokenizer import Special, Tokenizer

BATCH_BYTES = 2**21  # text that goes through the steps together
DOCUMENT = np.dtype(
    [("digest", "<u8", 2), ("tokens", "<u4"), ("bytes", "<u4"), ("group", "<u2"), ("copies", "<u2"), ("sketched", "?")]
)


@dataclass(frozen=True)
class UnitConfig(SourceConfig, CleanConfig, dedup.DedupConfig, formats.FormatConfig):
    decontaminate: str | None = None  # files of problems in HumanEval's or MBPP's columns, globs, comma-separated
    contaminant_min_chars: int = 32  # docstrings and solutions shorter than this, white space aside, prove nothing
    redact: bool = False  # replace e-mail and IP addresses, keys and tokens; needs detect-secrets
    tokenizer: str = "train:4096"  # cl100k_base, gpt2, the path of a tokenizer.json, or train:N for a BPE of N ids
    tokenizer_sample_bytes: int = 2**25  # train:N learns from about this much of the training text
    val_fraction: float = 0.05  # share of the repositories that goes to validation, each as a whole
    val_files: str | None = None  # input files, by glob, that go to validation whole, and are taken first
    split_by: str = "repo"  # repo, or file: what goes to training or validation as a whole
    language_weights: str | None = None  # copies of training documents by language: "Python=2,Java=0.5,*=1"
    unit_bytes: int = 2**24  # text a unit of work, bytes
    seed: int = 0  # picks the validation repositories, the tokenizer's sample and what is dropped by chance

    def __post_init__(self) -> None:
        for base in UnitConfig.__mro__[1:-1]:
            base.__post_init__(self)
        if not 0 <= self.val_fraction < 1 or (self.val_fraction == 0 and not self.val_files):
            raise ValueError(
                f"val_fraction is {self.val_fraction}; it must be above 0 (or 0 with val_files) and below 1"
            )
        for name in ("unit_bytes", "tokenizer_sample_bytes", "package_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.split_by not in ("repo", "file"):
            raise ValueError(f"split_by is {self.split_by!r}; it must be repo or file")
        language_weights(self.language_weights)


class Tally:
    """What became of the documents: counts that add up over units, and the first few cases of each rejection."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.steps: dict[str, Counter[str]] = {}  # documents and bytes that each step let through
        self.rejected: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()  # of benchmarks, found in documents
        self.redacted: Counter[str] = Counter()
        self.languages: dict[str, Counter[str]] = {}  # documents and bytes read
        self.cases: dict[str, list[tuple[str, str]]] = {}  # where, and how the text begins

    def reject(self, reason: str, where: str, text: str = "") -> None:
        self.rejected[reason] += 1
        cases = self.cases.setdefault(reason, [])
        if len(cases) < 3:
            cases.append((where, text[:400]))

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        t0 = time.perf_counter()
        yield
        self.seconds[step] += time.perf_counter() - t0

    def passed(self, step: str, documents: list[Document]) -> None:
        n_bytes = sum(utf8_bytes(document.text) for document in documents)
        self.steps.setdefault(step, Counter()).update(documents=len(documents), bytes=n_bytes)

    def note(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "cases"}


class Refined(NamedTuple):
    """A document as it leaves the steps."""

    document: Document
    ids: np.ndarray  # uint32, end-of-text last
    n_bytes: int  # of the text that the ids stand for
    digest: bytes
    sketch: tuple[np.ndarray, np.ndarray] | None
    split: str
    copies: int


class Refinery:
    """The steps from documents to tokens, with what they need at hand. Without a tokenizer it can clean."""

    def __init__(self, config: UnitConfig, tokenizer: Tokenizer | None = None):
        self.config, self.tokenizer = config, tokenizer
        names = filter_names(config.filters)
        self.filters = [FILTERS[name] for name in names if name in FILTERS]
        self.token_filters = [TOKEN_FILTERS[name] for name in names if name in TOKEN_FILTERS]
        self.languages = split_names(config.languages)
        self.weights = language_weights(config.language_weights)
        self.opt_out = _names_in(config.opt_out)
        self.decontaminator = _decontaminator(config)
        self.redactor = Redactor() if config.redact else None
        self.minhash = dedup.MinHash(config.near_threshold) if config.near_threshold is not None else None

    def refine(
        self, documents: list[Document], to_val: bool, tally: Tally, pool: ThreadPoolExecutor | None = None
    ) -> list[Refined]:
        """Take documents through every step; `to_val` sends them all to validation."""
        documents = self.clean(documents, tally)
        with tally.timed("digest"):
            wanted = self.decontaminator or self.config.exact_duplicates
            squeezed = ["".join(document.text.split()) if wanted else "" for document in documents]
        with tally.timed("decontaminate"):
            kept = [self._is_free(document, text, tally) for document, text in zip(documents, squeezed, strict=True)]
            squeezed = [text for text, keep in zip(squeezed, kept, strict=True) if keep]
            documents = [document for document, keep in zip(documents, kept, strict=True) if keep]
        tally.passed("decontaminate", documents)
        with tally.timed("digest"):
            marks = [(dedup.digest(text) if self.config.exact_duplicates else bytes(16), None) for text in squeezed]
        with tally.timed("sketch"):
            if self.minhash:
                marks = [(m[0], self._sketch(d.text)) for m, d in zip(marks, documents, strict=True)]
        with tally.timed("redact"):
            texts = [self._redact(document, tally) if self.redactor else document for document in documents]
            pairs = [(d, mark) for d, mark in zip(texts, marks, strict=True) if d is not None]
        with tally.timed("format"):
            splits = ["val" if to_val else self.split(document) for document, _ in pairs]
            pieces = [
                formats.sequence(document, self.config, self.config.seed)
                if split == "train"
                else formats.plain(document)
                for (document, _), split in zip(pairs, splits, strict=True)
            ]
        with tally.timed("tokenize"):
            ids = self.tokenizer.encode_documents(pieces, pool)
        refined = [
            Refined(document, i, _text_bytes(piece), *mark, split, self._copies(document) if split == "train" else 1)
            for (document, mark), piece, split, i in zip(pairs, pieces, splits, ids, strict=True)
            if self._is_tokenized(document, i, tally)
        ]
        tally.passed("tokenize", [one.document for one in refined])
        return refined

    def clean(self, documents: list[Document], tally: Tally) -> list[Document]:
        """The documents that pass the filters, notebooks taken apart."""
        with tally.timed("clean"):
            for document in documents:
                counts = tally.languages.setdefault(document.language or "unknown", Counter())
                counts.update(documents=1, bytes=utf8_bytes(document.text))
            documents = [kept for document in documents if (kept := self._cleaned(document, tally)) is not None]
        tally.passed("clean", documents)
        return documents

    def _cleaned(self, document: Document, tally: Tally) -> Document | None:
        if self.config.notebooks and document.language == formats.NOTEBOOK:
            result = formats.notebook(document)
            if isinstance(result, Rejection):
                tally.reject(result.reason, result.where, document.text)
                return None
            document = result
        reason = self._reason_against(document)
        if reason is not None:
            tally.reject(reason, f"{document.repo}: {document.path}", document.text)
            return None
        return document

    def _reason_against(self, document: Document) -> str | None:
        if not document.text.strip():
            return "empty"
        if self.languages and document.language not in self.languages:
            return "language not wanted"
        if self.opt_out and opted_out(document.repo, self.opt_out):
            return "opted out"
        if reason := license_rejection(document, self.config):
            return reason
        if self.weights and not self._copies(document):
            return "language weight"
        return next((f.__name__ for f in self.filters if f(document, self.config)), None)

    def _is_free(self, document: Document, squeezed: str, tally: Tally) -> bool:
        """Does the document hold no problem of a benchmark?"""
        problems = self.decontaminator.problems(squeezed.lower()) if self.decontaminator else []
        if problems:
            tally.problems.update(problems)
            tally.reject("contaminated", f"{document.repo}: {document.path} ({', '.join(problems[:5])})", document.text)
        return not problems

    def _sketch(self, text: str) -> tuple[np.ndarray, np.ndarray] | None:
        hashes = dedup.shingles(text, self.config.near_shingle)
        return self.minhash.sketch(hashes) if len(hashes) >= dedup.MIN_SHINGLES else None

    def _redact(self, document: Document, tally: Tally) -> Document | None:
        language = None if document.parts else document.language
        texts = [part for _, part in document.parts] or [document.text]
        results = [self.redactor.redact(text, language) for text in texts]
        if None in results:
            tally.reject("cannot be redacted", f"{document.repo}: {document.path}", document.text)
            return None
        for _, counts in results:
            tally.redacted.update(counts)
        texts = [text for text, _ in results]
        if not document.parts:
            return document._replace(text=texts[0])
        markers = [marker for marker, _ in document.parts]
        return document._replace(text="\n".join(texts), parts=tuple(zip(markers, texts, strict=True)))

    def _is_tokenized(self, document: Document, ids: np.ndarray | None, tally: Tally) -> bool:
        reason = "cannot be tokenized"
        if ids is not None:
            found = (f.__name__ for f in self.token_filters if f(document, len(ids) - 1, self.config))
            reason = next(found, None)
        if reason is not None:
            tally.reject(reason, f"{document.repo}: {document.path}", document.text)
        return reason is None

    def split(self, document: Document) -> str:
        """The split a document belongs to, by its repository or, with split_by=file, by itself."""
        key = document.repo if self.config.split_by == "repo" else f"{document.repo} {document.path}"
        return split_of(key, self.config.seed, self.config.val_fraction)

    def _copies(self, document: Document) -> int:
        weight = self.weights.get(document.language or "unknown", self.weights.get("*", 1.0))
        chance = fraction(f"copies {self.config.seed} {document.repo} {document.path}")
        return int(weight) + (chance < weight - int(weight))


def make_units(
    work: Path,
    number: int,
    source: Input,
    to_val: bool,
    refinery: Refinery,
    threads: int,
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
            note, go_on = _make_unit(work, name, records, to_val, refinery, pool, progress)
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


def split_of(key: str, seed: int, val_fraction: float) -> str:
    """The split of a repository or file, from a hash of its name: the same whatever else there is."""
    return "val" if fraction(f"split {seed} {key}") < val_fraction else "train"


def language_weights(setting: str | None) -> dict[str, float]:
    """The weights that a setting such as "Python=2,*=0.5" gives. Raises ValueError."""
    weights = {}
    for pair in split_names(setting):
        language, _, number = pair.rpartition("=")
        try:
            weights[language.strip()] = float(number)
        except ValueError:
            weights[language] = -1.0
        if not language or not 0 <= weights[language.strip()] <= 1000:
            raise ValueError(f"language_weights: {pair!r} is no LANGUAGE=NUMBER with a number in 0 .. 1000")
    return weights


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _make_unit(
    work: Path,
    name: str,
    records: Iterator[Document | Rejection],
    to_val: bool,
    refinery: Refinery,
    pool: ThreadPoolExecutor | None,
    progress: Callable[[int], bool],
) -> tuple[dict[str, Any], bool]:
    """Read, refine and write a unit; returns its note, and whether to go on."""
    tally = Tally()
    refined: list[Refined] = []
    n_records = n_bytes = 0
    last, go_on = False, True
    while not last and n_bytes < refinery.config.unit_bytes:
        with tally.timed("read"):
            limit = min(BATCH_BYTES, refinery.config.unit_bytes - n_bytes)
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


def _text_bytes(pieces: list[str]) -> int:
    return sum(utf8_bytes(piece) for piece in pieces if not isinstance(piece, Special))


def _names_in(path: str | None) -> frozenset[str]:
    """The lines of a text file, lower case, comments left out."""
    if path is None:
        return frozenset()
    lines = (line.partition("#")[0].strip().lower() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return frozenset(line for line in lines if line)


def _decontaminator(config: UnitConfig) -> Decontaminator | None:
    needles = []
    for pattern in sorted(split_names(config.decontaminate)):
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise ValueError(f"--decontaminate={pattern}: no such file; the README says how to get the problems")
        needles += [n for path in paths for n in needles_of(read_rows(Path(path)), config.contaminant_min_chars)]
    return Decontaminator(needles) if needles else None
