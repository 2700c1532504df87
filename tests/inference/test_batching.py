import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from data.tokenizer import Tokenizer, load_tokenizer
from inference.batching import Batcher, Piece, PrefixCache, QueueFull, Request
from inference.generate import generate
from inference.sampling import Sampling
from model import GPT, GPTConfig, KVCache

PROMPTS = ["def f(x):", "import os\nimport sys\n", "x", "class A:\n    def f(self):\n        return 1\n", "def f(y"]


@pytest.fixture(scope="module")
def tokenizer(shards) -> Tokenizer:
    return load_tokenizer(str(shards.path / "bpe.json"))


@pytest.fixture(scope="module", params=[False, True], ids=["gpt2", "modern"])
def model(request) -> GPT:
    """A model that says different things after different prompts."""
    torch.manual_seed(0)
    parts = {"rope_theta": 100.0, "rms_norm": True, "qk_norm": True, "swiglu": True, "n_kv_head": 1}
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=32, block_size=96, vocab_size=512, **(parts if request.param else {})
    )
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Answers:
    """Collects what a batcher says about requests."""

    def __init__(self, batcher: Batcher):
        self.batcher, self.done = batcher, threading.Semaphore(0)
        self.pieces: dict[tuple[int, int], list[Piece]] = {}

    def ask(self, number: int, request: Request) -> None:
        def on_piece(piece: Piece) -> None:
            self.pieces.setdefault((number, piece.number), []).append(piece)
            if piece.finish:
                self.done.release()

        request.on_piece = on_piece
        self.batcher.submit(request)

    def wait(self, n: int) -> None:
        for _ in range(n):
            assert self.done.acquire(timeout=60), "a request was lost"

    def text(self, number: int, choice: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces[number, choice])


def request(ids: Sequence[int], sampling: Sampling, **settings) -> Request:
    return Request(ids, sampling, lambda piece: None, **settings)


def test_greedy_completions_are_those_of_the_decoder_whatever_else_is_in_the_batch(model, tokenizer):
    """With more requests than rows, so that they join and leave; and again, when their beginnings are known."""
    sampling = [Sampling(10 + 7 * i, temperature=0.0) for i in range(len(PROMPTS))]
    alone = [generate(model, tokenizer, p, s)[0] for p, s in zip(PROMPTS, sampling, strict=True)]
    with Batcher(model, tokenizer, max_rows=3) as batcher:
        for _ in range(2):
            answers = Answers(batcher)
            for i, (prompt, settings) in enumerate(zip(PROMPTS, sampling, strict=True)):
                answers.ask(i, request(tokenizer.encode(prompt), settings, n=2))
            answers.wait(2 * len(PROMPTS))
            for i, completion in enumerate(alone):
                for choice in range(2):
                    assert answers.text(i, choice) == completion.text
                    assert answers.pieces[i, choice][-1].finish == completion.finish
    assert batcher.n_known > 0 and not batcher.rows and not batcher.cache.lengths


def test_a_seed_repeats_its_text_and_choices_differ(model, tokenizer):
    ids, drawn = tokenizer.encode(PROMPTS[0]), []
    with Batcher(model, tokenizer, max_rows=4) as batcher:
        for neighbours in (0, 3):
            answers = Answers(batcher)
            for i in range(neighbours):
                answers.ask(1 + i, request(tokenizer.encode(PROMPTS[1 + i]), Sampling(40, seed=i)))
            answers.ask(0, request(ids, Sampling(30, seed=7), n=2))
            answers.wait(2 + neighbours)
            drawn.append([answers.text(0, 0), answers.text(0, 1)])
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


def test_a_cancelled_request_is_decoded_no_more_and_a_full_queue_refuses(model, tokenizer):
    ids = tokenizer.encode("x")
    with Batcher(model, tokenizer, max_rows=1, max_waiting=2) as batcher:
        answers = Answers(batcher)
        endless = request(ids, Sampling(80, temperature=0.0), stop_ids=(), n=50)
        answers.ask(0, endless)
        while not batcher.n_drawn:
            time.sleep(0.001)
        waiting = [request(ids, Sampling(1, temperature=0.0)) for _ in range(2)]
        for i, one in enumerate(waiting, start=1):
            answers.ask(i, one)
        with pytest.raises(QueueFull):
            batcher.submit(request(ids, Sampling(1)))
        endless.cancelled = True
        while (1, 0) not in answers.pieces or (2, 0) not in answers.pieces:
            time.sleep(0.001)
        assert batcher.n_drawn < 50 * 80 and answers.pieces[1, 0][-1].finish == "length"


def test_completions_end_with_the_context_the_time_and_the_line(model, tokenizer):
    ids = tokenizer.encode("x")
    with Batcher(model, tokenizer) as batcher:
        answers = Answers(batcher)
        answers.ask(0, request(ids, Sampling(10_000, temperature=0.0)))
        answers.ask(1, request(ids, Sampling(10_000, temperature=0.0), predict_s=0.0))
        answers.wait(2)
    assert sum(piece.n_tokens for piece in answers.pieces[0, 0]) == model.config.block_size - len(ids) + 1
    assert sum(piece.n_tokens for piece in answers.pieces[1, 0]) <= 2
    assert answers.pieces[0, 0][-1].finish == answers.pieces[1, 0][-1].finish == "length"


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({"one_line": True}, "return x\nfoo", "return x"),
        (
            {"one_line": True},
            "\n\n    return x\n    y",
            "\n\n    return x",
        ),  # from the end of a line, its indentation kept
        ({"min_indent": 4}, "x\n    y\n\n  z\n", "x\n    y\n"),
        ({"min_indent": 4, "one_line": True}, "x\ny", "x"),
        ({"stop": ["\ndef"]}, "x\n  y\ndef", "x\n  y"),
    ],
)
def test_a_completion_is_cut_at_its_line_or_where_the_indentation_falls(settings, text, expected, tokenizer):
    from inference.batching import _BatchRow

    row = _BatchRow(0, request([1], Sampling(), **settings), tokenizer, torch.device("cpu"))
    sent = "".join(row.push(token, last=False) for token in tokenizer.encode(text))
    assert row.done and row.finish == "stop" and row.text == expected
    assert sent == expected


