"""The decoder: prompts in, completions out, drawn token by token with a cache of keys and values.

Beyond the context, the window moves on by half a context at a time: the token after n tokens is predicted from those
from index s = window_start(n, block_size) on, at positions counted from s. Each move refills the cache, on average one
more token of work per sampled token. What is sampled equals what full forward passes over the same windows would give.
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
    raw: str  # all of it: also the stop string, and what came with that in the same token
    finish: str  # what ended it: "stop" (a stop string or id) or "length" (max_new_tokens)


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    sampling: Sampling,
    *,
    n_samples: int = 1,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] = (),
    on_text: Callable[[int, str], None] = lambda number, text: None,
) -> list[Completion]:
    """Returns `n_samples` completions of `prompt`, a text or a list of texts and Specials; they do not repeat it.

    A completion ends at end-of-text or another of `stop_ids`, before the first string of `stop`, or after
    `max_new_tokens`. The prompt is read once, and each completion is drawn independently from its first token on.
    `on_text(number, text)` is called with each piece of completion `number` as soon as it is certain.
    A prompt longer than the context loses its beginning. Raises UserError for a prompt of no tokens.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_pieces(prompt)
    if not ids:
        raise UserError("the prompt has no tokens; give at least one character, a newline will do")
    device = model.wte.weight.device
    tokens = torch.tensor([ids[-model.config.block_size :]], device=device)  # (1, T)
    rows = [Row(i, tokenizer, stop, {tokenizer.end_of_text, *stop_ids}) for i in range(n_samples)]
    training = model.training
    model.eval()
    steps = generate_tokens(model, tokens, _chooser(model, tokenizer, sampling), n_samples)
    batch = rows  # the rows being decoded: all unfinished ones, and finished ones until they are taken out
    chosen = next(steps)  # (len(batch),), the next token of each
    for n in range(1, sampling.max_new_tokens + 1):
        for row, token in zip(batch, chosen.tolist(), strict=True):
            if text := row.push(token, last=n == sampling.max_new_tokens):
                on_text(row.number, text)
        unfinished = [i for i, row in enumerate(batch) if not row.done]  # indices into the batch
        if not unfinished:
            break
        # Taking rows out copies the cache: worth it if half of them go, but not if a compiled step would recompile.
        if len(unfinished) <= len(batch) // 2 and model.compiled_decode is None:
            batch = [batch[i] for i in unfinished]
            chosen = steps.send(torch.tensor(unfinished, device=device))
        else:
            chosen = next(steps)
    model.train(training)
    return [Completion(row.text, row.raw, row.finish) for row in rows]


def _chooser(model: GPT, tokenizer: Tokenizer, sampling: Sampling) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that draws the next tokens (B,) from logits (B, V), never ids that the tokenizer does not have."""
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    beyond = range(tokenizer.vocab_size, model.config.vocab_size)
    banned = torch.tensor([*tokenizer.undefined_ids(), *beyond], dtype=torch.int64, device=device)
    return lambda logits: choose_token(logits.index_fill(-1, banned, -torch.inf), sampling, generator)


def generate_tokens(
    model: GPT, tokens: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor], n_samples: int = 1
) -> Generator[torch.Tensor, torch.Tensor | None, None]:
    """Yields the next token of each row, (B,), without end: `choose(logits)` of the logits (B, V) that follow the row.
    Rows begin as `tokens` (B, T), and grow by what was chosen. A single one is read once and continued as `n_samples`.

    `send(indices)` instead of `next()` first drops all rows but these: int64 indices into the current rows.
    """
    block_size = model.config.block_size
    with torch.inference_mode():
        tokens = tokens.clone()  # an inference tensor, as later ones are: a compiled step tells them apart
        cache = new_cache(model, len(tokens))
        logits = _read_window(model, tokens, cache)
        if len(tokens) < n_samples:
            cache = _take_rows(model, cache, torch.zeros(n_samples, dtype=torch.int64, device=tokens.device))
            logits, tokens = logits.expand(n_samples, -1), tokens.expand(n_samples, -1)  # (B, V), (B, T)
    try:
        while True:
            with torch.inference_mode():
                chosen = choose(logits)  # (B,)
                tokens = torch.cat((tokens, chosen[:, None]), dim=1)  # (B, T + 1)
            kept = yield chosen
            with torch.inference_mode():
                if kept is not None:
                    cache, tokens = _take_rows(model, cache, kept), tokens[kept]
                T = tokens.size(1)
                if window_start(T, block_size) == window_start(T - 1, block_size):
                    logits = model.decode(tokens[:, -1:], cache)  # (B, V)
                else:
                    logits = _read_window(model, tokens, cache)
    finally:
        give_back(model, cache)


def _read_window(model: GPT, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Fill the cache with the last window of tokens (B, T). Returns the logits (B, V) that follow it."""
    cache.move_to(0)
    return model.decode(tokens[:, window_start(tokens.size(1), model.config.block_size) :], cache)


def _take_rows(model: GPT, cache: KVCache, rows: torch.Tensor) -> KVCache:
    """A cache of these rows, (B,) indices, in exchange for `cache`."""
    new = new_cache(model, len(rows))
    new.copy_rows(cache, rows)
    give_back(model, cache)
    return new


def new_cache(model: GPT, batch_size: int) -> KVCache:
    """An empty cache. For a compiled step it is static, and one that was given back if there is one: CUDA graphs are
    recorded for its memory. On a CPU it is fp32: attention of single tokens is 2 to 6 times as slow in bf16."""
    weight = model.wte.weight
    dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
    static = model.compiled_decode is not None
    cache = model.idle_caches.pop(batch_size, None) if static else None
    if cache is None or (cache.keys[0].dtype, cache.keys[0].device) != (dtype, weight.device):
        return KVCache(model.config, batch_size, weight.device, dtype, static)
    cache.clear()
    return cache


def give_back(model: GPT, cache: KVCache) -> None:
    """Keep a static cache for the next text of as many rows."""
    if cache.static:
        model.idle_caches[len(cache.keys[0])] = cache


def window_start(n_tokens: int, block_size: int) -> int:
    """Index of the first of `n_tokens` that the model sees: 0 while all fit, then it moves by half a context."""
    stride = max(1, block_size // 2)
    return -(-max(0, n_tokens - block_size) // stride) * stride


class Row:
    """The text of one completion as its tokens arrive, cut at the first stop string."""

    def __init__(self, number: int, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: Collection[int]):
        self.number, self.decoder, self.stop, self.stop_ids = number, StreamDecoder(tokenizer), stop, stop_ids
        self.text, self.raw, self.finish = "", "", ""
        self.n_sent = 0  # characters of the text that were returned as certain

    @property
    def done(self) -> bool:
        return bool(self.finish)

    def push(self, token: int, last: bool) -> str:
        """Add the next token; returns the text that has become certain. A finished row ignores the token."""
        if self.done:
            return ""
        if token in self.stop_ids:
            self.finish = "stop"
        else:
            self.text += self.decoder.push(token)
            self.finish = "length" if last else ""
        if self.done:
            self.text += self.decoder.flush()
        self.raw = self.text
        cuts = [self.text.find(stop) for stop in self.stop if stop in self.text]
        if cuts:
            self.text, self.finish = self.text[: min(cuts)], "stop"
        start, self.n_sent = self.n_sent, len(self.text) - (0 if self.done else self._n_held_back())
        return self.text[start : self.n_sent]

    def _n_held_back(self) -> int:
        """How many characters at the end may turn out to be the beginning of a stop string."""
        return max((n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
