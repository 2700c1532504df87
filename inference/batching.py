"""Continuous batching: the completions of many requests are decoded together, and join and leave at any token.

Each row of the batch has its own length, sampling settings, random numbers and end. A prompt is read by itself and its
keys and values are then copied into the batch; of a prompt that begins like a recent text only the rest is read. One
thread does all of this. Requests come from other threads, and what became certain goes back through callbacks.
"""

import math
import random
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from data.tokenizer import Tokenizer
from inference.generate import Row
from inference.sampling import Sampling, choose_token
from model import GPT, GPTConfig, KVCache

T = TypeVar("T")


class Token(NamedTuple):
    """A token of a completion or prompt, and how likely it was: the logarithms of probabilities before sampling."""

    id: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens at its place, (id, logprob)


class Piece(NamedTuple):
    """What has become certain of a completion."""

    number: int  # which of the request's completions
    text: str
    n_tokens: int  # drawn since the last piece
    tokens: list[Token]  # those of them that are text, if the request asked for tokens
    logprob: float  # the sum of those of all tokens drawn since the last piece, if the request asked for tokens
    finish: str  # what ended it: "stop", "length", "cancelled" or "error"; "" while it goes on


@dataclass(eq=False)
class Request:
    """Completions to draw of one prompt. `on_piece` and `on_prompt` are called in the decoding thread."""

    ids: Sequence[int]  # the prompt, at least one token, fewer than the context
    sampling: Sampling  # each completion draws its own random numbers, from the seed and its number
    on_piece: Callable[[Piece], None]
    n: int = 1
    stop: Sequence[str] = ()
    stop_ids: Collection[int] = ()
    n_top: int | None = None  # report tokens, with that many of the likeliest at their places; None does not
    echo: bool = False  # report the prompt's tokens too
    on_prompt: Callable[[list[Token]], None] = lambda tokens: None  # gets them; the first has no probability, NaN
    one_line: bool = False  # end with the first line that is not blank
    min_indent: int = 0  # a later line that is indented less ends the completion
    predict_s: float | None = None  # ends completions that many seconds after their first token
    cancelled: bool = False  # set by the caller: no more is decoded
    n_known: int = field(default=0, init=False)  # tokens of the prompt that need not be read again
    submitted_at: float = field(default_factory=time.monotonic, init=False)
    first_at: float = field(default=math.inf, init=False)  # when the first token was drawn


class QueueFull(Exception):
    """As many requests wait as may wait."""


