"""What a router compares a text with: one frozen picture of a store's beliefs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .consolidation import facts_of
from .embeddings import HiddenStates, TextEncoder, untrained_copy
from .errors import UnknownKeyError, ValidationError
from .generic_prompts import GENERIC_PROMPTS
from .lexical import Tfidf, words
from .whitening import Whitening

# What an encoder trains on by default, for beliefs that do not say.
_TRAINED_PARAPHRASES = 1


class Scorer(Protocol):
    """Scores a text against indexed texts."""

    def fit(self, texts: Sequence[str], categories: Sequence[str]) -> Scorer: ...

    def scores(self, text: str) -> Tensor: ...


class BeliefSource(Protocol):
    """What a router reads of a store."""

    @property
    def revision(self) -> int: ...

    def keys(self) -> Iterable[str]: ...

    def get(self, key: str) -> Any: ...


def indexed_texts(belief: Any) -> list[str]:
    """The prompts that a belief was trained on, without repetitions.

    Taken from `belief.report["training_prompts"]`; without it the prompt and the first paraphrase
    of its fact, or of every fact that it was consolidated from. Prompts held out for measuring are
    not among them.
    """
    trained = (belief.report or {}).get("training_prompts")
    if not trained:
        trained = [
            text
            for fact in facts_of(belief)
            for text in (fact.prompt, *fact.paraphrases[:_TRAINED_PARAPHRASES])
        ]
    return list(dict.fromkeys(trained))


def named_subjects(belief: Any, text: str) -> tuple[frozenset[str], ...]:
    """Of the subjects of a belief's facts those that `text` names, each as its words.

    None where the facts have no subject or `text` says it in other words; in a script without
    spaces a name is no word of its own, and none is found.
    """
    own = frozenset(words(text))
    subjects = (frozenset(words(fact.subject)) for fact in facts_of(belief))
    return tuple(dict.fromkeys(subject for subject in subjects if subject and subject <= own))


def category(belief: Any) -> str:
    """`domain/relation` of its fact; of a belief without one, its key up to the last slash."""
    fact = next(iter(facts_of(belief)), None)
    return belief.key.rpartition("/")[0] if fact is None else f"{fact.domain}/{fact.relation}"


class DenseScorer:
    """Cosines of centred and whitened vectors.

    The pool that centres and whitens is the indexed texts and `GENERIC_PROMPTS`, so that it is
    defined for a single belief too. Vectors of texts that were indexed before are kept.
    """

    def __init__(self, encoder: TextEncoder, shrinkage: float) -> None:
        self._encoder, self._shrinkage = encoder, shrinkage
        self._known: dict[str, Tensor] = {}
        self._whitening: Whitening | None = None
        self._matrix: Tensor | None = None

    def fit(self, texts: Sequence[str], categories: Sequence[str]) -> DenseScorer:
        needed = dict.fromkeys((*GENERIC_PROMPTS, *texts))
        kept = {text: self._vector(text) for text in needed}
        generic, own = (torch.stack([kept[x] for x in part]) for part in (GENERIC_PROMPTS, texts))
        fitted = DenseScorer(self._encoder, self._shrinkage)
        fitted._known = kept
        fitted._whitening = Whitening(torch.cat([generic, own]), self._shrinkage)
        fitted._matrix = fitted._whitening(own)
        return fitted

    def scores(self, text: str) -> Tensor:
        if self._matrix is None or self._whitening is None:
            raise ValidationError("DenseScorer.scores: expected an index, got none. Call fit")
        return self._matrix @ self._whitening(self._vector(text)[None])[0]

    def _vector(self, text: str) -> Tensor:
        if text in self._known:
            return self._known[text]
        # One text a call: an encoder that batches may round a text by the texts beside it.
        vector = torch.as_tensor(self._encoder([text]))[0].detach().cpu().double()
        if not vector.isfinite().all():
            raise ValidationError(
                f"Router: expected finite vectors from the encoder, got NaN or infinity of {text!r}"
            )
        return vector


class LexicalScorer:
    """TF-IDF cosines."""

    def __init__(self) -> None:
        self._tfidf = Tfidf()

    def fit(self, texts: Sequence[str], categories: Sequence[str]) -> LexicalScorer:
        fitted = LexicalScorer()
        fitted._tfidf.fit(texts)
        return fitted

    def scores(self, text: str) -> Tensor:
        return self._tfidf.scores(text)


class MajorityScorer:
    """Every text gets the beliefs of the largest category: what no look at the text achieves."""

    def __init__(self) -> None:
        self._shares = torch.empty(0, dtype=torch.float64)

    def fit(self, texts: Sequence[str], categories: Sequence[str]) -> MajorityScorer:
        counts = Counter(categories)
        fitted = MajorityScorer()
        shares = [counts[name] / len(categories) for name in categories]
        fitted._shares = torch.tensor(shares, dtype=torch.float64)
        return fitted

    def scores(self, text: str) -> Tensor:
        return self._shares


def make_scorer(
    encoder: str | Callable[..., Any] | Any, store: Any, *, pooling: str, shrinkage: float
) -> Scorer:
    """The scorer that `Router.encoder` names."""
    if not isinstance(encoder, str):
        # sentence-transformers' models are modules whose call is not the way to use them.
        return DenseScorer(getattr(encoder, "encode", encoder), shrinkage)
    name, _, layer = encoder.partition(":")
    if name == "tfidf":
        return LexicalScorer()
    if name == "majority":
        return MajorityScorer()
    if name not in ("hidden", "untrained"):
        raise ValidationError(
            "Router.encoder: expected hidden[:layer], untrained[:layer], tfidf, majority or a "
            f"callable that gives vectors [n, d], got {encoder!r}"
        )
    # Of a network without training the embeddings tell most, its layers only mix them: the default
    # is the stronger control.
    fresh = name == "untrained"
    model = untrained_copy(store.model) if fresh else store.model
    layer = layer or ("0" if fresh else "quarter")
    states = HiddenStates(model, store.tokenizer, layer=layer, pooling=pooling)
    return DenseScorer(states, shrinkage)


@dataclass(frozen=True)
class IndexedBelief:
    """What is kept of a belief: `id` belongs to one version for good, and so does the rest.

    `subjects` are `named_subjects` of each of `texts`.
    """

    key: str
    id: str
    version: int
    category: str
    texts: tuple[str, ...]
    subjects: tuple[tuple[frozenset[str], ...], ...]


@dataclass(frozen=True)
class RoutingIndex:
    """The beliefs of one revision of a store.

    Attributes:
        revision: of the store.
        beliefs: in the order of their keys, also those without texts, which nothing finds.
        owners: `[n]`, position of the belief that each indexed text belongs to.
        scorer: fitted to the indexed texts; None where there are none.
        subjects: of each indexed text the subjects of which a query has to name one to be near;
            a text without any asks for none.
    """

    revision: Any
    beliefs: tuple[IndexedBelief, ...]
    owners: Tensor
    scorer: Scorer | None
    subjects: tuple[tuple[frozenset[str], ...], ...]

    @property
    def keys(self) -> list[str]:
        """Of the beliefs that can be found."""
        return [belief.key for belief in self.beliefs if belief.texts]

    @property
    def versions(self) -> tuple[str, ...]:
        """`<id>-v<version>` of every belief."""
        return tuple(f"{belief.id}-v{belief.version}" for belief in self.beliefs)

    def scores(self, text: str) -> Tensor:
        """Of every belief `[len(beliefs)]`, float64: the best of its texts, -inf without any.

        Wording alone does not tell a paraphrase from the same question about something else. What
        an indexed text scores where its subject is not named, is moved from [-1, 1] to [-1, 0].
        """
        best = torch.full((len(self.beliefs),), -torch.inf, dtype=torch.float64)
        if self.scorer is None:
            return best
        scores = self.scorer.scores(text)
        scores = torch.where(self._names(text), scores, (scores - 1) / 2)
        return best.scatter_reduce(0, self.owners, scores, "amax")

    def _names(self, text: str) -> Tensor:
        """`[n]`, bool: whether `text` names what each indexed text is about."""
        own = frozenset(words(text))
        found = [not needed or any(x <= own for x in needed) for needed in self.subjects]
        return torch.tensor(found, dtype=torch.bool)


def build_index(
    store: BeliefSource,
    scorer: Scorer,
    texts_of: Callable[[Any], Sequence[str]],
    before: RoutingIndex | None = None,
    *,
    subjects: bool = True,
) -> RoutingIndex:
    """Index the active beliefs of `store`; those that are in `before` are not read again.

    Without `subjects` no text has to name any.
    """
    known = {belief.id: belief for belief in before.beliefs} if before else {}
    revision, active = _snapshot(store)
    found = [known.get(belief.id) or _indexed(belief, texts_of) for belief in active]
    flat = [text for belief in found for text in belief.texts]
    kinds = [belief.category for belief in found for _ in belief.texts]
    owners = [i for i, belief in enumerate(found) for _ in belief.texts]
    return RoutingIndex(
        revision=revision,
        beliefs=tuple(found),
        owners=torch.tensor(owners, dtype=torch.long),
        scorer=scorer.fit(flat, kinds) if flat else None,
        subjects=tuple(
            needed if subjects else () for belief in found for needed in belief.subjects
        ),
    )


def _snapshot(store: BeliefSource) -> tuple[Any, list[Any]]:
    """A revision and its beliefs, in the order of their keys, while others may write."""
    while True:
        revision = store.revision
        try:
            beliefs = [store.get(key) for key in sorted(store.keys())]
        except UnknownKeyError:
            # Removed since its key was listed; without a change the store is at fault.
            if store.revision == revision:
                raise
            continue
        if store.revision == revision:
            return revision, beliefs


def _indexed(belief: Any, texts_of: Callable[[Any], Sequence[str]]) -> IndexedBelief:
    texts = tuple(texts_of(belief))
    subjects = tuple(named_subjects(belief, text) for text in texts)
    return IndexedBelief(belief.key, belief.id, belief.version, category(belief), texts, subjects)
