"""Filling in the middle: lines of Python files left out, and how many of them a model writes back exactly.

    python eval_infilling.py --out_dir=out/fim --files='src/**/*.py'

The model must have been trained with --fim_rate. A line is left out whole, its indentation included; the model sees as
much of what stands before and after as its context holds, in whole lines, and its greedy answer, up to the end of the
line, must be that line, white space at its end apart.

Source: Ben Allal et al., "SantaCoder: don't reach for the stars!", 2023 (single-line infilling by exact match).
"""

import ast
import dataclasses
import glob
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
    checkpoint: str = "last"  # last, or best: the lowest validation loss
    n_lines: int = 1000  # lines to fill in, drawn from all files; fewer if there are fewer
    min_chars: int = 5  # shorter lines, such as `else:` without its indentation, are left alone
    max_new_tokens: int = 64  # tokens an answer, at most
    spm: bool = False  # ask in the order suffix, prefix, middle
    seed: int = 0  # of the choice of lines
    device: str | None = None  # cuda, mps or cpu; None takes the best there is
    dtype: str = "float32"  # of weights and cache: float32, bfloat16, float16

    def __post_init__(self) -> None:
        if self.files is None:
            raise UserError("give Python files, --files='src/**/*.py'")
        for name in ("n_lines", "min_chars", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype={self.dtype}: not one of {', '.join(DTYPES)}")


class Gap(NamedTuple):
    where: str  # file and line
    prefix: list[str]  # lines before, each with its end
    line: str
    suffix: list[str]


def eval_infilling(config: InfillingConfig) -> dict[str, Any]:
    """Fill in the lines, print how many are right and return the figures."""
    gaps = find_gaps(config.files, config.n_lines, config.min_chars, config.seed)
    device = resolve_device(config.device)
    out_dir = config.out_dir or latest_run()
    model, tokenizer, payload = load(out_dir, device, config.checkpoint)
    model.to(DTYPES[config.dtype])
    optimize(model)
    room = model.config.block_size - config.max_new_tokens - 4  # the specials
    if room < 1:
        raise UserError(
            f"--max_new_tokens={config.max_new_tokens}: the context has {model.config.block_size}; lower it"
        )
    answers, sampling = [], Sampling(config.max_new_tokens, temperature=0.0)
    for gap in tqdm(gaps, desc="infilling", unit="line", mininterval=1.0):
        completion = generate(
            model,
            tokenizer,
            prompt_of(gap, tokenizer, room, config.spm),
            sampling,
            stop=("\n",),
            stop_ids=tokenizer.specials.values(),
        )[0]
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
    """At most `n_lines` lines of at least `min_chars` characters, drawn from the code of all files that the patterns
    `files` match: lines of statements, neither comments nor parts of strings."""
    found = {path for pattern in files.split(";") for path in glob.glob(pattern.strip(), recursive=True)}
    gaps = []
    for path in sorted(map(Path, found)):
        try:
            text = path.read_bytes().decode("utf-8")
            places = _code_lines(text)
        except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            print(f"warning: {path}: not Python in UTF-8; left out", file=sys.stderr)
            continue
        lines = text.splitlines(keepends=True)
        for place in places:
            line = lines[place].rstrip("\r\n")
            if len(line.strip()) >= min_chars and not line.lstrip().startswith("#"):
                gaps.append(Gap(f"{path}, line {place + 1}", lines[:place], line, lines[place + 1 :]))
    if not gaps:
        raise UserError(f"--files={files}: no lines of Python in them; give patterns such as 'src/**/*.py'")
    chosen = random.Random(seed).sample(range(len(gaps)), min(n_lines, len(gaps)))
    return [gaps[place] for place in sorted(chosen)]


def _code_lines(text: str) -> list[int]:
    """The places of the lines on which a simple statement or the head of a compound one begins; docstrings are none."""
    if any(end in text for end in ("\r", "\f", "\v", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")):
        raise ValueError  # str.splitlines and Python count such lines differently
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    code = [s for s in statements if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return sorted({statement.lineno - 1 for statement in code})


def prompt_of(gap: Gap, tokenizer: Tokenizer, room: int, spm: bool) -> list[str]:
    """The pieces that ask for the line: as many whole lines around it as `room` tokens hold, half of them before it if
    there are so many, the nearest first."""
    before = [len(tokenizer.encode(line)) for line in reversed(gap.prefix)]
    after = [len(tokenizer.encode(line)) for line in gap.suffix]
    n_after = _how_many(after, room - min(sum(before), room // 2))
    n_before = _how_many(before, room - sum(after[:n_after]))
    prefix = "".join(gap.prefix[len(gap.prefix) - n_before :])
    suffix = "\n" + "".join(gap.suffix[:n_after])
    if spm:
        return [Special(END_OF_TEXT), FIM_PREFIX, FIM_SUFFIX, suffix, FIM_MIDDLE, prefix]
    return [Special(END_OF_TEXT), FIM_PREFIX, prefix, FIM_SUFFIX, suffix, FIM_MIDDLE]


def _how_many(counts: list[int], room: int) -> int:
    """How many from the beginning have no more than `room` in all."""
    total = 0
    for place, count in enumerate(counts):
        total += count
        if total > room:
            return place
    return len(counts)


if __name__ == "__main__":
    run_stage(eval_infilling, InfillingConfig)
