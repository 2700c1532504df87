import json
from pathlib import Path

import pytest
import torch

import eval_infilling as eval_infilling_module
from data.sequences import SPECIALS
from data.tokenizer import load_tokenizer
from eval_infilling import InfillingConfig, eval_infilling, find_gaps, prompt_of
from inference.generate import Completion
from prepare import PrepareConfig, prepare
from runtime.config import load_config
from train import TrainConfig, train

SOURCE = '''"""A docstring
of lines."""

import os


def f(x):
    # a comment
    y = [
        x,
        x + 1,
    ]
    text = """
    not_code = 1
    """
    if y:
        return y
    return None
'''


@pytest.fixture(scope="module")
def run_folder(corpus, tmp_path_factory) -> str:
    """A run of one step on shards with fill-in-the-middle."""
    folder = tmp_path_factory.mktemp("fim")
    data = [f"--name={folder / 'shards'}", f"--source=files:{corpus}/*.gz", "--tokenizer=train:512", "--fim_rate=0.5"]
    prepare(load_config(PrepareConfig, [*data, "--val_fraction=0.3"]))
    settings = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 128, "vocab_size": 576, "batch_size": 1}
    settings |= {"tokens_per_step": 128, "max_steps": 1, "eval_tokens": 1, "dataset": folder / "shards"}
    settings |= {"out_dir": folder / "run", "device": "cpu", "dtype": "float32", "compile": False}
    train(
        load_config(TrainConfig, [f"--{key}={value}" for key, value in settings.items()] + ["--sample_interval=None"])
    )
    return str(folder / "run")


@pytest.fixture
def files(tmp_path) -> str:
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "bad.py").write_text("def (:\n")
    return f"{tmp_path}/*.py"


def test_the_lines_left_out_are_code(files, capsys):
    gaps = find_gaps(files, 1000, 5, 0)
    assert [gap.line.strip() for gap in gaps] == [
        *("import os", "def f(x):", "y = [", 'text = """', "if y:", "return y", "return None")
    ]
    assert all("".join(gap.prefix) + gap.line + "\n" + "".join(gap.suffix) == SOURCE for gap in gaps)
    assert "bad.py: not Python in UTF-8; left out" in capsys.readouterr().err
    few = find_gaps(files, 3, 5, 0)
    assert len(few) == 3 and few == find_gaps(files, 3, 5, 0)


@pytest.mark.parametrize("spm", [False, True])
def test_a_prompt_holds_the_lines_next_to_the_gap_and_fits(shards, files, spm):
    tokenizer = load_tokenizer(str(shards.path / "bpe.json")).with_specials(SPECIALS)
    for gap in find_gaps(files, 1000, 5, 0):
        for room in (10, 40, 5000):
            pieces = prompt_of(gap, tokenizer, room, spm)
            prefix, suffix = (pieces[5], pieces[3]) if spm else (pieces[2], pieces[4])
            assert "".join(gap.prefix).endswith(prefix) and ("\n" + "".join(gap.suffix)).startswith(suffix)
            assert len(tokenizer.encode_pieces(pieces)) <= room + 5
            if room == 5000:
                assert prefix + gap.line + suffix == SOURCE


def test_answers_count_when_they_are_the_line(run_folder, files, monkeypatch, run_program):
    asked = []
    lines = [gap.line for gap in find_gaps(files, 1000, 5, 0)]

    def generate(model, tokenizer, prompt, sampling, **options):
        asked.append((sampling, options))
        line = lines[len(asked) - 1]
        return [Completion(line + "  " if len(asked) % 2 else line.strip() + "?", "", "stop")]

    monkeypatch.setattr(eval_infilling_module, "generate", generate)
    settings = (f"--out_dir={run_folder}", f"--files={files}", "--device=cpu", "--max_new_tokens=20")
    code, out, _ = run_program(eval_infilling, InfillingConfig, *settings)
    assert code == 0 and "57.14% ± 18.70% of 7 lines" in out
    assert asked[0][1]["stop"] == ("\n",) and asked[0][0].temperature == 0
    kept = json.loads((Path(run_folder) / "eval" / "infilling.json").read_text())
    assert kept["exact_match"] == pytest.approx(4 / 7) and kept["answers"][1]["answer"] == "def f(x):?"


def test_a_model_answers_itself(run_folder, files):
    figures = eval_infilling(
        load_config(InfillingConfig, [f"--out_dir={run_folder}", f"--files={files}", "--device=cpu"])
    )
    assert figures["n_lines"] == 7 and 0 <= figures["exact_match"] <= 1


def test_bad_input_is_one_line(run_folder, run_config, files, run_program):
    torch.manual_seed(0)
    train(run_config)
    cases = [
        ([], "give Python files"),
        ([f"--files={files}.txt"], "no lines of Python in them"),
        ([f"--files={files}", "--max_new_tokens=500"], "the context has 128 tokens; lower it"),
        (
            [f"--files={files}", f"--out_dir={run_config.out_dir}", "--max_new_tokens=4"],
            "use a model trained with --fim_rate",
        ),
    ]
    for wrong, message in cases:
        code, _, err = run_program(eval_infilling, InfillingConfig, f"--out_dir={run_folder}", "--device=cpu", *wrong)
        assert code == 2 and message in err and err.count("error: ") == 1
