import dataclasses

import pytest
import torch

from model import GPT
from runtime.errors import UserError
from train import TrainConfig, train
from training.batch_size import divide_among_ranks


def test_micro_steps_fit_the_steps_of_a_ramp(run_arguments, run_program):
    ramp = ["--ramp_doublings=2", "--ramp_steps=4", "--max_steps=6"]  # of 2, 4 and 8 sequences
    assert run_program(train, TrainConfig, *run_arguments, *ramp)[0] == 0
    error = run_program(train, TrainConfig, *run_arguments, *ramp, "--tokens_per_step=768", "--batch_size=4")[2]
    assert "768, 6 sequences at first" in error and "set --tokens_per_step=1024" in error


def test_a_batch_size_is_found_and_halved_where_memory_is_short(run_config, monkeypatch, capsys):
    plain = train(dataclasses.replace(run_config, dropout=0.0))
    forward, seen = GPT.forward, []

    def short_of_memory(self, tokens, targets=None):
        seen.append(len(tokens))
        if targets is not None and self.training and len(tokens) > 2:
            raise torch.OutOfMemoryError
        return forward(self, tokens, targets)

    monkeypatch.setattr(GPT, "forward", short_of_memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = train(dataclasses.replace(run_config, dropout=0.0, batch_size=None, out_dir=f"{run_config.out_dir}-found"))
    sequences = run_config.tokens_per_step // run_config.block_size
    out, err = capsys.readouterr()
    assert f"batch_size: {sequences}\n" in out and "continuing with --batch_size=2" in err
    assert seen[0] == sequences and found["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5)


@pytest.mark.parametrize(("world_size", "remedy"), [(3, "--tokens_per_step=192"), (16, "--tokens_per_step=512")])
def test_a_step_that_does_not_divide_among_the_processes_is_refused(world_size, remedy, run_config):
    with pytest.raises(UserError, match=f"{world_size} processes cannot share .*{remedy}"):
        divide_among_ranks(run_config, run_config.batch_size, world_size)


def test_a_share_smaller_than_a_micro_step_makes_a_smaller_one(run_config):
    assert [divide_among_ranks(run_config, 4, world_size) for world_size in (1, 4)] == [4, 2]
    assert divide_among_ranks(run_config, None, 4) is None
