"""Drawing samples by how hard they are, from all of a dataset."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from .mixing import DRAWN_TIERS, Mixture
from .tiers import Tier, TierSettings, checked_fractions

EpochKind = Literal["cover", "draws"]


class TieredSampler(Sampler[int]):
    """Indices of a dataset, mixed by tiers.

    Each tier gets its fraction of the draws, spread evenly, so that batches of any size have the
    mixture. Fractions of tiers that have nothing to draw go to the others. Samples that were never
    scored are a tier of their own, with the share that they are of the dataset: none is left out.

    An epoch is one of two things. "cover": every sample exactly once; the mixture decides in which
    order, and as tiers run out the rest is drawn. "draws": `draws` draws of the mixture; within a
    tier those go first that were drawn least often, so a small tier is repeated and a large one
    goes on in the next epoch.

    Tiers may change on the way (`update`); the next draw follows. Everything follows from `seed`,
    the epoch and the updates, and `state_dict` holds it.

    Args:
        tiers: `[N]`, a `Tier` for each sample; None: all unknown.
        size: of the dataset, where there are no tiers.
        fractions: of the draws, for MASTERED to FAILING.
        unknown_fraction: of the draws; None: the share of the samples that are unknown.
        epoch: as said.
        draws: of an epoch of "draws"; None: as many as there are samples.
        seed: of the order within tiers.

    Raises:
        ValueError: settings that do not go together; nothing to draw.

    Example:
        >>> scored = score_samples(model, dataset)
        >>> sampler = TieredSampler(scored["tier"], seed=0)
        >>> loader = DataLoader(scored, sampler=sampler, batch_size=8)
    """

    def __init__(
        self,
        tiers: Sequence[int] | np.ndarray | None = None,
        *,
        size: int | None = None,
        fractions: Sequence[float] | Mapping[int, float] = TierSettings().fractions,
        unknown_fraction: float | None = None,
        epoch: EpochKind = "cover",
        draws: int | None = None,
        seed: int = 0,
    ) -> None:
        _check(tiers, size, unknown_fraction, epoch, draws)
        unknown = np.full(size or 0, Tier.UNKNOWN, np.int8)
        self.tiers = unknown if tiers is None else _checked_tiers(tiers)
        self.counts = np.zeros(len(self.tiers), np.int32)
        self.tier_draws = dict.fromkeys(DRAWN_TIERS, 0)
        self.fractions = checked_fractions(fractions)
        self.unknown_fraction = unknown_fraction
        self.epoch_kind: EpochKind = epoch
        self.draws = draws
        self.seed = seed
        self.epoch = 0
        # Draws of this epoch so far, and whether it is over.
        self.position = 0
        self.finished = False
        self._asked: int | None = None
        # Where a loaded epoch goes on; None: nothing was loaded.
        self._resume: int | None = None
        self._start = self._standing()
        # Of this epoch; and those of a loaded one that it has not come to again.
        self._updates: list[_Update] = []
        self._pending: list[_Update] = []
        self._mixture: Mixture | None = None
        if not len(self):
            raise ValueError("TieredSampler: expected samples to draw, got none, or all excluded")

    def __len__(self) -> int:
        """Draws of an epoch, as tiers are now."""
        drawable = int((self.tiers != Tier.EXCLUDED).sum())
        if self.epoch_kind == "cover" or not drawable:
            return drawable
        return self.draws or len(self.tiers)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; accelerate calls it. Without it each iteration is the
        one after the last."""
        self._asked = epoch

    def __iter__(self) -> Iterator[int]:
        asked, self._asked = self._asked, None
        skipped, self._resume = self._resume, None
        again = skipped is not None and (
            not self.finished if asked is None else asked == self.epoch
        )
        if again:
            # The epoch from its beginning: the same draws, with the same updates between them.
            self._pending = list(self._updates)
            self._restore(self._start)
        else:
            self._catch_up(None)
            if asked is not None:
                self.epoch = asked
            elif self.position:
                self.epoch += 1
            self._start, self._updates, skipped = self._standing(), [], 0
        self.position, self.finished = 0, False
        yield from self._drawn(skipped or 0)

    def update(
        self, indices: Sequence[int] | np.ndarray, tiers: Sequence[int] | np.ndarray
    ) -> None:
        """Give some samples other tiers, from the next draw on.

        Raises:
            ValueError: no tiers, or no indices of the dataset; nothing is changed.
        """
        indices, tiers = np.asarray(indices, dtype=np.int64), _checked_tiers(tiers)
        inside = not len(indices) or (indices.min() >= 0 and indices.max() < len(self.tiers))
        if indices.shape != tiers.shape or not inside:
            raise ValueError(
                f"TieredSampler.update: expected as many tiers as indices below {len(self.tiers)}, "
                f"got {tiers.shape} tiers for {indices.shape} indices"
            )
        change = _Update(self.position, indices, tiers)
        self._updates.append(change)
        self._apply(change)

    def coverage(self) -> dict[str, int]:
        """`size` of the dataset, `unique` samples drawn so far, all `draws`, `excluded` samples,
        and the draws of each tier, `drawn_unknown` to `drawn_failing`."""
        return {
            "size": len(self.tiers),
            "unique": int((self.counts > 0).sum()),
            "draws": int(self.counts.sum()),
            "excluded": int((self.tiers == Tier.EXCLUDED).sum()),
            **{f"drawn_{tier.name.lower()}": n for tier, n in self.tier_draws.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; arrays are packed text."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "finished": self.finished,
            "start": self._start.packed(),
            "now": self._standing().packed(),
            "updates": [
                [position, _packed(indices), _packed(tiers)]
                for position, indices, tiers in self._updates
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any], *, replay: bool = False) -> None:
        """Go on from `state`.

        Args:
            state: of a sampler of the same dataset and settings.
            replay: the next iteration gives the whole epoch once more, with the updates of that
                time at their places, for a Trainer that skips what it has seen; otherwise it gives
                what is left.

        Raises:
            ValueError: of a dataset of another size; nothing is changed.
        """
        start, now = _Standing.unpacked(state["start"]), _Standing.unpacked(state["now"])
        if len(now.tiers) != len(self.tiers):
            raise ValueError(
                f"TieredSampler.load_state_dict: expected a state of {len(self.tiers)} samples, "
                f"got one of {len(now.tiers)}: of another dataset"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.finished = bool(state["finished"])
        self._start = start
        self._updates = [
            _Update(int(position), _unpacked(indices, np.int64), _unpacked(tiers, np.int8))
            for position, indices, tiers in state["updates"]
        ]
        self._mixture, self._pending = None, []
        self._restore(now)
        self._resume = 0 if replay else self.position

    def _drawn(self, skipped: int) -> Iterator[int]:
        mixture = self._mixture = Mixture(
            self.tiers,
            self.counts,
            self.fractions,
            self.unknown_fraction,
            repeats=self.epoch_kind == "draws",
            order=np.random.default_rng([self.seed, self.epoch]).permutation(len(self.tiers)),
        )
        end = len(self) if self.epoch_kind == "draws" else None
        while end is None or self.position < end:
            self._catch_up(self.position)
            index = mixture.draw()
            if index is None:
                break
            self.tier_draws[Tier(self.tiers[index])] += 1
            self.position += 1
            # Now, and not when another is asked for: a checkpoint may lie in between.
            self.finished = self.position == end or mixture.is_empty
            if self.position > skipped:
                yield index
        self._catch_up(None)
        self.finished = True

    def _catch_up(self, position: int | None) -> None:
        """Apply what is pending up to `position`; None: all."""
        while self._pending and (position is None or self._pending[0].position <= position):
            self._apply(self._pending.pop(0))

    def _apply(self, change: _Update) -> None:
        self.tiers[change.indices] = change.tiers
        if self._mixture is not None:
            self._mixture.refill()

    def _standing(self) -> _Standing:
        return _Standing(self.tiers.copy(), self.counts.copy(), dict(self.tier_draws))

    def _restore(self, standing: _Standing) -> None:
        self.tiers, self.counts = standing.tiers.copy(), standing.counts.copy()
        self.tier_draws = dict(standing.tier_draws)


class _Update(NamedTuple):
    """Tiers that changed after `position` draws of an epoch."""

    position: int
    indices: np.ndarray
    tiers: np.ndarray


class _Standing(NamedTuple):
    """Tiers and counts at one moment."""

    tiers: np.ndarray
    counts: np.ndarray
    tier_draws: dict[Tier, int]

    def packed(self) -> dict[str, Any]:
        draws = {str(int(tier)): count for tier, count in self.tier_draws.items()}
        return {"tiers": _packed(self.tiers), "counts": _packed(self.counts), "draws": draws}

    @classmethod
    def unpacked(cls, state: Mapping[str, Any]) -> _Standing:
        draws = {tier: int(state["draws"][str(int(tier))]) for tier in DRAWN_TIERS}
        tiers, counts = _unpacked(state["tiers"], np.int8), _unpacked(state["counts"], np.int32)
        return cls(tiers, counts, draws)


def _packed(values: np.ndarray) -> str:
    """As text that JSON can hold, little-endian."""
    data = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()
    return base64.b64encode(zlib.compress(data)).decode()


def _unpacked(text: str, dtype: Any) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)


def _checked_tiers(tiers: Sequence[int] | np.ndarray) -> np.ndarray:
    found = np.asarray(tiers)
    known = [int(tier) for tier in Tier]
    if found.ndim != 1 or not np.isin(found, known).all():
        strange = sorted({str(x) for x in found.flatten().tolist()} - {str(x) for x in known})
        raise ValueError(
            f"TieredSampler: expected a row of tiers, each of {known}, got the shape {found.shape} "
            f"with {strange[:5]}"
        )
    return found.astype(np.int8)


def _check(
    tiers: object, size: int | None, unknown_fraction: float | None, epoch: str, draws: int | None
) -> None:
    if (tiers is None) == (size is None):
        raise ValueError(
            "TieredSampler: expected tiers, or size where there are none, got "
            f"{'neither' if tiers is None else 'both'}"
        )
    if epoch not in ("cover", "draws") or (draws is not None and (epoch == "cover" or draws < 1)):
        raise ValueError(
            "TieredSampler: expected epoch='cover', or epoch='draws' with 1 or more draws, got "
            f"epoch={epoch!r} and draws={draws!r}"
        )
    if unknown_fraction is not None and not 0 < unknown_fraction < 1:
        raise ValueError(
            "TieredSampler.unknown_fraction: expected a number between 0 and 1, or None, got "
            f"{unknown_fraction!r}: samples that are never drawn are never learnt from"
        )
