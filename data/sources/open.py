"""Where documents come from: a source is a list of inputs in a fixed order.

    local            the Python on this machine: the standard library and installed packages; needs no network
    dir:PATH         the source files below a folder, by extension; each folder in it counts as a repository
    files:GLOB       files of rows: .json, .jsonl (plain, .gz or .zst) or .parquet
    hub:NAME         the same files from a dataset repository of the Hugging Face hub; hub:NAME:GLOB takes some
    commits:PATH     the commits of a git checkout: each changed file as before, message, after

Several are joined by semicolons: --source='files:data/raw/*.parquet; commits:../linux'.
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
    """The inputs that `config.source` names. A hub's files are downloaded into the folder `downloads`, one at a time;
    `pins` holds the commits of its repositories, and those not in it yet are looked up and added. Raises UserError if
    a source is unknown, is not there or matches nothing."""
    return [item for spec in config.source.split(";") for item in _open(spec.strip(), config, downloads, pins)]


def _open(spec: str, config: SourceConfig, downloads: Path, pins: dict[str, str]) -> list[Input]:
    kind, _, rest = spec.partition(":")
    if spec == "local":
        return local_files(python_folders(), config.package_bytes, config.max_document_bytes)
    if kind == "dir" and rest:
        return folder_files(Path(rest), config.max_document_bytes)
    if kind == "files" and rest:
        names = [name for name in sorted(glob.glob(rest, recursive=True)) if os.path.isfile(name)]
        once = {os.path.realpath(name): name for name in reversed(names)}  # a link may lead back to a folder above
        if not once:
            raise UserError(f"--source={spec}: no file matches; check the path, and quote the pattern")
        return [RowFile(Path(name), config) for name in sorted(once.values())]
    if kind == "hub" and rest:
        return hub_files(rest, config, downloads, pins)
    if kind == "commits" and rest:
        return [Commits(Path(rest), config.max_document_bytes)]
    raise UserError(
        f"--source={spec}: unknown; use local, dir:PATH, files:GLOB such as 'files:data/raw/*.json.gz', hub:NAME such "
        "as hub:codeparrot/codeparrot-clean, or commits:PATH"
    )
