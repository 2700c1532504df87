"""HTTP for editors and pages: OpenAI's completions, Mistral's, llama.cpp's /infill, the playground, health and metrics.

`make_app` builds an ASGI application around a Batcher. Every mistake of a client is a 4xx in one shape, which OpenAI's
clients and llm-ls both read. Sources: OpenAI's API reference; the sources of llama.vim, llama.vscode, Continue, llm-ls.
"""

import asyncio
import base64
import functools
import hashlib
import hmac
import ipaddress
import json
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from data.sequences import FILENAME, FIM_MIDDLE, FIM_PAD, FIM_PREFIX, FIM_SUFFIX
from data.tokenizer import END_OF_TEXT, Special, StreamDecoder, Tokenizer
from inference import batching
from inference.batching import Batcher, Piece, QueueFull, Token
from inference.sampling import Sampling
from runtime.errors import UserError

PLAYGROUND = Path(__file__).with_name("playground.html")
MAX_BODY = 2**20  # bytes
MAX_CHOICES = 16  # completions of a prompt
MAX_PROMPTS = 64
MAX_TOP = 20  # likeliest tokens reported
MAX_STOPS = 32
MAX_ENTRY = 256  # characters of a stop string: after each token every beginning of one is looked for
BODY_S = 20.0  # seconds in which a body must arrive
FIM = (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE, FIM_PAD)
FIM_NAMES = re.compile("(" + "|".join(map(re.escape, FIM)) + ")")


