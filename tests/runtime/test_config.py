import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import BenchConfig
from eval_humaneval import HumanEvalConfig
from eval_infilling import InfillingConfig
from eval_perplexity import PerplexityConfig
from plot import PlotConfig
from prepare import PrepareConfig
from runtime.config import field_comments, help_text, load_config
from runtime.errors import UserError
from sample import SampleConfig
from train import TrainConfig

ROOT = Path(__file__).parents[2]
EVALUATIONS = (HumanEvalConfig, PerplexityConfig, InfillingConfig)
STAGES = (TrainConfig, SampleConfig, *EVALUATIONS, PrepareConfig, BenchConfig, PlotConfig)
LEANING = re.compile(r"(and|or|but|it|its|of|on|at|as|likewise|the same|this|that|these|those|they|their|which)\b")


@dataclass(frozen=True)
class Example:
    width: int = 4  # how wide, cm
    rate: float = 0.5  # how fast
    name: str = "a#b"  # what it is called
    fast: bool = False  # whether it is fast
    limit: int | None = 3  # at most; None is no limit


def test_files_and_flags_apply_from_left_to_right(tmp_path):
    (tmp_path / "a.py").write_text("_two = 2\nwidth = _two ** 4\nname = 'from file'\n")
    arguments = ["--width=1", str(tmp_path / "a.py"), "--name=x=y", "--limit=None", "--rate=2"]
    assert load_config(Example, arguments) == Example(width=16, rate=2.0, name="x=y", limit=None)
    assert isinstance(load_config(Example, arguments).rate, float)


def test_a_value_may_follow_its_flag_and_a_bool_stands_alone():
    assert load_config(Example, ["--name", "def f(x):", "--fast", "--width", "7"]) == Example(7, 0.5, "def f(x):", True)
    assert load_config(Example, ["--fast", "false"]).fast is False


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--widht=3", "--widht: unknown key 'widht'; did you mean width?"),
        ("--width=3.5", "--width=3.5: wants int, got float 3.5"),
        ("--width=True", "--width=True: wants int, got bool True"),
        ("--fast=1", "--fast=1: wants bool, got int 1"),
        ("--limit=many", "--limit=many: wants int | None, got str 'many'"),
        ("--width", "--width: no value given; write --width=VALUE (int)"),
        ("none.py", "none.py: no such config file; settings are given as --key=value"),
        ("configs/70.py", "configs/70.py: no such config file; did you mean configs/70m.py?"),
    ],
)
def test_a_wrong_argument_is_named_with_its_remedy(argument, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        load_config(Example, [argument])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht = 1", ": unknown key 'widht'; did you mean width? (a file's own names begin with _)"),
        ("width = '1'", ": width: wants int, got str '1'"),
        ("name = 'a'\nwidth = 1 / 0", ", line 2: ZeroDivisionError: division by zero; fix the config file"),
        ("width = = 1", ", line 1: SyntaxError: "),
    ],
)
def test_a_wrong_file_is_named_with_its_line(text, message, tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(Example, [str(file)])
    assert str(error.value).startswith(f"{file}{message}")


def test_help_names_every_field_with_its_type_default_and_comment():
    text = help_text(Example)
    assert "--limit: int | None = 3\n        at most; None is no limit" in text
    assert "--name: str = 'a#b'\n        what it is called" in text


@pytest.mark.parametrize("cls", STAGES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_comment_that_can_be_read_alone(cls):
    """--help prints them one by one: none begins with a word that refers to the line above it in the code."""
    comments = field_comments(cls)
    assert [field.name for field in dataclasses.fields(cls) if not comments.get(field.name)] == []
    assert [f"{name}: {comment}" for name, comment in comments.items() if LEANING.match(comment)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    load_config(PrepareConfig if path.parent.name == "data" else TrainConfig, [str(path)])


def test_a_users_mistake_is_one_line_and_a_bug_keeps_its_traceback(run_program):
    def mistaken(config: Example):
        exec("raise UserError('out/x: not there;\\nmake it')", {"UserError": UserError})  # no source line to look at

    def full(config: Example):
        raise OSError(28, "No space left on device", "out/x")

    def buggy(config: Example):
        raise ValueError("too many values, in a line that begins with raise")

    assert run_program(full, Example) == (2, "", "error: [Errno 28] No space left on device: 'out/x'\n")
    assert run_program(mistaken, Example) == (2, "", "error: out/x: not there; make it\n")
    assert run_program(mistaken, Example, "--widht=3")[0] == 2
    with pytest.raises(ValueError, match="too many values"):
        run_program(buggy, Example)


def test_a_program_ends_with_exit_code_2_and_one_line():
    command = [sys.executable, "train.py", "configs/70m.py", "--n_layers=2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: --n_layers: unknown key 'n_layers'; did you mean n_layer?\n"
