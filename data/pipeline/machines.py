"""Parts of a preparation, made on several machines, and bringing them together."""

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
    """Where part I of N is made."""
    return path.with_name(f"{path.name}.part-{part}-of-{n_parts}")


def gather(path: Path, work: Path, n_parts: int, settings: dict[str, Any]) -> None:
    """Move the units of all parts of `path` into the folder `work`, if all are complete and made with `settings`. What
    is stopped can be done again. Raises UserError."""
    folders = [part_folder(path, part, n_parts) for part in range(1, n_parts + 1)]
    left = [folder for folder in folders if not (work / f"{folder.name}.merged").exists()]
    for folder in left:
        if not (folder / "complete.json").exists():
            setting = f"--part={folders.index(folder) + 1}/{n_parts}"
            raise UserError(f"{folder}: not there or not complete; run {setting} to its end first")
    known = work if tokenizer_file(work).exists() else left[0]
    for folder in (known, *left):
        for wanted in (settings, read_json(known / "settings.json")):
            compare(folder, read_json(folder / "settings.json"), wanted)
        if tokenizer_file(folder).read_bytes() != tokenizer_file(known).read_bytes():
            raise UserError(f"{folder}: its tokenizer is not the other parts'; delete it and make it again")
    (work / "units").mkdir(exist_ok=True)
    for name in ("tokenizers.json", "settings.json", tokenizer_file(known).name):
        if known is not work and (known / name).exists():
            shutil.copy(known / name, work / name)
    for folder in left:
        for file in sorted((folder / "units").iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
            os.replace(file, work / "units" / file.name)  # a unit's note after its arrays
        write_json(work / f"{folder.name}.merged", {})
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def compare(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError unless what `path` was made with is what is wanted."""
    if wanted.get("source_fingerprint") not in (None, found.get("source_fingerprint")):
        raise UserError(f"{path}: the source's files have changed since it was begun; delete it to begin anew")
    different = [f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise UserError(
            f"{path}: made with other settings: {'; '.join(different)}; delete it, or choose another --name"
        )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
