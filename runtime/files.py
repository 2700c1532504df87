"""Files that are written whole or not at all, and text files of users."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from runtime.errors import UserError


@contextmanager
def atomic_write(path: Path, mode: str = "w", keep: Path | None = None) -> Iterator[IO[Any]]:
    """Open a temporary file that is flushed to the disk and becomes `path` when the block ends; if the block raises,
    `path` stays as it was. If `keep` is given, a file already at `path` is renamed to it. Text is UTF-8."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1)


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write `values` to `path` as JSON, one per line, whole or not at all."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def read_text(path: Path) -> str:
    """The text of a user's file. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; convert it first") from None
