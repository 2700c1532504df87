import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.device import is_out_of_memory
from train import train
from training import compilation
from training.compilation import compile_model, load_compiled, save_compiled
from training.run import open_dataset, start_run

ROOT = Path(__file__).parent.parent.parent

COUNTED = """
import sys
from torch._dynamo.utils import counters
from runtime.config import load_config
from train import TrainConfig, train

train(load_config(TrainConfig, sys.argv[1:]))
print("hits", counters["inductor"]["fxgraph_cache_hit"], "misses", counters["inductor"]["fxgraph_cache_miss"])
"""


def test_a_run_that_continues_in_a_new_process_loads_what_was_compiled(run_arguments, tmp_path):
    """As on a new machine: the second process begins with an empty cache of its own."""
    found = []
    for number, steps in enumerate((4, 8)):
        command = [sys.executable, "-c", COUNTED, *run_arguments, "--compile=True", f"--max_steps={steps}"]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache{number}")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.splitlines()[-1].split())
    assert int(found[0][3]) > 0 and found[0][1] == "0"
    assert found[1][3] == "0" and int(found[1][1]) == int(found[0][3])


@pytest.fixture
def run(run_config):
    Path(run_config.out_dir).mkdir(parents=True)
    return start_run(run_config, open_dataset(run_config))


def test_compiled_code_is_read_only_if_it_is_the_users_and_of_this_machine(run, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: loaded.append(data) or "info")
    assert not load_compiled(run) and not loaded, "there is none yet"
    save_compiled(run)
    assert load_compiled(run) and loaded == [b"code"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "getuid", lambda: -1)
        assert not load_compiled(run)
    with monkeypatch.context() as patched:
        patched.setattr(compilation, "made_on", lambda device: {"torch": torch.__version__, "device": "another"})
        assert not load_compiled(run)
    assert len(loaded) == 1
    path = Path(run.config.out_dir) / "compiled.bin"
    path.write_bytes(path.read_bytes()[:10])
    assert not load_compiled(run) and "compiled.bin: not used" in capsys.readouterr().err
    save_compiled(run)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert not load_compiled(run) and "compiled.bin: not used (damaged)" in capsys.readouterr().err
    save_compiled(run)
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: [][0])
    assert not load_compiled(run) and len(loaded) == 1


@pytest.mark.parametrize(
    ("error", "short_of_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("C++ compile error: cc1plus: out of memory allocating 65536 bytes"), False),
        (RuntimeError("no C++ compiler"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_does_not_turn_compilation_off(error, short_of_memory, run, monkeypatch, capsys):
    assert is_out_of_memory(error) == short_of_memory

    def compiled(function, **options):
        def fail(*args):
            raise error

        return fail

    monkeypatch.setattr(torch, "compile", compiled)
    compile_model(run)
    assert run.model.is_compiled == short_of_memory
    assert ("torch.compile failed" in capsys.readouterr().err) != short_of_memory


def test_what_a_report_runs_is_tried_before_training(run, monkeypatch, capsys):
    """An evaluation that cannot be compiled ends compilation at the start, not the run at its first evaluation."""

    def no_evaluation(function, **options):
        def run_or_fail(*args):
            if not run.model.training:
                raise RuntimeError("not in evaluation")
            return function(*args)

        return run_or_fail

    monkeypatch.setattr(torch, "compile", no_evaluation)
    compile_model(run)
    assert not run.model.is_compiled and run.model.training
    assert "torch.compile failed (not in evaluation)" in capsys.readouterr().err


def test_a_cublas_that_finds_no_memory_halves_the_micro_batch(run_config, monkeypatch, capsys):
    from ops import cross_entropy

    plain = train(dataclasses.replace(run_config, dropout=0.0, max_steps=3))
    whole, rows = cross_entropy._scan, run_config.batch_size * run_config.block_size

    def short_of_memory(xs, *others):
        if len(xs) == rows:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return whole(xs, *others)

    monkeypatch.setattr(cross_entropy, "_scan", short_of_memory)
    halved = train(dataclasses.replace(run_config, dropout=0.0, max_steps=3, out_dir=f"{run_config.out_dir}-halved"))
    assert "out of memory; continuing with --batch_size=" in capsys.readouterr().err
    assert halved["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5)
