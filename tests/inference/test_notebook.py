"""The %%complete magic in a real IPython, and docs/editors.md's snippets as printed, with serve.py as a process."""

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from data.sequences import SPECIALS
from data.tokenizer import load_tokenizer
from weights.checkpoint import save

ROOT = Path(__file__).parent.parent.parent
PRINTED = "http://127.0.0.1:8012"  # the address in docs/editors.md
KEY = "secret-key"
GREEDY = "--max_tokens=12 --temperature=0"


@contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of serve.py with the run in `folder`."""
    command = [sys.executable, "serve.py", f"--out_dir={folder}", "--port=0", "--device=cpu", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            yield address
        finally:
            process.kill()


@pytest.fixture(scope="module")
def run_folder(shards, lively_model, tmp_path_factory) -> Path:
    """A run that knows the middle's tokens."""
    tokenizer = load_tokenizer(str(shards.path / "bpe.json")).with_specials(SPECIALS)
    payload = {"model": lively_model.state_dict(), "model_config": vars(lively_model.config), "step": 5}
    payload |= {"tokenizer": tokenizer.to_json(), "tokenizer_sha256": tokenizer.sha256}
    folder = tmp_path_factory.mktemp("fim")
    save(folder / "last.pt", payload)
    return folder


@pytest.fixture(scope="module")
def address(run_folder) -> Iterator[str]:
    with serve(run_folder, "--one_line=True") as found:
        yield found


@pytest.fixture(scope="module")
def locked(run_folder) -> Iterator[str]:
    with serve(run_folder, f"--api_key={KEY}") as found:
        yield found


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Iterator[Any]:
    """An IPython shell with the extension loaded."""
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        patch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # both are put back: the shell replaces them
        patch.setattr(sys, "excepthook", sys.excepthook)
        shell = InteractiveShell()
        shell.history_manager.enabled = False
        assert shell.run_cell("%load_ext inference.notebook").success
        yield shell


@pytest.fixture
def replaced(shell, monkeypatch) -> Callable[..., str | None]:
    """A function that runs `%%complete` over a text and returns what takes the cell's place, None if nothing does."""

    def run(options: str, text: str) -> str | None:
        given = []
        monkeypatch.setattr(shell, "set_next_input", lambda text, replace=False: given.append((text, replace)))
        result = shell.run_cell(f"%%complete {options}\n{text}")
        assert result.success == bool(given) and [replace for _, replace in given] in ([], [True])
        return given[0][0] if given else None

    return run


def ask(address: str, **body: Any) -> str:
    with urlopen(Request(f"{address}/v1/completions", json.dumps(body).encode()), timeout=60) as response:
        return json.load(response)["choices"][0]["text"]


# The magic.


def test_the_cell_becomes_its_text_and_what_the_server_writes_behind_it(address, replaced):
    text = "import os\n\ndef fib(n):\n    return"
    written = ask(address, prompt=text, max_tokens=12, temperature=0, one_line=False)
    assert written
    assert replaced(f"--url={address} {GREEDY}", text) == text + written
    assert replaced(f"--url {address}/ {GREEDY}", text + "\n") == text + written  # IPython adds that newline itself
    below = ask(address, prompt=text + "\n", max_tokens=12, temperature=0, one_line=False)
    assert below != written and replaced(f"--url={address} {GREEDY}", text + "\n\n") == text + "\n" + below


def test_options_reach_the_server(address, replaced):
    text, drawn, found = "x = [", {"max_tokens": 8, "temperature": 1.5}, {}
    for n in (1, 3):
        seeds = {seed: ask(address, prompt=text, seed=seed, best_of=n, one_line=False, **drawn) for seed in range(6)}
        options = f"--url={address} --max_tokens=8 --temperature=1.5 --n={n}"
        found[n] = [replaced(f"{options} --seed={seed}", text) for seed in seeds]
        assert found[n] == [text + written for written in seeds.values()]
    assert found[1] != found[3]


