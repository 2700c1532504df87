import io
import sys
from pathlib import Path

import pytest

import sample as sample_module
from sample import SampleConfig, sample
from train import train


def test_the_program_reads_a_prompt_from_anywhere_and_streams(run_config, run_program, tmp_path, monkeypatch):
    train(run_config)
    greedy = [f"--out_dir={run_config.out_dir}", "--temperature=0", "--max_new_tokens=40", "--device=cpu"]
    code, out, err = run_program(sample, SampleConfig, *greedy, "--prompt", "def f(x):")
    assert code == 0 and out.startswith("def f(x):") and "step 12" in err
    (tmp_path / "prompt.py").write_text("def f(x):")
    assert run_program(sample, SampleConfig, *greedy, f"--prompt_file={tmp_path / 'prompt.py'}")[1] == out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def f(x):")))
    assert run_program(sample, SampleConfig, *greedy, "--prompt_file=-")[1] == out
    long = run_program(sample, SampleConfig, *greedy, "--prompt=" + "x = 1\n" * 100)
    assert "tokens; the model sees the last 32" in long[2] and "warning" not in err
    several = run_program(sample, SampleConfig, *greedy, "--prompt=def f(x):", "--n_samples=2")[1]
    assert several == f"--- sample 1 of 2\n{out}--- sample 2 of 2\n{out}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt="], "the prompt has no tokens"),
        ([], "give a prompt, either --prompt=TEXT or --prompt_file=PATH"),
        (["--prompt=x", "--prompt_file=y"], "give a prompt, either"),
        (["--prompt_file=missing.txt"], "missing.txt"),
        (["--prompt=x", "--temperature=-1"], "--temperature=-1.0: must be 0 or more"),
        (["--prompt=x", "--top_p=0"], "--top_p=0.0: must be above 0"),
        (["--prompt=x", "--stop="], "--stop=: wants a text"),
        (["--prompt=x", "--stop=[1]"], "--stop=[1]: wants a text"),
        (["--prompt=x", "--out_dir=nowhere"], "nowhere: no such checkpoint"),
        (["--prompt=x", "--checkpoint=first"], "--checkpoint=first: not one of last, best"),
        (['--prompt="""\n>>>x\n"""', "--verify=doctest"], "the prompt's doctests are malformed: line 2"),
        (["--prompt=x", f"--tests={sys.executable}"], "not UTF-8 text; convert it first"),
    ],
)
def test_bad_input_is_one_line(arguments, message, run_config, run_program):
    if not (Path(run_config.out_dir) / "last.pt").exists():
        train(run_config)
    capture = run_program(sample, SampleConfig, f"--out_dir={run_config.out_dir}", *arguments)
    assert capture[0] == 2
    errors = [line for line in capture[2].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(("answers", "first_right"), [((1, 2, 3, 2), 2), ((0, 4), None)])
def test_the_first_completion_that_its_doctests_find_right_is_printed(
    answers, first_right, run_config, run_program, monkeypatch, tmp_path
):
    train(run_config)
    completions = [sample_module.Completion(f"    return {n} * n\n", "", "stop") for n in answers]
    monkeypatch.setattr(sample_module, "generate", lambda *args, **options: completions)
    prompt = 'def double(n):\n    """Twice.\n\n    >>> double(2)\n    4\n    >>> double(-1)\n    -2\n    """\n'
    (tmp_path / "tests.py").write_text("assert double(8) == 16\n")
    settings = (f"--out_dir={run_config.out_dir}", f"--prompt={prompt}", f"--n_samples={len(answers)}", "--device=cpu")
    for verify in ("--verify=doctest", f"--tests={tmp_path / 'tests.py'}"):
        code, out, err = run_program(sample, SampleConfig, *settings, verify)
        if first_right is None:
            assert code == 1 and out == "" and f"none of {len(answers)} passes; the first failed" in err
        else:
            assert (code, out) == (0, f"{prompt}    return 2 * n\n\n") and "2 of 4 pass; the first is number 2" in err


def test_a_completion_cannot_do_away_with_the_doctests(run_config, run_program, monkeypatch):
    train(run_config)
    text = "    return 3\n\n\ndef double(n):\n    return 3\n"
    monkeypatch.setattr(sample_module, "generate", lambda *a, **o: [sample_module.Completion(text, "", "stop")])
    prompt = 'def double(n):\n    """\n    >>> double(2)\n    4\n    """\n'
    settings = (f"--out_dir={run_config.out_dir}", "--device=cpu", "--verify=doctest")
    code, _, err = run_program(sample, SampleConfig, *settings, f"--prompt={prompt}")
    assert code == 1 and "1 of 1 doctests fail; the first: double(2): expected 4, got 3" in err
    code, _, err = run_program(sample, SampleConfig, *settings, "--prompt=def f():")
    assert code == 2 and "the prompt has no doctests" in err
    assert run_program(sample, SampleConfig, *settings, "--prompt=x", "--verify=tests")[0] == 2


def test_a_sandbox_that_does_not_start_is_one_line_before_anything_is_written(run_program, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    prompt = 'def one():\n    """\n    >>> one()\n    1\n    """\n'
    code, out, err = run_program(sample, SampleConfig, "--out_dir=missing", "--verify=doctest", f"--prompt={prompt}")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and "missing" not in err
