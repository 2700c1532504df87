"""The decoder: prompts in, completions out, drawn token by token on a cache of keys and values.

Past the end of the context the window moves on by half a context at a time: the token after n tokens is predicted from
those from place s = window_start(n, block_size) on, at positions that count from 0 at s. The cache is refilled at each
move, on average one more token of work for each token sampled, and what is sampled is what full forward passes over
the same windows would give.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from typing import NamedTuple

import torch

from data.tokenizer import StreamDecoder, Tokenizer
from inference.sampling import Sampling, choose_token
from model import GPT, KVCache
from runtime.errors import UserError


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
