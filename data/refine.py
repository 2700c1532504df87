"""The steps from documents to tokens: clean, decontaminate, sketch for duplicates, redact, format, tokenize.

Each document is treated by itself and by the settings alone; duplicates among them are chosen later (data/publish.py).
"""

import fnmatch
import glob
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
from tokenizer import Special, Tokenizer


@dataclass(frozen=True)
class RefineConfig(SourceConfig, CleanConfig, dedup.DedupConfig, formats.FormatConfig):
    decontaminate: str | None = None  # files of problems in HumanEval's or MBPP's columns, globs, comma-separated
    contaminant_min_chars: int = 32  # docstrings and solutions shorter than this, white space aside, prove nothing
    redact: bool = False  # replace e-mail and IP addresses, keys and tokens; needs detect-secrets
    tokenizer: str = "train:4096"  # cl100k_base, gpt2, the path of a tokenizer.json, or train:N for a BPE of N ids
    tokenizer_sample_bytes: int = 2**25  # train:N learns from about this much of the training text
    val_fraction: float = 0.05  # share of the repositories that goes to validation, each as a whole
    val_files: str | None = None  # input files, by glob, that go to validation whole, and are taken first
    split_by: str = "repo"  # repo, or file: what goes to training or validation as a whole
    language_weights: str | None = None  # copies of training documents by language: "Python=2,Java=0.5,*=1"
    seed: int = 0  # picks the validation repositories, the tokenizer's sample and what is dropped by chance

    def __post_init__(self) -> None:
        for base in RefineConfig.__mro__[1:-1]:
            base.__post_init__(self)
        if not 0 <= self.val_fraction < 1 or (self.val_fraction == 0 and not self.val_files):
            raise ValueError(
                f"val_fraction is {self.val_fraction}; it must be above 0 (or 0 with val_files) and below 1"
            )
        for name in ("tokenizer_sample_bytes", "package_bytes"):
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

    def __init__(self, config: RefineConfig, tokenizer: Tokenizer | None = None):
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


def is_validation(item: Input, config: RefineConfig) -> bool:
    """Does all of this input go to validation? Its path or file name matches `val_files` then."""
    pattern = config.val_files
    return pattern is not None and any(fnmatch.fnmatch(n, pattern) for n in (item.name, os.path.basename(item.name)))


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


def _text_bytes(pieces: list[str]) -> int:
    return sum(utf8_bytes(piece) for piece in pieces if not isinstance(piece, Special))


def _names_in(path: str | None) -> frozenset[str]:
    """The lines of a text file, lower case, comments left out."""
    if path is None:
        return frozenset()
    lines = (line.partition("#")[0].strip().lower() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return frozenset(line for line in lines if line)


def _decontaminator(config: RefineConfig) -> Decontaminator | None:
    needles = []
    for pattern in sorted(split_names(config.decontaminate)):
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise ValueError(f"--decontaminate={pattern}: no such file; the README says how to get the problems")
        needles += [n for path in paths for n in needles_of(read_rows(Path(path)), config.contaminant_min_chars)]
    return Decontaminator(needles) if needles else None
