"""The commits of a git checkout as documents: a file before, the message, the file after.

Commits without merges, from the first on; of each, the changed files whose extension names a language. Needs git.
"""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data.documents import Document, Rejection, language_of
from runtime.errors import UserError


@dataclass(frozen=True)
class Commits:
    """The history of a checkout's current commit as an input."""

    path: Path
    max_bytes: int

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
        return (
            int(self._git("rev-list", "--count", "--no-merges", "HEAD") or 0) * 20_000
        )  # a guess, for the progress bar: two files of 10 kB a commit

    @property
    def version(self) -> str:
        return self._git("rev-parse", "--verify", "--quiet", "HEAD")

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        repo = self.path.resolve().name
        with _Objects(self._command("cat-file", "--batch")) as objects:
            for number, (commit, path, before, after) in enumerate(self._changes()):
                if number >= skip:
                    yield self._document(repo, commit, path, *map(objects.read, (before, after, commit)))

    def _document(
        self, repo: str, commit: str, path: str, before: bytes, after: bytes, header: bytes
    ) -> Document | Rejection:
        where = f"{self.path}, commit {commit[:12]}, {path}"
        message = header.partition(b"\n\n")[2].strip()
        if len(before) + len(after) + len(message) > self.max_bytes:
            return Rejection("too large", where)
        try:
            old, words, new = (data.decode("utf-8") for data in (before, message, after))
        except UnicodeDecodeError:
            return Rejection("not UTF-8", where)
        sections = (("<commit_before>", old), ("<commit_msg>", words), ("<commit_after>", new))
        text = "\n".join((old, words, new))
        return Document(text, repo, f"{commit[:12]}/{path}", language=language_of(path), sections=sections)

    def _changes(self) -> Iterator[tuple[str, str, str, str]]:
        """Commit, path, and the blobs before and after, of each changed file."""
        options = ["--reverse", "--no-merges", "--no-renames", "--raw", "--no-abbrev", "-z", "--diff-filter=M"]
        with subprocess.Popen(self._command("log", *options, "--format=%H", "HEAD"), stdout=subprocess.PIPE) as log:
            fields = _split_at_nul(log.stdout)
            commit = ""
            for field in fields:
                field = field.strip()
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


class _Objects:
    """Objects of a repository, read through one process of git."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "_Objects":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def read(self, name: str) -> bytes:
        """The content of an object; empty if it is missing, as in a partial clone."""
        self.process.stdin.write(name.encode() + b"\n")
        self.process.stdin.flush()
        header = self.process.stdout.readline().split()
        if len(header) < 3:
            return b""
        return self.process.stdout.read(int(header[2]) + 1)[:-1]


def _split_at_nul(stream: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(2**16):
        *fields, rest = (rest + chunk).split(b"\0")
        yield from fields
    if rest:
        yield rest
