"""Documents from files of rows: JSON lines (.json, .jsonl; plain, .gz or .zst) and Parquet."""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.documents import Document, Rejection, SourceConfig, language_named, language_of, utf8_bytes
from runtime.errors import UserError

RATIOS = {".gz": 3.5, ".zst": 4.0, ".parquet": 3.0}  # bytes of source code per byte of the file, roughly


@dataclass(frozen=True)
class RowFile:
    """A file of rows as an input. The settings name its columns. Raises UserError if a package is missing."""

    path: Path
    config: SourceConfig

    def __post_init__(self) -> None:
        if self.path.suffix == ".zst":
            _zstd()
        if self.path.suffix == ".parquet":
            _parquet()

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def text_bytes(self) -> int:
        return int(self.path.stat().st_size * RATIOS.get(self.path.suffix, 1.0))

    @property
    def version(self) -> str:
        return f"{self.path} {self.path.stat().st_size}"

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        max_bytes = 6 * self.config.max_document_bytes + 2**16  # JSON may write one character as six
        rows = _parquet_rows(self.path) if self.path.suffix == ".parquet" else _lines(self.path, max_bytes)
        for number, row in enumerate(rows, start=1):
            if number > skip:
                yield row if isinstance(row, Rejection) else _document(row, f"{self.path}, row {number}", self.config)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a small file; blank lines are skipped. Raises UserError at the first row that is no JSON object."""
    rows = []
    found = _parquet_rows(path) if path.suffix == ".parquet" else _lines(path, 2**27)
    for number, row in enumerate(found, start=1):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: not a JSON object; give a file of JSON lines or Parquet")
        rows.append(row)
    return rows


def _document(row: bytes | dict[str, Any], where: str, config: SourceConfig) -> Document | Rejection:
    if isinstance(row, bytes):
        if not row.strip():
            return Rejection("empty", where)
        try:
            row = json.loads(row)
        except (ValueError, RecursionError):
            return Rejection("malformed line", where)
        if not isinstance(row, dict):
            return Rejection("malformed line", where)
    for column in (config.text_column, config.repo_column):
        if column is not None and _first(row, column) is None:
            names = column.split(",")
            has_column = any(name in row for name in names)
            return Rejection("malformed line" if has_column else f"no column {names[0]!r}", where)
    text, repo = _first(row, config.text_column), _first(row, config.repo_column or "")
    if not isinstance(text, str) or not isinstance(repo, str | None):
        return Rejection("malformed line", where)
    try:
        if utf8_bytes(text) + utf8_bytes(repo or "") > config.max_document_bytes:
            return Rejection("too large", where)
    except UnicodeEncodeError:
        return Rejection("lone surrogate", where)
    path, stars = str(_first(row, config.path_column) or ""), _first(row, config.stars_column)
    licenses = _first(row, config.license_column)
    return Document(
        text,
        hashlib.sha256(text.encode()).hexdigest()[:16] if repo is None else repo,
        path.encode("utf-8", "replace").decode(),
        tuple(str(one) for one in (licenses if isinstance(licenses, list) else [licenses]) if one),
        language_named(str(_first(row, config.language_column) or language_of(path) or config.language or "")) or None,
        int(stars) if isinstance(stars, int | float) and abs(stars) < 2**53 else None,
    )


def _first(row: dict[str, Any], columns: str) -> Any:
    """The value of the first of the comma-separated columns that is not null; None if all are."""
    return next((row[column] for column in columns.split(",") if row.get(column) is not None), None)


def _lines(path: Path, max_bytes: int) -> Iterator[bytes | Rejection]:
    """The lines of a file. A Rejection stands for a line longer than `max_bytes`, and for the point where a damaged
    file breaks off."""
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(max_bytes):
                number += 1
                if len(line) < max_bytes or line.endswith(b"\n"):
                    yield line
                else:
                    while (rest := file.readline(max_bytes)) and not rest.endswith(b"\n"):
                        pass
                    yield Rejection("too large", f"{path}, row {number}")
    except PermissionError:
        yield Rejection("unreadable", f"{path}: no permission")
    except Exception as error:
        if not isinstance(error, EOFError | gzip.BadGzipFile | zlib.error) and type(error).__name__ != "ZstdError":
            raise  # an OSError of the disk ends the run
        yield Rejection("file breaks off", f"{path}, after row {number}: {error}")


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path), 2**17)
    return _zstd().open(path) if path.suffix == ".zst" else open(path, "rb")


def _zstd() -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError("a .zst source needs backports.zstd; install it with: pip install backports.zstd") from None
    return zstd


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("a .parquet source needs pyarrow; install it with: pip install datasets") from None
    return pyarrow.parquet


def _parquet_rows(path: Path) -> Iterator[dict[str, Any] | Rejection]:
    """The rows of a Parquet file. A Rejection stands for the point where a damaged file breaks off."""
    number = 0
    try:
        with _parquet().ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield row
    except PermissionError:
        yield Rejection("unreadable", f"{path}: no permission")
    except (ValueError, OSError) as error:  # pyarrow's, of a file that is not UTF-8, not Parquet, cut short or corrupt
        if getattr(error, "errno", None):
            raise  # an error of the disk
        yield Rejection("file breaks off", f"{path}, after row {number}: {' '.join(str(error).split())[:200]}")
