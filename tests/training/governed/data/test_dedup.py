"""Near duplicates are found by few comparisons."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from gravity_hf.training.governed.data import deduplicate
from gravity_hf.training.governed.data.dedup import Deduplicator, MinHash, band_rows

DRAW = np.random.default_rng(0)
DOCUMENTS = [DRAW.integers(0, 5000, 120).tolist() for _ in range(400)]


def changed(tokens: list[int], count: int) -> list[int]:
    """The last `count` tokens are others: of the 116 runs of five, about `count` are."""
    return tokens[:-count] + [9000 + i for i in range(count)]


def jaccard(first: list[int], second: list[int]) -> float:
    sets = [{tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_what_is_alike_enough_is_removed_and_nothing_else() -> None:
    close = [changed(document, 2) for document in DOCUMENTS[:50]]
    far = [changed(document, 20) for document in DOCUMENTS[50:100]]
    assert jaccard(close[0], DOCUMENTS[0]) > 0.95 > 0.8 > jaccard(far[0], DOCUMENTS[50])
    kept, removed = deduplicate(DOCUMENTS + close + far, threshold=0.9)
    assert removed == list(range(400, 450))
    assert kept == [*range(400), *range(450, 500)]
    # The same pairs at another threshold.
    assert len(deduplicate(DOCUMENTS + close + far, threshold=0.6).removed) == 100


def test_the_first_of_a_crowd_is_kept() -> None:
    rows = [DOCUMENTS[0], DOCUMENTS[1], *[DOCUMENTS[0]] * 30, DOCUMENTS[1]]
    assert deduplicate(rows, threshold=1.0).kept == [0, 1]


def test_texts_and_columns_of_a_dataset() -> None:
    texts = ["one two three four five six", "seven", "one two three four five six ", ""]
    dataset = Dataset.from_dict({"text": texts, "body": ["x", "x", "y", "x"]})
    assert deduplicate(dataset).removed == [2]
    assert deduplicate(texts).removed == [2]
    assert deduplicate(dataset, column="body").removed == [1, 3]
    with pytest.raises(ValueError, match="column"):
        deduplicate(dataset, column="title")


def test_embeddings_by_their_angle() -> None:
    first = DRAW.standard_normal((300, 48))
    near = first[:40] + 0.1 * DRAW.standard_normal((40, 48))
    far = first[40:80] + 0.7 * DRAW.standard_normal((40, 48))
    kept, removed = deduplicate([*first, *near, *far, *(3.0 * first[80:90])], "simhash", 0.95)
    assert removed == [*range(300, 340), *range(380, 390)]
    assert len(kept) == 340
    with pytest.raises(ValueError, match="embeddings"):
        deduplicate([[0.0, 0.0]], "simhash")


def test_comparisons_grow_with_the_number_of_samples_not_of_pairs() -> None:
    sets = [np.unique(DRAW.integers(0, 2**63, 60).astype(np.uint64)) for _ in range(1500)]
    finder = Deduplicator(
        MinHash(256, 0).signatures(sets), agreement=0.9, longest=16, alike=lambda i, j: False
    )
    assert len(finder.run().kept) == 1500
    assert finder.comparisons < 1500


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.9])
def test_hashes_agree_as_often_as_sets_overlap(similarity: float) -> None:
    size = 600
    both = round(2 * size * similarity / (1 + similarity))
    agreed = []
    for seed in range(8):
        pool = np.random.default_rng(seed).integers(0, 2**63, 2 * size - both).astype(np.uint64)
        first, second = pool[:size], pool[size - both :]
        one, other = MinHash(256, seed).signatures([first, second])
        agreed.append((one == other).mean())
    assert np.mean(agreed) == pytest.approx(similarity, abs=0.04)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_pairs_at_the_threshold_are_hardly_ever_missed(threshold: float) -> None:
    rows = band_rows(256, threshold, 16)
    assert (1 - threshold**rows) ** (256 // rows) <= 1e-3


@pytest.mark.parametrize("wrong", [{"method": "md5"}, {"threshold": 0.0}, {"threshold": 1.1}])
def test_what_cannot_be_done_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="deduplicate"):
        deduplicate([[1]], **wrong)
