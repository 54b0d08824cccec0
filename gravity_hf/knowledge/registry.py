"""Which deltas share a base, and what each of them takes of it: who may join is decided here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .delta import LowRankDelta
from .digest import compute_digest
from .errors import DuplicateKeyError, KnowledgeError, UnknownKeyError
from .leakage import Moments, SecondMoment
from .moments import ENOUGH_TOKENS, text_moments
from .registry_capacity import INPUT, SIDES, ModuleCapacity, Occupied, Sizes
from .registry_checks import judged, shape_reasons
from .registry_files import RegistryFiles, State
from .registry_member import Member, delta_spans
from .registry_projection import BusyDirections, Projector, projector
from .registry_verdict import HASH, VALIDATION, Limits, Reason, RegistryVerdict
from .subspaces import Spans, principal_angles
from .targets import base_model


class Registry:
    """Deltas that share a base, the directions that each takes of every map, and the gate.

        registry = Registry(store)
        verdict = registry.check(delta)            # measures; changes nothing
        registry.register(belief.id, delta)        # raises with every reason, or takes it in
        registry.save()

    A delta is refused for another base (hash), maps that do not fit (shape), too few directions
    left (capacity), directions shared with others (angle), and too much added to inputs of others
    or to unrelated text (leakage). Orthogonal directions alone do not keep deltas apart, so both
    are measured.

    Args:
        store_or_model: a BeliefStore, beside which the registry is kept and from which it is read;
            or a causal LM, for a registry in memory only.
        angle_min, leakage_max, generic_max, output_side: see `Limits`.

    Raises:
        IntegrityError: the registry on disk is not as it was written.
        IncompatibleBaseError: it is of another base.
    """

    def __init__(
        self,
        store_or_model: Any,
        angle_min: float = 0.3,
        leakage_max: float = 0.05,
        *,
        generic_max: float = 0.05,
        output_side: bool = False,
    ) -> None:
        self.limits = Limits(angle_min, leakage_max, generic_max, output_side)
        is_model = isinstance(store_or_model, nn.Module)
        self.store: Any = None if is_model else store_or_model
        self.model = base_model(store_or_model if is_model else store_or_model.model)
        self.generic: dict[str, SecondMoment] = {}
        self._members: dict[str, Member] = {}
        self._base: str | None = None
        self._busy = BusyDirections()
        self._sizes = Sizes(self.model)
        self._occupied = Occupied(self._sizes)
        self._undo: list[tuple[Any, ...]] = []  # what open transactions go back to
        self._saved: tuple[dict[str, Member], dict[str, SecondMoment]] = ({}, {})
        self._files = None if self.store is None else RegistryFiles(store_or_model.path)
        if self._files is not None:
            self._take(self._files.read(self.base))

    @property
    def base(self) -> str:
        """Digest of the base that the deltas are for."""
        if self._base is None:
            own = getattr(self.store, "base_digest", None)
            self._base = str(getattr(own, "root", own) or compute_digest(self.model).root)
        return self._base

    @property
    def ids(self) -> list[str]:
        """Of the registered deltas, in the order of registration."""
        return list(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, belief_id: object) -> bool:
        return belief_id in self._members

    def __getitem__(self, belief_id: str) -> Member:
        """What is registered under an id. UnknownKeyError where nothing is."""
        if belief_id not in self._members:
            raise UnknownKeyError(
                f"registry: expected an id of its {len(self)} deltas, got {belief_id!r}. See ids"
            )
        return self._members[belief_id]

    def measure_generic(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        names: Sequence[str],
        *,
        tokens: int = ENOUGH_TOKENS,
        progress: bool | None = None,
    ) -> None:
        """Measure what the inputs of the maps `names` are like on unrelated text: once for each.

        Raises:
            ValidationError: the texts have fewer than `tokens` tokens.
        """
        missing = [name for name in names if name not in self.generic]
        if missing:
            found = text_moments(
                self.model, tokenizer, missing, texts, tokens=tokens, progress=progress
            )
            self.generic = {**self.generic, **found}

    def check(
        self,
        delta: LowRankDelta,
        moments: Moments | None = None,
        *,
        base: str | None = None,
        without: Sequence[str] = (),
    ) -> RegistryVerdict:
        """Whether `delta` may join, and every reason why not. Changes nothing.

        Args:
            moments: of the delta's own prompts, by map (`moments.prompt_moments`): what registered
                deltas do to them is measured then.
            base: digest of the base that the delta was made for; None: of this one.
            without: ids that would leave first, as when a delta replaces others.
        """
        reasons = shape_reasons(delta, self.model)
        if base is not None and base != self.base:
            what = f"expected a delta for the base {self.base[:12]}, got one for {base[:12]}"
            reasons.insert(0, Reason(HASH, f"{what}. Train it on this base"))
        if reasons:
            return RegistryVerdict(tuple(reasons), ())
        for name, (A, B) in delta.factors.items():
            self._sizes[name] = (A.shape[1], B.shape[0])
        members = [m for m in self._members.values() if m.id not in without]
        occupied = self._occupied if not without else self._occupied_by(members)
        return judged(delta, moments or {}, members, occupied, self.generic, self.limits)

    def register(
        self,
        belief_id: str,
        delta: LowRankDelta,
        moments: Moments | None = None,
        *,
        base: str | None = None,
        validation: Sequence[str] = (),
    ) -> RegistryVerdict:
        """Take `delta` in under an id, or raise and leave the registry as it was.

        Args:
            moments, base: see `check`.
            validation: what its validation found wrong with it, in words; nothing: it passed.

        Raises:
            DuplicateKeyError: the id is taken.
            IncompatibleBaseError: another base, or maps that do not fit.
            CapacityError: too few directions left.
            InterferenceError: shared directions or leakage; `conflicts` names the others.
            ValidationError: its validation failed.
        """
        if belief_id in self._members:
            raise DuplicateKeyError(
                f"registry: expected an id that it does not have, got {belief_id!r}. Unregister "
                "the older delta first"
            )
        verdict = self.check(delta, moments, base=base)
        failed = tuple(Reason(VALIDATION, text) for text in validation)
        verdict = dataclasses.replace(verdict, reasons=(*verdict.reasons, *failed))
        if not verdict.accepted:
            raise verdict.error()
        member = Member.of(belief_id, delta, moments)
        self._occupied = self._occupied.with_spans(member.spans)
        self._members = {**self._members, belief_id: member}
        return verdict

    def unregister(self, belief_id: str) -> None:
        """Forget a delta. What is left is bit for bit as if it had never been registered.

        Raises:
            UnknownKeyError: there is none of this id.
        """
        self[belief_id]
        self._members = {k: m for k, m in self._members.items() if k != belief_id}
        self._occupied = self._occupied_by(self._members.values())

    def capacity(self, names: Sequence[str] | None = None) -> dict[str, int]:
        """Free input directions of each map: its input features less the rank of what is taken.

        Args:
            names: of maps; None: those that a registered delta changes.
        """
        return {name: report.free for name, report in self.capacity_report(names).items()}

    def capacity_report(self, names: Sequence[str] | None = None) -> dict[str, ModuleCapacity]:
        """As `capacity`, with everything that was counted."""
        used = sorted({name for m in self._members.values() for name in m.spans})
        return {name: self._occupied.of(name) for name in (used if names is None else names)}

    def basis(self, name: str, side: str = INPUT) -> Tensor:
        """Orthonormal columns `[features, rank]` of what is taken of one side of a map."""
        return self._occupied.basis(name, side).columns

    def principal_angles(
        self, first: str | LowRankDelta, second: str | LowRankDelta, side: str = INPUT
    ) -> dict[str, Tensor]:
        """Angles between two deltas, in radians, ascending, for every map that both change.

        Args:
            first, second: ids, or deltas that need not be registered.
        """
        at = SIDES.index(side)
        a, b = self._spans(first), self._spans(second)
        shared = [name for name in a if name in b]
        return {name: principal_angles(a[name][at], b[name][at]) for name in shared}

    def conflicts(self, delta: LowRankDelta) -> list[str]:
        """Ids of the deltas that `delta` would disturb; see `check` for why."""
        return list(self.check(delta).conflicts)

    def strangers(self) -> list[str]:
        """Ids that are registered and are of no active belief of the store: it was changed by
        somebody who did not tell the registry, or killed in between. Unregister them."""
        if self.store is None:
            return []
        active = {self.store.get(key).id for key in self.store}
        return [belief_id for belief_id in self._members if belief_id not in active]

    @property
    def projector(self) -> Projector:
        """What a new delta has to be orthogonal to; it stays as it is when others register."""
        both = self.limits.output_side
        return projector(self._occupied, output_side=both, avoided=lambda name: [])

    def null_space_projector(self, quiet: float = 0.02, against: Sequence[str] = ()) -> Projector:
        """As `projector`, with the directions that inputs of others use: an update orthogonal to
        them says next to nothing to unrelated text and to the prompts of those deltas.

        Args:
            quiet: share of the inputs' energy that may be left outside of what is avoided.
            against: ids of deltas whose prompts are to be left alone, besides unrelated text.
        """
        moments = {"": self.generic, **{key: self[key].moments for key in against}}
        return projector(
            self._occupied,
            output_side=self.limits.output_side,
            avoided=lambda name: self._busy.all_of(moments, name, quiet),
        )

    @contextmanager
    def transaction(self) -> Iterator[Registry]:
        """What is registered and unregistered inside counts together, or, where an exception
        leaves the block, not at all. Saved at the end where the registry belongs to a store."""
        self._undo.append(self._state())
        try:
            yield self
            self.save()
        except BaseException:
            before = self._undo[-1]
            self._members, self._occupied, self.generic = before[:3]
            if self._saved is not before[3]:  # saved inside the block
                self.save()
            raise
        finally:
            self._undo.pop()

    def save(self) -> None:
        """Write the registry beside its store; nothing to do for one in memory, or where nothing
        has changed since it was read or written.

        Raises:
            KnowledgeError: another process has written it since this one read it.
            LockTimeoutError: another process is writing it, for a minute now.
        """
        if self._files is None or self._is_saved():
            return
        self._files.write(State(self.base, list(self._members.values()), self.generic, self.limits))
        self._saved = self._members, self.generic

    def reload(self) -> None:
        """Take what is on disk in the place of what is in memory; an open transaction that fails
        goes back to that."""
        if self._files is not None:
            self._take(self._files.read(self.base))
            self._undo = [self._state()] * len(self._undo)

    def refresh(self) -> None:
        """Reload where another process has written.

        Raises:
            KnowledgeError: it has, and there are changes here that are not saved.
        """
        if self._files is None or self._files.is_current():
            return
        if not self._is_saved():
            raise KnowledgeError(
                "registry: expected nothing unsaved, as another process wrote it meanwhile, got "
                "changes. Call reload() and make them again"
            )
        self.reload()

    def copy(self) -> Registry:
        """One in memory, to try things on: nothing of it is saved."""
        limits = dataclasses.asdict(self.limits)
        other = Registry(self.model, **limits)
        other._base, other._sizes, other._busy = self.base, self._sizes, self._busy
        other.generic = dict(self.generic)
        other._members, other._occupied = dict(self._members), self._occupied
        return other

    def adopt_generic(self, other: Registry) -> None:
        """Take over what another registry of the same base has measured on unrelated text."""
        found = {name: m for name, m in other.generic.items() if name not in self.generic}
        if found:
            self.generic = {**self.generic, **found}

    def _state(self) -> tuple[Any, ...]:
        return self._members, self._occupied, self.generic, self._saved

    def _is_saved(self) -> bool:
        now = self._members, self.generic
        return all(a is b for a, b in zip(now, self._saved, strict=True))

    def _take(self, state: State | None) -> None:
        members = [] if state is None else state.members
        self._members = {m.id: m for m in members}
        self._occupied = self._occupied_by(members)
        self.generic = {} if state is None else dict(state.generic)
        self._saved = (self._members, self.generic)

    def _occupied_by(self, members: Iterable[Member]) -> Occupied:
        occupied = Occupied(self._sizes)
        for member in members:
            occupied = occupied.with_spans(member.spans)
        return occupied

    def _spans(self, given: str | LowRankDelta) -> Mapping[str, Spans]:
        return self[given].spans if isinstance(given, str) else delta_spans(given)
