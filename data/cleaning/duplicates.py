"""Finds the exact and the near duplicates in a whole corpus, in bounded memory.

While documents are read, each is reduced to a digest and, for near duplicates, to a MinHash sketch: a key for each band
of minima, and a signature of one byte per minimum. Documents with an equal key are compared by their signatures. Once
all are read, the functions at the end find the later copies, one band and one range of keys at a time.

Sources: CodeParrot (sets of words, Jaccard 0.85), BigCode (5-grams of words, Jaccard 0.7), both with 256 permutations;
MinHash: Broder, "On the resemblance and containment of documents", 1997; low bytes: Li and König, "b-bit minwise
hashing", 2010.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from runtime.errors import UserError

PERMUTATIONS = 256
MIN_SHINGLES = 10  # documents with fewer are not compared, as in CodeParrot: their similarity says little
KEYS_AT_A_TIME = 2**20  # keys sorted in memory at once
RECALL = 0.99  # at least this share of the pairs at the threshold is compared
WORD = re.compile(rb"[A-Za-z0-9_]+")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class DedupConfig:
    exact_duplicates: bool = True  # keep only the first of documents that differ only in white space
    near_threshold: float | None = None  # keep one of documents this similar (Jaccard): CodeParrot 0.85, BigCode 0.7
    near_shingle: int = 1  # words per shingle, the unit of near-duplicate similarity: CodeParrot 1, BigCode 5

    def __post_init__(self) -> None:
        if self.near_threshold is not None and not 0.4 <= self.near_threshold <= 1:
            raise UserError(f"near_threshold is {self.near_threshold}; it must be in 0.4 .. 1")
        if not 1 <= self.near_shingle <= 32:
            raise UserError(f"near_shingle is {self.near_shingle}; it must be in 1 .. 32 words")


def digest(squeezed: str) -> bytes:
    """A hash of 16 bytes; `squeezed` is a document's text without white space."""
    return hashlib.blake2b(squeezed.encode(), digest_size=16).digest()


def shingles(text: str, n_words: int) -> np.ndarray:
    """A hash of each run of `n_words` words, uint32; a word is a run of letters, digits and underscores."""
    words = WORD.findall(text.encode())
    distinct = set(words)
    if n_words == 1:
        return np.fromiter(map(zlib.crc32, distinct), np.uint32, len(distinct))
    hashes = {word: zlib.crc32(word) for word in distinct}
    sequence = np.fromiter(map(hashes.__getitem__, words), np.uint64, len(words))
    count = max(0, len(sequence) - n_words + 1)
    mixed = np.zeros(count, np.uint64)
    for index in range(n_words):
        mixed = (mixed + sequence[index : index + count] + np.uint64(1)) * _GOLDEN
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(32)).astype(np.uint32)


