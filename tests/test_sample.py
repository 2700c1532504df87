import io
import sys
from pathlib import Path

import pytest
import torch

import sample as sample_module
from data.tokenizer import Tokenizer, load_tokenizer
from inference import generate as generate_module
from inference.generate import generate, generate_tokens, window_start
from inference.sampling import Sampling, choose_token
from model import GPT
from sample import SampleConfig, sample
from train import train


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


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(2000, 1)

    def drawn(**options):
        sampling = Sampling(**{"temperature": 1.0, "top_p": None, **options})
        return set(choose_token(logits, sampling, torch.Generator().manual_seed(0)).tolist())

    assert drawn() == {0, 1, 2, 3} and drawn(top_k=2) == {0, 1} and drawn(top_k=9) == {0, 1, 2, 3}
    assert drawn(top_p=0.79) == {0, 1} and drawn(top_p=0.81) == {0, 1, 2} and drawn(top_p=0.1) == {0}
    assert drawn(temperature=0.0) == {0} and drawn(temperature=0.01) == {0}
    share = (
        (choose_token(logits, Sampling(temperature=1.0, top_p=None), torch.Generator().manual_seed(0)) == 0)
        .float()
        .mean()
    )
    assert share == pytest.approx(0.5, abs=0.05)


def test_a_seed_repeats_and_samples_differ(model, tokenizer):
    def drawn(seed: int) -> list:
        return generate(model, tokenizer, "def ", Sampling(20, temperature=1.0, seed=seed), n_samples=3)

    assert drawn(1) == drawn(1) != drawn(2) and len(set(drawn(1))) == 3


def test_a_prompt_longer_than_the_context_is_cut_on_the_left(model, tokenizer):
    text = "x = 1\n" * 100
    long = generate(model, tokenizer, text, Sampling(5, temperature=0))
    kept = tokenizer.decode(tokenizer.encode(text)[-64:])
    assert generate(model, tokenizer, kept, Sampling(5, temperature=0)) == long


def test_the_program_reads_a_prompt_from_anywhere_and_streams(run_config, run_program, tmp_path, monkeypatch):
    train(run_config)
    greedy = [f"--out_dir={run_config.out_dir}", "--temperature=0", "--max_new_tokens=40", "--device=cpu"]
    code, out, err = run_program(sample, SampleConfig, *greedy, "--prompt", "def f(x):")
    assert code == 0 and out.startswith("def f(x):") and "step 12" in err
    (tmp_path / "prompt.py").write_text("def f(x):")
    assert run_program(sample, SampleConfig, *greedy, f"--prompt_file={tmp_path / 'prompt.py'}")[1] == out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def f(x):")))
    assert run_program(sample, SampleConfig, *greedy, "--prompt_file=-")[1] == out
    long = run_program(sample, SampleConfig, *greedy, "--prompt=" + "x = 1\n" * 100)
    assert "tokens; the model sees the last 32" in long[2] and "warning" not in err
    several = run_program(sample, SampleConfig, *greedy, "--prompt=def f(x):", "--n_samples=2")[1]
    assert several == f"--- sample 1 of 2\n{out}--- sample 2 of 2\n{out}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt="], "the prompt has no tokens"),
        ([], "give a prompt, either --prompt=TEXT or --prompt_file=PATH"),
        (["--prompt=x", "--prompt_file=y"], "give a prompt, either"),
        (["--prompt_file=missing.txt"], "missing.txt"),
        (["--prompt=x", "--temperature=-1"], "--temperature=-1.0: must be 0 or more"),
        (["--prompt=x", "--top_p=0"], "--top_p=0.0: must be above 0"),
        (["--prompt=x", "--stop="], "--stop=: wants a text"),
        (["--prompt=x", "--stop=[1]"], "--stop=[1]: wants a text"),
        (["--prompt=x", "--out_dir=nowhere"], "nowhere: no such checkpoint"),
        (["--prompt=x", "--checkpoint=first"], "--checkpoint=first: not one of last, best"),
    ],
)
def test_bad_input_is_one_line(arguments, message, run_config, run_program):
    if not (Path(run_config.out_dir) / "last.pt").exists():
        train(run_config)
    capture = run_program(sample, SampleConfig, f"--out_dir={run_config.out_dir}", *arguments)
    assert capture[0] == 2
    errors = [line for line in capture[2].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(("answers", "place"), [((1, 2, 3, 2), 2), ((0, 4), None)])
def test_the_first_completion_that_its_doctests_find_right_is_printed(
    answers, place, run_config, run_program, monkeypatch, tmp_path
):
    train(run_config)
    completions = [sample_module.Completion(f"    return {n} * n\n", "", "stop") for n in answers]
    monkeypatch.setattr(sample_module, "generate", lambda *args, **options: completions)
    prompt = 'def double(n):\n    """Twice.\n\n    >>> double(2)\n    4\n    >>> double(-1)\n    -2\n    """\n'
    (tmp_path / "tests.py").write_text("assert double(8) == 16\n")
    settings = (f"--out_dir={run_config.out_dir}", f"--prompt={prompt}", f"--n_samples={len(answers)}", "--device=cpu")
    for verify in ("--verify=doctest", f"--tests={tmp_path / 'tests.py'}"):
        code, out, err = run_program(sample, SampleConfig, *settings, verify)
        if place is None:
            assert code == 1 and out == "" and f"none of {len(answers)} passes; the first failed" in err
        else:
            assert (code, out) == (0, f"{prompt}    return 2 * n\n\n") and "2 of 4 pass; the first is number 2" in err


def test_a_completion_cannot_do_away_with_the_doctests(run_config, run_program, monkeypatch):
    train(run_config)
    text = "    return 3\n\n\ndef double(n):\n    return 3\n"
    monkeypatch.setattr(sample_module, "generate", lambda *a, **o: [sample_module.Completion(text, "", "stop")])
    prompt = 'def double(n):\n    """\n    >>> double(2)\n    4\n    """\n'
    settings = (f"--out_dir={run_config.out_dir}", "--device=cpu", "--verify=doctest")
    code, _, err = run_program(sample, SampleConfig, *settings, f"--prompt={prompt}")
    assert code == 1 and "only 0 doctests are left" in err
    code, _, err = run_program(sample, SampleConfig, *settings, "--prompt=def f():")
    assert code == 2 and "the prompt has no doctests" in err
    assert run_program(sample, SampleConfig, *settings, "--prompt=x", "--verify=tests")[0] == 2
