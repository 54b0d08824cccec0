"""Cosines of word counts: the baseline that any routing by meaning has to beat."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ValidationError

_WORD = re.compile(r"\w+", re.UNICODE)


def words(text: str) -> list[str]:
    """The runs of letters, digits and underscores of `text`, case folded, in order."""
    return _WORD.findall(text.casefold())


class Tfidf:
    """Sublinear TF-IDF with cosine similarity.

    A word weighs `(1 + ln tf) * (ln((1 + n) / (1 + df)) + 1)`, with `tf` its count in the text and
    `df` the number of the `n` indexed texts that have it (Manning, Raghavan and Schuetze, 2008,
    section 6.4; the smoothing is the usual one). Words that no indexed text has count too, in the
    length of the query: a query about something else is not near because it shares its template.
    """

    def __init__(self) -> None:
        self._inverse: dict[str, float] = {}
        self._columns: dict[str, int] = {}
        self._unseen = 0.0
        self._matrix: Tensor | None = None

    def fit(self, texts: Sequence[str]) -> Tfidf:
        """Index `texts`."""
        counts = [Counter(words(text)) for text in texts]
        document_frequency = Counter(word for count in counts for word in count)
        total = len(texts)
        self._unseen = math.log(1 + total) + 1
        self._inverse = {
            word: math.log((1 + total) / (1 + frequency)) + 1
            for word, frequency in document_frequency.items()
        }
        self._columns = {word: i for i, word in enumerate(sorted(self._inverse))}
        self._matrix = torch.zeros(total, len(self._columns), dtype=torch.float64)
        for row, count in enumerate(counts):
            for word, weight in self._weights(count).items():
                self._matrix[row, self._columns[word]] = weight
        return self

    def scores(self, text: str) -> Tensor:
        """Cosines `[n]`, float64, of `text` with what is indexed.

        Raises:
            ValidationError: nothing is indexed yet.
        """
        if self._matrix is None:
            raise ValidationError("Tfidf.scores: expected an index, got none. Call fit(texts)")
        query = torch.zeros(self._matrix.shape[1], dtype=torch.float64)
        for word, weight in self._weights(Counter(words(text))).items():
            if word in self._columns:
                query[self._columns[word]] = weight
        return self._matrix @ query

    def _weights(self, count: Counter[str]) -> dict[str, float]:
        """Of the words of one text, scaled to a length of 1."""
        weights = {
            word: (1 + math.log(times)) * self._inverse.get(word, self._unseen)
            for word, times in count.items()
        }
        length = math.sqrt(sum(weight * weight for weight in weights.values()))
        return {word: weight / length for word, weight in weights.items()} if length else {}
