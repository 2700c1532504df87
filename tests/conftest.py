"""Small real parts that tests share: a corpus of Python, shards made from it, a two-layer run and a model."""

import os

# Set before torch is imported, and inherited by the processes that tests start. The models here are too small for two
# threads, and on a busy machine threads that wait for each other make a test ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
from small_corpus import SHARD_SETTINGS, make_lively_model, python_documents, write_json_gz

from data.shards import Shards
from model import GPT
from prepare import PrepareConfig, prepare
from runtime.config import load_config, run_stage
from train import TrainConfig


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
    """Shards of the corpus with a BPE of 512 ids, several per split."""
    path = tmp_path_factory.mktemp("shards") / "stdlib"
    prepare(load_config(PrepareConfig, [f"--name={path}", f"--source=files:{corpus}/*.gz", *SHARD_SETTINGS]))
    return Shards(path)


@pytest.fixture
def run_arguments(shards: Shards, tmp_path: Path) -> list[str]:
    """Arguments of a run in tmp_path/run that takes seconds on a CPU, with dropout and two micro-steps."""
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
    """A function that runs a stage as its program does and returns the exit code, stdout and stderr."""

    def run(entry, cls, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [f"{entry.__name__}.py", *arguments])
        code = 0
        capsys.readouterr()  # drop what was written before
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
    """Two random layers, context 64, 640 ids; greedy decoding does not end in a loop of one token."""
    return make_lively_model(block_size=64)