class BatchCache:
    """Keys and values of rows of different lengths. To the model it is a KVCache that takes one token per row."""

    static = False

    def __init__(self, config: GPTConfig, max_rows: int, device: torch.device, dtype: torch.dtype):
        shape = (max_rows, config.kv_heads, config.block_size, config.head_width)  # (B, K, S, D)

        def zeros() -> torch.Tensor:  # masked values must not be NaN
            if device.type == "cpu":  # NumPy's zeros take memory where they are touched, torch's at once
                return torch.from_numpy(np.zeros(shape, dtype=np.float32)).to(dtype)
            return torch.zeros(shape, device=device, dtype=dtype)

        self.keys, self.values = ([zeros() for _ in range(config.n_layer)] for _ in range(2))
        self.lengths: list[int] = []  # tokens that each row holds
        self._rows_changed()

    @property
    def length(self) -> int:
        return max(self.lengths)

    def add(self, cache: KVCache) -> None:
        """Append a row that holds what `cache`, of one row, holds."""
        row, n = len(self.lengths), cache.length
        for mine, theirs in zip((*self.keys, *self.values), (*cache.keys, *cache.values), strict=True):
            mine[row, :, :n] = theirs[0, :, :n]
        self.lengths.append(n)
        self._rows_changed()

    def remove(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last, n, n_removed = len(self.lengths) - 1, self.lengths[-1], self.lengths[row]
        for mine in (*self.keys, *self.values):
            if row < last:
                mine[row, :, :n] = mine[last, :, :n]
                mine[row, :, n:n_removed].zero_()
            mine[last, :, :n].zero_()  # an infinity left there would spoil another text: 0 times that is NaN
        self.lengths[row] = n
        self.lengths.pop()
        self._rows_changed()

    def clear(self) -> None:
        for mine in (*self.keys, *self.values) if self.lengths else ():
            mine[: len(self.lengths), :, : self.length + 1].zero_()
        self.lengths = []
        self._rows_changed()

    def of_row(self, row: int) -> torch.Tensor:
        """A copy of what a row holds, (2 L, K, S, D)."""
        return torch.stack([mine[row, :, : self.lengths[row]] for mine in (*self.keys, *self.values)])

    def _rows_changed(self) -> None:
        device = self.keys[0].device
        self.rows = torch.arange(len(self.lengths), device=device)
        self.positions = torch.tensor(self.lengths, dtype=torch.int64, device=device)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As KVCache.append, for k and v of (B, K, 1, D). Keys beyond a row's own length are those of older texts."""
        n, end = len(self.lengths), self.length + 1
        self.keys[layer][self.rows, :, self.positions] = k[:, :, 0].to(self.keys[layer].dtype)
        self.values[layer][self.rows, :, self.positions] = v[:, :, 0].to(self.values[layer].dtype)
        return self.keys[layer][:n, :, :end], self.values[layer][:n, :, :end]

    def mask(self, T: int) -> torch.Tensor | None:
        """What to add to the scores of each row's new token, (B, 1, 1, S); None if all rows are equally long."""
        if len(set(self.lengths)) == 1:
            return None
        beyond = torch.arange(self.length + 1, device=self.positions.device) > self.positions[:, None]  # (B, S)
        zeros = torch.zeros(beyond.shape, dtype=self.keys[0].dtype, device=beyond.device)
        return zeros.masked_fill(beyond, -torch.inf)[:, None, None]

    def at_positions(self, table: torch.Tensor, T: int) -> torch.Tensor:
        """The row of `table` (block_size, ...) at the position of each row's new token, (B, 1, ...)."""
        return table[self.positions][:, None]

    def advance(self, n_tokens: int) -> None:
        self.lengths = [n + 1 for n in self.lengths]
        self.positions += 1


class PrefixCache:
    """Keys and values of recent texts, at most `max_bytes` and MAX_TEXTS of them; the one that was used least recently
    goes first."""

    MAX_TEXTS = 512  # a prompt is compared with each

    def __init__(self, max_bytes: int):
        self.max_bytes, self.n_bytes = max_bytes, 0
        self.texts: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # ids as int32, and their (2 L, K, S, D)

    def put(self, ids: Sequence[int], held: torch.Tensor) -> None:
        """Keep `held`, the keys and values of a text's first tokens, in place of any beginning of the text."""
        key = np.array(ids[: held.size(2)], dtype=np.int32).tobytes()
        if held.nbytes > self.max_bytes or any(longer.startswith(key) for longer in self.texts):
            return
        for older in [older for older in self.texts if key.startswith(older)]:
            self.n_bytes -= self.texts.pop(older).nbytes
        self.texts[key] = held
        self.n_bytes += held.nbytes
        while self.n_bytes > self.max_bytes or len(self.texts) > self.MAX_TEXTS:
            self.n_bytes -= self.texts.popitem(last=False)[1].nbytes

    def fill(self, cache: KVCache, ids: Sequence[int]) -> None:
        """Fill an empty cache of one row with as many of the first `ids` as a text here begins with, but not all: the
        last one has to be read for what follows it."""
        wanted = np.array(ids[:-1], dtype=np.int32)
        best, n_best = None, 0
        for key in self.texts:
            known = np.frombuffer(key, dtype=np.int32)[: len(wanted)]
            differs = np.flatnonzero(known != wanted[: len(known)])
            n = int(differs[0]) if len(differs) else len(known)
            if n > n_best:
                best, n_best = key, n
        if best is None:
            return
        self.texts.move_to_end(best)
        for mine, held in zip((*cache.keys, *cache.values), self.texts[best], strict=True):
            mine[0, :, :n_best] = held[:, :n_best]
        cache.move_to(n_best)


class _BatchRow(Row):
    """A row of the batch: the text of a completion, and what its request asks for."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer, device: torch.device):
        super().__init__(number, tokenizer, request.stop, {tokenizer.end_of_text, *request.stop_ids})
        self.request, self.ids = request, list(request.ids)  # the prompt's, then those drawn
        seed = request.sampling.seed  # the first completion draws as sample.py does
        seed = random.Random(f"{seed} {number}").getrandbits(63) if number else seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.n_drawn, self.drawn, self.logprob = 0, [], 0.0  # since the last piece
        self.began_at = time.monotonic()

    def push(self, token: int, last: bool) -> str:
        before = self.n_sent
        text = super().push(token, last)
        cut = _line_end(self.text) if self.request.one_line else None
        if cut is None and self.request.min_indent:
            cut = _dedent(self.text, self.request.min_indent)
        if cut is None:
            return text
        self.text, self.finish = self.text[:cut], "stop"
        return self.text[before:]

    def _n_held_back(self) -> int:
        """Also a line of which only white space is known: its indentation may end the completion."""
        line = self.text[self.text.rfind("\n") :] if self.request.min_indent and "\n" in self.text else ""
        return max(super()._n_held_back(), 0 if line.strip() else len(line))


def _line_end(text: str) -> int | None:
    """Where the first line ends that is not blank, if it does."""
    end = text.find("\n", len(text) - len(text.lstrip()))
    return None if end < 0 else end


def _dedent(text: str, least: int) -> int | None:
    """Where the text is to be cut: before the first of its lines after the first that is indented by less than `least`
    columns, if there is one. Blank lines do not count."""
    end = text.find("\n")
    while end >= 0:
        line = text[end + 1 :].partition("\n")[0]
        if line.strip() and len(line) - len(line.lstrip()) < least:
            return end
        end = text.find("\n", end + 1)
    return None


def in_a_thread(work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread that ends. A program that decodes in a Batcher makes its model like this:
    OpenMP's threads stay for as long as the thread that used them, and with more of them than processors those of the
    decoder would sleep between any two products, which takes a fifth of its speed."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


class Batcher:
    """Decodes requests in a thread of its own, at most `max_rows` completions at a time. A context manager."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, max_rows: int = 16, max_waiting: int = 256, cache_bytes: int = 2**29
    ):
        self.model, self.tokenizer, self.max_rows, self.max_waiting = model, tokenizer, max_rows, max_waiting
        weight = model.wte.weight
        self.device, self.dtype = weight.device, torch.float32 if weight.device.type == "cpu" else weight.dtype
        self.prefixes = PrefixCache(cache_bytes)
        beyond = range(tokenizer.vocab_size, model.config.vocab_size)
        self.banned = torch.tensor([*tokenizer.undefined_ids(), *beyond], dtype=torch.int64, device=self.device)
        self.rows: list[_BatchRow] = []
        self.cache = BatchCache(model.config, max_rows, self.device, self.dtype)
        self.waiting: deque[Request] = deque()
        # Requests that were read and have rows yet to join: the rows' numbers, the prompt's cache, what follows it.
        self.joining: deque[tuple[Request, Iterator[int], KVCache, torch.Tensor]] = deque()
        self.wake = threading.Condition()
        self.closing = False
        self.n_drawn = self.n_read = self.n_known = 0  # tokens drawn, of prompts read, and of prompts known already
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *exception: object) -> None:
        with self.wake:
            self.closing = True
            self.wake.notify()
        self.thread.join()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises QueueFull if too many wait already."""
        with self.wake:
            if len(self.waiting) >= self.max_waiting:
                self.waiting = deque(waiting for waiting in self.waiting if not waiting.cancelled)
            if len(self.waiting) >= self.max_waiting:
                raise QueueFull
            self.waiting.append(request)
            self.wake.notify()

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self.wake:
                    self.wake.wait_for(lambda: self.closing or self.waiting or self.joining or self.rows)
                    if self.closing:
                        return
                try:
                    self._drop_cancelled()
                    self._admit()
                    if self.rows:
                        self._step()
                except Exception:
                    failed = {row.request for row in self.rows} | {request for request, *_ in self.joining}
                    self.rows = []
                    self.joining.clear()
                    self.cache.clear()
                    self._fail(failed)

    def _drop_cancelled(self) -> None:
        self.joining = deque(joining for joining in self.joining if not joining[0].cancelled)
        for row in [row for row in self.rows if row.request.cancelled]:
            row.finish = "cancelled"
            self._leave(row)

    def _fail(self, requests: Iterable[Request]) -> None:
        """Say that these requests failed, and why to the log. Later ones may not: memory may have run out, say."""
        traceback.print_exc()
        for request in requests:
            request.cancelled = True
            for number in range(request.n):
                request.on_piece(Piece(number, "", 0, [], 0.0, "error"))

    def _admit(self) -> None:
        """Fill free rows, with a row of each request in turn. At most one prompt is read, so that none waits long."""
        if len(self.rows) == self.max_rows:
            return
        if len(self.joining) < self.max_rows:
            with self.wake:
                request = self.waiting.popleft() if self.waiting else None
            if request is not None and not request.cancelled:
                try:
                    self.joining.append((request, iter(range(request.n)), *self._read(request)))
                except Exception:
                    self._fail([request])
        joined, logits = [], []
        while self.joining and len(self.rows) < self.max_rows:
            request, numbers, cache, following = entry = self.joining.popleft()
            row = _BatchRow(next(numbers), request, self.tokenizer, self.device)
            if row.number < request.n - 1:
                self.joining.append(entry)
            self.rows.append(row)
            self.cache.add(cache)
            joined.append(row)
            logits.append(following)
        if joined:
            self._extend(joined, torch.cat(logits))

    def _read(self, request: Request) -> tuple[KVCache, torch.Tensor]:
        """A cache of the request's prompt, and the logits (1, V) that follow it."""
        if request.echo and request.n_top is not None:
            request.on_prompt(self._prompt_tokens(request))
        cache = KVCache(self.model.config, 1, self.device, self.dtype)
        self.prefixes.fill(cache, request.ids)
        request.n_known = cache.length
        self.n_known += cache.length
        self.n_read += len(request.ids) - cache.length
        rest = torch.tensor([request.ids[cache.length :]], device=self.device)
        return cache, self.model.decode(rest, cache).index_fill(-1, self.banned, -torch.inf)

    def _prompt_tokens(self, request: Request) -> list[Token]:
        logits = self.model(torch.tensor([request.ids], device=self.device))[0, :-1]  # (T - 1, V)
        scored = _scored(logits.index_fill(-1, self.banned, -torch.inf), request.ids[1:], request.n_top)
        return [Token(request.ids[0], math.nan, []), *scored]

    def _step(self) -> None:
        """Draw one more token for every row."""
        last = torch.tensor([[row.ids[-1]] for row in self.rows], device=self.device)  # (B, 1)
        logits = self.model.decode(last, self.cache).index_fill(-1, self.banned, -torch.inf)  # (B, V)
        self._extend(list(self.rows), logits)

    def _extend(self, rows: list[_BatchRow], logits: torch.Tensor) -> None:
        """Draw the next token of each of these rows from logits (B, V), and send what became certain."""
        broken = logits.isnan().any(-1).tolist()  # an overflow in 16 bits, say
        alike: dict[tuple[Any, ...], list[int]] = {}  # indices of rows that are drawn in one go
        for i, row in enumerate(rows):
            if broken[i]:
                row.finish = "error"
                self._leave(row)
                continue
            sampling = row.request.sampling
            alike.setdefault((sampling.temperature, sampling.top_k, sampling.top_p), []).append(i)
        for indices in alike.values():
            some = [rows[i] for i in indices]
            of_some = logits if len(some) == len(rows) else logits[indices]  # (B, V)
            chosen = choose_token(of_some, some[0].request.sampling, [row.generator for row in some]).tolist()
            for row, token, row_logits in zip(some, chosen, of_some, strict=True):
                self._push(row, token, row_logits)

    def _push(self, row: _BatchRow, token: int, logits: torch.Tensor) -> None:
        """Add a token, which was drawn from logits (V,), to a row."""
        request = row.request
        if request.n_top is not None:
            (scored,) = _scored(logits[None], [token], request.n_top)
            row.logprob += scored.logprob
            row.drawn += [scored] if token not in row.stop_ids else []
        row.ids.append(token)
        row.n_drawn += 1
        self.n_drawn += 1
        request.first_at = min(request.first_at, time.monotonic())
        late = request.predict_s is not None and time.monotonic() - row.began_at > request.predict_s
        full = len(row.ids) > self.model.config.block_size
        text = row.push(token, late or full or len(row.ids) - len(request.ids) == request.sampling.max_new_tokens)
        if row.done:
            self._leave(row, text)
        elif text:
            self._send(row, text)

    def _leave(self, row: _BatchRow, text: str = "") -> None:
        """Take a row out of the batch, and keep what it held for prompts that begin like it."""
        self._send(row, text)  # before the copying, which takes milliseconds
        i = self.rows.index(row)
        if row.number == 0 and row.finish != "error":
            self.prefixes.put(row.ids, self.cache.of_row(i))
        self.cache.remove(i)
        self.rows[i] = self.rows[-1]
        self.rows.pop()

    def _send(self, row: _BatchRow, text: str) -> None:
        piece = Piece(row.number, text, row.n_drawn, row.drawn, row.logprob, row.finish)
        row.n_drawn, row.drawn, row.logprob = 0, [], 0.0
        row.request.on_piece(piece)


def _scored(logits: torch.Tensor, tokens: Sequence[int], n_top: int) -> list[Token]:
    """Tokens, each drawn from a row of logits (T, V), with the `n_top` likeliest."""
    logprobs = logits.float().log_softmax(-1)
    of_tokens = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = (top.tolist() for top in logprobs.topk(n_top))  # (T, n_top) each
    return [
        Token(*drawn[:2], list(zip(*drawn[2:], strict=True)))
        for drawn in zip(tokens, of_tokens, ids, values, strict=True)
    ]
