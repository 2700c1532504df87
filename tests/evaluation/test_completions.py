"""How the program uses these functions is tested in test_eval_humaneval.py."""

import json

import torch

from data.tokenizer import load_tokenizer
from evaluation.completions import complete, write_samples
from evaluation.problems import Problem
from inference.sampling import Sampling
from model import GPT, GPTConfig

PROBLEM = Problem("T/0", "def f():\n", "", "f", None, ("\n\n",))


def test_a_prompt_follows_an_end_of_text_and_specials_end_a_completion(shards, monkeypatch):
    tokenizer = load_tokenizer(str(shards.path / "bpe.json")).with_specials(["<mark>"])
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=513))
    seen = []
    script = [tokenizer.encode("x")[0], tokenizer.specials["<mark>"], tokenizer.encode("y")[0]]

    def decode(self, tokens, cache):
        seen.append(tokens)
        cache.length += tokens.size(1)
        return torch.nn.functional.one_hot(torch.tensor(script[len(seen) - 1]), 513).expand(len(tokens), -1) * 100.0

    monkeypatch.setattr(GPT, "decode", decode)
    completions = complete(model, tokenizer, PROBLEM, Sampling(3, temperature=0.0), n_samples=2, batch_size=2)
    assert seen[0][0].tolist() == [tokenizer.end_of_text, *tokenizer.encode(PROBLEM.prompt)]
    assert [tuple(completion) for completion in completions] == [("x", "x", "stop")] * 2


def test_a_file_cut_anywhere_goes_on_to_the_same_lines(shards, tmp_path):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(shards.path / "bpe.json"))
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=512))
    problems = [PROBLEM._replace(task_id=f"T/{index}") for index in range(3)]
    sampling = Sampling(4, temperature=1.0)
    path = tmp_path / "samples.jsonl"
    samples = write_samples(path, model, tokenizer, problems, sampling, 2, 2)
    whole = path.read_text()
    assert [json.loads(line) for line in whole.splitlines()] == samples and len(samples) == 6
    for cut in range(0, len(whole), 37):
        path.write_text(whole[:cut])
        assert write_samples(path, model, tokenizer, problems, sampling, 2, 2) == samples
        assert path.read_text() == whole