class ApiError(Exception):
    """An answer that is no completion: a status, a message for people and a code for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> Response:
        kind = "server_error" if self.status in (500, 503) else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        detail = [{"loc": self.param or "body", "msg": self.message, "type": self.code or kind}]  # for llm-ls
        headers = (
            {"Retry-After": "1"} if self.status == 503 else {"x-should-retry": "false"}
        )  # openai's client heeds it
        return answer({"error": error, "detail": detail}, self.status, headers)


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(value), status, headers, "application/json")


def as_json(value: Any) -> str:
    """JSON without spaces: llama.vim drops a reply in which one follows a colon."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class Fields:
    """The members of a request's JSON object, read with their types and bounds. What does not fit raises ApiError."""

    def __init__(self, values: Any, name: str | None = None):
        if not isinstance(values, dict):
            raise ApiError(400, f"{name or 'the body'} must be a JSON object", name)
        self.values = values

    def get(self, name: str, default: Any = None) -> Any:
        """A member, or `default` if it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def number(self, name: str, default: Any, low: float, high: float, kind: type = float) -> Any:
        value = self.get(name, default)
        if value is None:
            return None
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not whole):
            raise ApiError(400, f"{name} must be a{'n integer' if kind is int else ' number'}", name)
        if not low <= value <= high:
            raise ApiError(400, f"{name} is {value}; it must be from {low:g} to {high:g}", name)
        return kind(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false", name)
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.get(name, default)
        if value is not None and not isinstance(value, str):
            raise ApiError(400, f"{name} must be a string", name)
        return value

    def texts(self, name: str, most: int) -> list[str]:
        """A string, or a list of at most `most` of them."""
        value = self.get(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise ApiError(400, f"{name} must be a string or a list of strings", name)
        if len(values) > most:
            raise ApiError(400, f"{name} has {len(values)} entries; at most {most} are taken", name)
        if any(len(text) > MAX_ENTRY for text in values):
            raise ApiError(400, f"{name} has an entry of more than {MAX_ENTRY} characters", name)
        return [text for text in values if text]


@dataclass
class Service:
    """What the application serves, and how."""

    batcher: Batcher
    name: str  # that clients see; Continue mistakes names that contain "gpt" for chat models
    api_key: str | None = None
    origins: Sequence[str] = ()  # web origins that may use the server, such as http://localhost:3000
    hosts: Sequence[str] = ()  # names, beside localhost and addresses, that a request's Host may have
    one_line: bool = False  # end every completion with its first line, unless the request says otherwise
    verify: Callable[[list[str], str, bool], list[Any]] | None = None  # programs, a text, whether its doctests count
    runner: Executor = field(default_factory=lambda: ThreadPoolExecutor(1))  # runs `verify`, for one request at a time
    listeners: set[asyncio.Queue] = field(default_factory=set)  # get what is decoded; None at the server's end
    stopping: bool = False
    counts: Counter = field(default_factory=Counter)  # for /metrics
    began: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.batcher.tokenizer

    @property
    def context(self) -> int:
        return self.batcher.model.config.block_size

    @property
    def fills_middle(self) -> bool:
        return all(name in self.tokenizer.specials for name in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE))

    def stop(self) -> None:
        """End all requests that are being decoded or wait for it, and refuse others."""
        self.stopping = True
        for arrived in self.listeners:
            arrived.put_nowait((0, None))

    def head(self, kind: str, prefix: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}

    # Prompts. Only the end of what stands before the cursor and the beginning of what stands behind it are encoded.

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text[self.cut(len(text), 40 * self.context) :])

    def cut(self, n: int, most: int) -> int:
        """How many of the first of `n` things to leave out so that at most `most` stay: none, or else a multiple of an
        eighth of them. While one types, the beginning of a long prompt then stays what it was, and is known."""
        step = max(1, most // 8)
        return -(-max(0, n - most) // step) * step

    def plain_ids(self, prompt: str, room: int) -> list[int]:
        """A prompt's last tokens, so that `room` more fit in the context. The names of fill-in-the-middle's tokens
        stand for these tokens, if the model has them: some editors fill in such a template themselves."""
        pieces = FIM_NAMES.split(prompt) if self.fills_middle else []
        if pieces[1::2] == [FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE] and not pieces[0] and not pieces[-1]:
            return self.middle_ids(pieces[2], pieces[4], room)
        if len(pieces) > 1:
            pieces = FIM_NAMES.split(prompt[-40 * self.context :])
            pieces = [Special(piece) if piece in FIM else piece for piece in pieces if piece]
            ids = self.tokenizer.encode_pieces([Special(END_OF_TEXT), *pieces])
        else:
            ids = self.encode(prompt) or [self.tokenizer.end_of_text]
        return ids[self.cut(len(ids), self.context - room) :]

    def middle_ids(self, before: str, behind: str, room: int, others: Sequence[tuple[str, str]] = ()) -> list[int]:
        """A prompt to fill in between two texts. Three quarters of the context are for what stands before; other files,
        (name, text) each, get what is left. Raises ApiError if the model cannot."""
        if not self.fills_middle:
            raise ApiError(
                501,
                "this model was not trained to fill in the middle, so it cannot use a suffix; train one on shards made "
                "with prepare.py --fim_rate=0.5",
                "suffix",
                "no_fill_in_the_middle",
            )
        special, encode = self.tokenizer.specials, self.encode
        most = self.context - room - 4
        prefix, suffix = encode(before), self.tokenizer.encode(behind[: 40 * self.context])
        n_prefix = min(len(prefix), max(most * 3 // 4, most - len(suffix)))
        suffix = suffix[: most - n_prefix]
        most -= n_prefix + len(suffix)
        context: list[int] = []
        for name, text in others:
            if most - len(context) < 16:  # too few tokens to say anything
                break
            named = [Special(FILENAME), name[:MAX_ENTRY].replace("\n", " "), "\n"] if FILENAME in special else []
            ids = [self.tokenizer.end_of_text, *self.tokenizer.encode_pieces([*named, text[: 40 * self.context]])]
            context += ids[: most - len(context)]
        prefix = prefix[self.cut(len(prefix), n_prefix) :]
        first = [*context, self.tokenizer.end_of_text, special[FIM_PREFIX], *prefix]
        return [*first, special[FIM_SUFFIX], *suffix, special[FIM_MIDDLE]]

    def sampling(self, fields: Fields, max_tokens: int, seed: str = "seed", **defaults: Any) -> Sampling:
        temperature = fields.number("temperature", defaults.get("temperature", 1.0), 0, 2)
        top_p = fields.number("top_p", defaults.get("top_p"), 0, 1)
        top_k = fields.number("top_k", defaults.get("top_k"), 0, 2**31, int)
        number = fields.number(seed, None, -(2**63), 2**63 - 1, int)
        if number is None or (seed == "seed" and number == -1):  # llama.cpp's word for a random one
            number = uuid.uuid4().int
        top_p = top_p if top_p is None else max(top_p, 1e-9)
        return Sampling(max(1, max_tokens), temperature, top_k or None, top_p, number % 2**63)

    def stop_ids(self) -> set[int]:
        """Special tokens end a completion: they are not text."""
        return set(self.tokenizer.specials.values())

    async def pieces(
        self, requests: Sequence[batching.Request], empty: bool = False
    ) -> AsyncIterator[tuple[int, Piece | list[Token]]]:
        """Decode the requests. Yields pieces, and the scored tokens of prompts, with the number of their request. If
        the caller stops listening, decoding stops at the next token. `empty` drops the token that is always drawn."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

        def hand_over(number: int, piece: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, (number, piece))

        self.listeners.add(arrived)
        try:
            if self.stopping:
                raise ApiError(503, "the server stops")
            for number, request in enumerate(requests):
                request.on_piece = request.on_prompt = functools.partial(hand_over, number)
                self.batcher.submit(request)
            unfinished = sum(request.n for request in requests)
            while unfinished:
                number, piece = await arrived.get()
                if piece is None:
                    raise ApiError(503, "the server stops")
                if isinstance(piece, Piece) and piece.finish == "error":
                    raise ApiError(503, "decoding failed; try again with a shorter prompt or fewer completions")
                unfinished -= isinstance(piece, Piece) and bool(piece.finish)
                if empty and isinstance(piece, Piece):
                    piece = Piece(piece.number, "", 0, [], 0.0, "length")
                yield number, piece
        except QueueFull:
            raise ApiError(503, "too many requests wait; try again later", code="queue_full") from None
        finally:
            self.listeners.remove(arrived)
            for request in requests:
                request.cancelled = True


