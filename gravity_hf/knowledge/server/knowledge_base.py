"""The model, its store of beliefs, and what is computed from both, as the server uses them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..abstention import is_stale
from ..errors import IntegrityError, KnowledgeError
from ..registry import Registry
from ..registry_capacity import INPUT
from ..targets import target_modules
from .calibrating import Calibration
from .selection import Selector
from .snapshot import Snapshot

_logger = logging.getLogger(__name__)
_MANIFEST = "manifest.json"


class KnowledgeBase:
    """What changes the store or asks the model is called by one thread, or before that starts.

    Args:
        store: a BeliefStore that was opened on its model, which verified the base.
        calibration: of routing and confidence.
        route_threshold: similarity from which a belief is used; None: the calibrated one.
        enforce_registry: refuse additions that the registry refuses.
    """

    def __init__(
        self,
        store: Any,
        *,
        calibration: Calibration | None = None,
        route_threshold: float | None = None,
        enforce_registry: bool = False,
    ) -> None:
        self.store = store
        self.model, self.tokenizer = store.model.eval(), store.tokenizer
        self.end_tokens = _end_tokens(self.model, self.tokenizer)
        self.bank = store.compile_bank()
        self.bank.attach()
        self.registry = Registry(store)
        self.enforce_registry = enforce_registry
        calibration = calibration or Calibration.empty()
        router = calibration.make_router(store, route_threshold)
        self.selector = Selector(self.model, self.bank, router, calibration.confidence)
        self.base_digest: str = store.base_digest.root
        self.is_verified, self.verified_at = True, time.monotonic()
        self._manifest: tuple[int, ...] = ()
        self.snapshot = Snapshot.of(0, ())
        self._synchronise()

    def close(self) -> None:
        """Leave the model as it was."""
        self.bank.detach()

    def refresh(self) -> None:
        """Take over what another process changed in the store."""
        if self._manifest_now() != self._manifest:
            self.store.reload()
            self.registry.reload()
            self._synchronise()

    def change(self, action: Callable[[Any], Any]) -> Any:
        """Let `action(store)` change the store; bank and snapshot follow, also where it raises."""
        self.refresh()
        try:
            return action(self.store)
        finally:
            self._synchronise()

    def add(self, fact: dict[str, Any]) -> Any:
        """Encode a fact and keep it; the belief. Raises as `BeliefStore.add`."""
        return self.change(lambda store: self._admitted(store, store.add(**fact)))

    def update(self, key: str, answer: str, source: str | None) -> Any:
        """Encode another answer; the belief. Raises as `BeliefStore.update`."""
        options = {} if source is None else {"source": source}
        return self.change(lambda store: store.update(key, answer, **options))

    def remove(self, key: str, purge: bool) -> None:
        """Take a belief out. Raises as `BeliefStore.remove`."""
        belief_id = self.store.get(key).id

        def remove(store: Any) -> None:
            store.remove(key, purge=purge)
            if belief_id in self.registry:
                self.registry.unregister(belief_id)
                self.registry.save()

        self.change(remove)

    def verify(self) -> bool:
        """Compare the base in memory and the store's files with their digests; whether all are as
        they were written. It only reads: texts may be written meanwhile."""
        try:
            self.store.verify()
            self.is_verified = True
        except IntegrityError as error:
            self.is_verified = False
            _logger.error("verification failed: %s", error)
        self.verified_at = time.monotonic()
        return self.is_verified

    def is_stale(self, beliefs: Iterable[str]) -> bool:
        """Whether more than a tenth of the beliefs changed since `beliefs`."""
        return is_stale(beliefs, self.snapshot.versions)

    def capacity(self) -> dict[str, Any]:
        """Rank-1 deltas that each map has directions for: in all, and left by the registered
        ones."""
        used = {name for belief in self.snapshot.beliefs for name in _maps(belief.delta)}
        report = self.registry.capacity_report(sorted(used | set(target_modules(self.model))))
        return {
            "registered_deltas": len(self.registry),
            "theoretical_max_per_layer": {n: m.features for n, m in report.items()},
            "per_layer_remaining": {name: module.free for name, module in report.items()},
            "total_remaining": sum(module.free for module in report.values()),
        }

    def neighbours(self, belief: Any) -> tuple[float | None, list[str]]:
        """The smallest angle between what a delta and the registered ones read, over pi / 2, and
        the ids of those that it shares too much with. None for a delta that is not low-rank maps.
        """
        if belief.delta.kind != "low_rank":
            return None, []
        verdict = self.registry.check(belief.delta, without=(belief.id,))
        scores = [sides[INPUT] for sides in verdict.angles.values()]
        return min(scores, default=1.0), list(verdict.conflicts)

    def _admitted(self, store: Any, belief: Any) -> Any:
        """The belief that was added, once the registry has taken it in where it has a say."""
        if not self.enforce_registry:
            return belief
        try:
            self.registry.register(belief.id, belief.delta)
        except KnowledgeError:
            store.remove(belief.key, purge=True)
            raise
        self.registry.save()
        return belief

    def _synchronise(self) -> None:
        """Bank and snapshot as the store is now."""
        # Those that stay have read their files already.
        known = self.snapshot.names
        found = [self.store.get(key) for key in sorted(self.store.keys())]
        beliefs = tuple(known.get(belief.id, belief) for belief in found)
        by_id = {belief.id: belief for belief in beliefs}
        for gone in set(self.bank.ids()) - set(by_id):
            self.bank.remove(gone)
        for new in set(by_id) - set(self.bank.ids()):
            self.bank.add(new, by_id[new].delta)
        self.snapshot = Snapshot.of(self.store.revision, beliefs)
        self._manifest = self._manifest_now()

    def _manifest_now(self) -> tuple[int, ...]:
        """Changes whenever a manifest is written: each is a new file under the old name."""
        status = (Path(self.store.path) / _MANIFEST).stat()
        return status.st_ino, status.st_mtime_ns, status.st_size


def _maps(delta: Any) -> list[str]:
    """Linear maps that a delta changes; one of residual streams changes none."""
    return list(delta.factors) if delta.kind == "low_rank" else []


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return frozenset(int(x) for x in (*ends, tokenizer.eos_token_id) if x is not None)
