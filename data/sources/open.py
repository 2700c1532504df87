"""Where documents come from: a source is a list of inputs in a fixed order.

    local            the Python on this machine: the standard library and installed packages; needs no network
    dir:PATH         the source files below a folder, by extension; each folder in it counts as a repository
    files:GLOB       files of rows: .json, .jsonl (plain, .gz or .zst) or .parquet
    hub:NAME         the same files from a dataset repository of the Hugging Face hub; hub:NAME:GLOB takes some
    commits:PATH     the commits of a git checkout: each changed file as before, message, after

Several are joined by semicolons: --source='files:data/raw/*.parquet; commits:../linux'.

To add a source, write a class with the attributes of `Input` (data/documents.py) in a file beside this one, and return
its instances from `_open` below. An input may also have `held_out` (True: all of it goes to validation) and `size`
(bytes that it downloads, for the estimate of disk space).
"""

import glob
import os
from pathlib import Path

from data.documents import Input, SourceConfig
from data.sources.commits import Commits
from data.sources.folders import folder_files, local_files, python_folders
from data.sources.hub import hub_files
from data.sources.rows import RowFile
from runtime.errors import UserError


def open_source(config: SourceConfig, downloads: Path, pins: dict[str, str]) -> list[Input]:
    """The inputs that `config.source` names. Files of the hub are downloaded into `downloads`, one at a time; `pins`
    keeps the commits of its repositories. Raises UserError if a source is unknown, missing or matches nothing."""
    return [item for spec in config.source.split(";") for item in _open(spec.strip(), config, downloads, pins)]


def _open(spec: str, config: SourceConfig, downloads: Path, pins: dict[str, str]) -> list[Input]:
    kind, _, rest = spec.partition(":")
    if spec == "local":
        return local_files(python_folders(), config.package_bytes, config.max_document_bytes)
    if kind == "dir" and rest:
        return folder_files(Path(rest), config.max_document_bytes)
    if kind == "files" and rest:
        names = [name for name in sorted(glob.glob(rest, recursive=True)) if os.path.isfile(name)]
        if not names:
            raise UserError(f"--source={spec}: no file matches; check the path, and quote the pattern")
        distinct = {os.path.realpath(name): name for name in reversed(names)}  # links may lead to one file many times
        return [RowFile(Path(name), config) for name in sorted(distinct.values())]
    if kind == "hub" and rest:
        return hub_files(rest, config, downloads, pins)
    if kind == "commits" and rest:
        return [Commits(Path(rest), config.max_document_bytes)]
    raise UserError(
        f"--source={spec}: unknown; use local, dir:PATH, files:GLOB such as 'files:data/raw/*.json.gz', hub:NAME such "
        "as hub:codeparrot/codeparrot-clean, or commits:PATH"
    )
