"""Write code with a trained model.

    python sample.py --out_dir=out/tiny --prompt="def fib(n):"
    echo "import os" | python sample.py --prompt_file=- --n_samples=3 --temperature=0.2 --stop='\\ndef'
    python sample.py --prompt_file=task.py --n_samples=20 --verify=doctest    # the first that its doctests find right

Past the end of the context the window moves on by half a context at a time: the token after n tokens is predicted from
those from place s = window_start(n, block_size) on, at positions that count from 0 at s. The cache is refilled at each
move, on average one more token of work for each token sampled, and what is sampled is what full forward passes over
the same windows would give.
"""

import doctest
import sys
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import latest_run, load
from config import run_stage
from decoding import QUANTIZATIONS, prepare
from device import DTYPES, resolve_device
from errors import UserError
from model import GPT, KVCache
from problems import FUNCTION_STOPS, read_stops
from sampling import Sampling, choose_token
from sandbox import Sandbox
from tokenizer import StreamDecoder, Tokenizer

# All examples of the prompt must be there still: a completion may define the function anew, without its docstring.
DOCTESTS = """
import doctest, sys
done = doctest.testmod(sys.modules["program"])
assert done.attempted >= {}, f"only {{done.attempted}} doctests are left"
assert not done.failed, f"{{done.failed}} of {{done.attempted}} doctests fail"
"""


@dataclass(frozen=True)
class SampleConfig(Sampling):
    out_dir: str | None = None  # folder of the run, or a .pt file; None takes the latest run under out/
    checkpoint: str = "last"  # last, or best: the lowest validation loss
    prompt: str | None = None  # text to go on from
    prompt_file: str | None = None  # a file to read it from instead; - is standard input
    n_samples: int = 1  # completions, drawn side by side
    stop: str | None = None  # text to stop before, \n for a newline; several as a JSON list: '["\ndef", "\nclass"]'
    verify: str | None = None  # doctest: run the prompt's doctests on each completion, and print the first that passes
    tests: str | None = None  # a file of assertions to run on each completion, instead of doctests
    device: str | None = None  # cuda, mps or cpu; None takes the best there is
    dtype: str = "float32"  # of weights: float32, bfloat16, float16
    quantize: str | None = None  # weights in fewer bytes, for one to four samples on a CPU: float16, or int8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_samples < 1:
            raise UserError(f"--n_samples={self.n_samples}: must be at least 1")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype={self.dtype}: not one of {', '.join(DTYPES)}")
        if self.quantize not in (None, *QUANTIZATIONS):
            raise UserError(f"--quantize={self.quantize}: not one of {', '.join(QUANTIZATIONS)}")
        if self.verify not in (None, "doctest"):
            raise UserError(f"--verify={self.verify}: wants doctest; assertions are given with --tests=FILE")


