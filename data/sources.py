"""Where documents come from. A source is a sequence of records in a fixed order, readable from any place on.

    local         the Python on this machine: the standard library and installed packages; needs no network
    files:GLOB    files of JSON lines in codeparrot-clean's columns, .jsonl or .json, plain or .gz

A record is a Document, or a Rejection that says why it is none.
"""

import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    text: str  # the file's whole text
    repo: str  # repository or package: train and validation never share one
    path: str  # within the repository
    license: str | None  # as the source names it


class Rejection(NamedTuple):
    reason: str  # counted by this
    where: str  # for a person to look at


class Source(Protocol):
    size_bytes: int  # about how much text there is, for the progress bar
    fingerprint: str  # changes when the records or their order may have

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        """The records in order, but for the first `skip`."""


def open_source(spec: str, package_bytes: int | None = None) -> Source:
    """The source that `spec` names: `local`, with at most about `package_bytes` of each package, or `files:GLOB`.
    Raises ValueError if it is unknown or matches nothing."""
    kind, _, pattern = spec.partition(":")
    if spec == "local":
        return LocalSource(_python_folders(), package_bytes)
    if kind == "files" and pattern:
        return JsonLinesSource(pattern)
    raise ValueError(f"--source={spec}: unknown; use local, or files:GLOB such as 'files:data/raw/*.json.gz'")


class LocalSource:
    """Python files under folders, in order of package and path. A vendored copy (`pip/_vendor/rich/…`) belongs to the
    package it is a copy of, so that the same code is not in train and validation both. Of a package with more than
    `package_bytes`, a share of the files picked by a hash of their paths makes about that much."""

    def __init__(self, folders: dict[Path, str], package_bytes: int | None = None):
        files = sorted(
            (_package(path.relative_to(folder), prefix), str(path.relative_to(folder)), path, path.stat())
            for folder, prefix in folders.items()
            for path in _python_files(folder)
        )
        sizes: Counter[str] = Counter()
        for repo, _, _, stat in files:
            sizes[repo] += stat.st_size
        limit = package_bytes or max(sizes.values(), default=0)
        self.files = [file for file in files if fraction(f"{file[0]} {file[1]}") * sizes[file[0]] < limit]
        self.size_bytes = sum(stat.st_size for *_, stat in self.files)
        self.fingerprint = _digest(f"{repo} {name} {_version(stat)}" for repo, name, _, stat in self.files)

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        for repo, name, path, _ in self.files[skip:]:
            try:
                yield Document(path.read_bytes().decode("utf-8"), repo, name, None)
            except UnicodeDecodeError:
                yield Rejection("not UTF-8", str(path))
            except OSError as error:
                yield Rejection("unreadable", f"{path}: {error.strerror}")


class JsonLinesSource:
    """JSON lines with columns `content`, `repo_name` and, where there, `path` and `license`, as in codeparrot-clean."""

    GZIP_RATIO = 3.5  # source code's, about

    def __init__(self, pattern: str):
        self.files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
        if not self.files:
            raise ValueError(f"--source=files:{pattern}: no file matches; check the path, and quote the pattern")
        ratios = {path: self.GZIP_RATIO if path.suffix == ".gz" else 1 for path in self.files}
        self.size_bytes = int(sum(path.stat().st_size * ratio for path, ratio in ratios.items()))
        self.fingerprint = _digest(f"{path} {_version(path.stat())}" for path in self.files)

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        for path in self.files:
            lines = _lines(path)
            for number, line in enumerate(lines, start=1):
                if skip:
                    skip -= 1
                elif isinstance(line, Rejection):
                    yield line
                else:
                    yield _document(line, f"{path}, line {number}")


def _document(line: bytes, where: str) -> Document | Rejection:
    if not line.strip():
        return Rejection("empty", where)
    try:
        row = json.loads(line)
        text, repo = row["content"], row["repo_name"]
        if not (isinstance(text, str) and isinstance(repo, str)):
            raise TypeError
    except KeyError as error:
        return Rejection(f"no column {error}", where)
    except (ValueError, TypeError, RecursionError):
        return Rejection("malformed line", where)
    if not _is_unicode(text):
        return Rejection("lone surrogate", where)
    return Document(text, repo, str(row.get("path", "")), row.get("license"))


def _lines(path: Path) -> Iterator[bytes | Rejection]:
    """The lines of a file, plain or gzipped; one that breaks off ends with a Rejection."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except PermissionError:
        yield Rejection("unreadable", f"{path}: no permission")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # any other OSError is the disk's: it stops the run
        yield Rejection("file breaks off", f"{path}: {error}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _python_folders() -> dict[Path, str]:
    """The folders of this interpreter's Python code, each with the prefix of its packages' names."""
    paths = sysconfig.get_paths()
    folders = {Path(paths["stdlib"]): "python/", Path(paths["purelib"]): "", Path(paths["platlib"]): ""}
    return {folder.resolve(): prefix for folder, prefix in folders.items()}


def _python_files(folder: Path) -> Iterator[Path]:
    """Every .py file below `folder`, symbolic links and nested site-packages left out."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("__pycache__", "site-packages", "dist-packages")]
        paths = (Path(root, name) for name in names if name.endswith(".py"))
        yield from (path for path in paths if path.is_file() and not path.is_symlink())


def _package(path: Path, prefix: str) -> str:
    vendored = [place for place, part in enumerate(path.parts[:-1]) if part == "_vendor"]
    if vendored:
        return Path(path.parts[vendored[-1] + 1]).stem
    return prefix + Path(path.parts[0]).stem


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns}"


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
