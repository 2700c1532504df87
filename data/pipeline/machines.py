"""A preparation in parts, made on several machines and then joined."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data.shards import tokenizer_file
from runtime.errors import UserError
from runtime.files import write_json


def part_of(setting: str) -> tuple[int, int]:
    """I and N of the setting I/N. Raises UserError."""
    part, _, n_parts = setting.partition("/")
    if not (part.isdecimal() and n_parts.isdecimal() and 1 <= int(part) <= int(n_parts)):
        raise UserError(f"--part={setting}: wants I/N with I in 1 .. N, such as 1/4")
    return int(part), int(n_parts)


def part_folder(path: Path, part: int, n_parts: int) -> Path:
    """The folder in which a part of the shards of `path` is made."""
    return path.with_name(f"{path.name}.part-{part}-of-{n_parts}")


def gather(path: Path, work: Path, n_parts: int, settings: dict[str, Any]) -> None:
    """Moves the units of all parts of `path` into the folder `work`; a gathering that was killed can be repeated.
    Raises UserError unless all parts are complete, made with `settings`, and share one tokenizer."""
    folders = [part_folder(path, part, n_parts) for part in range(1, n_parts + 1)]
    to_move = [folder for folder in folders if not (work / f"{folder.name}.merged").exists()]
    for folder in to_move:
        if not (folder / "complete.json").exists():
            raise UserError(
                f"{folder}: missing or not complete; first run --part={folders.index(folder) + 1}/{n_parts}"
            )
    reference = work if tokenizer_file(work).exists() else to_move[0]
    for folder in (reference, *to_move):
        for wanted in (settings, read_json(reference / "settings.json")):
            compare(folder, read_json(folder / "settings.json"), wanted)
        if tokenizer_file(folder).read_bytes() != tokenizer_file(reference).read_bytes():
            raise UserError(f"{folder}: its tokenizer differs from the other parts'; delete it and make it again")
    (work / "units").mkdir(exist_ok=True)
    if reference is not work:
        for name in ("tokenizers.json", "settings.json", tokenizer_file(reference).name):
            if (reference / name).exists():
                shutil.copy(reference / name, work / name)
    for folder in to_move:
        for file in sorted((folder / "units").iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
            os.replace(file, work / "units" / file.name)  # the notes last: a unit with a note counts as complete
        write_json(work / f"{folder.name}.merged", {})
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def compare(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError if `path` was made with other settings, or from other source files, than those wanted."""
    if wanted.get("source_fingerprint") not in (None, found.get("source_fingerprint")):
        raise UserError(f"{path}: the source's files have changed since it was begun; delete it to begin again")
    changed = [f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise UserError(f"{path}: made with other settings: {'; '.join(changed)}; delete it or choose another --name")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
