"""The hub's own client against a server on this machine that speaks as much of the hub's protocol as downloads need."""

import gzip
import json
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from small_corpus import python_documents

from data.documents import SourceConfig
from data.pipeline.split import is_validation
from data.shards import Shards
from data.sources.hub import HubFile
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
FEW = ("--workers=1", "--exact_duplicates=False")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of user/code. `failures` lists how a request fails the first times: a status or "cut"."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.requests, self.failures = files, Counter(), {}
        self.watched, self.most = None, 0  # a folder, and the most files of the corpus seen in it at once


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.requests[f"{self.command} {path}"] += 1
        if self.server.watched:
            self.server.most = max(self.server.most, len(list(self.server.watched.rglob("*.gz"))))
        planned = self.server.failures.get(f"{self.command} {path}", [])
        failure = planned.pop(0) if planned else None
        if isinstance(failure, int):
            return self._send(failure, b"{}", {})
        if path.startswith("/api/datasets/user/code"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
            info = {"id": "user/code", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        name = path.removeprefix(f"/datasets/user/code/resolve/{COMMIT}/")
        if name not in self.server.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound" if name != path else "RepoNotFound"})
        data = self.server.files[name]
        headers = {"ETag": f'"{hash(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._send(206 if start else 200, data[start:], headers, cut=failure == "cut")

    do_HEAD = do_GET

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    rows = [json.dumps(row).encode() + b"\n" for row in python_documents()]
    names = [f"file-{number:012d}.json.gz" for number in (1, 2, 54)]
    files = {name: gzip.compress(b"".join(rows[index::3])) for index, name in enumerate(names)}
    server = Hub({**files, "README.md": b"text"})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def prepare(hub: Hub, folder: Path, *more: str, source: str = "hub:user/code") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "prepare.py", f"--source={source}", f"--name={folder}/shards", "--retry_s=0.05"]
    settings = ["--tokenizer=gpt2" if "gpt2" in more else "--tokenizer=train:512", "--val_fraction=0.3"]
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / "hf"),
        "HOME": str(folder),
        "NO_PROXY": "*",
        "PATH": "",
    }
    command += [*settings, *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def test_files_of_a_repository_are_read_one_by_one_and_deleted(hub, tmp_path):
    hub.watched = tmp_path
    result = prepare(hub, tmp_path, "--val_files=file-*54.json.gz", "--val_fraction=0", *FEW)
    assert result.returncode == 0, result.stderr
    shards = Shards(tmp_path / "shards")
    tokenizer = load_tokenizer(str(shards.path / "bpe.json"))
    texts = [row["content"] for row in python_documents()]
    for split, expected in (("val", texts[2::3]), ("train", texts[0::3] + texts[1::3])):
        stream = shards.split(split)
        assert tokenizer.decode(stream.read(0, len(stream))) == "".join(f"{text}<|endoftext|>" for text in expected)
    assert hub.most == 0, "when a file is requested, the one before is deleted"
    assert not list(tmp_path.rglob("*.gz")) and shards.meta["source"]["commits"] == {"user/code": COMMIT}
    assert shards.meta["splits"]["val"]["documents"] == len(texts[2::3])


def test_failures_of_the_network_are_waited_out(hub, tmp_path):
    first = f"/datasets/user/code/resolve/{COMMIT}/file-000000000001.json.gz"
    hub.failures = {
        "GET /api/datasets/user/code": [503, 502],
        f"HEAD {first}": [500] * 4,
        f"GET {first}": ["cut", 429, "cut"],
    }
    (tmp_path / "calm").mkdir()
    for folder in (tmp_path, tmp_path / "calm"):
        result = prepare(hub, folder)
        assert result.returncode == 0, result.stderr
        assert ("trying again in" in result.stderr) == (folder == tmp_path)
    assert Shards(tmp_path / "shards").fingerprint() == Shards(tmp_path / "calm" / "shards").fingerprint()


def test_a_dry_run_and_a_part_leave_no_downloads(hub, tmp_path):
    result = prepare(hub, tmp_path, "--dry_run=30")
    assert result.returncode == 0 and "nothing was written" in result.stdout, result.stderr
    assert prepare(hub, tmp_path, "--part=1/2").returncode == 0
    assert not list(tmp_path.rglob("*.gz"))


def test_the_file_that_codeparrot_validates_on_is_never_in_train():
    for repo, held_out in (("codeparrot/codeparrot-clean", [False, True]), ("user/code", [False, False])):
        names = ("file-000000000001.json.gz", "file-000000000054.json.gz")
        files = [HubFile(repo, COMMIT, name, 1, Path("x"), SourceConfig()) for name in names]
        assert [is_validation(file, val_files=None) for file in files] == held_out


def test_failures_that_a_retry_cannot_fix_end_in_one_line(hub, tmp_path):
    for source, message in (
        ("hub:user/missing", "user/missing: not on the hub; check the name and --revision"),
        ("hub:user/code:*.parquet", "no file matches; the repository holds"),
    ):
        result = prepare(hub, tmp_path, source=source)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
    hub.failures = {"GET /api/datasets/user/code": [403]}
    result = prepare(hub, tmp_path)
    assert result.returncode == 2 and "the hub refuses (403)" in result.stderr.splitlines()[-1]
