"""The commits of a git checkout as documents: a file before the commit, the message, the file after it.

Oldest first, without merges. Each changed file whose extension names a language is one document. Needs git.
"""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from data.documents import Document, Rejection, language_of
from runtime.errors import UserError

MARKERS = ("<commit_before>", "<commit_msg>", "<commit_after>")


@dataclass(frozen=True)
class Commits:
    """The history of a checkout's current commit as an input. Raises UserError if there is no git or no history."""

    path: Path
    max_bytes: int  # changes with more bytes than this, both files and the message together, are rejected

    def __post_init__(self) -> None:
        if shutil.which("git") is None:
            raise UserError("--source=commits: needs git; install it")
        if not self.version:
            raise UserError(f"--source=commits:{self.path}: not a git checkout with commits")

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def text_bytes(self) -> int:
        n_commits = int(self._git("rev-list", "--count", "--no-merges", "HEAD") or 0)
        return n_commits * 20_000  # a guess for the progress bar: two files of 10 kB per commit

    @property
    def version(self) -> str:
        return self._git("rev-parse", "--verify", "--quiet", "HEAD")

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        repo = self.path.resolve().name
        command = self._command("cat-file", "--batch")
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as git:
            for commit, path, old, new in islice(self._changes(), skip, None):
                message = _read_object(git, commit).partition(b"\n\n")[2].strip()
                yield self._document(repo, commit, path, _read_object(git, old), message, _read_object(git, new))

    def _document(self, repo: str, commit: str, path: str, *sections: bytes) -> Document | Rejection:
        """The document of a changed file; `sections` are the file before, the message, the file after."""
        where = f"{self.path}, commit {commit[:12]}, {path}"
        if sum(map(len, sections)) > self.max_bytes:
            return Rejection("too large", where)
        try:
            texts = [section.decode("utf-8") for section in sections]
        except UnicodeDecodeError:
            return Rejection("not UTF-8", where)
        text, name = "\n".join(texts), f"{commit[:12]}/{path}"
        return Document(text, repo, name, language=language_of(path), sections=tuple(zip(MARKERS, texts, strict=True)))

    def _changes(self) -> Iterator[tuple[str, str, str, str]]:
        """For each changed file: the commit, the path, and the names of the blobs before and after."""
        options = ["--reverse", "--no-merges", "--no-renames", "--raw", "--no-abbrev", "-z", "--diff-filter=M"]
        with subprocess.Popen(self._command("log", *options, "--format=%H", "HEAD"), stdout=subprocess.PIPE) as log:
            fields = _split_at_nul(log.stdout)
            commit = ""
            for field in map(bytes.strip, fields):
                if not field.startswith(b":"):  # a commit; its changed files follow
                    commit = field.decode() or commit
                    continue
                old_mode, new_mode, before, after, _ = field[1:].decode().split(" ")
                path = next(fields).decode("utf-8", "replace")
                if old_mode.startswith("100") and new_mode.startswith("100") and language_of(path):  # files, not links
                    yield commit, path, before, after
            if log.wait():
                raise OSError(f"{self.path}: git log ended with exit code {log.returncode}; is the checkout whole?")

    def _command(self, *arguments: str) -> list[str]:
        return ["git", "-C", str(self.path), *arguments]

    def _git(self, *arguments: str) -> str:
        result = subprocess.run(self._command(*arguments), capture_output=True, check=False)
        return result.stdout.decode("utf-8", "replace").strip()


def _read_object(git: subprocess.Popen[bytes], name: str) -> bytes:
    """The content of an object, from `git cat-file --batch`; empty if it is missing, as in a partial clone."""
    git.stdin.write(name.encode() + b"\n")
    git.stdin.flush()
    header = git.stdout.readline().split()
    if len(header) < 3:
        return b""
    return git.stdout.read(int(header[2]) + 1)[:-1]


def _split_at_nul(stream: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(2**16):
        *fields, rest = (rest + chunk).split(b"\0")
        yield from fields
    if rest:
        yield rest
