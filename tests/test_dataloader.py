import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data.shards import TokenStream
from dataloader import Loader, Prefetcher, permute
from runtime.errors import UserError


def stream(n_tokens: int, n_shards: int = 3) -> TokenStream:
    """A stream whose token at index i is i, cut into uneven shards."""
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
    assert inputs.dtype == targets.dtype == torch.int32
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(100))


def test_ranks_are_disjoint_and_together_make_the_single_ranks_batch():
    alone = Loader(stream(5000), block_size=8, sequences_per_step=12, seed=5)
    ranks = [Loader(stream(5000), 8, 12, seed=5, rank=rank, world_size=3) for rank in range(3)]
    for step in (0, 7):
        rows = [{tuple(row) for row in loader.batch(step)[0].tolist()} for loader in ranks]
        assert all(len(part) == 4 for part in rows) and len(set.union(*rows)) == 12
        assert set.union(*rows) == {tuple(row) for row in alone.batch(step)[0].tolist()}


def test_steps_that_grow_visit_the_same_blocks_in_the_same_order():
    even = Loader(stream(5000), block_size=8, sequences_per_step=4, seed=5)
    before = [0, 16, 32, 64, 96, 160]  # tokens
    growing = Loader(stream(5000), 8, 8, seed=5, tokens_before=before.__getitem__)
    batches = [growing.batch(step)[0] for step in range(5)]
    assert [len(batch) for batch in batches] == [2, 2, 4, 4, 8]
    assert torch.equal(torch.cat(batches), torch.cat([even.batch(step)[0] for step in range(5)]))


def test_a_batch_is_the_same_whatever_came_before_it():
    used, fresh = (Loader(stream(5000), block_size=8, sequences_per_step=16, seed=5) for _ in range(2))
    for step in (3, 1, 100, 99):
        used.batch(step)
    assert all(torch.equal(a, b) for a, b in zip(used.batch(50), fresh.batch(50), strict=True))


def test_a_split_shorter_than_a_block_is_refused():
    with pytest.raises(UserError, match="8 tokens, fewer than a block of 8 and its last target"):
        Loader(stream(8), block_size=8, sequences_per_step=1, seed=0)


def damaged(index: int, n_tokens: int = 5000) -> TokenStream:
    """A stream with one impossible id, far beyond int32, at `index`."""
    tokens = np.zeros(n_tokens, dtype=np.uint32)
    tokens[index] = 2**32 - 2
    return TokenStream([tokens], 100, Path("shards/train"))


@pytest.mark.parametrize("n_shards", [1, 7])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_batch_is_the_rows_that_read_gives(dtype, n_shards):
    whole = stream(1000, n_shards)
    loader = Loader(TokenStream([s.astype(dtype) for s in whole.shards], 1000, whole.name), 50, 19, seed=2)
    inputs, targets = loader.batch(0)
    for row, target in zip(inputs, targets, strict=True):
        read = torch.from_numpy(whole.read(int(row[0]), 51))
        assert torch.equal(row.long(), read[:-1]) and torch.equal(target.long(), read[1:])
    assert inputs.is_contiguous() and targets.is_contiguous()


@pytest.mark.parametrize("index", [0, 1, 4992])  # the last is a target only
def test_an_impossible_id_anywhere_in_a_batch_is_refused(index):
    message = "shards/train: holds id 4294967294, the vocabulary ends at 99; find the damaged shard with --verify"
    with pytest.raises(UserError, match=message):
        Loader(damaged(index), block_size=8, sequences_per_step=624, seed=0).batch(0)
    with pytest.raises(UserError, match=message):
        damaged(index).read(0, 5000)


def test_prefetched_batches_are_the_loaders_in_any_order():
    loader = Loader(stream(5000), block_size=8, sequences_per_step=16, seed=5)
    with Prefetcher(loader, 3, torch.device("cpu")) as batches:
        for step in (3, 4, 5, 50, 51, 2, 2, 3):
            assert all(torch.equal(a, b) for a, b in zip(batches.batch(step), loader.batch(step), strict=True))


def test_the_batch_of_the_next_step_is_made_while_this_one_is_used():
    made = []

    class Watched(Loader):
        def batch(self, step: int, pinned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
            made.append((step, threading.current_thread() is threading.main_thread()))
            return super().batch(step, pinned)

    before = threading.active_count()
    with Prefetcher(Watched(stream(5000), 8, 16, seed=5), 0, torch.device("cpu")) as batches:
        for step in range(4):
            batches.batch(step)
    assert sorted(made)[:4] == [(step, False) for step in range(4)] and len(made) <= 5
    assert threading.active_count() == before


def test_what_fails_in_the_thread_is_raised_where_the_batch_is_asked_for():
    loader = Loader(damaged(100), block_size=8, sequences_per_step=4, seed=0)
    with Prefetcher(loader, 0, torch.device("cpu")) as batches, pytest.raises(UserError, match="holds id 4294967294"):
        for step in range(160):
            batches.batch(step)
    assert 0 < step < 159
