"""Write code with a trained model.

python sample.py --out_dir=out/tiny --prompt="def fib(n):"
echo "import os" | python sample.py --prompt_file=- --n_samples=3 --temperature=0.2 --stop='\\ndef'
python sample.py --prompt_file=task.py --n_samples=20 --verify=doctest    # the first that passes its doctests
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.doctests import doctest_check
from evaluation.problems import FUNCTION_STOPS, read_stops
from inference.generate import Completion, generate
from inference.optimize import QUANTIZATIONS, optimize
from inference.sampling import Sampling
from runtime.config import run_stage
from runtime.device import DTYPES, resolve_device
from runtime.errors import UserError
from runtime.files import read_text
from sandbox.pool import Sandbox
from weights.checkpoint import latest_run, load


@dataclass(frozen=True)
class SampleConfig(Sampling):
    out_dir: str | None = None  # folder of the run, or a .pt file; None takes the latest run under out/
    checkpoint: str = "last"  # checkpoint to load: last, or best, of the lowest validation loss
    prompt: str | None = None  # text to continue
    prompt_file: str | None = None  # file to read the prompt from, instead of --prompt; - is standard input
    n_samples: int = 1  # completions to draw, in one batch
    stop: str | None = None  # text to stop before, \n for a newline; a JSON list gives several: '["\ndef", "\nclass"]'
    verify: str | None = None  # doctest: run the prompt's doctests on each completion, print the first that passes
    tests: str | None = None  # file of assertions to run on each completion, instead of doctests
    device: str | None = None  # cuda, mps or cpu; None takes the best available
    dtype: str = "float32"  # precision of the weights: float32, bfloat16 or float16
    quantize: str | None = None  # store weights in fewer bytes: float16 or int8; for one to four samples on a CPU

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_samples < 1:
            raise UserError(f"--n_samples={self.n_samples}: must be at least 1")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype={self.dtype}: not one of {', '.join(DTYPES)}")
        if self.quantize not in (None, *QUANTIZATIONS):
            raise UserError(f"--quantize={self.quantize}: not one of {', '.join(QUANTIZATIONS)}")
        if self.verify not in (None, "doctest"):
            raise UserError(f"--verify={self.verify}: must be doctest; assertions are given with --tests=FILE")


def sample(config: SampleConfig) -> list[Completion]:
    """Load the run, print `n_samples` completions of the prompt and return them. One alone is printed as it grows."""
    prompt, stop = _read_prompt(config.prompt, config.prompt_file), read_stops(config.stop)
    check = _read_check(prompt, config.verify, config.tests)
    if check is not None:
        with Sandbox(preload=["doctest"]) as sandbox:  # first, so that nothing is written in vain if it does not work
            completions = _write(config, prompt, stop if config.stop else FUNCTION_STOPS, streaming=False)
            _print_verified(sandbox, prompt, completions, check)
        return completions
    completions = _write(config, prompt, stop, streaming=config.n_samples == 1)
    if config.n_samples > 1:
        for number, completion in enumerate(completions, start=1):
            print(f"--- sample {number} of {config.n_samples}\n{prompt}{completion.text}")
    return completions


def _write(config: SampleConfig, prompt: str, stop: Sequence[str], streaming: bool) -> list[Completion]:
    """Load the run and return completions of the prompt. If `streaming`, print them as they grow, after the prompt."""
    device = resolve_device(config.device)
    out_dir = config.out_dir or latest_run()
    model, tokenizer, payload = load(out_dir, device, config.checkpoint)
    model.to(DTYPES[config.dtype])
    print(f"{out_dir}, step {payload['step']}, {model.n_parameters():,} parameters, {device}", file=sys.stderr)
    n_tokens, context = len(tokenizer.encode(prompt)), model.config.block_size
    if n_tokens > context:
        print(f"warning: the prompt has {n_tokens} tokens; the model sees the last {context}", file=sys.stderr)
    optimize(model, config.n_samples, config.quantize)

    def show(number: int, text: str) -> None:
        if streaming:
            print(text, end="", flush=True)

    show(0, prompt)
    completions = generate(model, tokenizer, prompt, config, n_samples=config.n_samples, stop=stop, on_text=show)
    show(0, "\n")
    return completions


def _print_verified(sandbox: Sandbox, prompt: str, completions: Sequence[Completion], check: str) -> None:
    """Print the first completion that passes the check, and how many pass. Exit with code 1 if none does."""
    results = dict(sandbox.run_many((prompt + completion.text, check, "") for completion in completions))
    passed = [index for index in sorted(results) if results[index].passed]
    if not passed:
        result = results[0]
        print(f"none of {len(completions)} passes; the first {result.outcome}: {result.detail}", file=sys.stderr)
        raise SystemExit(1)
    print(f"{len(passed)} of {len(completions)} pass; the first is number {passed[0] + 1}", file=sys.stderr)
    print(prompt + completions[passed[0]].text)


def _read_check(prompt: str, verify: str | None, tests: str | None) -> str | None:
    """The code that checks a completion: the file `tests`, or the prompt's doctests. None if neither is asked for."""
    if tests is not None:
        return read_text(Path(tests))
    return None if verify is None else doctest_check(prompt, "--verify=doctest", "--tests=FILE")


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UserError("give a prompt, either --prompt=TEXT or --prompt_file=PATH (- for standard input)")
    if prompt is not None:
        return prompt
    if prompt_file == "-" and sys.stdin is None:
        raise UserError("--prompt_file=-: standard input is closed; give --prompt=TEXT")
    try:
        data = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--prompt_file={prompt_file}: not UTF-8 text; convert it first") from None


if __name__ == "__main__":
    run_stage(sample, SampleConfig)
