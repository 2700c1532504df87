"""The program serve.py as a process, and its load test. SERVE_LOAD=2000 makes that one long, and prints what it saw."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from data.sequences import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, SPECIALS
from data.tokenizer import END_OF_TEXT, Special, Tokenizer, load_tokenizer
from inference.generate import generate
from inference.sampling import Sampling
from model import GPT
from serve import ServeConfig, serve
from weights.checkpoint import load, save

ROOT = Path(__file__).parent.parent
N_REQUESTS = int(os.environ.get("SERVE_LOAD", "200"))
N_CLIENTS = 64

# Asks for /health until its stdin is closed, from a process of its own: the clients' threads would delay it.
PROBE = """
import http.client, json, sys, threading, time
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
done, taken = threading.Event(), []
while not done.wait(0.02):
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.close()
    taken.append(time.perf_counter() - began)
print(json.dumps(taken))
"""


class Running(NamedTuple):
    process: subprocess.Popen
    port: int
    err: Path

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """The status and what was answered: JSON, the chunks of a stream, or text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST" if data is not None else "GET", path, data, headers)
            response = connection.getresponse()
            text, kind = response.read().decode(), response.headers["Content-Type"]
            if kind.startswith("text/event-stream"):
                events = [event.removeprefix("data: ") for event in text.split("\n\n")]
                return response.status, [json.loads(event) for event in events if event not in ("", "[DONE]")]
            return response.status, json.loads(text) if kind == "application/json" else text

    def metric(self, name: str) -> int:
        lines = self.ask("/metrics")[1].splitlines()
        return int(dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))[f"codegpt_{name}"])

    def resident(self) -> float:
        """MB of memory in use."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@contextlib.contextmanager
def running(run_folder: Path, *arguments: str) -> Iterator[Running]:
    command = [sys.executable, "serve.py", f"--out_dir={run_folder}", "--port=0", "--device=cpu", *arguments]
    err = run_folder / f"serve-{time.monotonic_ns()}.txt"
    with err.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            address = process.stdout.readline()
            assert address.startswith("http://127.0.0.1:"), err.read_text()
            yield Running(process, int(address.rsplit(":", 1)[1]), err)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def run_folder(shards, lively_model, tmp_path_factory) -> Path:
    """A run with StarCoder's special tokens, whose texts do not loop."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = load_tokenizer(str(shards.path / "bpe.json")).with_specials(SPECIALS)
    payload = {"model": lively_model.state_dict(), "model_config": vars(lively_model.config), "step": 5}
    payload |= {"tokenizer": tokenizer.to_json(), "tokenizer_sha256": tokenizer.sha256}
    save(folder / "last.pt", payload)
    return folder


