"""Batches from token shards. A batch is a function of (seed, step, rank) alone, so resuming needs only the step."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from data.shards import TokenStream
from runtime.errors import UserError


class Loader:
    """Batches of `sequences_per_step` blocks of `block_size` tokens (T), divided among `world_size` ranks.

    Block i holds tokens i T to (i + 1) T - 1; its targets begin one token later. A tail shorter than a block is left
    out. Each epoch visits every block once, in its own permutation, which is computed and not stored. The blocks of a
    step depend neither on the micro-batch size nor on the number of ranks. If steps differ in size,
    `tokens_before(step)` gives the tokens in all steps before `step`.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        tokens_before: Callable[[int], int] | None = None,
    ):
        self.stream, self.block_size, self.seed = stream, block_size, seed
        self.n_blocks = (len(stream) - 1) // block_size
        self.sequences_per_step, self.rank, self.world_size = sequences_per_step, rank, world_size
        self.tokens_before = tokens_before or (lambda step: step * sequences_per_step * block_size)
        if self.n_blocks < 1:
            raise UserError(
                f"{stream.name}: {len(stream)} tokens, fewer than a block of {block_size} and its last target; "
                "prepare more data or set a smaller --block_size"
            )
        if sequences_per_step % world_size:
            raise UserError(f"{sequences_per_step} sequences per step do not divide among {world_size} ranks")

    def batch(self, step: int, pinned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of this rank in `step`: int32, (sequences of the step / world_size, block_size) each.

        `pinned` puts them in pinned memory, for a CUDA device to copy. Raises UserError for an impossible id.
        """
        first, end = (self.tokens_before(i) // self.block_size for i in (step, step + 1))
        samples = np.arange(first + self.rank, end, self.world_size)
        rows = np.empty((len(samples), self.block_size + 1), dtype=np.int32)  # (B, T + 1)
        self.stream.read_rows(self._blocks(samples) * self.block_size, rows)
        inputs, targets = torch.empty((2, len(samples), self.block_size), dtype=torch.int32, pin_memory=pinned)
        inputs[:] = torch.from_numpy(rows[:, :-1])
        targets[:] = torch.from_numpy(rows[:, 1:])
        return inputs, targets

    def _blocks(self, samples: np.ndarray) -> np.ndarray:
        """The block of each of `samples`, which count from the start of training; they may be of several epochs."""
        epochs, indices = np.divmod(samples, self.n_blocks)
        blocks = np.empty_like(indices)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            blocks[in_epoch] = permute(indices[in_epoch], self.n_blocks, self.seed, int(epoch))
        return blocks


class Prefetcher:
    """The batches of `loader` on `device`; a thread makes the batch of the next step while this step is computed.

    The thread runs inside the context. Outside it, `batch` makes each batch when asked. On CUDA the copy to the device
    is asynchronous: it is queued on the current stream, and the program does not wait for it.
    """

    def __init__(self, loader: Loader, first_step: int, device: torch.device):
        self.loader, self.device = loader, device
        self.pinned = device.type == "cuda"  # an asynchronous copy is safe from pinned memory only
        self.step = first_step  # the step that the thread makes a batch for
        self.thread: ThreadPoolExecutor | None = None
        self.ahead: Future | None = None

    def __enter__(self) -> "Prefetcher":
        self.thread = ThreadPoolExecutor(max_workers=1)
        self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self.thread.shutdown(cancel_futures=True)  # waits milliseconds for the batch being made
        self.thread = self.ahead = None

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of `step`, as `Loader.batch` makes them, on the device. Raises the thread's errors."""
        is_ahead = self.ahead is not None and step == self.step
        inputs, targets = self.ahead.result() if is_ahead else self._make(step)
        self.step = step + 1
        self._begin()
        # torch's allocator does not reuse pinned memory before the copy is done: it notes the stream that reads it.
        return inputs.to(self.device, non_blocking=self.pinned), targets.to(self.device, non_blocking=self.pinned)

    def _begin(self) -> None:
        if self.thread is not None:
            self.ahead = self.thread.submit(self._make, self.step)

    def _make(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loader.batch(step, pinned=self.pinned)


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `indices` under a permutation of 0 .. size - 1 that (seed, epoch) choose, in constant memory.

    It is a six-round Feistel network over the next power of four. Images of `size` or more are permuted again until
    they are below it, which keeps it one-to-one (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    images = indices.astype(np.uint64)
    beyond = np.ones(len(images), dtype=bool)
    while beyond.any():
        left, right = images[beyond] >> half_bits, images[beyond] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        images[beyond] = (left << half_bits) | right
        beyond = images >= size
    return images.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finalizer (Steele, Lea and Flood, 2014): every bit of x affects every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