class MinHash:
    """Sketches documents for one threshold. A band's key is a hash of `rows` minima. Two documents at the threshold
    share a key with probability RECALL or more. Less similar ones may share one too: their signatures tell."""

    def __init__(self, threshold: float):
        recalls = [1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) for rows in range(1, 33)]
        self.rows = max(rows for rows, recall in enumerate(recalls, start=1) if recall >= RECALL)
        self.n_bands = PERMUTATIONS // self.rows
        generator = np.random.Generator(np.random.PCG64(0))
        self.factors = generator.integers(0, 2**31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self.terms = generator.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)
        self.row_factors = generator.integers(0, 2**63, self.rows, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def sketch(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bands' keys, uint64 (n_bands,), and the signature, uint8 (PERMUTATIONS,), of a set of hashes, uint32."""
        minima = np.full(PERMUTATIONS, 2**32 - 1, np.uint32)
        hashes = (hashes ^ (hashes >> np.uint32(15))) * np.uint32(0x85EBCA6B)  # crc32 is linear, which this undoes
        hashes ^= hashes >> np.uint32(13)
        for start in range(0, len(hashes), 64):  # 64 x 256 values fit in the cache
            values = hashes[start : start + 64, None] * self.factors
            values += self.terms
            np.minimum(minima, values.min(axis=0), out=minima)
        bands = minima[: self.n_bands * self.rows].reshape(self.n_bands, self.rows).astype(np.uint64)
        keys = (bands * self.row_factors).sum(axis=1, dtype=np.uint64)
        keys = (keys ^ (keys >> np.uint64(32))) * _GOLDEN
        return keys ^ (keys >> np.uint64(29)), (minima ^ (minima >> np.uint32(16))).astype(np.uint8)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity (...) of signatures (..., PERMUTATIONS); 1/256 of bytes agree by chance."""
    return ((a == b).mean(axis=-1) - 1 / 256) / (1 - 1 / 256)


def exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """True for each document that is a copy of an earlier one, bool (n,), given the digests, uint64 (n, 2)."""
    copies = np.zeros(len(digests), dtype=bool)
    for members, leaders in _equal_keys(digests[:, 0]):
        same = digests[members, 1] == digests[leaders, 1]
        copies[members[same]] = members[same] != leaders[same]
    return copies


def near_duplicates(
    bands: Iterable[np.ndarray], signatures: np.ndarray, alive: np.ndarray, threshold: float
) -> np.ndarray:
    """The first document of each document's cluster, int64 (n,). Documents that are their own first are to be kept.

    `bands` yields the keys of one band at a time, uint64 (n,). `signatures`, uint8 (n, PERMUTATIONS), may be anything
    that can be indexed with an array of rows. Documents that are not `alive`, bool (n,), take no part.
    """
    first = np.arange(len(alive))
    for keys in bands:
        for members, leaders in _equal_keys(keys, alive):
            _join_similar(first, members, leaders, signatures, threshold)
    return _roots(first, np.arange(len(first)))


def _join_similar(
    first: np.ndarray, members: np.ndarray, leaders: np.ndarray, signatures: np.ndarray, threshold: float
) -> None:
    """Join the clusters of each member and its leader if the two are similar. Of the members that are not, those with
    the same leader form a new group with its first as the leader, and are compared again: eight rounds at most."""
    for _ in range(8):
        apart = _roots(first, members) != _roots(first, leaders)
        members, leaders = members[apart], leaders[apart]
        if not len(members):
            return
        similar = np.empty(len(members), dtype=bool)
        for start in range(0, len(members), 2**12):  # bounds the memory for signatures
            part = slice(start, start + 2**12)
            similar[part] = similarity(signatures[members[part]], signatures[leaders[part]]) >= threshold
        for member, leader in zip(members[similar].tolist(), leaders[similar].tolist(), strict=True):
            _union(first, member, leader)
        members, leaders = members[~similar], leaders[~similar]
        _, starts, groups = np.unique(leaders, return_index=True, return_inverse=True)
        leaders = members[starts[groups]]


def _equal_keys(keys: np.ndarray, alive: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the indices of keys that occur more than once, in order of key and index, and for each the first index
    with its key. Yields one range of keys at a time, so that memory does not grow with their number."""
    n_ranges = -(-len(keys) // KEYS_AT_A_TIME)
    for number in range(n_ranges):
        low = np.uint64(number * 2**64 // n_ranges)
        high = np.uint64((number + 1) * 2**64 // n_ranges - 1)
        found = []
        for start in range(0, len(keys), KEYS_AT_A_TIME):
            piece = np.asarray(keys[start : start + KEYS_AT_A_TIME])
            inside = (piece >= low) & (piece <= high)
            if alive is not None:
                inside &= alive[start : start + KEYS_AT_A_TIME]
            found.append((piece[inside], np.flatnonzero(inside) + start))
        values, indices = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        order = np.argsort(values, kind="stable")
        values, indices = values[order], indices[order]
        is_start = np.ones(len(values), dtype=bool)
        is_start[1:] = values[1:] != values[:-1]
        starts = np.flatnonzero(is_start)
        counts = np.diff(starts, append=len(values))
        repeated = np.repeat(counts > 1, counts)
        yield indices[repeated], np.repeat(indices[starts], counts)[repeated]


def _roots(first: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The first document of each member's cluster, found by following `first` until it stays the same."""
    roots = first[members]
    while (further := first[roots] != roots).any():
        roots[further] = first[roots[further]]
    return roots


def _union(first: np.ndarray, a: int, b: int) -> None:
    """Join the clusters of `a` and `b` under the earlier of their first documents, and shorten the paths to it."""
    while first[a] != a:
        first[a] = a = int(first[first[a]])
    while first[b] != b:
        first[b] = b = int(first[first[b]])
    first[max(a, b)] = min(a, b)
