"""Whether a model is settled enough for facts to be added to it.

A fact is fitted to weights; weights that still move leave it behind. So a domain opens only when
all groups it touches have been converged for a while, and closes as soon as one is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from .governor import GovernorState
from .settings import ForgeGateSettings


class GateEvent(NamedTuple):
    """A domain that opened ("forge_activated") or closed ("forge_suspended")."""

    event: str
    domain: str
    groups: tuple[str, ...]


class ForgeGate:
    """Opens and closes domains by the states of their groups.

    Args:
        domains: by domain the groups that its facts touch.
        groups: names of all groups there are.
        settings: see there.

    Raises:
        ValueError: a domain without groups, or of groups that are not there: it could never open.
    """

    def __init__(
        self,
        domains: Mapping[str, Sequence[str]],
        groups: Collection[str],
        settings: ForgeGateSettings | None = None,
    ) -> None:
        for domain, members in domains.items():
            unknown = sorted(set(members) - set(groups))
            if unknown or not members:
                raise ValueError(
                    f"ForgeGate: {domain}: expected groups of {sorted(groups)}, got "
                    f"{unknown or 'none'}: it could never open"
                )
        self.domains = {name: tuple(members) for name, members in domains.items()}
        self.settings = settings or ForgeGateSettings()
        touched = sorted({group for members in self.domains.values() for group in members})
        self._settled: dict[str, int] = dict.fromkeys(touched, 0)
        self._open: set[str] = set()
        kept = self.settings.feedback_results
        self._results: dict[str, deque[bool]] = {name: deque(maxlen=kept) for name in domains}

    def step(self, states: Mapping[str, GovernorState]) -> tuple[GateEvent, ...]:
        """Take the states after an optimiser step; the domains that opened or closed by it."""
        for group in self._settled:
            converged = states[group] is GovernorState.CONVERGED
            self._settled[group] = self._settled[group] + 1 if converged else 0
        events = []
        for domain, members in self.domains.items():
            least = min(self._settled[group] for group in members)
            if domain in self._open and least == 0:
                self._open.discard(domain)
                events.append(GateEvent("forge_suspended", domain, members))
            elif domain not in self._open and least >= self.settings.stability_window:
                self._open.add(domain)
                events.append(GateEvent("forge_activated", domain, members))
        return tuple(events)

    def is_ready(self, domain: str) -> bool:
        """Whether facts of `domain` may be added.

        Raises:
            ValueError: no such domain.
        """
        if domain not in self.domains:
            raise ValueError(
                f"ForgeGate: expected a domain of {sorted(self.domains)}, got {domain!r}"
            )
        return domain in self._open

    def require(self, domain: str, *, force: bool = False) -> dict[str, Any]:
        """Let a fact of `domain` be added, or refuse.

        Args:
            domain: of the fact.
            force: let it be added all the same.

        Returns:
            What belongs into the fact's provenance: `domain`, `gate` ("ready" or "forced"), and by
            group for how many steps it has been converged.

        Raises:
            RuntimeError: the domain is closed and nothing is forced.
        """
        ready = self.is_ready(domain)
        settled = {group: self._settled[group] for group in self.domains[domain]}
        if not ready and not force:
            raise RuntimeError(
                f"ForgeGate: {domain}: expected its groups converged for "
                f"{self.settings.stability_window} steps, got {settled}. Train on, or pass "
                "force=True, which the fact's provenance will say"
            )
        return {"domain": domain, "gate": "ready" if ready else "forced", "settled": settled}

    def record(self, domain: str, quality: float) -> bool:
        """Note how good a fact of `domain` turned out; whether it is accepted."""
        self.is_ready(domain)
        accepted = quality >= self.settings.acceptance_threshold
        self._results[domain].append(accepted)
        return accepted

    def feedback(self) -> dict[str, float]:
        """Factors for the needs of groups whose domains accept too few facts: `Budget.boost`."""
        factors: dict[str, float] = {}
        for domain, results in self._results.items():
            if results and sum(results) / len(results) < self.settings.acceptance_threshold:
                factors |= dict.fromkeys(self.domains[domain], self.settings.feedback_boost)
        return factors

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` takes."""
        return {
            "settled": dict(self._settled),
            "open": sorted(self._open),
            "results": {name: list(results) for name, results in self._results.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: of other domains; nothing is changed.
        """
        if set(state["results"]) != set(self.domains):
            raise ValueError(
                f"ForgeGate.load_state_dict: expected the domains {sorted(self.domains)}, got "
                f"{sorted(state['results'])}"
            )
        self._settled = {group: int(state["settled"].get(group, 0)) for group in self._settled}
        self._open = set(state["open"])
        for name, results in state["results"].items():
            self._results[name].clear()
            self._results[name].extend(bool(result) for result in results)
