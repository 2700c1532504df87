"""Infilling: leave lines out of Python files, and count how many of them a model writes back exactly.

    python eval_infilling.py --out_dir=out/fim --files='src/**/*.py'

The shards that the model was trained on must have been prepared with --fim_rate. A line is left out with its
indentation. The model sees as many whole lines before and after it as fit in the context. Its greedy answer, up to the
end of the line, must equal the line, except for trailing white space.

Source: Ben Allal et al., "SantaCoder: don't reach for the stars!", 2023 (single-line infilling by exact match).
"""

import ast
import dataclasses
import glob
import itertools
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.sequences import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from data.tokenizer import END_OF_TEXT, Special, Tokenizer
from inference.generate import generate
from inference.optimize import optimize
from inference.sampling import Sampling
from runtime.config import run_stage
from runtime.device import DTYPES, resolve_device
from runtime.errors import UserError
from runtime.files import write_json
from weights.checkpoint import latest_run, load


@dataclass(frozen=True)
class InfillingConfig:
    files: str | None = None  # Python files to leave lines out of: patterns such as 'src/**/*.py', joined by ;
    out_dir: str | None = None  # folder of the run, or a .pt file; None takes the latest run under out/
    checkpoint: str = "last"  # checkpoint to load: last, or best, of the lowest validation loss
    n_lines: int = 1000  # most lines to fill in, drawn from all files
    min_chars: int = 5  # lines with fewer characters, not counting white space around them, are not asked for
    max_new_tokens: int = 64  # most tokens per answer
    spm: bool = False  # order of the prompt: suffix, prefix, middle; False: prefix, suffix, middle
    seed: int = 0  # seed of the choice of lines
    device: str | None = None  # cuda, mps or cpu; None takes the best available
    dtype: str = "float32"  # precision of the weights: float32, bfloat16 or float16

    def __post_init__(self) -> None:
        if self.files is None:
            raise UserError("give Python files: --files='src/**/*.py'")
        for name in ("n_lines", "min_chars", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype={self.dtype}: not one of {', '.join(DTYPES)}")


class Gap(NamedTuple):
    """A line left out of a file."""

    where: str  # file and line
    prefix: list[str]  # the lines before, each with its newline
    line: str  # without its newline
    suffix: list[str]  # the lines after


def eval_infilling(config: InfillingConfig) -> dict[str, Any]:
    """Ask for each line, print the share of exact answers and return the figures, shares from 0 to 1."""
    gaps = find_gaps(config.files, config.n_lines, config.min_chars, config.seed)
    device = resolve_device(config.device)
    out_dir = config.out_dir or latest_run()
    model, tokenizer, payload = load(out_dir, device, config.checkpoint)
    model.to(DTYPES[config.dtype])
    optimize(model)
    room = model.config.block_size - config.max_new_tokens - 4  # the special tokens
    if room < 1:
        most = model.config.block_size
        raise UserError(f"--max_new_tokens={config.max_new_tokens}: the context has {most} tokens; lower it")
    answers, sampling = [], Sampling(config.max_new_tokens, temperature=0.0)
    stops = {"stop": ("\n",), "stop_ids": tokenizer.specials.values()}
    for gap in tqdm(gaps, desc="infilling", unit="line", mininterval=1.0):
        completion = generate(model, tokenizer, prompt_of(gap, tokenizer, room, config.spm), sampling, **stops)[0]
        answers.append({"where": gap.where, "line": gap.line, "answer": completion.text})
    right = sum(answer["line"].rstrip() == answer["answer"].rstrip() for answer in answers) / len(answers)
    figures = {"exact_match": right, "standard_error": math.sqrt(right * (1 - right) / len(answers))}
    figures |= {"n_lines": len(answers), "model": out_dir, "step": payload["step"]}
    folder = (Path(out_dir) if Path(out_dir).is_dir() else Path(out_dir).parent) / "eval"
    folder.mkdir(exist_ok=True)
    write_json(folder / "infilling.json", {**figures, "config": dataclasses.asdict(config), "answers": answers})
    print(
        f"{out_dir}, step {payload['step']}: {right:.2%} ± {figures['standard_error']:.2%} of {len(answers):,} lines "
        f"of {config.files} filled in exactly; {folder / 'infilling.json'}"
    )
    return figures


def find_gaps(files: str, n_lines: int, min_chars: int, seed: int) -> list[Gap]:
    """Returns at most `n_lines` gaps: lines with at least `min_chars` characters, drawn from all files that match the
    patterns `files`. Only lines on which a statement begins are drawn, never comments or docstrings."""
    found = {path for pattern in files.split(";") for path in glob.glob(pattern.strip(), recursive=True)}
    gaps = []
    for path in sorted(map(Path, found)):
        try:
            text = path.read_bytes().decode("utf-8")
            indices = _code_lines(text)
        except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            print(f"warning: {path}: not Python in UTF-8; left out", file=sys.stderr)
            continue
        lines = text.splitlines(keepends=True)
        for i in indices:
            line = lines[i].rstrip("\r\n")
            if len(line.strip()) >= min_chars and not line.lstrip().startswith("#"):
                gaps.append(Gap(f"{path}, line {i + 1}", lines[:i], line, lines[i + 1 :]))
    if not gaps:
        raise UserError(f"--files={files}: no lines of Python in them; give patterns such as 'src/**/*.py'")
    chosen = random.Random(seed).sample(range(len(gaps)), min(n_lines, len(gaps)))
    return [gaps[i] for i in sorted(chosen)]


def _code_lines(text: str) -> list[int]:
    """Indices of the lines on which a statement begins, docstrings left out. Raises ValueError or SyntaxError if the
    text cannot be cut into lines of Python."""
    if any(end in text for end in ("\r", "\f", "\v", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")):
        raise ValueError  # str.splitlines and Python count such lines differently
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    code = [s for s in statements if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return sorted({statement.lineno - 1 for statement in code})


def prompt_of(gap: Gap, tokenizer: Tokenizer, room: int, spm: bool) -> list[str]:
    """Returns the prompt's pieces: as many of the nearest whole lines around the gap as fit in `room` tokens. The lines
    before it get half of the room, and what the lines after it leave."""
    before = [len(tokenizer.encode(line)) for line in reversed(gap.prefix)]
    after = [len(tokenizer.encode(line)) for line in gap.suffix]
    n_after = _n_fitting(after, room - min(sum(before), room // 2))
    n_before = _n_fitting(before, room - sum(after[:n_after]))
    prefix = "".join(gap.prefix[len(gap.prefix) - n_before :])
    suffix = "\n" + "".join(gap.suffix[:n_after])
    if spm:
        return [Special(END_OF_TEXT), FIM_PREFIX, FIM_SUFFIX, suffix, FIM_MIDDLE, prefix]
    return [Special(END_OF_TEXT), FIM_PREFIX, prefix, FIM_SUFFIX, suffix, FIM_MIDDLE]


def _n_fitting(counts: list[int], room: int) -> int:
    """How many counts, from the first on, sum to at most `room`."""
    return sum(total <= room for total in itertools.accumulate(counts))


if __name__ == "__main__":
    run_stage(eval_infilling, InfillingConfig)