def test_logprobs_are_those_of_a_forward_pass(model, tokenizer):
    ids, scored = tokenizer.encode(PROMPTS[0]), []
    with Batcher(model, tokenizer) as batcher:
        answers = Answers(batcher)
        one = request(ids, Sampling(8, temperature=0.0), n_top=3, echo=True, on_prompt=scored.extend)
        answers.ask(0, one)
        answers.wait(1)
    tokens = [*scored, *(token for piece in answers.pieces[0, 0] for token in piece.tokens)]
    known = [token.id for token in tokens]
    assert known[: len(ids)] == ids and np.isnan(tokens[0].logprob)
    with torch.no_grad():
        logits = model(torch.tensor([known]))[0].float()
    logits[:, tokenizer.undefined_ids()] = -torch.inf
    logits[:, tokenizer.vocab_size :] = -torch.inf
    logprobs = logits.log_softmax(-1)
    for t, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(float(logprobs[t, token.id]), abs=1e-4)
        values, _ = logprobs[t].topk(3)
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_the_token_that_ends_a_completion_counts_in_its_logprob(model, tokenizer):
    """Else an empty completion would be likelier than any other."""
    with Batcher(model, tokenizer) as batcher:
        answers = Answers(batcher)
        answers.ask(0, request([1, 2], Sampling(9), n_top=0, stop_ids=range(512)))
        answers.wait(1)
    (piece,) = answers.pieces[0, 0]
    assert piece.finish == "stop" and not piece.tokens and piece.n_tokens == 1 and piece.logprob < 0


def test_a_short_request_does_not_wait_for_all_of_a_large_one(model, tokenizer):
    with Batcher(model, tokenizer, max_rows=2) as batcher:
        answers = Answers(batcher)
        answers.ask(0, request([1, 2], Sampling(60, temperature=0.0), n=40))
        answers.ask(1, request([3, 4], Sampling(2, temperature=0.0)))
        while (1, 0) not in answers.pieces or not answers.pieces[1, 0][-1].finish:
            time.sleep(0.001)
        assert sum(pieces[-1].finish != "" for pieces in answers.pieces.values()) < 20
        for one in batcher.rows:
            one.request.cancelled = True


@pytest.mark.parametrize("left", [float("inf"), float("nan")])
def test_numbers_that_overflowed_fail_their_completion_and_spoil_no_other(left, model, tokenizer, monkeypatch):
    good = generate(model, tokenizer, [PROMPTS[0]], Sampling(20, temperature=0.0))[0].text
    ids, decode, spoilt = tokenizer.encode(PROMPTS[0]), model.decode, []

    def overflowing(tokens, cache):
        logits = decode(tokens, cache).clone()
        if tokens.size(1) == 1 and not spoilt:
            spoilt.append(True)
            cache.values[0][0, :, 1] = left
            logits[0] = torch.nan
        return logits

    with Batcher(model, tokenizer, max_rows=2) as batcher:
        batcher.prefixes.max_bytes = 0
        monkeypatch.setattr(model, "decode", overflowing)
        for expected in ("error", "length"):
            answers = Answers(batcher)
            answers.ask(0, request(ids, Sampling(20, temperature=0.0)))
            answers.ask(1, request(ids, Sampling(20, temperature=0.0)))
            answers.wait(2)
            assert answers.pieces[0, 0][-1].finish in (expected, "stop")
            assert answers.text(1) == good or expected == "error"


def test_known_beginnings_are_bounded_in_bytes_and_the_oldest_goes_first():
    config = GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=16)

    def held(ids: Sequence[int]) -> torch.Tensor:
        return torch.arange(len(ids), dtype=torch.float32)[None, None, :, None].expand(2, 1, -1, 4).contiguous()

    prefixes = PrefixCache(max_bytes=2 * held(range(8)).nbytes)
    prefixes.put(range(4), held(range(4)))
    prefixes.put(range(8), held(range(8)))  # takes the place of its beginning
    assert len(prefixes.texts) == 1
    prefixes.put([9] * 8, held([9] * 8))

    def known(ids: Sequence[int]) -> int:
        cache = KVCache(config, 1, torch.device("cpu"), torch.float32)
        prefixes.fill(cache, ids)
        assert torch.equal(cache.keys[0][0, 0, : cache.length, 0], torch.arange(cache.length, dtype=torch.float32))
        return cache.length

    assert known([0, 1, 2, 7]) == 3 and known(range(8)) == 7 and known([5, 1]) == 0
    prefixes.put([3] * 8, held([3] * 8))  # the nines were used least recently
    assert known([9, 9, 9]) == 0 and known([0, 1, 2]) == 2
    assert prefixes.n_bytes <= prefixes.max_bytes


def test_decoding_that_fails_ends_its_requests_and_not_the_batcher(model, tokenizer, monkeypatch):
    with Batcher(model, tokenizer) as batcher:
        answers = Answers(batcher)
        with monkeypatch.context() as patched:
            patched.setattr(GPT, "decode", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError))
            answers.ask(0, request([1, 2], Sampling(5)))
            answers.wait(1)
        assert answers.pieces[0, 0][-1].finish == "error"
        answers.ask(1, request([1, 2], Sampling(5, temperature=0.0)))
        answers.wait(1)
    assert answers.pieces[1, 0][-1].finish in ("stop", "length")
