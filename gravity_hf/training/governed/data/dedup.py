"""Near duplicates in a dataset, found without comparing every pair.

Samples are hashed so that alike ones often share a bucket: MinHash of the shingles of a text, or
signs of random projections of an embedding. Hashes are cut into bands; two samples that agree in
one band are compared, exactly. The bands are chosen so that of the pairs at the threshold 99.9 % or
more agree somewhere; pairs that are more alike are missed less often still. Only a crowd of samples
that are all nearly, but not quite, alike enough is compared pair by pair.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Method = Literal["minhash", "simhash"]
_HASHES = {"minhash": 256, "simhash": 2048}
_RECALL = 0.999
# Longer bands than 64 bits are no better: hardly any two different samples share one.
_LONGEST = {"minhash": 16, "simhash": 60}
_CHUNK = 1024


class Deduplicated(NamedTuple):
    """Indices, in order: of each set of near duplicates the first is kept."""

    kept: list[int]
    removed: list[int]


def deduplicate(
    dataset: Sequence[Any],
    method: Method = "minhash",
    threshold: float = 0.95,
    *,
    column: str | None = None,
    shingle: int = 5,
    seed: int = 0,
) -> Deduplicated:
    """Find near duplicates; nothing is removed from `dataset` itself.

    A sample is removed where an earlier one that is kept is at least as alike as `threshold`:
    the Jaccard similarity of their sets of shingles (runs of `shingle` tokens), or the cosine of
    their embeddings.

    Args:
        dataset: of `datasets`, or a list of mappings, texts, lists of tokens, or embeddings.
        method: "minhash" for texts and tokens, "simhash" for embeddings.
        threshold: above 0 to 1.
        column: what is compared; None: for minhash `input_ids` or `text`, for simhash `embedding`.
        shingle: tokens in a run; words where there is a text.
        seed: of the hashes.

    Raises:
        ValueError: another method, a threshold out of range, a sample without that column, an
            embedding that is no row of finite numbers.

    Example:
        >>> kept, removed = deduplicate(dataset, threshold=0.8)
        >>> dataset = dataset.select(kept)
    """
    if method not in _HASHES or not 0 < threshold <= 1 or shingle < 1:
        raise ValueError(
            f"deduplicate: expected method in {list(_HASHES)}, threshold above 0 to 1 and shingle "
            f"of 1 or more, got {method!r}, {threshold!r} and {shingle!r}"
        )
    if method == "minhash":
        sets = [_shingles(_value(row, column, ("input_ids", "text")), shingle) for row in dataset]
        finder = Deduplicator(
            MinHash(_HASHES[method], seed).signatures(sets),
            agreement=threshold,
            longest=_LONGEST[method],
            alike=lambda i, j: _jaccard(sets[i], sets[j]) >= threshold,
        )
    else:
        rows = _unit_rows([_value(row, column, ("embedding", "embeddings")) for row in dataset])
        # Of two vectors at an angle, a random hyperplane separates that share of the half circle.
        agreement = 1.0 - math.acos(min(threshold, 1.0)) / math.pi
        finder = Deduplicator(
            simhash(rows, _HASHES[method], seed),
            agreement=agreement,
            longest=_LONGEST[method],
            # Of equal vectors the product is 1 to rounding.
            alike=lambda i, j: float(rows[i] @ rows[j]) >= threshold - 1e-6,
        )
    return finder.run()


class Deduplicator:
    """Buckets by bands, and exact comparisons within them.

    Args:
        signatures: `[N, hashes]`, integers.
        agreement: how likely one hash agrees for a pair at the threshold.
        longest: band at most, in hashes.
        alike: whether two samples are near duplicates, exactly.
    """

    def __init__(
        self,
        signatures: np.ndarray,
        *,
        agreement: float,
        longest: int,
        alike: Callable[[int, int], bool],
    ) -> None:
        self.signatures = signatures
        self.rows = band_rows(signatures.shape[1], agreement, longest)
        self.alike = alike
        # Pairs that were compared.
        self.comparisons = 0

    def run(self) -> Deduplicated:
        """The first of each set of near duplicates, and the others."""
        bands = self.signatures.shape[1] // self.rows
        buckets: list[dict[Hashable, list[int]]] = [{} for _ in range(bands)]
        kept, removed = [], []
        for index, signature in enumerate(self.signatures):
            cut = signature[: bands * self.rows].reshape(bands, self.rows)
            keys = [band.tobytes() for band in cut]
            if self._is_duplicate(index, keys, buckets):
                removed.append(index)
                continue
            kept.append(index)
            for bucket, key in zip(buckets, keys, strict=True):
                bucket.setdefault(key, []).append(index)
        return Deduplicated(kept, removed)

    def _is_duplicate(
        self, index: int, keys: list[bytes], buckets: list[dict[Hashable, list[int]]]
    ) -> bool:
        seen: set[int] = set()
        for bucket, key in zip(buckets, keys, strict=True):
            for other in bucket.get(key, ()):
                if other not in seen:
                    seen.add(other)
                    self.comparisons += 1
                    if self.alike(other, index):
                        return True
        return False


def band_rows(hashes: int, agreement: float, longest: int) -> int:
    """Hashes in a band: as many as still let a pair at the threshold share one of the bands with
    the probability `_RECALL`; 1 at least."""
    best = 1
    for rows in range(1, min(longest, hashes) + 1):
        if 1.0 - (1.0 - agreement**rows) ** (hashes // rows) >= _RECALL:
            best = rows
    return best


class MinHash:
    """The least of many hashes over a set: two sets agree in one as often as they overlap.

    Args:
        hashes: how many.
        seed: of the hash functions.
    """

    def __init__(self, hashes: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        # Odd factors: multiplication modulo 2^64 then loses nothing.
        self._factors = draw.integers(0, 2**63, hashes, dtype=np.uint64) * np.uint64(2) + np.uint64(
            1
        )
        self._shifts = draw.integers(0, 2**63, hashes, dtype=np.uint64)

    def signatures(self, sets: Sequence[np.ndarray]) -> np.ndarray:
        """`[N, hashes]`, uint32; of empty sets the largest number everywhere."""
        found = np.full((len(sets), len(self._factors)), np.iinfo(np.uint32).max, np.uint32)
        for row, members in enumerate(sets):
            for start in range(0, len(members), _CHUNK):
                part = members[start : start + _CHUNK, None]
                mixed = part * self._factors + self._shifts
                # The upper half of a product is mixed best.
                least = (mixed >> np.uint64(32)).astype(np.uint32).min(0)
                found[row] = np.minimum(found[row], least)
        return found


def simhash(rows: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """`[N, bits]`, bool: on which side of random hyperplanes the rows `[N, d]` lie."""
    planes = np.random.default_rng(seed).standard_normal((rows.shape[1], bits), np.float32)
    parts = [rows[i : i + _CHUNK] @ planes > 0 for i in range(0, len(rows), _CHUNK)]
    return np.concatenate(parts) if parts else np.zeros((0, bits), bool)


def _value(row: Any, column: str | None, usual: tuple[str, ...]) -> Any:
    if not isinstance(row, Mapping):
        return row
    for name in (column,) if column is not None else usual:
        if name in row:
            return row[name]
    wanted = column if column is not None else " or ".join(usual)
    raise ValueError(
        f"deduplicate: expected samples with {wanted}, got {sorted(map(str, row))}. Name the "
        "column: column=..."
    )


def _shingles(value: Any, length: int) -> np.ndarray:
    """Hashes of the different runs of `length` tokens, sorted uint64; a shorter text is one run."""
    tokens = value.split() if isinstance(value, str) else np.asarray(value).flatten().tolist()
    if not tokens:
        return np.zeros(0, np.uint64)
    count = max(len(tokens) - length + 1, 1)
    runs = {repr(tokens[i : i + length]) for i in range(count)}
    digests = (hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return np.unique(np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64))


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Of two sets; 1 for two empty ones."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    either = len(first) + len(second) - both
    return both / either if either else 1.0


def _unit_rows(values: list[Any]) -> np.ndarray:
    """`[N, d]` of length 1 each."""
    rows = np.asarray(values, dtype=np.float32) if values else np.zeros((0, 1), np.float32)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True) if rows.ndim == 2 else np.zeros(0)
    if rows.ndim != 2 or not np.isfinite(norms).all() or not norms.all():
        raise ValueError(
            "deduplicate: expected embeddings of one length, finite and not all zeros, got the "
            f"shape {rows.shape}"
        )
    return rows / norms