@dataclass
class Choice:
    """A completion as it grows."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    n_tokens: int = 0
    logprob: float = 0.0  # of all its tokens together, the one that ended it included
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.n_tokens += piece.n_tokens
        self.logprob += piece.logprob
        self.finish = piece.finish or None


class Places:
    """Where tokens stand in a text, in characters: OpenAI's logprobs with their text_offset. The parts of a character
    stand where it begins, and special tokens, which are no text, take no room."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, known: Sequence[Token]):
        """`known` are the last tokens of `prompt`, which are told first."""
        self.tokenizer, self.decoder, self.offset = tokenizer, StreamDecoder(tokenizer), 0
        self.offset = len(prompt) - sum(len(self.text_of(token)) for token in known) if known else 0
        self.decoder = StreamDecoder(tokenizer)

    def text_of(self, token: Token) -> str:
        return "" if token.id in self.tokenizer.specials.values() else self.decoder.push(token.id)

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(self.text_of(token))
        tops = [{self.tokenizer.decode([id]): _number(value) for id, value in reversed(token.top)} for token in tokens]
        return {
            "tokens": [self.tokenizer.decode([token.id]) for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [top or None for top in tops],
            "text_offset": offsets,
        }


def _number(logprob: float) -> float | None:
    """As JSON can hold it: null for what is not known, OpenAI's -9999 for impossible."""
    return None if math.isnan(logprob) else max(logprob, -9999.0)


@dataclass
class Completions:
    """What a request to /v1/completions asks for."""

    service: Service
    prompts: list[str]  # as they were sent; ids decoded
    requests: list[batching.Request]
    n: int  # completions of each prompt that are answered
    n_top: int | None
    echo: bool
    empty: bool  # no token was asked for, only the prompt's echo
    usage: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 0, "completion_tokens": 0})

    def count(self, piece: Piece) -> None:
        self.usage["completion_tokens"] += piece.n_tokens

    def total(self) -> dict[str, int]:
        self.usage["prompt_tokens"] = sum(len(request.ids) for request in self.requests)
        return {**self.usage, "total_tokens": sum(self.usage.values())}

    def choice(
        self, index: int, choice: Choice, prompt: str, known: Sequence[Token], places: Places | None = None
    ) -> dict[str, Any]:
        """A choice of an answer. `prompt` is what is echoed, `known` its scored tokens; `places` those of a stream."""
        places = places or Places(self.service.tokenizer, prompt, known)
        logprobs = None if self.n_top is None else places.logprobs([*known, *choice.tokens])
        return {"index": index, "text": prompt + choice.text, "logprobs": logprobs, "finish_reason": choice.finish}

    async def gather(self) -> tuple[list[list[Choice]], list[list[Token]]]:
        """All completions of each prompt, and the prompts' scored tokens."""
        choices = [[Choice() for _ in range(request.n)] for request in self.requests]
        known: list[list[Token]] = [[] for _ in self.requests]
        async for number, piece in self.service.pieces(self.requests, self.empty):
            if isinstance(piece, Piece):
                choices[number][piece.number].add(piece)
                self.count(piece)
            else:
                known[number] = piece
        return choices, known

    async def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream: of each prompt the `n` completions likeliest a token."""
        answers = []
        for prompt, choices, known in zip(self.prompts, *(await self.gather()), strict=True):
            if len(choices) > self.n:
                choices = sorted(choices, key=lambda choice: -choice.logprob / max(1, choice.n_tokens))[: self.n]
            for choice in choices:
                answers.append(self.choice(len(answers), choice, prompt if self.echo else "", known))
        return {**self.service.head("text_completion", "cmpl"), "choices": answers, "usage": self.total()}

    async def chunks(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream."""
        head, known = self.service.head("text_completion", "cmpl"), {}
        places: dict[int, Places] = {}  # by index
        async for number, piece in self.service.pieces(self.requests, self.empty):
            if not isinstance(piece, Piece):
                known[number] = piece
                continue
            index = number * self.n + piece.number
            first = index not in places
            prompt = self.prompts[number] if self.echo and first else ""
            choice = Choice()
            choice.add(piece)
            scored = known.get(number, []) if first else []
            if first:
                places[index] = Places(self.service.tokenizer, prompt, scored)
            chunk = self.choice(index, choice, prompt, scored, places[index])
            self.count(piece)
            yield {**head, "choices": [chunk], **({"usage": None} if with_usage else {})}
        if with_usage:
            yield {**head, "choices": [], "usage": self.total()}


