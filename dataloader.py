"""Token shards on disk, and batches from them.

A folder of shards holds `meta.json`, `tokenizer.json` and, for each split, 1-D `.npy` files of ids (uint16 up to 65,536
ids, else uint32), read through memory maps. A split is the concatenation of its shards. Every document ends with
end-of-text. A batch is a function of (seed, step, rank) alone, so resuming needs the step and nothing else.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atomic import atomic_write

SPLITS = ("train", "val")


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> dict[str, Any]:
    """Write ids to `path`, whole or not at all; returns the shard's entry in meta.json: file, tokens, sha256."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    with atomic_write(path, "wb") as file:
        np.save(file, tokens.astype(dtype))
    return {"file": path.name, "tokens": len(tokens), "sha256": _sha256(path)}


class Shards:
    """A folder of shards: its metadata, and each split as a TokenStream."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            self.vocab_size: int = self.meta["vocab_size"]
            self.entries: dict[str, list] = {split: self.meta["splits"][split]["shards"] for split in SPLITS}
        except FileNotFoundError:
            raise ValueError(
                f"{path}/meta.json: not found; prepare the data with python -m data.prepare configs/data/NAME.py, "
                "or name another folder under data/shards with --dataset"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}/meta.json: damaged; delete {path} and prepare the data again") from None

    def tokenizer_json(self) -> str:
        """The text of the tokenizer's file. Raises ValueError unless its sha256 is the one recorded."""
        path = self.path / "tokenizer.json"
        if not path.is_file() or _sha256(path) != self.meta["tokenizer_sha256"]:
            raise ValueError(f"{path}: missing, or not the tokenizer of these shards; prepare the data again")
        return path.read_text(encoding="utf-8")

    def split(self, name: str) -> "TokenStream":
        return TokenStream([self._open(entry) for entry in self.entries[name]], self.vocab_size, self.path / name)

    def _open(self, entry: dict[str, Any]) -> np.ndarray:
        path = self.path / entry["file"]
        try:
            shard = np.load(path, mmap_mode="r")
            if shard.shape != (entry["tokens"],):
                raise ValueError
            return shard
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; prepare the data again") from None
        except (ValueError, OSError, EOFError):
            raise ValueError(f"{path}: damaged, not {entry['tokens']} tokens; prepare the data again") from None

    def fingerprint(self) -> str:
        """sha256 of the tokenizer and every shard, as recorded: equal only for equal data."""
        parts = [self.meta["tokenizer_sha256"]] + [e["sha256"] for split in SPLITS for e in self.entries[split]]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def verify(self) -> None:
        """Read every byte and raise ValueError at the first file that is not what was written."""
        self.tokenizer_json()
        for entry in (entry for split in SPLITS for entry in self.entries[split]):
            self._open(entry)
            if _sha256(self.path / entry["file"]) != entry["sha256"]:
                raise ValueError(f"{self.path / entry['file']}: sha256 differs from meta.json; prepare the data again")


def shards_path(dataset: str) -> Path:
    """Where `dataset` is: a folder under data/shards, or a path of its own if there is a slash in it."""
    return Path(dataset) if "/" in dataset else Path("data/shards") / dataset


def open_shards(dataset: str) -> Shards:
    """The shards of `dataset`. Raises ValueError if they are not there or damaged."""
    return Shards(shards_path(dataset))


class TokenStream:
    """The tokens of a split, end to end, read through memory maps."""

    def __init__(self, shards: list[np.ndarray], vocab_size: int, name: Path):
        self.shards, self.vocab_size, self.name = shards, vocab_size, name
        self.ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)  # of each shard, in the stream

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from place `start`, int64, across shard borders. Raises ValueError on an impossible id."""
        tokens = np.empty(count, dtype=np.int64)
        filled, shard = 0, int(np.searchsorted(self.ends, start, side="right"))
        while filled < count:
            offset = start + filled - (int(self.ends[shard - 1]) if shard else 0)
            piece = self.shards[shard][offset : offset + count - filled]
            tokens[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1
        if count and tokens.max() >= self.vocab_size:
            raise ValueError(
                f"{self.name}: holds id {tokens.max()}, the vocabulary ends at {self.vocab_size - 1}; "
                "find the damaged shard with --verify and prepare the data again"
            )
        return tokens


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
