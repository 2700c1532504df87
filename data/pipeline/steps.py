"""The steps from documents to tokens: clean, decontaminate, sketch for duplicates, redact, format, tokenize.

Each document is treated by itself and by the settings alone; duplicates among them are chosen later (data/publish.py).
"""

import fnmatch
import glob
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data import sequences
from data.cleaning import duplicates
from data.cleaning.contamination import Decontaminator, needles_of
from data.cleaning.filters import (
    FILTERS,
    TOKEN_FILTERS,
    CleanConfig,
    filter_names,
    license_rejection,
    opted_out,
    split_names,
)
from data.cleaning.redaction import Redactor
from data.documents import Document, Input, Rejection, SourceConfig, fraction, utf8_bytes
from data.sources.rows import read_rows
from data.tokenizer import NAMED, Special, Tokenizer
from runtime.errors import UserError


@dataclass(frozen=True)
class RefineConfig(SourceConfig, CleanConfig, duplicates.DedupConfig, sequences.FormatConfig):
    decontaminate: str | None = None  # files of benchmark problems, globs, comma-separated
    contaminant_columns: str = "prompt,text,question,canonical_solution,solution,code"  # of problems: what to look for
    contaminant_min_chars: int = 32  # docstrings and solutions shorter than this, white space aside, prove nothing
    redact: bool = False  # replace e-mail and IP addresses, keys and tokens; needs detect-secrets
    tokenizer: str = "train:4096"  # cl100k_base, gpt2, the path of a bpe.json, or train:N for a BPE of N ids
    tokenizer_sample_bytes: int = 2**25  # train:N learns from about this much of the training text
    val_fraction: float = 0.05  # share of the repositories that goes to validation, each as a whole
    val_files: str | None = None  # input files, by glob, that go to validation whole, and are taken first
    split_by: str = "repo"  # repo, or file: what goes to training or validation as a whole
    language_weights: str | None = None  # copies of training documents by language: "Python=2,Java=0.5,*=1"

    def __post_init__(self) -> None:
        for base in RefineConfig.__mro__[1:-1]:
            base.__post_init__(self)
        if not 0 <= self.val_fraction < 1 or (self.val_fraction == 0 and not self.val_files):
            raise UserError(
                f"val_fraction is {self.val_fraction}; it must be above 0 (or 0 with val_files) and below 1"
            )
        for name in ("tokenizer_sample_bytes", "package_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.split_by not in ("repo", "file"):
            raise UserError(f"split_by is {self.split_by!r}; it must be repo or file")
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

    def drop(self, reason: str, document: Document, detail: str = "") -> None:
        self.reject(reason, f"{document.repo}: {document.path}{detail}", document.text)

    def note(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "cases"}


@dataclass
class Draft:
    """A document on its way through the steps."""

    document: Document
    split: str
    copies: int  # in the shards
    digest: bytes = bytes(16)
    sketch: tuple[np.ndarray, np.ndarray] | None = None
    pieces: list[str] = field(default_factory=list)  # Specials and texts
    ids: np.ndarray | None = None  # uint32, end-of-text last

    @property
    def texts(self) -> list[str]:
        """What of the pieces is ordinary text."""
        return [piece for piece in self.pieces if not isinstance(piece, Special)]

    @property
    def language(self) -> str:
        return self.document.language or "unknown"


class Refinery:
    """The steps from documents to tokens, with what they need at hand. Raises UserError or FileNotFoundError if a file
    or package that the settings need is not there. Without a tokenizer it can clean."""

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
        self.minhash = duplicates.MinHash(config.near_threshold) if config.near_threshold is not None else None

    def refine(
        self, documents: list[Document], to_val: bool, tally: Tally, pool: ThreadPoolExecutor | None = None
    ) -> list[Draft]:
        """Take documents through every step; `to_val` sends them all to validation."""
        with tally.timed("clean"):
            documents = self.clean(documents, tally)
            drafts = [draft for document in documents if (draft := self._draft(document, to_val, tally)) is not None]
        tally.passed("clean", [draft.document for draft in drafts])
        with tally.timed("decontaminate"):
            drafts = [draft for draft in drafts if self._is_free(draft, tally)]
        tally.passed("decontaminate", [draft.document for draft in drafts])
        with tally.timed("sketch"):
            for draft in drafts:
                draft.sketch = self._sketch(draft.document.text)
        with tally.timed("redact"):
            drafts = [draft for draft in drafts if self._redact(draft, tally)]
        tally.passed("redact", [draft.document for draft in drafts])
        with tally.timed("format"):
            for draft in drafts:
                is_train = draft.split == "train"
                draft.pieces = (
                    sequences.sequence(draft.document, self.config, self.config.seed)
                    if is_train
                    else sequences.plain(draft.document)
                )
        with tally.timed("tokenize"):
            ids = self.tokenizer.encode_documents([draft.pieces for draft in drafts], pool)
            for draft, of_draft in zip(drafts, ids, strict=True):
                draft.ids = of_draft
            drafts = [draft for draft in drafts if self._is_tokenized(draft, tally)]
        tally.passed("tokenize", [draft.document for draft in drafts])
        return drafts

    def clean(self, documents: list[Document], tally: Tally) -> list[Document]:
        """The documents that pass the filters, notebooks taken apart."""
        for document in documents:
            counts = tally.languages.setdefault(document.language or "unknown", Counter())
            counts.update(documents=1, bytes=utf8_bytes(document.text))
        return [kept for document in documents if (kept := self._cleaned(document, tally)) is not None]

    def split(self, document: Document) -> str:
        """The split a document belongs to, by its repository or, with split_by=file, by itself."""
        key = document.repo if self.config.split_by == "repo" else f"{document.repo} {document.path}"
        return split_of(key, self.config.seed, self.config.val_fraction)

    def _cleaned(self, document: Document, tally: Tally) -> Document | None:
        if self.config.notebooks and document.language == sequences.NOTEBOOK:
            result = sequences.notebook(document)
            if isinstance(result, Rejection):
                tally.drop(result.reason, document)
                return None
            document = result
        reason = self._reason_against(document)
        if reason is not None:
            tally.drop(reason, document)
        return document if reason is None else None

    def _reason_against(self, document: Document) -> str | None:
        if not document.text.strip():
            return "empty"
        if self.languages and document.language not in self.languages:
            return "language not wanted"
        if self.opt_out and opted_out(document.repo, self.opt_out):
            return "opted out"
        if reason := license_rejection(document, self.config):
            return reason
        return next((f.__name__ for f in self.filters if f(document, self.config)), None)

    def _draft(self, document: Document, to_val: bool, tally: Tally) -> Draft | None:
        """The document with its split and, in training, as many copies as its language's weight says."""
        split, copies = "val" if to_val else self.split(document), 1
        if self.weights and split == "train":
            weight = self.weights.get(document.language or "unknown", self.weights.get("*", 1.0))
            chance = fraction(f"copies {self.config.seed} {document.repo} {document.path}")
            copies = int(weight) + (chance < weight - int(weight))
        if not copies:
            tally.drop("language weight", document)
        return Draft(document, split, copies) if copies else None

    def _is_free(self, draft: Draft, tally: Tally) -> bool:
        """Note the digest; does the document hold no problem of a benchmark?"""
        if not (self.decontaminator or self.config.exact_duplicates):
            return True
        squeezed = "".join(draft.document.text.split())
        draft.digest = duplicates.digest(squeezed) if self.config.exact_duplicates else bytes(16)
        if not self.decontaminator:
            return True
        if draft.document.sections:  # its text leaves a notebook's outputs out
            squeezed = "".join("".join(text.split()) for _, text in draft.document.sections)
        problems = self.decontaminator.problems(squeezed.lower())
        if problems:
            tally.problems.update(problems)
            tally.drop("contaminated", draft.document, f" ({', '.join(problems[:5])})")
        return not problems

    def _sketch(self, text: str) -> tuple[np.ndarray, np.ndarray] | None:
        if self.minhash is None:
            return None
        hashes = duplicates.shingles(text, self.config.near_shingle)
        return self.minhash.sketch(hashes) if len(hashes) >= duplicates.MIN_SHINGLES else None

    def _redact(self, draft: Draft, tally: Tally) -> bool:
        """Redact the document, unless Python would break by it: then it is dropped."""
        if self.redactor is None:
            return True
        document = draft.document
        sections = document.sections or (("", document.text),)
        results = [self.redactor.redact(text, _section_language(marker, document)) for marker, text in sections]
        if None in results:
            tally.drop("cannot be redacted", document)
            return False
        for _, counts in results:
            tally.redacted.update(counts)
        texts = [text for text, _ in results]
        redacted = tuple((marker, text) for (marker, _), text in zip(sections, texts, strict=True))
        draft.document = document._replace(text="\n".join(texts), sections=redacted if document.sections else ())
        return True

    def _is_tokenized(self, draft: Draft, tally: Tally) -> bool:
        reason = "cannot be tokenized"
        if draft.ids is not None:
            texts = draft.texts
            n_tokens = len(draft.ids) - 1 - (len(draft.pieces) - len(texts))  # without special ones
            n_chars = sum(map(len, texts))
            reason = next((f.__name__ for f in self.token_filters if f(n_chars, n_tokens, self.config)), None)
        if reason is not None:
            tally.drop(reason, draft.document)
        return reason is None


def files_named(config: RefineConfig) -> dict[str, str]:
    """The sha256 of each file that the settings name: what it holds decides the result, as a setting does."""
    patterns = [*split_names(config.decontaminate), *([config.opt_out] if config.opt_out else [])]
    if config.tokenizer not in NAMED and not config.tokenizer.startswith("train:"):
        patterns.append(config.tokenizer)
    paths = sorted(path for pattern in patterns for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def is_validation(item: Input, config: RefineConfig) -> bool:
    """Does all of this input go to validation? It does if `val_files` matches its file name (its path, if there is a
    slash in the pattern), and if its makers hold it out."""
    pattern = config.val_files or ""
    name = item.name if "/" in pattern else os.path.basename(item.name)
    return getattr(item, "held_out", False) or fnmatch.fnmatch(name, pattern)


def split_of(key: str, seed: int, val_fraction: float) -> str:
    """The split of a repository or file, from a hash of its name: the same whatever else there is."""
    return "val" if fraction(f"split {seed} {key}") < val_fraction else "train"


def language_weights(setting: str | None) -> dict[str, float]:
    """The weights that a setting such as "Python=2,*=0.5" gives. Raises UserError."""
    weights = {}
    for pair in split_names(setting):
        language, _, number = pair.rpartition("=")
        try:
            weights[language.strip()] = float(number)
        except ValueError:
            weights[language] = -1.0
        if not language or not 0 <= weights[language.strip()] <= 1000:
            raise UserError(f"language_weights: {pair!r} is no LANGUAGE=NUMBER with a number in 0 .. 1000")
    return weights


def _section_language(marker: str, document: Document) -> str | None:
    """The language of a section of a document, if redaction has to mind it."""
    if marker == "<jupyter_code>":
        return "Python"
    return document.language if marker in ("", "<commit_before>", "<commit_after>") else None


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
            raise UserError(f"--decontaminate={pattern}: no such file; the README says how to get the problems")
        for path in map(Path, paths):
            columns, name = config.contaminant_columns, path.name.split(".")[0]
            needles += needles_of(read_rows(path), config.contaminant_min_chars, columns, name)
    return Decontaminator(needles) if needles else None
