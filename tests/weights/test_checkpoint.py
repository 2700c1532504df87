import dataclasses
import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from runtime.errors import UserError
from train import TrainConfig, train
from training.run import open_dataset, start_run
from weights import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trained(run_config: TrainConfig) -> Path:
    train(run_config)
    return Path(run_config.out_dir)


def test_a_checkpoint_of_another_version_says_so(tmp_path):
    torch.save({"format": "codegpt checkpoint 1"}, tmp_path / "old.pt")
    with pytest.raises(UserError, match=r"old.pt: written by another version \(codegpt checkpoint 1, not"):
        checkpoint.read(tmp_path / "old.pt")


def test_a_checkpoint_holds_model_and_tokenizer_and_best_is_the_lowest_loss(trained, run_config):
    model, tokenizer, payload = checkpoint.load(str(trained), torch.device("cpu"))
    assert payload["step"] == run_config.max_steps and payload["tokens"] == run_config.max_steps * 256
    assert tokenizer.sha256 == payload["tokenizer_sha256"] and not model.training
    best = checkpoint.load(str(trained), torch.device("cpu"), "best")[2]
    events = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    assert best["best_val_loss"] == min(event["val_loss"] for event in events if "val_loss" in event)
    assert "optimizers" not in best
    assert checkpoint.load(str(trained / "best.pt"), torch.device("cpu"))[2]["step"] == best["step"]


def test_a_truncated_newest_checkpoint_is_skipped_with_a_warning(trained, capsys):
    last, previous = trained / "last.pt", trained / "previous.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    payload = checkpoint.read_newest(trained, set_aside=True)
    assert payload["step"] == 9
    assert f"warning: {last}: damaged, or not a checkpoint" in capsys.readouterr().err
    assert not last.exists() and (trained / "last.damaged").exists()  # so that it never replaces previous.pt
    previous.write_bytes(b"")
    with pytest.raises(UserError, match=r"none in .* can be read; to start anew choose another --out_dir"):
        checkpoint.read_newest(trained)


def test_a_flipped_byte_in_the_weights_is_found(trained):
    data = bytearray((trained / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (trained / "last.pt").write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(trained / "last.pt")


def test_loading_draws_no_random_weights_and_a_tokenizer_is_read_without_any(trained, run_config, monkeypatch):
    drawn = []
    normal = torch.nn.init.normal_
    monkeypatch.setattr("torch.nn.init.normal_", lambda tensor, **o: drawn.append(tensor.device.type) or normal(tensor))
    start_run(dataclasses.replace(run_config, init_from=str(trained), out_dir="other"), open_dataset(run_config))
    start_run(run_config, open_dataset(run_config))
    model = checkpoint.load(str(trained), torch.device("cpu"))[0]
    assert set(drawn) == {"meta"} and all(parameter.requires_grad for parameter in model.parameters())
    data = bytearray((trained / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1  # in the weights
    (trained / "last.pt").write_bytes(data)
    tokenizer, payload = checkpoint.open_run(str(trained))
    assert (payload["step"], payload["model_config"]["n_embd"]) == (12, 32) and tokenizer.vocab_size == 512
    (trained / "previous.pt").unlink()
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(str(trained), torch.device("cpu"))


def test_weights_that_two_layers_share_stay_shared_when_they_are_loaded(monkeypatch):
    class Shared(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.h[1].mlp.c_fc.weight = self.h[0].mlp.c_fc.weight

    monkeypatch.setattr(checkpoint, "GPT", Shared)
    model = Shared(GPTConfig(n_layer=2, n_head=1, n_embd=8, block_size=8, vocab_size=16))
    built = checkpoint.build_model(model.config, model.state_dict(), torch.device("cpu"))
    assert built.h[1].mlp.c_fc.weight is built.h[0].mlp.c_fc.weight and built.n_parameters() == model.n_parameters()
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), model.parameters(), strict=True))


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(Payload())], ids=["empty", "text", "pickle"])
def test_what_is_no_checkpoint_is_refused_and_not_executed(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt: damaged, or not a checkpoint"):
        checkpoint.load("x.pt", torch.device("cpu"))
    torch.save({"model": {}}, "x.pt")  # nanoGPT's, say
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoint.load("x.pt", torch.device("cpu"))
    torch.save(Payload(), "x.pt")
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        checkpoint.load("x.pt", torch.device("cpu"))
    assert not Path("executed").exists()
    for missing in ("nowhere", str(tmp_path)):
        with pytest.raises(UserError, match=r"no such checkpoint|no checkpoint in it yet"):
            checkpoint.load(missing, torch.device("cpu"))


def test_a_tokenizer_that_does_not_match_is_refused(trained):
    payload = checkpoint.read(trained / "last.pt")
    checkpoint.save(trained / "last.pt", {**payload, "tokenizer": payload["tokenizer"].replace("self", "flea")})
    with pytest.raises(UserError, match="its tokenizer is not the one the model was trained with"):
        checkpoint.load(str(trained), torch.device("cpu"))


def test_a_full_disk_while_saving_leaves_the_checkpoint_before_it(run_arguments, run_config):
    out_dir = Path(run_config.out_dir)
    first = [sys.executable, "train.py", *run_arguments, "--max_steps=6"]
    subprocess.run(first, cwd=ROOT, check=True, capture_output=True)
    before = (out_dir / "last.pt").read_bytes()

    def limit_files() -> None:  # a write beyond this fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    more = [sys.executable, "train.py", *run_arguments]
    result = subprocess.run(more, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit_files)
    assert result.returncode == 2
    assert "could not be saved" in result.stderr.splitlines()[-1] and "free disk space" in result.stderr
    assert (out_dir / "last.pt").read_bytes() == before and not list(out_dir.glob("*.tmp"))
    subprocess.run(more, cwd=ROOT, check=True, capture_output=True)
    assert checkpoint.read(out_dir / "last.pt")["step"] == run_config.max_steps
