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

RATIOS = {".gz": 3.5, ".zst": 4.0, ".parquet": 3.0}  # bytes of source code in a byte of the file, about


@dataclass(frozen=True)
class RowFile:
    """A file of rows as an input. Its columns are those that the settings name."""

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
        rows = _parquet_rows if self.path.suffix == ".parquet" else _lines
        max_bytes = 6 * self.config.max_document_bytes + 2**16  # JSON may write a character as six
        for number, row in enumerate(rows(self.path, max_bytes), start=1):
            if number <= skip:
                continue
            yield row if isinstance(row, Rejection) else _document(row, f"{self.path}, row {number}", self.config)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a small file, blank lines left out. Raises UserError at the first that is none."""
    rows = []
    for number, row in enumerate((_parquet_rows if path.suffix == ".parquet" else _lines)(path, 2**27), start=1):
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
            there = any(name in row for name in column.split(","))
            return Rejection("malformed line" if there else f"no column {column.split(',')[0]!r}", where)
    text, repo = _first(row, config.text_column), _first(row, config.repo_column or "")
    if not isinstance(text, str) or not isinstance(repo, str | None):
        return Rejection("malformed line", where)
    try:
        if utf8_bytes(text) + utf8_bytes(repo or "") > config.max_document_bytes:
            return Rejection("too large", where)
    except UnicodeEncodeError:
        return Rejection("lone surrogate", where)
    path, stars = str(_first(row, config.path_column) or ""), _first(row, config.stars_column)
    return Document(
        text,
        hashlib.sha256(text.encode()).hexdigest()[:16] if repo is None else repo,
        path.encode("utf-8", "replace").decode(),
        _licenses(_first(row, config.license_column)),
        language_named(str(_first(row, config.language_column) or language_of(path) or config.language or "")) or None,
        int(stars) if isinstance(stars, int | float) and abs(stars) < 2**53 else None,
    )


def _first(row: dict[str, Any], columns: str) -> Any:
    """The value of the first of some comma-separated columns that has one."""
    return next((row[column] for column in columns.split(",") if row.get(column) is not None), None)


def _licenses(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(str(one) for one in values if one)


def _lines(path: Path, max_bytes: int) -> Iterator[bytes | Rejection]:
    """The lines of a file; one longer than `max_bytes` becomes a Rejection, and so does the end of a file that breaks
    off."""
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
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # any other OSError is the disk's: it stops the run
        yield Rejection("file breaks off", f"{path}, after row {number}: {error}")
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
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


def _parquet_rows(path: Path, max_bytes: int) -> Iterator[dict[str, Any] | Rejection]:
    """The rows of a Parquet file, `max_bytes` being its documents' affair."""
    number = 0
    try:
        with _parquet().ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield row
    except PermissionError:
        yield Rejection("unreadable", f"{path}: no permission")
    except (ValueError, OSError) as error:  # pyarrow's: what is not UTF-8, not Parquet, cut short or corrupt
        if getattr(error, "errno", None):
            raise  # the disk's
        yield Rejection("file breaks off", f"{path}, after row {number}: {' '.join(str(error).split())[:200]}")
