"""The steps from documents to tokens: clean, decontaminate, sketch for duplicates, redact, format, tokenize.

Each document is treated by itself. Duplicates are dropped later, in data/pipeline/assemble_shards.py.

To add a filter, write it in data/cleaning/filters.py and list it there in FILTERS (in TOKEN_FILTERS if it needs the
number of tokens). To add a step, write a method of Refinery, call it in `Refinery.refine`, and put its settings into
PipelineConfig. If it drops documents, call `tally.passed` and add its name to STEPS in data/pipeline/report.py.
"""

import glob
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data import sequences
from data.cleaning import duplicates, filters
from data.cleaning.contamination import Decontaminator, needles_of
from data.cleaning.redaction import Redactor
from data.documents import Document, Rejection, SourceConfig, fraction, utf8_bytes
from data.pipeline.split import split_of
from data.pipeline.tally import Tally
from data.sources.rows import read_rows
from data.tokenizer import Special, Tokenizer
from runtime.errors import UserError
from runtime.files import read_text


@dataclass(frozen=True)
class PipelineConfig(SourceConfig, filters.CleanConfig, duplicates.DedupConfig, sequences.FormatConfig):
    decontaminate: str | None = None  # drop documents that hold problems of these files: globs, separated by commas
    contaminant_columns: str = "prompt,text,question,canonical_solution,solution,code"  # problem columns to look for
    contaminant_min_chars: int = 32  # ignore docstrings and solutions with fewer characters, not counting white space
    redact: bool = False  # replace e-mail and IP addresses, keys and tokens; needs detect-secrets
    tokenizer: str = "train:4096"  # cl100k_base, gpt2, the path of a bpe.json, or train:N for a BPE of N ids
    tokenizer_sample_bytes: int = 2**25  # train:N learns from about this much of the training text
    val_fraction: float = 0.05  # share of the repositories that go to validation, each as a whole
    val_files: str | None = None  # glob of input files that go to validation as a whole and are read first
    split_by: str = "repo"  # what goes to training or validation as a whole: repo or file
    language_weights: str | None = None  # copies of training documents by language: "Python=2,Java=0.5,*=1"

    def __post_init__(self) -> None:
        for base in (SourceConfig, filters.CleanConfig, duplicates.DedupConfig, sequences.FormatConfig):
            base.__post_init__(self)
        if not 0 <= self.val_fraction < 1 or (self.val_fraction == 0 and not self.val_files):
            raise UserError(f"val_fraction is {self.val_fraction}; it must be below 1, and above 0 without val_files")
        for name in ("tokenizer_sample_bytes", "package_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.split_by not in ("repo", "file"):
            raise UserError(f"split_by is {self.split_by!r}; it must be repo or file")
        language_weights(self.language_weights)


@dataclass
class Draft:
    """A document on its way through the steps."""

    document: Document
    split: str
    copies: int  # how often it is written to the shards
    digest: bytes = bytes(16)
    sketch: tuple[np.ndarray, np.ndarray] | None = None
    pieces: list[str] = field(default_factory=list)  # Specials and texts
    ids: np.ndarray | None = None  # uint32, end-of-text last

    @property
    def texts(self) -> list[str]:
        """The pieces that are ordinary text."""
        return [piece for piece in self.pieces if not isinstance(piece, Special)]

    @property
    def language(self) -> str:
        return self.document.language or "unknown"


class Refinery:
    """The steps from documents to tokens, with the filters, problems and patterns that they use. Raises UserError or
    FileNotFoundError if a file or package that the settings need is missing. Cleaning needs no tokenizer."""

    def __init__(self, config: PipelineConfig, tokenizer: Tokenizer | None = None):
        self.config, self.tokenizer = config, tokenizer
        names = filters.filter_names(config.filters)
        self.filters = [filters.FILTERS[name] for name in names if name in filters.FILTERS]
        self.token_filters = [filters.TOKEN_FILTERS[name] for name in names if name in filters.TOKEN_FILTERS]
        self.languages = filters.split_names(config.languages)
        self.weights = language_weights(config.language_weights)
        self.opt_out = _names_in(config.opt_out)
        self.decontaminator = _decontaminator(config)
        self.redactor = Redactor() if config.redact else None
        self.minhash = duplicates.MinHash(config.near_threshold) if config.near_threshold is not None else None

    def refine(
        self, documents: list[Document], to_val: bool, tally: Tally, pool: ThreadPoolExecutor | None = None
    ) -> list[Draft]:
        """Takes documents through every step; `to_val` sends them all to validation. Returns the drafts that remain."""
        with tally.timed("clean"):
            documents = self.clean(documents, tally)
            drafts = _kept(self._draft(document, to_val, tally) for document in documents)
        tally.passed("clean", [draft.document for draft in drafts])
        with tally.timed("decontaminate"):
            drafts = _kept(self._decontaminate(draft, tally) for draft in drafts)
        tally.passed("decontaminate", [draft.document for draft in drafts])
        with tally.timed("sketch"):
            for draft in drafts:
                draft.sketch = self._sketch(draft.document.text)
        with tally.timed("redact"):
            drafts = _kept(self._redact(draft, tally) for draft in drafts)
        tally.passed("redact", [draft.document for draft in drafts])
        with tally.timed("format"):
            for draft in drafts:
                draft.pieces = self._pieces(draft)
        with tally.timed("tokenize"):
            all_ids = self.tokenizer.encode_documents([draft.pieces for draft in drafts], pool)
            drafts = _kept(self._tokenized(draft, ids, tally) for draft, ids in zip(drafts, all_ids, strict=True))
        tally.passed("tokenize", [draft.document for draft in drafts])
        return drafts

    def clean(self, documents: list[Document], tally: Tally) -> list[Document]:
        """The documents that pass the filters, notebooks split into cells."""
        for document in documents:
            counts = tally.languages.setdefault(document.language or "unknown", Counter())
            counts.update(documents=1, bytes=utf8_bytes(document.text))
        return _kept(self._cleaned(document, tally) for document in documents)

    def split(self, document: Document) -> str:
        """The split of a document: by its repository, or with split_by=file by its own path."""
        key = document.repo if self.config.split_by == "repo" else f"{document.repo} {document.path}"
        return split_of(key, self.config.seed, self.config.val_fraction)

    def _cleaned(self, document: Document, tally: Tally) -> Document | None:
        if self.config.notebooks and document.language == sequences.NOTEBOOK:
            result = sequences.notebook(document)
            if isinstance(result, Rejection):
                tally.drop(result.reason, document)
                return None
            document = result
        reason = self._reason_to_drop(document)
        if reason is None:
            return document
        tally.drop(reason, document)
        return None

    def _reason_to_drop(self, document: Document) -> str | None:
        if not document.text.strip():
            return "empty"
        if self.languages and document.language not in self.languages:
            return "language not wanted"
        if self.opt_out and filters.opted_out(document.repo, self.opt_out):
            return "opted out"
        if reason := filters.license_rejection(document, self.config):
            return reason
        return next((f.__name__ for f in self.filters if f(document, self.config)), None)

    def _draft(self, document: Document, to_val: bool, tally: Tally) -> Draft | None:
        """The document with its split and, in training, with as many copies as its language's weight says."""
        draft = Draft(document, "val" if to_val else self.split(document), copies=1)
        if self.weights and draft.split == "train":
            weight = self.weights.get(draft.language, self.weights.get("*", 1.0))
            chance = fraction(f"copies {self.config.seed} {document.repo} {document.path}")
            draft.copies = int(weight) + (chance < weight - int(weight))
        if draft.copies:
            return draft
        tally.drop("language weight", document)
        return None

    def _decontaminate(self, draft: Draft, tally: Tally) -> Draft | None:
        """Drops a document that holds a problem of a benchmark. Also sets the digest, which needs the same text."""
        if not (self.decontaminator or self.config.exact_duplicates):
            return draft
        squeezed = "".join(draft.document.text.split())
        if self.config.exact_duplicates:
            draft.digest = duplicates.digest(squeezed)
        if not self.decontaminator:
            return draft
        if draft.document.sections:  # the text of a notebook lacks its outputs
            squeezed = "".join("".join(text.split()) for _, text in draft.document.sections)
        problems = self.decontaminator.problems(squeezed.lower())
        if not problems:
            return draft
        tally.problems.update(problems)
        tally.drop("contaminated", draft.document, f" ({', '.join(problems[:5])})")
        return None

    def _sketch(self, text: str) -> tuple[np.ndarray, np.ndarray] | None:
        if self.minhash is None:
            return None
        hashes = duplicates.shingles(text, self.config.near_shingle)
        return self.minhash.sketch(hashes) if len(hashes) >= duplicates.MIN_SHINGLES else None

    def _redact(self, draft: Draft, tally: Tally) -> Draft | None:
        """Redacts the document; drops Python that would no longer parse."""
        if self.redactor is None:
            return draft
        document = draft.document
        sections = document.sections or (("", document.text),)
        results = [self.redactor.redact(text, _section_language(marker, document)) for marker, text in sections]
        if None in results:
            tally.drop("cannot be redacted", document)
            return None
        for _, counts in results:
            tally.redacted.update(counts)
        texts = [text for text, _ in results]
        redacted = tuple((marker, text) for (marker, _), text in zip(sections, texts, strict=True))
        draft.document = document._replace(text="\n".join(texts), sections=redacted if document.sections else ())
        return draft

    def _pieces(self, draft: Draft) -> list[str]:
        if draft.split == "train":
            return sequences.sequence(draft.document, self.config, self.config.seed)
        return sequences.plain(draft.document)

    def _tokenized(self, draft: Draft, ids: np.ndarray | None, tally: Tally) -> Draft | None:
        """The draft with its ids; drops it if there are none or a filter on tokens rejects it."""
        draft.ids = ids
        reason = "cannot be tokenized"
        if ids is not None:
            n_specials = len(draft.pieces) - len(draft.texts) + 1  # and end-of-text
            n_chars = sum(map(len, draft.texts))
            n_tokens = len(ids) - n_specials
            reason = next((f.__name__ for f in self.token_filters if f(n_chars, n_tokens, self.config)), None)
        if reason is None:
            return draft
        tally.drop(reason, draft.document)
        return None


def language_weights(setting: str | None) -> dict[str, float]:
    """The weight of each language in a setting such as "Python=2,*=0.5". Raises UserError."""
    weights = {}
    for pair in filters.split_names(setting):
        language, _, number = pair.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0  # refused below
        if not language or not 0 <= weight <= 1000:
            raise UserError(f"language_weights: {pair!r} is not LANGUAGE=NUMBER with a number in 0 .. 1000")
        weights[language.strip()] = weight
    return weights


def _kept(results: Iterable[Any]) -> list[Any]:
    """The results without None, which stands for a document that a step has dropped and counted in its tally."""
    return [result for result in results if result is not None]


def _section_language(marker: str, document: Document) -> str | None:
    """The language of a section, if redaction has to keep its syntax intact."""
    if marker == "<jupyter_code>":
        return "Python"
    return document.language if marker in ("", "<commit_before>", "<commit_after>") else None


def _names_in(path: str | None) -> frozenset[str]:
    """The lines of a text file in lower case, without comments and blank lines."""
    if path is None:
        return frozenset()
    lines = (line.partition("#")[0].strip().lower() for line in read_text(Path(path)).splitlines())
    return frozenset(line for line in lines if line)


def _decontaminator(config: PipelineConfig) -> Decontaminator | None:
    needles = []
    for pattern in sorted(filters.split_names(config.decontaminate)):
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise UserError(f"--decontaminate={pattern}: no such file; docs/data.md says how to get the problems")
        for path in map(Path, paths):
            columns, name = config.contaminant_columns, path.name.split(".")[0]
            needles += needles_of(read_rows(path), config.contaminant_min_chars, columns, name)
    return Decontaminator(needles) if needles else None
