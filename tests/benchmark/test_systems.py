from pathlib import Path

import pytest
import torch

from benchmark.systems import Ours, dataset_or_random, write_random_shards
from data.shards import open_shards
from runtime.config import load_config
from train import TrainConfig, train_step

SIZES = ("--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=300", "--block_size=32", "--batch_size=2")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Steps of two micro-steps of two sequences, on random ids."""
    write_random_shards(tmp_path / "random", 300, 40_000, 1000)
    here = (f"--dataset={tmp_path / 'random'}", f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--compile=False")
    return load_config(TrainConfig, [*SIZES, *here, "--tokens_per_step=128"])


def test_each_call_returns_how_many_tokens_it_processed(config):
    ours = Ours(config, torch.float32, None, train_step)
    assert ours.train(3) == 3 * 128
    assert ours.evaluate(4) == 4 * 2 * 32
    assert ours.evaluate(1000) == 31 * 32, "the blocks that 1,000 tokens hold"
    assert ours.load(2) == 2 * 2**19, "batches as large as a step of the 70M's recipe"
    assert ours.decode(3, 8, 5) == 3 * 5


def test_rate_warms_up_once_for_each_shape(config):
    ours = Ours(config, torch.float32, None, train_step)
    calls = []
    ours.decode = lambda *arguments: calls.append(arguments) or arguments[-1]
    assert all(ours.rate("decode", rows, 8, 5) > 0 for rows in (1, 1, 2))
    assert calls == [(1, 8, 3), (1, 8, 5), (1, 8, 5), (2, 8, 3), (2, 8, 5)]


@pytest.mark.parametrize(("quantize", "n_bytes"), [(None, 4), ("float16", 2), ("int8", 1)])
def test_the_weights_read_are_all_but_the_position_embedding(config, quantize, n_bytes):
    ours = Ours(config, torch.float32, quantize, train_step)
    assert ours.facts()["weight_bytes"] == n_bytes * (ours.run.model.n_parameters() - 32 * 32)


def test_a_dataset_that_fits_is_used_and_another_is_replaced_by_random_ids(config, tmp_path, capsys):
    assert dataset_or_random(config, tmp_path / "new") == config.dataset
    wider = load_config(TrainConfig, ["--vocab_size=1000", f"--dataset={config.dataset}"])
    made = dataset_or_random(wider, tmp_path / "new")
    assert open_shards(made).vocab_size == 1000 and made == str(tmp_path / "new")
    assert "random ids replace dataset" in capsys.readouterr().out
