from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloader import Loader, permute
from shards import TokenStream


def stream(n_tokens: int, n_shards: int = 3) -> TokenStream:
    """A stream whose token at place i is i, cut into uneven shards."""
    cuts = np.linspace(0, n_tokens, n_shards + 1).astype(int) ** 2 // n_tokens
    shards = [np.arange(a, b, dtype=np.uint32) for a, b in pairwise(cuts)]
    return TokenStream(shards, n_tokens, Path("test"))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_permute_is_one_to_one_and_differs_by_seed_and_epoch(size):
    images = permute(np.arange(size), size, seed=1, epoch=0)
    assert sorted(images) == list(range(size))
    if size >= 16:
        assert not np.array_equal(images, permute(np.arange(size), size, seed=1, epoch=1))
        assert not np.array_equal(images, permute(np.arange(size), size, seed=2, epoch=0))


def test_permute_leaves_no_order_behind():
    images = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    assert abs(np.corrcoef(np.arange(100_000), images)[0, 1]) < 0.01
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.01


def test_one_epoch_visits_every_block_once():
    loader = Loader(stream(1000), block_size=7, sequences_per_step=11, seed=3)
    assert loader.n_blocks == 142
    seen = torch.cat([loader.batch(step)[0] for step in range(26)])  # two epochs are 284 sequences, 26 steps 286
    starts = (seen[:, 0] // 7).tolist()
    assert sorted(starts[:142]) == list(range(142)) == sorted(starts[142:284])
    assert starts[:142] != starts[142:284]


def test_targets_are_the_next_tokens_across_shards():
    inputs, targets = Loader(stream(1000), block_size=100, sequences_per_step=9, seed=0).batch(0)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(100))


def test_ranks_are_disjoint_and_together_make_the_single_ranks_batch():
    alone = Loader(stream(5000), block_size=8, sequences_per_step=12, seed=5)
    ranks = [Loader(stream(5000), 8, 12, seed=5, rank=rank, world_size=3) for rank in range(3)]
    for step in (0, 7):
        rows = [{tuple(row) for row in loader.batch(step)[0].tolist()} for loader in ranks]
        assert all(len(part) == 4 for part in rows) and len(set.union(*rows)) == 12
        assert set.union(*rows) == {tuple(row) for row in alone.batch(step)[0].tolist()}


def test_a_batch_is_the_same_whatever_came_before_it():
    used, fresh = (Loader(stream(5000), block_size=8, sequences_per_step=16, seed=5) for _ in range(2))
    for step in (3, 1, 100, 99):
        used.batch(step)
    assert all(torch.equal(a, b) for a, b in zip(used.batch(50), fresh.batch(50), strict=True))


def test_a_split_shorter_than_a_block_is_refused():
    with pytest.raises(ValueError, match="8 tokens, fewer than a block of 8 and its last target"):
        Loader(stream(8), block_size=8, sequences_per_step=1, seed=0)
