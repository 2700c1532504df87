"""Small real parts that the tests share: a corpus of real Python, shards made from it, and a two-layer run."""

import os

# Before torch is imported, and for the processes that tests start: the models here are too small for two threads, and
# on a busy machine threads that wait for each other make a test ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"

import bisect
import gzip
import hashlib
import json
import random
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from config import load_config, run_stage
from data.prepare import PrepareConfig, prepare
from model import GPT, GPTConfig
from shards import Shards
from tokenizer import END_OF_TEXT, load_tokenizer
from train import TrainConfig

SHARD_SETTINGS = ("--tokenizer=train:512", "--val_fraction=0.3", "--unit_bytes=250000", "--shard_tokens=100000")
PACKAGES = ("asyncio", "concurrent", "email", "html", "http", "importlib", "json", "logging", "tkinter", "unittest")


def python_documents() -> list[dict[str, str]]:
    """About 3 MB of the standard library, in codeparrot-clean's columns, a package as a repository."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [path for name in PACKAGES for path in sorted((stdlib / name).rglob("*.py"))]
    rows = [(path.relative_to(stdlib), path.read_text(encoding="utf-8")) for path in files]
    return [
        {"repo_name": f"python/{path.parts[0]}", "path": str(path), "content": text, "license": "psf"}
        for path, text in rows
        if text.strip()
    ]


def write_json_gz(path: Path, rows: list[dict[str, str]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def arguments(corpus: Path, path: Path, *more: str) -> list[str]:
    return [f"--name={path}", f"--source=files:{corpus}/*.gz", *SHARD_SETTINGS, *more]


def prepared(corpus: Path, path: Path, *more: str) -> Shards:
    prepare(load_config(PrepareConfig, arguments(corpus, path, *more)))
    return Shards(path)


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the report, which tells seconds."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    return {name: digest for name, digest in files.items() if name != "report.json"}


def texts_of(shards: Shards, split: str, language: str | None = None) -> list[str]:
    """The documents of a split, decoded."""
    tokenizer = load_tokenizer(str(shards.path / "tokenizer.json"))
    stream = shards.split(split, language)
    tokens = stream.read(0, len(stream))
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text) + 1)
    assert len(parts[-1]) == 0, "the last document ends with end-of-text"
    return [tokenizer.decode(part).removesuffix(END_OF_TEXT) for part in parts[:-1]]


def code(number: int, n_words: int = 400) -> str:
    """Python that passes every filter, unlike any other number's."""
    chance = random.Random(number)
    words = [f"value_{chance.randrange(10**9)}" for _ in range(n_words)]
    lines = [f"    {word} = {place}  # {word} counts" for place, word in enumerate(words)]
    return f"def compute_{number}():\n    '''Compute number {number}.'''\n" + "\n".join(lines) + "\n"


def like(number: int, jaccard: float) -> str:
    """Code whose set of words has that Jaccard similarity to `code(number)`'s."""
    mine, other = code(number).splitlines(), code(number + 1000).splitlines()

    def mixed(n_changed: int) -> str:
        return "\n".join([*mine[:2], *other[2:n_changed], *mine[n_changed:]]) + "\n"

    def unlikeness(n_changed: int) -> float:
        a, b = (set(re.findall(r"\w+", text)) for text in (code(number), mixed(n_changed)))
        return -len(a & b) / len(a | b)

    return mixed(bisect.bisect_left(range(len(mine)), -jaccard, lo=2, key=unlikeness))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two .json.gz files that hold python_documents()."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = python_documents()
    write_json_gz(folder / "file-000000000000.json.gz", rows[: len(rows) // 2])
    write_json_gz(folder / "file-000000000001.json.gz", rows[len(rows) // 2 :])
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Shards of the corpus under a BPE of 512 ids, several a split."""
    path = tmp_path_factory.mktemp("shards") / "stdlib"
    prepare(
        load_config(
            PrepareConfig,
            [f"--name={path}", f"--source=files:{corpus}/*.gz", *SHARD_SETTINGS],
        )
    )
    return Shards(path)


@pytest.fixture
def run_arguments(shards: Shards, tmp_path: Path) -> list[str]:
    """Arguments of a run of seconds on a CPU, with dropout and two micro-steps, into tmp_path/run."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 512, "dropout": 0.1}
    steps = {"batch_size": 4, "tokens_per_step": 256, "max_steps": 12, "warmup_steps": 2, "learning_rate": 1e-3}
    often = {"log_interval": 1, "eval_interval": 5, "eval_tokens": 512, "checkpoint_interval": 3}
    here = {"dataset": shards.path, "out_dir": tmp_path / "run", "device": "cpu", "dtype": "float32", "compile": False}
    settings = {**sizes, **steps, **often, **here, "sample_interval": None}
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture
def run_config(run_arguments: list[str]) -> TrainConfig:
    return load_config(TrainConfig, run_arguments)


@pytest.fixture
def run_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run a stage as its program does, and return its exit code and what it wrote to stdout and stderr."""

    def run(entry, cls, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [f"{entry.__name__}.py", *arguments])
        code = 0
        capsys.readouterr()  # what came before is not the program's
        try:
            run_stage(entry, cls)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="how often the resume test kills its run")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--kills")


@pytest.fixture(scope="module")
def lively_model() -> GPT:
    """Two layers at random, context 64, 640 ids; greedy decoding does not end in a loop of one token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=640)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.wpe.weight)
    torch.nn.init.ones_(model.ln_f.weight)
    return model
