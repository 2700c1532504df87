"""Batches from token shards: a batch is a function of (seed, step, rank) alone, so resuming needs the step and nothing
else."""

import numpy as np
import torch

from shards import TokenStream


class Loader:
    """Batches of `sequences_per_step` blocks of `block_size` tokens, shared out among `world_size` ranks.

    Block i holds tokens i T .. (i + 1) T - 1, and its targets the same shifted by one; the tail that fills no block is
    left out. Each epoch visits every block once, in a permutation of its own that is computed, not stored. The blocks
    of a step depend neither on the micro-batch size nor on the number of ranks.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.stream, self.block_size, self.seed = stream, block_size, seed
        self.n_blocks = (len(stream) - 1) // block_size
        self.sequences_per_step, self.rank, self.world_size = sequences_per_step, rank, world_size
        if self.n_blocks < 1:
            raise ValueError(
                f"{stream.name}: {len(stream)} tokens, fewer than a block of {block_size} and its last target; "
                "prepare more data or set a smaller --block_size"
            )
        if sequences_per_step % world_size:
            raise ValueError(f"{sequences_per_step} sequences a step do not divide among {world_size} ranks")

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of this rank in `step`: int64, (sequences_per_step / world_size, block_size) each."""
        first = step * self.sequences_per_step + self.rank
        samples = np.arange(first, first + self.sequences_per_step - self.rank, self.world_size)
        rows = torch.from_numpy(np.stack([self._read(block) for block in self._blocks(samples)]))  # (B, T + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _read(self, block: int) -> np.ndarray:
        return self.stream.read(int(block) * self.block_size, self.block_size + 1)

    def _blocks(self, samples: np.ndarray) -> np.ndarray:
        """The block of each sample, counted from the start of training; a batch may straddle two epochs."""
        epochs, places = np.divmod(samples, self.n_blocks)
        blocks = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            blocks[chosen] = permute(places[chosen], self.n_blocks, self.seed, int(epoch))
        return blocks


def permute(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a permutation of 0 .. size - 1, picked by (seed, epoch), sends each of `places`; constant memory.

    A six-round Feistel network over the next even power of two; places it sends beyond `size` are sent on until they
    fall below, which keeps it one-to-one (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    images = places.astype(np.uint64)
    beyond = np.ones(len(images), dtype=bool)
    while beyond.any():
        left, right = images[beyond] >> half_bits, images[beyond] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        images[beyond] = (left << half_bits) | right
        beyond = images >= size
    return images.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finalizer (Steele, Lea and Flood, 2014): every bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
