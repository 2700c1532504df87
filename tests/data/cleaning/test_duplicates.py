import random

import numpy as np
import pytest

from data.cleaning.duplicates import (
    DedupConfig,
    MinHash,
    digest,
    exact_duplicates,
    near_duplicates,
    shingles,
    similarity,
)
from runtime.errors import UserError

WORDS = [f"name_{i}" for i in range(50_000)]


def pair(jaccard: float, n_words: int, chance: random.Random) -> tuple[str, str]:
    """Two texts whose sets of words have that Jaccard similarity."""
    words = chance.sample(WORDS, n_words)
    shared = round(n_words * jaccard)
    middle = shared + (n_words - shared) // 2
    return " ".join(words[:middle]), " ".join(words[:shared] + words[middle:])


def found_by(threshold: float, texts: list[str], n_words: int = 1) -> np.ndarray:
    minhash = MinHash(threshold)
    sketches = [minhash.sketch(shingles(text, n_words)) for text in texts]
    keys, signatures = (np.array(arrays) for arrays in zip(*sketches, strict=True))
    return near_duplicates(keys.T, signatures, np.ones(len(texts), bool), threshold)


@pytest.mark.parametrize("threshold", [0.85, 0.7])
def test_planted_pairs_at_090_are_found_and_at_050_kept(threshold):
    chance = random.Random(0)
    close = [text for _ in range(200) for text in pair(0.95, 300, chance)]
    close += [text for _ in range(200) for text in pair(0.9, 2000, chance)]
    apart = [text for _ in range(400) for text in pair(0.5, 300, chance)]
    first = found_by(threshold, close + apart)
    assert (first[: len(close)] == np.arange(len(close)) // 2 * 2).sum() >= len(close) - 2
    assert (first[len(close) :] == np.arange(len(close), len(first))).all()


def test_similarity_is_estimated_without_bias():
    chance, minhash = random.Random(1), MinHash(0.85)
    for jaccard in (0.3, 0.6, 0.9):
        pairs = [pair(jaccard, 400, chance) for _ in range(200)]
        signatures = [[minhash.sketch(shingles(text, 1))[1] for text in both] for both in pairs]
        errors = [similarity(a, b) - jaccard for a, b in signatures]
        assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 1.3 * (jaccard * (1 - jaccard) / 256) ** 0.5


def test_shingles_of_five_see_order_and_shingles_of_one_do_not():
    words = WORDS[:1000]
    texts = [" ".join(words), " ".join(reversed(words)), "\n".join(words) + ";;"]
    assert found_by(0.7, texts, 5).tolist() == [0, 1, 0]
    assert found_by(0.7, texts, 1).tolist() == [0, 0, 0]


def test_clusters_join_through_a_common_neighbour_and_keep_their_first():
    words = WORDS[:1000]
    texts = [" ".join(words[start : start + 900]) for start in (0, 100, 50)]  # first and second: 0.8; to third: 0.89
    assert found_by(0.85, texts[:2]).tolist() == [0, 1]
    assert found_by(0.85, texts).tolist() == [0, 0, 0]


def test_exact_copies_are_found_in_ranges_of_keys_as_at_once(monkeypatch):
    texts = [f"x = {i % 700}" + " " * (i % 3) for i in range(1000)]
    digests = np.array([np.frombuffer(digest("".join(text.split())), "<u8") for text in texts])
    copies = exact_duplicates(digests)
    assert copies.tolist() == [i >= 700 for i in range(1000)]
    monkeypatch.setattr("data.cleaning.duplicates.KEYS_AT_A_TIME", 64)
    assert (exact_duplicates(digests) == copies).all()
    chance = random.Random(2)
    texts = [text for _ in range(150) for text in pair(0.95, 100, chance)]
    few = found_by(0.85, texts)
    monkeypatch.undo()
    assert (found_by(0.85, texts) == few).all()


def test_who_takes_no_part_is_no_ones_duplicate():
    minhash = MinHash(0.85)
    keys, signature = minhash.sketch(shingles(" ".join(WORDS[:50]), 1))
    alive = np.array([False, True, True])
    first = near_duplicates(np.tile(keys[:, None], 3), np.tile(signature, (3, 1)), alive, 0.85)
    assert first.tolist() == [0, 1, 1]


def test_thresholds_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"near_threshold is 85.0; it must be in 0.4 .. 1"):
        DedupConfig(near_threshold=85.0)