def test_the_address_that_is_printed_answers(run_folder):
    with running(run_folder, "--api_key=secret", "--name=mine", "--quantize=float16") as server:
        assert server.ask("/health") == (200, {"status": "ok"})
        assert server.ask("/v1/models")[0] == 401
        status, models = server.ask("/v1/models", Authorization="Bearer secret")
        assert status == 200 and models["data"][0]["id"] == "mine"
        status, page = server.ask("/")
        assert status == 200 and page.lower().startswith("<!doctype html>")
        taken = subprocess.run(
            [sys.executable, "serve.py", f"--out_dir={run_folder}", f"--port={server.port}", "--device=cpu"],
            **{"cwd": ROOT, "capture_output": True, "text": True},
        )
        assert taken.returncode == 2 and taken.stdout == ""
        assert "choose others" in taken.stderr and "Traceback" not in taken.stderr
        assert "mine" in server.err.read_text() and "step 5" in server.err.read_text()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_it_without_a_traceback_while_it_streams(run_folder, sent, code):
    body = json.dumps({"prompt": ["x"] * 8, "max_tokens": 60, "stream": True, "n": 16}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with running(run_folder, "--max_rows=1") as server, socket.create_connection(("127.0.0.1", server.port)) as stream:
        stream.sendall(head + body)
        assert b"200 OK" in stream.recv(100)
        server.process.send_signal(sent)
        with stream.makefile("rb") as file:
            assert b"the server stops" in file.read()
        assert server.process.wait(timeout=20) == code
        assert "Traceback" not in server.err.read_text()


def test_mistakes_are_one_line(run_folder, run_program, tmp_path):
    cases = [
        ([f"--out_dir={tmp_path}/none"], "no such checkpoint"),
        (["--dtype=float8"], "not one of"),
        (["--quantize=int3"], "not one of"),
        (["--port=70000"], "from 0 to 65535"),
        (["--max_rows=0"], "at least 1"),
        (["--prefix_cache_mb=-1"], "0 or more"),
        (["--host=256.256.256.256"], "cannot listen"),
    ]
    for wrong, message in cases:
        arguments = [f"--out_dir={run_folder}", "--device=cpu", "--port=0", *wrong]
        code, out, err = run_program(serve, ServeConfig, *arguments)
        assert code == 2 and out == "" and message in err and "Traceback" not in err, wrong


def test_a_sandbox_that_does_not_start_is_one_line_before_anything_is_answered(run_folder, run_program, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    arguments = [f"--out_dir={run_folder}", "--device=cpu", "--port=0", "--allow_code_execution=True"]
    code, out, err = run_program(serve, ServeConfig, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_the_openai_package_completes(run_folder):
    openai = pytest.importorskip("openai")
    model, tokenizer, _ = load(str(run_folder), torch.device("cpu"))
    with running(run_folder, "--max_rows=2") as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        assert "gpt" not in name and "starcoder" in name
        settings = {"model": name, "prompt": "import ", "max_tokens": 20, "temperature": 0}
        wanted = expected(model, tokenizer, "import ", 20)
        assert client.completions.create(**settings).choices[0].text == wanted
        stream = client.completions.create(**settings, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == wanted


def test_doctests_run_if_code_may(run_folder):
    prompt = 'def f():\n    """\n    >>> f()\n    1\n    """\n    return 1  #'
    body = {"prompt": prompt, "verify": "doctest", "max_tokens": 8, "n": 4, "one_line": True, "seed": 0}
    with running(run_folder, "--allow_code_execution=True") as server:
        status, answer = server.ask("/v1/completions", body)
        assert status == 200 and answer["verdict"]["passed"] >= 1 and len(answer["choices"]) == 1
        status, answer = server.ask("/v1/completions", {**body, "prompt": prompt.replace("    1\n", "    2\n")})
        assert status == 200 and answer["verdict"]["passed"] == 0 and not answer["choices"]


# Load.


def expected(model: GPT, tokenizer: Tokenizer, prompt: str | list[str], max_tokens: int) -> str:
    sampling = Sampling(max_tokens, temperature=0)
    return generate(model, tokenizer, prompt, sampling, stop_ids=set(tokenizer.specials.values()))[0].text


class Case(NamedTuple):
    """A request, and what its answer must be."""

    path: str
    body: Any
    status: int
    read: Callable[[Any], Any]
    wanted: Any


def load_cases(server: Running, model: GPT, tokenizer: Tokenizer) -> list[Case]:
    """Requests of every kind. Those that are drawn by chance must be what they were when nothing else was decoded."""

    def text(answer: Any) -> str:
        return answer["choices"][0]["text"]

    def texts(answer: Any) -> list[str]:
        return [choice["text"] for choice in answer["choices"]]

    def joined(chunks: list[Any]) -> str:
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])

    cases, url = [], "/v1/completions"
    for i in range(8):
        prompt = f"# {i % 4}\nimport os\n" + "x = 1\n" * (i % 3) + f"value_{i} ="
        size = 3 + 5 * i % 32
        greedy = {"prompt": prompt, "max_tokens": size, "temperature": 0}
        wanted = expected(model, tokenizer, prompt, size)
        cases.append(Case(url, greedy, 200, text, wanted))
        cases.append(Case(url, {**greedy, "stream": True}, 200, joined, wanted))
        echoed = {**greedy, "prompt": tokenizer.encode(prompt), "echo": True}
        cases.append(Case(url, echoed, 200, text, prompt + wanted))
        cases.append(Case(url, {**greedy, "logprobs": 2, "n": 3}, 200, texts, [wanted] * 3))
        pieces = [Special(END_OF_TEXT), FIM_PREFIX, prompt, FIM_SUFFIX, "\n# end", FIM_MIDDLE]
        size = min(size, 16)  # /infill keeps three quarters of the context for the prompt
        wanted = expected(model, tokenizer, pieces, size)
        filled = {"prompt": prompt, "max_tokens": size, "temperature": 0, "suffix": "\n# end"}
        cases.append(Case(url, filled, 200, text, wanted))
        body = {"input_prefix": prompt[:7], "prompt": prompt[7:], "input_suffix": "\n# end", "n_predict": size}
        cases.append(Case("/infill", {**body, "temperature": 0}, 200, lambda answer: answer["content"], wanted))
        chat = "/v1/fim/completions"
        cases.append(Case(chat, filled, 200, lambda answer: answer["choices"][0]["message"]["content"], wanted))
        drawn = {"prompt": prompt, "max_tokens": 20, "n": 2, "seed": i, "top_p": 0.9, "top_k": 30}
        cases.append(Case(url, drawn, 200, texts, texts(server.ask(url, drawn)[1])))
        cases.append(Case(url, {"prompt": [prompt, "x"], "max_tokens": 3, "n": 2}, 200, lambda a: len(a["choices"]), 4))
    refused = [({"n": -1}, 400), (b"{", 400), ({"prompt": [[]]}, 400), (b"x" * 2**20 + b"x", 413)]
    cases += [Case(url, body, status, lambda answer: set(answer), {"error", "detail"}) for body, status in refused]
    cases.append(Case("/v1/models", None, 200, lambda answer: len(answer["data"]), 1))
    return cases


def drop(server: Running, case: Case, chance: random.Random) -> None:
    """Send a request, or a part of it, and go away at a random moment."""
    body = case.body if isinstance(case.body, bytes) else json.dumps(case.body or {}).encode()
    head = f"POST {case.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    data = head + body
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection, contextlib.suppress(OSError):
        connection.sendall(data if chance.random() < 0.8 else data[: chance.randrange(len(data))])
        time.sleep(chance.choice((0, 0.01, 0.1, 0.3)) * chance.random())


def test_many_clients_at_once_get_right_answers_and_dropped_ones_leave_nothing(run_folder):
    model, tokenizer, _ = load(str(run_folder), torch.device("cpu"))
    with running(run_folder, "--prefix_cache_mb=4") as server:
        cases = load_cases(server, model, tokenizer)
        probe = subprocess.Popen(
            [sys.executable, "-c", PROBE, str(server.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        wrong: list[tuple[Case, Any]] = []
        resident: list[float] = []
        n_dropped = 0

        def client(number: int) -> None:
            nonlocal n_dropped
            chance = random.Random(number)
            case = chance.choice(cases)
            if chance.random() < 1 / 3:
                n_dropped += 1
                return drop(server, case, chance)
            try:
                status, answer = server.ask(case.path, case.body)
                if status != case.status or case.read(answer) != case.wanted:
                    wrong.append((case, answer))
            except Exception as error:
                wrong.append((case, repr(error)))

        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                resident.append(server.resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.monotonic()
        try:
            with ThreadPoolExecutor(N_CLIENTS) as pool:
                list(pool.map(client, range(N_REQUESTS)))
            seconds = time.monotonic() - began
        finally:
            over.set()
            watcher.join()
            health = sorted(json.loads(probe.communicate("")[0] or "[]"))
        assert not wrong, (len(wrong), wrong[:3])
        assert len(health) > 1 and health[len(health) // 2] < 1
        end = time.monotonic() + 20
        while (left := [server.metric(name) for name in ("completions_running", "requests_waiting")]) != [0, 0]:
            assert time.monotonic() < end, left
        assert server.ask("/v1/completions", cases[0].body)[1]["choices"][0]["text"] == cases[0].wanted
        assert server.metric("prefix_cache_bytes") <= 4_000_000
        assert server.process.poll() is None and "Traceback" not in server.err.read_text()
        if "SERVE_LOAD" in os.environ:
            later = resident[len(resident) // 2 :]
            shown = {f"p{100 * q:g}": 1000 * health[int(q * (len(health) - 1))] for q in (0.5, 0.9, 0.99, 1)}
            print(f"\n{N_REQUESTS} requests, {n_dropped} dropped, {seconds:.1f} s; {len(health)} probes, ms: {shown}")
            print(f"MB: {resident[:: max(1, len(resident) // 20)]}, second half {min(later):.1f} to {max(later):.1f}")
            assert max(later) <= 1.05 * min(later)
