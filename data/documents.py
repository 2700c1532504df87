"""What the data stage is about: documents, why a record is none, and inputs that give both.

An input is a sequence of records in a fixed order, readable from any place on. A record is a Document or a Rejection.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from runtime.errors import UserError


class Document(NamedTuple):
    text: str  # the file's whole text
    repo: str  # repository or package: train and validation never share one
    path: str  # within the repository
    licenses: tuple[str, ...] = ()  # as the source names them
    language: str | None = None  # as in LANGUAGES, or as the source names it
    stars: int | None = None
    sections: tuple[tuple[str, str], ...] = ()  # a notebook's or commit's texts, each after its marker; else empty


class Rejection(NamedTuple):
    reason: str  # counted by this
    where: str  # for a person to look at


class Input(Protocol):
    """A part of a source that can be read by itself."""

    name: str
    text_bytes: int  # about how much text it holds
    version: str  # names and sizes: changes when the records or their order may have; the same on every machine

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        """The records in order, but for the first `skip`."""


@dataclass(frozen=True)
class SourceConfig:
    source: str = "local"  # local, dir:PATH, files:GLOB, hub:NAME[:GLOB] or commits:PATH; several joined by ;
    package_bytes: int | None = None  # of `local`, take about this much of a package at most; None takes all
    revision: str | None = None  # of hub: a commit, tag or branch; None takes the newest; the commit is pinned
    retry_s: float = 5.0  # first wait after a network failure, seconds; doubles up to ten minutes
    text_column: str = "content,text,code"  # of rows: the first of these columns that is there
    repo_column: str | None = "repo_name,repository_name,max_stars_repo_name,repo"  # None: each row its own repository
    path_column: str = "path,max_stars_repo_path,file_path"  # likewise
    license_column: str = "license,licenses,max_stars_repo_licenses,license_type"  # likewise
    language_column: str = "language,lang"  # likewise
    stars_column: str = "stars,max_stars_count,star_count"  # likewise
    language: str | None = None  # of documents whose language neither a column nor the path's extension tells
    max_document_bytes: int = 2**24  # larger documents are rejected; bytes

    def __post_init__(self) -> None:
        if self.max_document_bytes < 1:
            raise UserError(f"max_document_bytes is {self.max_document_bytes}; it must be at least 1")


LANGUAGES = {
    extension: language
    for language, extensions in {
        "C": ".c .h",
        "C#": ".cs",
        "C++": ".cc .cpp .cxx .hh .hpp .hxx",
        "CSS": ".css",
        "Go": ".go",
        "HTML": ".htm .html",
        "Haskell": ".hs",
        "JSON": ".json",
        "Java": ".java",
        "JavaScript": ".cjs .js .jsx .mjs",
        "Julia": ".jl",
        "Jupyter Notebook": ".ipynb",
        "Kotlin": ".kt .kts",
        "Lua": ".lua",
        "Markdown": ".markdown .md",
        "PHP": ".php",
        "Perl": ".pl .pm",
        "Python": ".py .pyi .pyw",
        "R": ".r",
        "Ruby": ".rb",
        "Rust": ".rs",
        "SQL": ".sql",
        "SVG": ".svg",
        "Scala": ".scala",
        "Shell": ".bash .sh",
        "Swift": ".swift",
        "TeX": ".tex",
        "Text": ".txt",
        "TypeScript": ".ts .tsx",
        "XML": ".xml",
        "YAML": ".yaml .yml",
        "reStructuredText": ".rst",
    }.items()
    for extension in extensions.split()
}
_BY_LOWER_CASE = {language.lower(): language for language in LANGUAGES.values()}


def language_of(path: str) -> str | None:
    """The language that a path's extension names, as in LANGUAGES."""
    return LANGUAGES.get(os.path.splitext(path)[1].lower())


def language_named(name: str) -> str:
    """A language as LANGUAGES spells it, whatever the case of its letters; a name not in there as it is."""
    return _BY_LOWER_CASE.get(name.lower(), name)


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


def digest_of(lines: Iterator[str]) -> str:
    """sha256 of some lines."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def utf8_bytes(text: str) -> int:
    """The text's size in UTF-8. Raises UnicodeEncodeError on a lone surrogate."""
    return len(text) if text.isascii() else len(text.encode())