def parse_completions(service: Service, fields: Fields) -> Completions:
    """Read a request to /v1/completions. Raises ApiError if it cannot be served."""
    nested = Fields(fields.get("parameters", {}), "parameters")  # as llm-nvim has llm-ls send them
    inner = {name: nested.get(name) for name in ("temperature", "top_p", "top_k", "stop", "seed")}
    fields = Fields({name: fields.get(name, inner.get(name)) for name in {**fields.values, **inner}})
    max_tokens = fields.number("max_tokens", nested.number("max_new_tokens", 16, 0, 2**31, int), 0, 2**31, int)
    echo, n = fields.flag("echo"), fields.number("n", 1, 1, MAX_CHOICES, int)
    best_of = fields.number("best_of", n, 1, MAX_CHOICES, int)
    n_top = fields.number("logprobs", None, 0, MAX_TOP, int)
    if best_of < n:
        raise ApiError(400, f"best_of is {best_of}; it must be at least n, {n}", "best_of")
    if max_tokens == 0 and not echo:
        raise ApiError(400, "max_tokens is 0; it must be at least 1, or echo true", "max_tokens")
    if best_of > n and fields.flag("stream"):
        raise ApiError(400, "best_of cannot be streamed: the best is known at the end", "best_of")
    for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
        if fields.get(name):
            raise ApiError(400, f"{name} is not supported; leave it out", name)
    suffix, prompt = fields.text("suffix"), fields.get("prompt", "")
    many = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
    prompts = prompt if many else [prompt]
    if len(prompts) > min(MAX_PROMPTS, service.batcher.max_waiting) or len(prompts) * best_of > 2 * MAX_PROMPTS:
        raise ApiError(400, f"{len(prompts)} prompts of {best_of} completions; ask for fewer at once", "prompt")
    room = min(max(1, max_tokens), service.context // 2)
    settings = {
        "sampling": service.sampling(fields, max_tokens),
        "n": best_of,
        "stop": fields.texts("stop", MAX_STOPS),
        "stop_ids": service.stop_ids(),
        "n_top": 0 if n_top is None and best_of > n else n_top,
        "echo": echo,
        "one_line": fields.flag("one_line", service.one_line),
        "on_piece": lambda piece: None,
    }
    texts, requests = [], []
    for one in prompts:
        if isinstance(one, str):
            ids = service.middle_ids(one, suffix, room) if suffix else service.plain_ids(one, room)
        else:
            ids, one = _checked_ids(service, one, suffix, room)
        texts.append(one)
        requests.append(batching.Request(ids, **settings))
    return Completions(service, texts, requests, n, n_top, echo, empty=max_tokens == 0)


def _checked_ids(service: Service, ids: Any, suffix: str | None, room: int) -> tuple[list[int], str]:
    """A prompt of token ids and its text."""
    known = service.tokenizer.vocab_size
    holes = set(service.tokenizer.undefined_ids())
    if not isinstance(ids, list) or not ids or suffix:
        raise ApiError(400, "prompt must be a string, or a list of strings or of token ids (without suffix)", "prompt")
    if not all(type(i) is int and 0 <= i < known and i not in holes for i in ids):
        raise ApiError(400, f"prompt has ids that are no tokens of this model, which has {known}", "prompt")
    return ids[-(service.context - room) :], service.tokenizer.decode(ids)


async def completions(service: Service, fields: Fields, request: Request) -> Response:
    """POST /v1/completions, OpenAI's and llm-ls'."""
    if fields.get("verify") or fields.get("tests"):
        return answer(await until_gone(request, _verified(service, fields)))
    asked = await asyncio.to_thread(parse_completions, service, fields)
    if fields.flag("stream"):
        options = Fields(fields.get("stream_options", {}), "stream_options")
        return await event_stream(request, asked.chunks(options.flag("include_usage")))
    return answer(await until_gone(request, asked.whole()))


async def _verified(service: Service, fields: Fields) -> dict[str, Any]:
    """Draw completions and run them with the prompt's doctests (`verify`) or assertions (`tests`). The answer has the
    first that passes, if one does, and a verdict."""
    if service.verify is None:
        raise ApiError(403, "the server may not run code; start it with --allow_code_execution=True", "verify")
    kind, tests = fields.text("verify"), fields.text("tests")
    if kind not in (None, "doctest") or fields.flag("stream"):
        raise ApiError(400, "verify must be doctest, tests a string of assertions, stream false", "verify")
    asked = await asyncio.to_thread(parse_completions, service, fields)
    if len(asked.prompts) > 1:
        raise ApiError(400, "verify takes one prompt", "prompt")
    (choices,), (known,) = await asked.gather()
    prompt, suffix = asked.prompts[0], fields.text("suffix") or ""
    programs = [prompt + choice.text + suffix for choice in choices]
    check = prompt + suffix if tests is None else tests
    run = asyncio.get_running_loop().run_in_executor
    results = await run(service.runner, service.verify, programs, check, tests is None)
    passed = [i for i, result in enumerate(results) if result.passed]
    shown = results[passed[0]] if passed else results[0]
    verdict = {"passed": len(passed), "of": len(results), "outcome": shown.outcome, "detail": shown.detail}
    best = [asked.choice(i, choices[i], prompt if asked.echo else "", known) for i in passed[:1]]
    head = service.head("text_completion", "cmpl")
    return {**head, "choices": best, "verdict": verdict, "usage": asked.total()}


async def mistral(service: Service, fields: Fields, request: Request) -> Response:
    """POST /v1/fim/completions: fill in the middle, answered in the shape of a chat."""
    fields.values = {**fields.values, "seed": fields.get("random_seed"), "suffix": fields.text("suffix") or "\n"}
    fields.values.setdefault("max_tokens", 128)
    asked = await asyncio.to_thread(parse_completions, service, fields)

    def as_chat(chunk: dict[str, Any], key: str, kind: str) -> dict[str, Any]:
        choices = [
            {"index": c["index"], key: {"role": "assistant", "content": c["text"]}, "finish_reason": c["finish_reason"]}
            for c in chunk["choices"]
        ]
        return {**chunk, "object": kind, "choices": choices}

    if fields.flag("stream"):
        chunks = asked.chunks(with_usage=False)  # each chunk has a choice: clients read choices[0] without looking
        return await event_stream(request, (as_chat(chunk, "delta", "chat.completion.chunk") async for chunk in chunks))
    return answer(as_chat(await until_gone(request, asked.whole()), "message", "chat.completion"))


async def infill(service: Service, fields: Fields, request: Request) -> Response:
    """POST /infill, as llama.vim and llama.vscode call llama.cpp's server."""
    before = fields.text("input_prefix", "") + fields.text("prompt", "")
    behind, n_predict = fields.text("input_suffix", ""), fields.number("n_predict", 128, -1, 2**31, int)
    others = fields.get("input_extra", [])
    if not isinstance(others, list) or not all(isinstance(other, dict) for other in others) or len(others) > 256:
        raise ApiError(400, "input_extra must be a list of at most 256 objects", "input_extra")
    others = [(Fields(o).text("filename", ""), Fields(o).text("text", "")) for o in others]
    wanted = service.context if n_predict < 0 else n_predict
    limit_ms = fields.number("t_max_predict_ms", 0, -1, 1e9)
    ids = await asyncio.to_thread(service.middle_ids, before, behind, min(max(1, wanted), service.context // 4), others)
    one = batching.Request(
        ids,
        service.sampling(fields, wanted, temperature=0.2, top_k=40, top_p=0.95),
        on_piece=lambda piece: None,
        n=fields.number("n_cmpl", 1, 1, MAX_CHOICES, int),
        stop=fields.texts("stop", MAX_STOPS),
        stop_ids=service.stop_ids(),
        one_line=fields.flag("one_line", service.one_line),
        min_indent=fields.number("n_indent", 0, 0, 10_000, int),
        predict_s=limit_ms / 1000 if limit_ms > 0 else None,
    )
    names, id_slot = fields.texts("response_fields", 64), fields.number("id_slot", 0, -1, 2**31, int)

    def whole(choice: Choice) -> dict[str, Any]:
        now = time.monotonic()
        n_read, read_s = len(ids) - one.n_known, max(1e-6, min(one.first_at, now) - one.submitted_at)
        predict_s = max(1e-6, now - min(one.first_at, now))
        timings = {"cache_n": one.n_known, "prompt_n": n_read, "prompt_ms": 1000 * read_s}
        timings |= {"prompt_per_second": n_read / read_s, "predicted_n": choice.n_tokens}
        timings |= {"predicted_ms": 1000 * predict_s, "predicted_per_second": choice.n_tokens / predict_s}
        full = len(ids) + choice.n_tokens > service.context
        answered = {
            **{"index": 0, "content": choice.text, "tokens": [], "id_slot": id_slot, "stop": True},
            **{"model": service.name, "tokens_predicted": choice.n_tokens, "tokens_evaluated": len(ids)},
            **{"tokens_cached": one.n_known, "truncated": full, "timings": timings},
            **{"stop_type": "limit" if choice.finish == "length" else "eos", "stopping_word": ""},
        }
        return picked(answered, names) if names else answered

    async def gather() -> list[Choice]:
        choices = [Choice() for _ in range(one.n)]
        async for _, piece in service.pieces([one], n_predict == 0):
            choices[piece.number].add(piece)
        return choices

    async def stream() -> AsyncIterator[dict[str, Any]]:
        choice = Choice()
        async for _, piece in service.pieces([one], n_predict == 0):
            choice.add(piece)
            last = whole(choice) if piece.finish else {"stop": False}
            yield {**last, "content": piece.text}

    if fields.flag("stream"):
        if one.n > 1:
            raise ApiError(400, "n_cmpl must be 1 for a stream", "n_cmpl")
        return await event_stream(request, stream(), done=False)
    answers = [whole(choice) for choice in await until_gone(request, gather())]
    return answer(answers if one.n > 1 else answers[0])


def picked(full: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The named members, those of members as "timings/prompt_n"; others are left out."""
    found: dict[str, Any] = {}
    for name in names:
        value: Any = full
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found


async def event_stream(request: Request, chunks: AsyncIterator[dict[str, Any]], done: bool = True) -> Response:
    """Server-sent events. Errors that come before the first chunk raise, so that they have a status of their own."""
    first = await until_gone(request, anext(chunks, None))

    async def events() -> AsyncIterator[str]:
        try:
            if first is not None:
                yield f"data: {as_json(first)}\n\n"
            async for chunk in chunks:
                yield f"data: {as_json(chunk)}\n\n"
        except ApiError as error:
            yield f"data: {error.response().body.decode()}\n\n"
        finally:
            await chunks.aclose()
        if done:
            yield "data: [DONE]\n\n"

    return StreamingResponse(events(), headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")


async def until_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled if the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def read_json(request: Request) -> Any:
    """The body as JSON. Raises ApiError if it is too large, too slow, or not JSON."""

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():  # to its end, or the client could not read why it is refused
            body.extend(part[: MAX_BODY + 1 - len(body)])
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body has more than {MAX_BODY} bytes; send less of the text")
        return bytes(body)

    try:
        body = await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_S:g} s") from None

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be encoded
        return value
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None


def api(handler: Callable[[Service, Fields, Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint from a handler: reads the body, answers mistakes, counts."""

    async def endpoint(request: Request) -> Response:
        service: Service = request.app.state.service
        try:
            response = await handler(service, Fields(await read_json(request)), request)
        except ApiError as error:
            response = error.response()
        except UserError as error:
            response = ApiError(400, str(error)).response()
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        service.counts[request.scope["path"], response.status_code] += 1
        return response

    return endpoint


async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    about = {"context": service.context, "fill_in_the_middle": service.fills_middle}
    about |= {
        "can_verify": service.verify is not None,
        "one_line": service.one_line,
        "parameters": service.batcher.model.n_parameters(),
    }
    model = {"id": service.name, "object": "model", "created": service.began, "owned_by": "codegpt", **about}
    if (name := request.path_params.get("name")) is not None:
        return answer(model) if name == service.name else ApiError(404, f"no model {name}", "model").response()
    return answer({"object": "list", "data": [model]})


async def metrics(request: Request) -> Response:
    """GET /metrics: counters and gauges in Prometheus' text format."""
    service: Service = request.app.state.service
    batcher = service.batcher
    gauges = {"requests_waiting": len(batcher.waiting), "completions_running": len(batcher.rows)}
    gauges["prefix_cache_bytes"] = batcher.prefixes.n_bytes
    counters = {"tokens_drawn": batcher.n_drawn, "prompt_tokens_read": batcher.n_read}
    counters["prompt_tokens_known"] = batcher.n_known
    lines = [f"# TYPE codegpt_{name} gauge\ncodegpt_{name} {value}" for name, value in gauges.items()]
    lines += [f"# TYPE codegpt_{name}_total counter\ncodegpt_{name}_total {n}" for name, n in counters.items()]
    lines.append("# TYPE codegpt_requests_total counter")
    for (path, status), n in sorted(service.counts.items()):
        lines.append(f'codegpt_requests_total{{path="{path}",status="{status}"}} {n}')
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def page() -> Callable[[Request], Awaitable[Response]]:
    """The playground. Its policy allows the one script and the one style that are in it, by their hashes."""
    html = PLAYGROUND.read_text(encoding="utf-8")
    policy = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    policy.append("frame-ancestors 'none'")
    for tag in ("script", "style"):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        policy.append(f"{tag}-src " + " ".join(f"'sha256-{digest}'" for digest in digests))
    headers = {"Content-Security-Policy": "; ".join(policy), "X-Content-Type-Options": "nosniff"}
    headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

    async def endpoint(request: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    return endpoint


class Guard:
    """Refuses requests whose Host is a foreign name, because a web page may point a name of its own at this machine,
    posts of foreign pages, whose browsers send them although they may not read the answer, and requests without the API
    key, if one is set."""

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (error := self.refusal(scope)) is not None:
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def refusal(self, scope: dict) -> ApiError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if name not in ("localhost", *(host.lower() for host in self.service.hosts)) and not _is_address(name):
            return ApiError(421, f"Host {host!r} is not served here; start the server with --hosts={name}", code="host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = (f"http://{host}", f"https://{host}", *self.service.origins)
        if scope["method"] == "POST" and origin and origin not in own:
            return ApiError(403, f"pages of {origin} are not served; start with --origins={origin}", code="origin")
        key, path = self.service.api_key, scope["path"]
        given = re.sub(rb"(?i)^bearer ", b"", headers.get(b"authorization", b""))
        if key is None or path in ("/", "/health") or hmac.compare_digest(given, key.encode()):
            return None
        return ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def make_app(service: Service) -> Starlette:
    """The application, with the playground at /."""

    async def health(request: Request) -> Response:
        return answer({"status": "ok"})

    async def unknown(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        return ApiError(status, f"{request.method} {request.url.path}: {getattr(error, 'detail', 'failed')}").response()

    routes = [
        Route("/", page()),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/v1/completions", api(completions), methods=["POST"]),
        Route("/v1/fim/completions", api(mistral), methods=["POST"]),
        Route("/infill", api(infill), methods=["POST"]),
    ]
    middleware = [Middleware(Guard, service=service)]
    if service.origins:
        cors = {"allow_origins": list(service.origins), "allow_methods": ["GET", "POST"]}
        middleware.insert(0, Middleware(CORSMiddleware, **cors, allow_headers=["*"]))
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={404: unknown, 405: unknown, 500: unknown})
    app.state.service = service
    return app