def test_lines_go_on_unless_one_is_asked_for(address, replaced):
    """Also where the server's default is one line."""
    text, options = "x = [", f"--url={address} --max_tokens=60 --temperature=1.5 --seed="
    for seed in range(50):
        first, newline, _ = replaced(f"{options}{seed}", text).partition("\n")
        if newline and first != text:
            break
    assert newline and replaced(f"{options}{seed} --one_line", text) == first


def test_text_that_is_not_ascii_arrives_whole(address, replaced):
    text = "grüße = 'δ 𝛼 \\n' # {address} $HOME"
    assert replaced(f"--url={address} {GREEDY}", text).startswith(text)


def test_a_key_comes_from_a_variable(locked, shell, replaced, capsys):
    shell.user_ns["key"] = KEY
    assert replaced(f"--url={locked} {GREEDY} --api_key={{key}}", "x = ").startswith("x = ")
    assert replaced(f"--url={locked} {GREEDY}", "x = ") is None
    assert one_error(capsys).startswith(f"UsageError: {locked} answers: the API key is missing or wrong")


def one_error(capsys: pytest.CaptureFixture) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max_tokens=0", "answers: max_tokens is 0; it must be at least 1"),
        ("--n=17", "answers: best_of is 17; it must be from 1 to 16"),
        ("--temperature=warm", "invalid float value"),
        ("--tokens=5", "unrecognized arguments: --tokens=5"),
    ],
)
def test_a_refused_request_is_one_line_and_leaves_the_cell(address, replaced, capsys, options, message):
    assert replaced(f"--url={address} {options}", "x = ") is None
    error = one_error(capsys)
    assert error.startswith("UsageError: ") and message in error


def test_a_server_that_is_not_there_is_one_line(replaced, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert replaced(f"--url={url}", "x = ") is None
    assert one_error(capsys).startswith(f"UsageError: {url} does not answer: ")
    assert replaced("--url=localhost", "x = ") is None
    assert one_error(capsys).startswith("UsageError: localhost is not the address of serve.py: ")


@pytest.mark.parametrize(("status", "body"), [(200, "<p>"), (200, "[]"), (200, '{"choices":[]}'), (404, "<p>")])
def test_another_server_is_one_line(replaced, capsys, status, body):
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            assert replaced(f"--url={url}", "x = ") is None
        finally:
            server.shutdown()
    assert one_error(capsys).startswith(f"UsageError: {url} is not the address of serve.py: ")


def test_the_extension_starts_without_torch():
    pytest.importorskip("IPython")
    code = "import sys, inference.notebook; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# docs/editors.md.


def blocks(kind: str) -> list[str]:
    page = (ROOT / "docs" / "editors.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def curls() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith("curl ")]


def test_the_pages_snippets_name_the_default_address():
    """Else the tests below would not reach their server."""
    snippets = [*curls(), *blocks("yaml"), *blocks("vim"), *blocks("json"), *blocks("lua"), *blocks("elisp")]
    assert len(curls()) >= 2 and all(PRINTED in snippet for snippet in snippets)


@pytest.mark.parametrize("command", curls())
def test_a_curl_command_of_the_page_is_answered_a_completion(address, command):
    command = command.replace(PRINTED, address)
    result = subprocess.run(["bash", "-c", f"{command} -sS"], capture_output=True, text=True, check=True)
    (choice,) = json.loads(result.stdout)["choices"]
    assert isinstance(choice["text"], str) and choice["finish_reason"] in ("stop", "length")


def test_the_pages_python_runs(address):
    pytest.importorskip("openai")
    (code,) = [block for block in blocks("python") if "from openai " in block]
    command = [sys.executable, "-c", code.replace(PRINTED, address)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "" and len(result.stdout) > 2


def test_the_pages_cell_runs(address, replaced):
    (cell,) = [block for block in blocks("python") if block.startswith("%")]
    options, _, text = cell.removeprefix("%%complete ").partition("\n")
    assert replaced(f"{options} --url={address}", text).startswith(text.strip())
