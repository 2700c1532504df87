import itertools

import pytest
import torch

from data.tokenizer import Tokenizer, load_tokenizer
from inference import generate as generate_module
from inference.generate import generate, generate_tokens, window_start
from inference.sampling import Sampling
from model import GPT


@pytest.fixture(scope="module")
def tokenizer(shards) -> Tokenizer:
    return load_tokenizer(str(shards.path / "bpe.json"))


@pytest.fixture(scope="module")
def model(lively_model) -> GPT:
    return lively_model


@torch.no_grad()
@pytest.mark.parametrize("n_prompt", [1, 40, 64])
def test_cached_decode_equals_full_forward_past_the_context(model, n_prompt):
    prompt = torch.randint(0, 640, (2, n_prompt))
    steps = generate_tokens(model, prompt, lambda logits: logits.argmax(-1))
    decoded = torch.stack([next(steps) for _ in range(300)], dim=1)
    tokens = prompt
    for _ in range(300):
        window = tokens[:, window_start(tokens.size(1), 64) :]
        assert 32 < window.size(1) <= 64 or tokens.size(1) <= 64
        tokens = torch.cat((tokens, model(window)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(decoded, tokens[:, n_prompt:])
    assert len(decoded.unique()) > 10


def test_ids_beyond_the_vocabulary_are_never_sampled(model, tokenizer):
    for temperature in (0.0, 5.0):
        text = generate(model, tokenizer, "x", Sampling(100, temperature), n_samples=8)
        assert len(text) == 8  # an id of 512 to 639, a fifth of the model's rows, could not be decoded


def test_end_of_text_and_stop_strings_end_a_sample(model, tokenizer, monkeypatch):
    ids = tokenizer.encode("return x\n\nclass Foo:")

    def script(steps):
        return lambda *args: iter(torch.tensor([step]) for step in steps)

    def write(steps, **options):
        pieces = []
        monkeypatch.setattr(generate_module, "generate_tokens", script(steps))
        sampling = Sampling(len(steps))
        completion = generate(
            model, tokenizer, "x", sampling, on_text=lambda row, text: pieces.append(text), **options
        )[0]
        assert "".join(pieces) == completion.text and completion.raw.startswith(completion.text)
        return completion

    whole = "return x\n\nclass Foo:"
    assert write(ids) == (whole, whole, "length")
    assert write([*ids, tokenizer.end_of_text, *ids]) == (whole, whole, "stop")
    text, raw, finish = write(ids, stop=["\nclass", "Foo"])
    assert (text, finish) == ("return x\n", "stop") and raw in whole and "\nclass" in raw
    assert write(ids, stop=["nowhere", "\n\nclass B"]).text == whole
    assert write(tokenizer.encode("'🐍'")[:-3]).text == "'\ufffd"
    assert write(ids, stop_ids=[ids[2]]) == (tokenizer.decode(ids[:2]), tokenizer.decode(ids[:2]), "stop")


def test_the_prompt_is_read_once_and_the_samples_differ_from_the_first_token_on(model, tokenizer, monkeypatch):
    shapes = []
    decode = GPT.decode
    monkeypatch.setattr(
        GPT, "decode", lambda self, tokens, cache: shapes.append(tokens.shape) or decode(self, tokens, cache)
    )
    prompt = "x = 1\n" * 5
    generate(model, tokenizer, prompt, Sampling(3, 2.0), n_samples=50)
    assert shapes == [(1, len(tokenizer.encode(prompt))), (50, 1), (50, 1)]
    torch.manual_seed(0)
    draws = []
    steps = generate_tokens(
        model, torch.tensor([tokenizer.encode(prompt)]), lambda logits: draws.append(logits) or logits.argmax(-1), 5
    )
    first, second = next(steps), next(steps)
    assert first.shape == second.shape == (5,) and draws[0].shape == (5, 640)
    alone = generate_tokens(model, torch.tensor([tokenizer.encode(prompt)] * 5), lambda logits: logits.argmax(-1))
    assert torch.equal(next(alone), first) and torch.equal(next(alone), second)


def test_rows_that_are_left_go_on_as_they_would_have_beside_the_others(model):
    prompts = torch.randint(0, 640, (4, 10))
    together = generate_tokens(model, prompts, lambda logits: logits.argmax(-1))
    apart = generate_tokens(model, prompts, lambda logits: logits.argmax(-1))
    rows = torch.tensor([1, 3])
    assert torch.equal(next(together), next(apart))
    assert torch.equal(next(together)[rows], apart.send(rows))
    for _ in range(80):  # past the context too
        assert torch.equal(next(together)[rows], next(apart))


def test_completions_that_end_early_leave_the_batch_and_none_is_mixed_up(model, tokenizer, monkeypatch):
    texts = ["x", "y = 1\n", "import os\n", "return x\n" * 3]
    ids = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]
    sizes, pieces = [], ["", "", "", ""]

    def script(*args):
        batch = ids
        for step in itertools.count():
            sizes.append(len(batch))
            kept = yield torch.tensor([row[min(step, len(row) - 1)] for row in batch])
            batch = batch if kept is None else [batch[i] for i in kept]

    def collect(number, text):
        pieces[number] += text

    monkeypatch.setattr(generate_module, "generate_tokens", script)
    completions = generate(model, tokenizer, "x", Sampling(100), n_samples=4, on_text=collect)
    assert [completion.text for completion in completions] == pieces == texts
    assert sizes[0] == 4 and sizes[-1] == 1


def test_a_seed_repeats_and_samples_differ(model, tokenizer):
    def drawn(seed: int) -> list:
        return generate(model, tokenizer, "def ", Sampling(20, temperature=1.0, seed=seed), n_samples=3)

    assert drawn(1) == drawn(1) != drawn(2) and len(set(drawn(1))) == 3


def test_a_prompt_longer_than_the_context_is_cut_on_the_left(model, tokenizer):
    text = "x = 1\n" * 100
    long = generate(model, tokenizer, text, Sampling(5, temperature=0))
    kept = tokenizer.decode(tokenizer.encode(text)[-64:])
    assert generate(model, tokenizer, kept, Sampling(5, temperature=0)) == long