class Completion(NamedTuple):
    """What a model wrote after a prompt."""

    text: str  # up to the first stop
    raw: str  # all of it, the stop string and what came with it in the same token included
    finish: str  # what ended it: stop, a string or a special id; or length, max_new_tokens


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    sampling: Sampling,
    *,
    n_samples: int = 1,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] = (),
    on_text: Callable[[int, str], None] = lambda row, text: None,
) -> list[Completion]:
    """`n_samples` completions of `prompt`, which is a text or a list of texts and Specials; the completions do not
    repeat it. Each ends at end-of-text or another of `stop_ids`, before the first string of `stop`, or after
    `max_new_tokens`. The prompt is read once, and every completion drawn independently from its first token on.
    `on_text(row, text)` is called with each piece as soon as it is certain.

    A prompt longer than the context loses its beginning. Raises UserError for one of no tokens.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_pieces(prompt)
    if not ids:
        raise UserError("the prompt has no tokens; give at least one character, a newline will do")
    context = model.config.block_size
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    beyond = range(tokenizer.vocab_size, model.config.vocab_size)
    banned = torch.tensor([*tokenizer.undefined_ids(), *beyond], dtype=torch.int64, device=device)
    tokens = torch.tensor([ids[-context:]], device=device)  # (1, T)
    rows = [_Row(tokenizer, stop, {tokenizer.end_of_text, *stop_ids}) for _ in range(n_samples)]

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return choose_token(logits.index_fill(-1, banned, -torch.inf), sampling, generator)

    training = model.training
    model.eval()
    steps = generate_tokens(model, tokens, choose, n_samples)
    going, chosen = list(range(n_samples)), next(steps)  # the rows still decoded, and their next tokens
    for n in range(1, sampling.max_new_tokens + 1):
        for index, token in zip(going, chosen.tolist(), strict=True):
            if text := rows[index].push(token, last=n == sampling.max_new_tokens):
                on_text(index, text)
        left = [place for place, index in enumerate(going) if not rows[index].done]
        if not left:
            break
        # A copy of the cache pays when it leaves out many; not where each shape would be compiled anew.
        if len(left) <= len(going) // 2 and model.compiled_decode is None:
            going = [going[place] for place in left]
            chosen = steps.send(torch.tensor(left, device=device))
        else:
            chosen = next(steps)
    model.train(training)
    return [Completion(row.text, row.raw, row.finish) for row in rows]


def generate_tokens(
    model: GPT, tokens: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor], n_samples: int = 1
) -> Generator[torch.Tensor, torch.Tensor | None, None]:
    """Without end, the next token of each row, (B,): `choose(logits)` of the logits (B, V) that follow `tokens` (B, T)
    and what was chosen before. A single row of tokens is read once and continued as `n_samples`. Sending the places of
    rows, int64, goes on with these alone."""
    block_size, start, cache = model.config.block_size, -1, None
    while True:
        with torch.inference_mode():
            moved = window_start(tokens.size(1), block_size) != start
            if moved:
                start = window_start(tokens.size(1), block_size)
                cache = new_cache(model, len(tokens))
            logits = model.decode(tokens[:, start:] if moved else tokens[:, -1:], cache)
            if len(tokens) < n_samples:
                cache = cache.take(torch.zeros(n_samples, dtype=torch.int64, device=tokens.device))
                logits, tokens = logits.expand(n_samples, -1), tokens.expand(n_samples, -1)
            chosen = choose(logits)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        rows = yield chosen
        if rows is not None:
            with torch.inference_mode():
                cache, tokens, n_samples = cache.take(rows), tokens[rows], len(rows)


def new_cache(model: GPT, batch_size: int) -> KVCache:
    """An empty cache of the kind that is fast where the model is. On a GPU each kernel's launch costs: one of static
    shape. On a CPU attention over all its places would, and so does bf16, for single tokens: 2 to 6 times."""
    weight = model.wte.weight
    on_gpu = weight.device.type == "cuda"
    dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
    return KVCache(model.config, batch_size, weight.device, dtype, static=on_gpu)


def window_start(n_tokens: int, block_size: int) -> int:
    """The first of `n_tokens` that the model sees: 0 while all fit, then on by half a context at a time."""
    stride = max(1, block_size // 2)
    return -(-max(0, n_tokens - block_size) // stride) * stride


class _Row:
    """The text of one completion as its tokens arrive, cut at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: Collection[int]):
        self.decoder, self.stop, self.stop_ids = StreamDecoder(tokenizer), stop, stop_ids
        self.text, self.raw, self.sent, self.finish = "", "", 0, ""

    @property
    def done(self) -> bool:
        return bool(self.finish)

    def push(self, token: int, last: bool) -> str:
        """Take the next token; returns the text that has become certain. Once done, takes no more."""
        if self.done:
            return ""
        self.finish = "stop" if token in self.stop_ids else "length" if last else ""
        self.text += "" if token in self.stop_ids else self.decoder.push(token)
        self.text += self.decoder.flush() if self.done else ""
        self.raw = self.text
        cuts = [self.text.find(stop) for stop in self.stop if stop in self.text]
        if cuts:
            self.text, self.finish = self.text[: min(cuts)], "stop"
        sent, self.sent = self.sent, len(self.text) - (0 if self.done else self._held_back())
        return self.text[sent : self.sent]

    def _held_back(self) -> int:
        """How many characters at the end may turn out to be the beginning of a stop string."""
        return max((n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)


def sample(config: SampleConfig) -> list[Completion]:
    """Load the run, print `n_samples` completions of the prompt, one alone as it is written, and return them."""
    prompt, stop = _read_prompt(config.prompt, config.prompt_file), read_stops(config.stop)
    check = _read_check(prompt, config.verify, config.tests)
    if check is not None and config.stop is None:
        stop = list(FUNCTION_STOPS)
    device = resolve_device(config.device)
    out_dir = config.out_dir or latest_run()
    model, tokenizer, payload = load(out_dir, device, config.checkpoint)
    model.to(DTYPES[config.dtype])
    print(f"{out_dir}, step {payload['step']}, {model.n_parameters():,} parameters, {device}", file=sys.stderr)
    n_tokens, context = len(tokenizer.encode(prompt)), model.config.block_size
    if n_tokens > context:
        print(f"warning: the prompt has {n_tokens} tokens; the model sees the last {context}", file=sys.stderr)
    prepare(model, config.n_samples, config.quantize)
    streaming = config.n_samples == 1 and check is None
    if streaming:
        print(prompt, end="", flush=True)
    completions = generate(
        model,
        tokenizer,
        prompt,
        config,
        n_samples=config.n_samples,
        stop=stop,
        on_text=lambda row, text: print(text, end="", flush=True) if streaming else None,
    )
    if streaming:
        print()
    elif check is not None:
        _print_verified(prompt, completions, check)
    else:
        for number, completion in enumerate(completions, start=1):
            print(f"--- sample {number} of {config.n_samples}\n{prompt}{completion.text}")
    return completions


def _print_verified(prompt: str, completions: Sequence[Completion], check: str) -> None:
    """Print the first completion that the check passes, and how many it does; leave with 1 if there is none."""
    with Sandbox(preload=["doctest"]) as sandbox:
        results = dict(sandbox.run_many((prompt + completion.text, check, "") for completion in completions))
    right = [place for place in sorted(results) if results[place].passed]
    if not right:
        result = results[0]
        print(f"none of {len(completions)} passes; the first {result.outcome}: {result.detail}", file=sys.stderr)
        raise SystemExit(1)
    print(f"{len(right)} of {len(completions)} pass; the first is number {right[0] + 1}", file=sys.stderr)
    print(prompt + completions[right[0]].text)


def _read_check(prompt: str, verify: str | None, tests: str | None) -> str | None:
    """The code that judges a completion, if it is to be judged: the file `tests`, or the prompt's doctests."""
    if tests is not None:
        return Path(tests).read_text(encoding="utf-8")
    if verify is None:
        return None
    n_examples = len(doctest.DocTestParser().get_examples(prompt))
    if not n_examples:
        raise UserError("--verify=doctest: the prompt has no doctests, >>> lines; add some, or give --tests=FILE")
    return DOCTESTS.format(n_examples)


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
