"""Files of a dataset repository on the Hugging Face hub, one at a time: downloaded, read, deleted.

The repository's commit is looked up once and pinned: a run that continues next week reads the same files. Failures of
the network are retried; failures that a retry cannot fix end the run with a message that says what to do.
"""

import errno
import fnmatch
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data.documents import Document, Rejection, SourceConfig
from data.sources.rows import RATIOS, RowFile
from runtime.errors import UserError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet")
HELD_OUT = {"codeparrot/codeparrot-clean": "*file-000000000054.json.gz"}  # files their publishers reserve: validation
MAX_WAIT_S = 600.0
ATTEMPTS = 30  # about four hours of waiting with the default first wait
HTTP_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")  # the hub's, by version; their errors are the network's
Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository as an input."""

    repo: str
    revision: str  # a commit
    name: str  # path within the repository
    size: int  # bytes to download
    folder: Path  # where to download it
    config: SourceConfig

    @property
    def held_out(self) -> bool:
        """True if the dataset's publisher reserves this file for validation."""
        return fnmatch.fnmatch(self.name, HELD_OUT.get(self.repo, ""))

    @property
    def text_bytes(self) -> int:
        return int(self.size * RATIOS.get(Path(self.name).suffix, 1.0))

    @property
    def version(self) -> str:
        return f"{self.repo} {self.revision} {self.name} {self.size}"

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        hub = _hub()
        hub.utils.disable_progress_bars()
        path = patiently(
            lambda: hub.hf_hub_download(
                self.repo, self.name, repo_type="dataset", revision=self.revision, local_dir=self.folder
            ),
            f"{self.repo}/{self.name}",
            self.config.retry_s,
        )
        try:
            yield from RowFile(Path(path), self.config).records(skip)
        finally:
            Path(path).unlink(missing_ok=True)


def hub_files(spec: str, config: SourceConfig, folder: Path, pins: dict[str, str]) -> list[HubFile]:
    """The files of rows in the repository that `spec` names (NAME or NAME:GLOB), sorted by name, at the commit in
    `pins`. If `pins` lacks the repository, the commit of `config.revision` is looked up and added to it."""
    repo, _, pattern = spec.partition(":")
    hub = _hub()
    revision = pins.get(repo, config.revision)
    info = patiently(
        lambda: hub.HfApi().dataset_info(repo, revision=revision, files_metadata=True), repo, config.retry_s
    )
    pins[repo] = info.sha
    files = [
        HubFile(repo, info.sha, file.rfilename, file.size or 0, folder, config)
        for file in sorted(info.siblings, key=lambda file: file.rfilename)
        if file.rfilename.endswith(SUFFIXES) and fnmatch.fnmatch(file.rfilename, pattern or "*")
    ]
    if not files:
        names = ", ".join(file.rfilename for file in info.siblings[:5])
        raise UserError(f"--source=hub:{spec}: no file matches; the repository holds {names} …")
    return files


def patiently(action: Callable[[], Result], what: str, first_wait_s: float) -> Result:
    """Returns what `action` returns. After a failure of the network it waits, twice as long each time, and tries again.
    Raises PermissionError or FileNotFoundError if the hub refuses, ConnectionError after ATTEMPTS failures."""
    from huggingface_hub.errors import HfHubHTTPError

    wait_s = first_wait_s
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            known = isinstance(error, OSError | HfHubHTTPError | RuntimeError)
            if not known and not type(error).__module__.startswith(HTTP_CLIENTS):
                raise
            _raise_if_final(error, what)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if attempt < ATTEMPTS:
            print(f"{what}: {reason}; trying again in {wait_s:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait_s * random.uniform(0.75, 1.0))  # so that workers that failed together do not retry together
            wait_s = min(MAX_WAIT_S, 2 * wait_s)
    raise ConnectionError(f"{what}: failed {ATTEMPTS} times; run the same command again to continue")


def _raise_if_final(error: Exception, what: str) -> None:
    """Raises an OSError that says what to do if trying again cannot help against `error`."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        raise PermissionError(
            f"{what}: the hub refuses ({status}); check the name, accept the dataset's terms on its page, and log in "
            "with: hf auth login"
        ) from None
    if status == 404:
        raise FileNotFoundError(f"{what}: not on the hub; check the name and --revision") from None
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.ENOSPC, errno.EROFS):
        raise error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("a hub source needs huggingface_hub; install it with: pip install datasets") from None
    return huggingface_hub
