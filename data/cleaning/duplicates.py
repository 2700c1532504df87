"""Duplicates, exact and near, of a whole corpus in bounded memory.

While documents are read, each is reduced to a digest and, for near duplicates, to a MinHash sketch: keys of bands,
which say whom to compare it with, and a byte of each minimum, which says how similar they are. Once all are known,
the functions at the end find the later copies, a band and a range of keys at a time.

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
MIN_SHINGLES = 10  # with fewer, Jaccard similarity says little: CodeParrot compares no such document either
KEYS_AT_A_TIME = 2**20  # keys sorted in memory at once
RECALL = 0.99  # of pairs at the threshold, at least this share gets compared
WORD = re.compile(rb"[A-Za-z0-9_]+")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class DedupConfig:
    exact_duplicates: bool = True  # of documents equal but for white space keep the first
    near_threshold: float | None = None  # keep one of documents this Jaccard-similar: 0.85 CodeParrot, 0.7 BigCode
    near_shingle: int = 1  # words in a shingle: 1 CodeParrot's set of words, 5 BigCode's

    def __post_init__(self) -> None:
        if self.near_threshold is not None and not 0.4 <= self.near_threshold <= 1:
            raise UserError(f"near_threshold is {self.near_threshold}; it must be in 0.4 .. 1")
        if not 1 <= self.near_shingle <= 32:
            raise UserError(f"near_shingle is {self.near_shingle}; it must be in 1 .. 32 words")


def digest(squeezed: str) -> bytes:
    """16 bytes that tell a text from others; `squeezed` is the text without white space."""
    return hashlib.blake2b(squeezed.encode(), digest_size=16).digest()


def shingles(text: str, n_words: int) -> np.ndarray:
    """A 32-bit hash of each run of `n_words` words, uint32; a word is a run of letters, digits and underscores."""
    words = WORD.findall(text.encode())
    distinct = set(words)
    if n_words == 1:
        return np.fromiter(map(zlib.crc32, distinct), np.uint32, len(distinct))
    hashes = {word: zlib.crc32(word) for word in distinct}
    sequence = np.fromiter(map(hashes.__getitem__, words), np.uint64, len(words))
    count = max(0, len(sequence) - n_words + 1)
    mixed = np.zeros(count, np.uint64)
    for place in range(n_words):
        mixed = (mixed + sequence[place : place + count] + np.uint64(1)) * _GOLDEN
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(32)).astype(np.uint32)


class MinHash:
    """Sketches of documents for one threshold: `rows` minima make a band's key. Pairs at the threshold share a band
    with probability RECALL or more; the comparison of signatures then throws out what is less similar."""

    def __init__(self, threshold: float):
        recalls = [1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) for rows in range(1, 33)]
        self.rows = max(rows for rows, recall in enumerate(recalls, start=1) if recall >= RECALL)
        self.n_bands = PERMUTATIONS // self.rows
        generator = np.random.Generator(np.random.PCG64(0))
        self.factors = generator.integers(0, 2**31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self.terms = generator.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)
        self.row_factors = generator.integers(0, 2**63, self.rows, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def sketch(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys of the bands, uint64 (n_bands,), and signature, uint8 (PERMUTATIONS,), of a set of hashes, uint32."""
        minima = np.full(PERMUTATIONS, 2**32 - 1, np.uint32)
        hashes = (hashes ^ (hashes >> np.uint32(15))) * np.uint32(0x85EBCA6B)  # crc32 is linear: break that up
        hashes ^= hashes >> np.uint32(13)
        for start in range(0, len(hashes), 64):  # 64 x 256 values stay in the cache
            values = hashes[start : start + 64, None] * self.factors
            values += self.terms
            np.minimum(minima, values.min(axis=0), out=minima)
        bands = minima[: self.n_bands * self.rows].reshape(self.n_bands, self.rows).astype(np.uint64)
        keys = (bands * self.row_factors).sum(axis=1, dtype=np.uint64)
        keys = (keys ^ (keys >> np.uint64(32))) * _GOLDEN
        return keys ^ (keys >> np.uint64(29)), (minima ^ (minima >> np.uint32(16))).astype(np.uint8)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of signatures (..., PERMUTATIONS), row by row; a byte agrees by chance in 1/256."""
    return ((a == b).mean(axis=-1) - 1 / 256) / (1 - 1 / 256)


def exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """Which documents are copies of an earlier one, bool (n,), from their digests, uint64 (n, 2)."""
    copies = np.zeros(len(digests), dtype=bool)
    for members, leaders in _equal_keys(digests[:, 0]):
        same = digests[members, 1] == digests[leaders, 1]
        copies[members[same]] = members[same] != leaders[same]
    return copies


def near_duplicates(
    bands: Iterable[np.ndarray], signatures: np.ndarray, alive: np.ndarray, threshold: float
) -> np.ndarray:
    """The first document of each one's cluster, int64 (n,): a document that stands for itself is to be kept.

    `bands` gives the keys of a band at a time, uint64 (n,); `signatures`, uint8 (n, PERMUTATIONS), may be anything that
    takes an array of rows as its index. `alive`, bool (n,), says which documents take part. Within a band's group of
    equal keys each is compared with the group's first; those unlike it form groups anew, eight times at most.
    """
    first = np.arange(len(alive))
    for band in bands:
        for members, leaders in _equal_keys(band, alive):
            for _ in range(8):
                others = members != leaders
                members, leaders = members[others], leaders[others]
                apart = _roots(first, members) != _roots(first, leaders)
                members, leaders = members[apart], leaders[apart]
                if not len(members):
                    break
                alike = _alike(signatures, members, leaders, threshold)
                for member, leader in zip(members[alike].tolist(), leaders[alike].tolist(), strict=True):
                    _union(first, member, leader)
                members, groups = members[~alike], leaders[~alike]
                _, starts, inverse = np.unique(groups, return_index=True, return_inverse=True)
                leaders = members[starts[inverse]] if len(members) else groups
    return _roots(first, np.arange(len(first)))


def _equal_keys(keys: np.ndarray, alive: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of keys that occur more than once, in order of key and index, each with the first index of its key; a
    range of keys at a time, so that memory does not grow with their number."""
    n_ranges = -(-len(keys) // KEYS_AT_A_TIME)
    for number in range(n_ranges):
        low, high = (np.uint64(min(2**64 - 1, place * 2**64 // n_ranges)) for place in (number, number + 1))
        found = []
        for start in range(0, len(keys), KEYS_AT_A_TIME):
            piece = np.asarray(keys[start : start + KEYS_AT_A_TIME])
            inside = (piece >= low) & ((piece < high) if number + 1 < n_ranges else True)
            if alive is not None:
                inside &= alive[start : start + KEYS_AT_A_TIME]
            found.append((piece[inside], np.flatnonzero(inside) + start))
        values, indices = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(values, kind="stable")
        values, indices = values[order], indices[order]
        starts = np.ones(len(values), dtype=bool)
        starts[1:] = values[1:] != values[:-1]
        places = np.flatnonzero(starts)
        counts = np.diff(places, append=len(values))
        several = np.repeat(counts > 1, counts)
        yield indices[several], np.repeat(indices[places], counts)[several]


def _alike(signatures: np.ndarray, a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
    alike = np.empty(len(a), dtype=bool)
    for start in range(0, len(a), 2**12):
        part = slice(start, start + 2**12)
        alike[part] = similarity(signatures[a[part]], signatures[b[part]]) >= threshold
    return alike


def _roots(first: np.ndarray, members: np.ndarray) -> np.ndarray:
    roots = first[members]
    while (further := first[roots] != roots).any():
        roots[further] = first[roots[further]]
    return roots


def _union(first: np.ndarray, a: int, b: int) -> None:
    """Join two clusters under the earlier of their first documents, shortening the paths on the way."""
    while first[a] != a:
        first[a] = a = int(first[first[a]])
    while first[b] != b:
        first[b] = b = int(first[first[b]])
    first[max(a, b)] = min(a, b)
