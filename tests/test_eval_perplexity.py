import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from data.tokenizer import load_tokenizer
from eval_perplexity import PerplexityConfig, eval_perplexity
from evaluation.likelihood import evaluate_loss
from model import GPT, GPTConfig
from runtime.config import load_config
from train import train


@pytest.mark.parametrize("max_tokens", [None, 2100])
def test_loss_equals_a_direct_computation(shards, max_tokens):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(shards.path / "bpe.json"))
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=1000, vocab_size=512, dropout=0.5))
    stream = shards.split("val")
    stream.ends[-1] = 5500  # the first five blocks are enough
    figures = evaluate_loss(model, stream, tokenizer, batch_size=2, dtype=torch.float32, max_tokens=max_tokens)
    assert model.training
    model.eval()
    if max_tokens is None:  # all blocks, so their order does not matter
        rows = torch.stack([torch.from_numpy(stream.read(i * 1000, 1001)) for i in range(5)])
        with torch.no_grad():
            nats = F.cross_entropy(model(rows[:, :-1]).double().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        n_bytes = sum(len(tokenizer.decode(r[1:]).replace("<|endoftext|>", "").encode()) for r in rows.tolist())
        assert figures["loss"] == pytest.approx(nats.item() / 5000, abs=1e-6)
        assert figures["bits_per_byte"] == pytest.approx(nats.item() / math.log(2) / figures["bytes"], rel=1e-6)
        assert figures["bytes"] == pytest.approx(n_bytes, rel=1e-3)  # a block may begin or end within a character
    assert figures["tokens"] == (5000 if max_tokens is None else 2000)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


def test_the_program_scores_a_run_as_training_did(run_config, run_program):
    trained = train(run_config)
    arguments = (f"--out_dir={run_config.out_dir}", "--dtype=float32", "--max_tokens=512", "--batch_size=4")
    code, out, _ = run_program(eval_perplexity, PerplexityConfig, *arguments)
    assert code == 0 and f"loss {trained['val_loss']:.4f} nats/token" in out
    for wrong in ("--split=test", "--batch_size=0", "--dataset=missing"):
        code, _, err = run_program(eval_perplexity, PerplexityConfig, *arguments, wrong)
        assert code == 2 and err.count("error: ") == 1, wrong


def test_documents_of_shards_and_of_files_by_language_beside_another_run(run_config, run_program, tmp_path, capsys):
    train(run_config)
    arguments = (f"--out_dir={run_config.out_dir}", "--dtype=float32", "--batch_size=4")
    figures = eval_perplexity(load_config(PerplexityConfig, [*arguments, "--stride=16", "--max_tokens=20_000"]))
    assert 500 < figures["tokens"] < 80_000 and figures["context"] == 32
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "a.py").write_text("def f(x):\n    return x\n")
    (sources / "b.go").write_text("package main\n")
    (sources / "c.py").write_bytes(b"\xff\xfe")
    files = f"--files={sources}/*.py; {sources}/*.go"
    other = tmp_path / "other"
    shutil.copytree(run_config.out_dir, other)
    capsys.readouterr()
    figures = eval_perplexity(load_config(PerplexityConfig, [*arguments, files, f"--compare={other}"]))
    out, err = capsys.readouterr()
    assert figures[run_config.out_dir]["loss"] == figures[str(other)]["loss"]
    assert list(figures[str(other)]["languages"]) == ["Go", "Python"] and figures[str(other)]["bytes"] == 36
    assert len([line for line in out.splitlines() if line.startswith("Go ")]) == 2
    assert "c.py: not UTF-8 text; left out" in err
    for wrong in ("--files=missing/*.py", "--stride=33", "--stride=0", "--compare=missing", f"{files} --dataset=x"):
        code, _, err = run_program(eval_perplexity, PerplexityConfig, *arguments, files, *wrong.split(" --"))
        assert code == 2 and err.count("error: ") == 1, wrong
