"""Files of a dataset repository on the Hugging Face hub, one at a time: downloaded, read, deleted.

The repository's commit is looked up once and pinned, so that a run that goes on next week reads the same files. A
failure of the network is waited out; one that waiting cannot mend ends with what to do.
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
HELD_OUT = {"codeparrot/codeparrot-clean": "*file-000000000054.json.gz"}  # never in train
MAX_WAIT_S = 600.0
ATTEMPTS = 30  # about four hours of waiting, by the default first wait
Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository as an input."""

    repo: str
    revision: str  # a commit
    filename: str
    size: int
    folder: Path
    config: SourceConfig

    @property
    def name(self) -> str:
        return self.filename

    @property
    def held_out(self) -> bool:
        """Is this the file that its makers validate on?"""
        return fnmatch.fnmatch(self.filename, HELD_OUT.get(self.repo, ""))

    @property
    def text_bytes(self) -> int:
        return int(self.size * RATIOS.get(Path(self.filename).suffix, 1.0))

    @property
    def version(self) -> str:
        return f"{self.repo} {self.revision} {self.filename} {self.size}"

    def records(self, skip: int) -> Iterator[Document | Rejection]:
        hub = _hub()
        hub.utils.disable_progress_bars()
        path = patiently(
            lambda: hub.hf_hub_download(
                self.repo, self.filename, repo_type="dataset", revision=self.revision, local_dir=self.folder
            ),
            f"{self.repo}/{self.filename}",
            self.config.retry_s,
        )
        try:
            yield from RowFile(Path(path), self.config).records(skip)
        finally:
            Path(path).unlink(missing_ok=True)


def hub_files(spec: str, config: SourceConfig, folder: Path, pins: dict[str, str]) -> list[HubFile]:
    """The files of rows of the repository that `spec` names, NAME or NAME:GLOB, by name, at the commit that `pins` has
    for it; if none, the settings' revision is looked up and noted there."""
    repo, _, pattern = spec.partition(":")
    hub = _hub()
    revision = pins.get(repo, config.revision)
    info = patiently(
        lambda: hub.HfApi().dataset_info(repo, revision=revision, files_metadata=True), repo, config.retry_s
    )
    pins[repo] = info.sha
    found = sorted((file.rfilename, file.size or 0) for file in info.siblings if file.rfilename.endswith(SUFFIXES))
    files = [
        HubFile(repo, info.sha, name, size, folder, config)
        for name, size in found
        if fnmatch.fnmatch(name, pattern or "*")
    ]
    if not files:
        names = ", ".join(file.rfilename for file in info.siblings[:5])
        raise UserError(f"--source=hub:{spec}: no file matches; the repository holds {names} …")
    return files


def patiently(action: Callable[[], Result], what: str, first_wait_s: float) -> Result:
    """What `action` returns, tried again after failures of the network, each wait up to twice the last. Raises
    PermissionError or FileNotFoundError if the hub says no, ConnectionError after ATTEMPTS failures."""
    from huggingface_hub.errors import HfHubHTTPError

    wait_s = first_wait_s
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (OSError, HfHubHTTPError, RuntimeError) as error:
            _give_up_on(error, what)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        except Exception as error:  # whatever the HTTP client underneath raises: it has changed between versions
            if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if attempt < ATTEMPTS:
            print(f"{what}: {reason}; trying again in {wait_s:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait_s * random.uniform(0.75, 1.0))  # workers that failed together come back apart
            wait_s = min(MAX_WAIT_S, 2 * wait_s)
    raise ConnectionError(f"{what}: no success in {ATTEMPTS} attempts; run the same command again to go on")


def _give_up_on(error: Exception, what: str) -> None:
    """Raise what is to be told, if waiting cannot mend `error`."""
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
