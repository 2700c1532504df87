"""Documents, rejected records, and the inputs that yield them.

An input is a sequence of records in a fixed order, readable from any index on. A record is a Document or a Rejection.
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
    licenses: tuple[str, ...] = ()  # spelled as in the source
    language: str | None = None  # spelled as in LANGUAGES; a language not in there as in the source
    stars: int | None = None
    sections: tuple[tuple[str, str], ...] = ()  # (marker, text) pairs of a notebook or commit; else empty


class Rejection(NamedTuple):
    reason: str  # rejections are counted by reason
    where: str  # tells a person where to look


class Input(Protocol):
    """A part of a source that can be read by itself."""

    name: str
    text_bytes: int  # size of its text, estimated
    version: str  # made of names and sizes: differs if the records or their order may differ; equal on all machines

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        """Yields the records in order, without the first `skip`."""


@dataclass(frozen=True)
class SourceConfig:
    source: str = "local"  # local, dir:PATH, files:GLOB, hub:NAME[:GLOB] or commits:PATH; join several with ;
    package_bytes: int | None = None  # source local: about the most bytes taken from one package; None takes all
    revision: str | None = None  # source hub: commit, tag or branch; None: newest; the commit found is recorded
    retry_s: float = 5.0  # seconds to wait after the first network failure; doubles up to ten minutes
    text_column: str = "content,text,code"  # columns to try for the text: the first with a value is used
    repo_column: str | None = "repo_name,repository_name,max_stars_repo_name,repo"  # repository name; None: one per row
    path_column: str = "path,max_stars_repo_path,file_path"  # columns to try for the file's path in its repository
    license_column: str = "license,licenses,max_stars_repo_licenses,license_type"  # columns to try for the licences
    language_column: str = "language,lang"  # columns to try for the language, before the path's extension
    stars_column: str = "stars,max_stars_count,star_count"  # columns to try for the repository's stars
    language: str | None = None  # language of documents if neither a column nor the path's extension tells it
    max_document_bytes: int = 2**24  # documents of more bytes are rejected

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
    """The language of a path's extension; None if LANGUAGES does not have it."""
    return LANGUAGES.get(os.path.splitext(path)[1].lower())


def language_named(name: str) -> str:
    """The spelling in LANGUAGES of a language given in any case; a language not in there stays as it is."""
    return _BY_LOWER_CASE.get(name.lower(), name)


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


def digest_of(lines: Iterator[str]) -> str:
    """The sha256 of the lines joined by newlines, in hexadecimal."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def utf8_bytes(text: str) -> int:
    """The text's size in UTF-8. Raises UnicodeEncodeError on a lone surrogate."""
    return len(text) if text.isascii() else len(text.encode())
