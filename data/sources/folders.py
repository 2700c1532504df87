"""Files of source code below folders: the Python on this machine, and any folder of repositories."""

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.documents import LANGUAGES, Document, Input, Rejection, digest_of, fraction, language_of
from runtime.errors import UserError

GROUP_BYTES = 2**24  # bytes of source files per input, roughly


class SourceFile(NamedTuple):
    repo: str
    path: str  # relative to the source's folder; becomes the Document's path
    file: Path
    size: int = 0  # bytes
    rejected: str | None = None  # reason to reject the file without reading it


@dataclass(frozen=True)
class FileGroup:
    """Files of source code as an input, read one after the other."""

    files: tuple[SourceFile, ...]
    text_bytes: int
    max_bytes: int

    @property
    def name(self) -> str:
        return self.files[0].path

    @property
    def version(self) -> str:
        return digest_of(f"{file.path} {file.size}" for file in self.files)

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        for file in self.files[skip:]:
            yield self._read(file)

    def _read(self, file: SourceFile) -> Document | Rejection:
        if file.rejected:
            return Rejection(file.rejected, str(file.file))
        try:
            data = file.file.read_bytes()
            if len(data) > self.max_bytes:
                return Rejection("too large", str(file.file))
            return Document(data.decode("utf-8"), file.repo, file.path, language=language_of(file.path))
        except UnicodeDecodeError:
            return Rejection("not UTF-8", str(file.file))
        except OSError as error:
            return Rejection("unreadable", f"{file.file}: {error.strerror}")


def local_files(folders: dict[Path, str], package_bytes: int | None, max_bytes: int) -> list[Input]:
    """The Python files below folders, in order of package and path; `folders` maps each to a prefix of its packages.

    A vendored copy (`pip/_vendor/rich/…`) belongs to the package that it copies, so that training and validation never
    share its code. Of a package larger than `package_bytes`, a hash of the path selects files of about that size."""
    files = []
    sizes: Counter[str] = Counter()
    for folder, prefix in folders.items():
        for path, problem in _walk(folder, ("site-packages", "dist-packages")):
            if path.suffix == ".py" and not problem and path.is_file():
                relative = path.relative_to(folder)
                file = _source_file(path, _package(relative, prefix), str(relative), max_bytes)
                files.append(file)
                sizes[file.repo] += file.size
    limit = package_bytes or max(sizes.values(), default=0)
    kept = [file for file in sorted(files) if fraction(f"{file.repo} {file.path}") * sizes[file.repo] < limit]
    return _groups(kept, max_bytes)


def folder_files(folder: Path, max_bytes: int) -> list[Input]:
    """The files below `folder` whose extension names a language, in order of path. Each folder in it is a repository,
    and so is `folder` for the files in it. Hidden folders and node_modules are left out. Raises UserError if none."""
    if not folder.is_dir():
        raise UserError(f"--source=dir:{folder}: no such folder")
    files = []
    for path, problem in _walk(folder, ("node_modules",)):
        relative = path.relative_to(folder)
        repo = relative.parts[0] if len(relative.parts) > 1 else folder.resolve().name
        if problem:
            files.append(SourceFile(repo, str(relative), path, 0, problem))
        elif language_of(path.name):
            files.append(_source_file(path, repo, str(relative), max_bytes))
    if not files:
        raise UserError(f"--source=dir:{folder}: no source files; known extensions: {' '.join(sorted(LANGUAGES))}")
    return _groups(sorted(files), max_bytes)


def _source_file(path: Path, repo: str, name: str, max_bytes: int) -> SourceFile:
    try:
        stat = path.stat()
    except OSError:
        return SourceFile(repo, name, path, 0, "unreadable")
    if not path.is_file():
        return SourceFile(repo, name, path, 0, "not a file")
    if stat.st_size > max_bytes:
        return SourceFile(repo, name, path, 0, "too large")
    return SourceFile(repo, name, path, stat.st_size)


def _groups(files: list[SourceFile], max_bytes: int) -> list[Input]:
    """The files in groups of neighbours, each of about GROUP_BYTES."""
    groups: list[Input] = []
    members: list[SourceFile] = []
    n_bytes = 0
    for file in files:
        members.append(file)
        n_bytes += file.size
        if n_bytes >= GROUP_BYTES or file is files[-1]:
            groups.append(FileGroup(tuple(members), n_bytes, max_bytes))
            members, n_bytes = [], 0
    return groups


def _walk(folder: Path, left_out: tuple[str, ...]) -> Iterator[tuple[Path, str | None]]:
    """Every file below `folder`, with None; every symbolic link and unreadable folder, with the reason to reject it."""
    problems: list[OSError] = []
    for root, folders, names in os.walk(folder, onerror=problems.append):
        links = {name for name in (*folders, *names) if os.path.islink(os.path.join(root, name))}
        for name in sorted({*links, *names}):
            yield Path(root, name), "symbolic link" if name in links else None
        skipped = {*left_out, *links, "__pycache__"}
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
    for error in problems:
        if Path(error.filename) != folder:
            yield Path(error.filename), "unreadable"


def python_folders() -> dict[Path, str]:
    """The folders of this interpreter's Python code, each with a prefix for the names of its packages."""
    paths = sysconfig.get_paths()
    folders = {Path(paths["stdlib"]): "python/", Path(paths["purelib"]): "", Path(paths["platlib"]): ""}
    return {folder.resolve(): prefix for folder, prefix in folders.items()}


def _package(path: Path, prefix: str) -> str:
    """The package of a file, from its path below a folder of packages."""
    vendored = [index for index, part in enumerate(path.parts[:-1]) if part == "_vendor"]
    if vendored:
        return Path(path.parts[vendored[-1] + 1]).stem
    return prefix + Path(path.parts[0]).stem
