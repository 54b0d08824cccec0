"""Containment: a training step is clipped, damped or stopped before it does harm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..runtime.growth import ADD_LAYER, INCREASE_CURVATURE, grown_curvature, has_adapters
from .bekenstein import bekenstein_penalty
from .damping import damp_gravity, mean_force

if TYPE_CHECKING:
    from ..runtime.ledger import Ledger

_DAMPING = 0.9
# Above this stability a layer is proposed, below it more curvature.
_LAYER_STABILITY = 0.98


@dataclass(frozen=True)
class ContainmentConfig:
    """Limits of `ContainmentProtocol`; the defaults are the published ones.

    Attributes:
        max_grad_norm: global norm to which gradients are clipped.
        max_attention_force: mean force above which gravity is damped.
        bekenstein_lambda: weight of the Bekenstein term.
        min_loss: a loss below it, any negative one too, is a collapse.
        max_loss: a loss above it, or NaN, is a divergence.
        stability_ema_alpha: weight of the newest force in the stability, in (0, 1].
        enable_architecture_proposals: whether growth is proposed at all.
        stability_proposal_threshold: the stability from which it is.
        proposal_min_interval: steps between two proposals.
    """

    max_grad_norm: float = 1.0
    max_attention_force: float = 40.0
    bekenstein_lambda: float = 1e-4
    min_loss: float = 1e-8
    max_loss: float = 1e4
    stability_ema_alpha: float = 0.05
    enable_architecture_proposals: bool = True
    stability_proposal_threshold: float = 0.95
    proposal_min_interval: int = 100

    def __post_init__(self) -> None:
        for name in ("max_grad_norm", "max_attention_force"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"ContainmentConfig.{name}: expected a number > 0, got {value!r}")
        if not self.min_loss < self.max_loss:
            raise ValueError(
                "ContainmentConfig.min_loss: expected less than max_loss, got "
                f"{self.min_loss!r} and {self.max_loss!r}"
            )
        if not 0 <= self.bekenstein_lambda < math.inf:
            raise ValueError(
                "ContainmentConfig.bekenstein_lambda: expected a finite number >= 0, got "
                f"{self.bekenstein_lambda!r}"
            )
        if math.isnan(self.stability_proposal_threshold):
            raise ValueError(
                "ContainmentConfig.stability_proposal_threshold: expected a number, got nan"
            )
        interval = self.proposal_min_interval
        if type(interval) is not int or interval < 0:
            raise ValueError(
                "ContainmentConfig.proposal_min_interval: expected an integer of 0 or more, got "
                f"{interval!r}"
            )
        if not 0 < self.stability_ema_alpha <= 1:
            raise ValueError(
                "ContainmentConfig.stability_ema_alpha: expected a number in (0, 1], got "
                f"{self.stability_ema_alpha!r}"
            )


class ContainmentProtocol:
    """Watches one training step after another: `step` comes after backward, before the optimiser.

    As published, but for three things. The norm of gradients that are not finite stops training
    like a loss that is NaN (published: the optimiser would take the step). Damping reaches every
    `G`, scalar or `[H]`, and the masses of a patched host. `mean_force` is the true mean force
    where the diagnostics are a mirror's reports; the published diagnostics call `|G| mean_mass^2`
    so, which the limit of 40 was never reached by.

    Args:
        config: limits.
        model: what trains.
        ledger: where to log; None logs nothing.
    """

    def __init__(
        self, config: ContainmentConfig, model: nn.Module, ledger: Ledger | None = None
    ) -> None:
        self.config = config
        self.model = model
        self.ledger = ledger
        self.step_count = 0
        # Moving average of 1 / (1 + force / limit); 1.0: no force was ever seen.
        self.stability = 1.0
        self.proposals: list[dict[str, Any]] = []

    def step(self, loss: Tensor | float, diagnostics: Any = None) -> dict[str, Any]:
        """Check, clip, damp and propose, in this order; a stop ends it at once.

        Args:
            loss: of this step.
            diagnostics: a mirror's reports, or the published mapping; None where not measured.

        Returns:
            `step`, `loss`, `clipped`, `damped`, `stopped`, `stability`, `proposal` (None or what to
            grow). Where `stopped`, the optimiser must not step.
        """
        value = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        self.step_count += 1
        stopped = self.stops(value)
        clipped = damped = False
        proposal = None
        if not stopped:
            clipped, stopped = self.clip(value)
        if not stopped:
            damped = diagnostics is not None and self.damp(diagnostics)
            proposal = self.propose()
        return {
            "step": self.step_count,
            "loss": value,
            "clipped": clipped,
            "damped": damped,
            "stopped": stopped,
            "stability": self.stability,
            "proposal": proposal,
        }

    def stops(self, loss: float) -> bool:
        """Whether this loss ends training: NaN, above `max_loss` or below `min_loss`."""
        if math.isnan(loss) or loss > self.config.max_loss:
            reason = "divergence"
        elif loss < self.config.min_loss:
            reason = "collapse"
        else:
            return False
        self._log("containment_stop", {"reason": reason, "loss": loss})
        return True

    def clip(self, loss: float | None = None) -> tuple[bool, bool]:
        """Clip the global norm of the gradients: `(clipped, stopped)`; stopped where the norm is
        not finite, and then the gradients are as they were."""
        trained = [p for p in self.model.parameters() if p.grad is not None]
        if not trained:
            return False, False
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        # Sharded gradients (FSDP2) have a norm in parts.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = float(norm)
        if not math.isfinite(total):
            stop = {"reason": "divergence", "loss": loss, "total_norm": total}
            self._log("containment_stop", stop)
            return False, True
        if total <= self.config.max_grad_norm:
            return False, False
        nn.utils.clip_grads_with_norm_(trained, self.config.max_grad_norm, norm)
        self._log("grad_clip", {"total_norm": total})
        return True, False

    def damp(self, diagnostics: Any) -> bool:
        """Take the mean force into the stability; weaken gravity by 0.9 if it is over the limit.
        Whether any was: what is frozen is not."""
        force, limit = mean_force(diagnostics), self.config.max_attention_force
        alpha = self.config.stability_ema_alpha
        self.stability = (1 - alpha) * self.stability + alpha / (1 + force / limit)
        if force <= limit:
            return False
        if damp_gravity(self.model, _DAMPING) == 0:
            return False
        self._log("attention_dampening", {"mean_force": force, "threshold": limit})
        return True

    def propose(self) -> dict[str, Any] | None:
        """What to grow, if it is stable and the last proposal is long enough ago."""
        config = self.config
        if not config.enable_architecture_proposals:
            return None
        if self.stability < config.stability_proposal_threshold:
            return None
        last = self.proposals[-1]["step"] if self.proposals else None
        if last is not None and self.step_count - last < config.proposal_min_interval:
            return None
        change = self._change()
        if change is None:
            return None
        proposal = {"step": self.step_count, "stability": self.stability, **change}
        self.proposals.append(proposal)
        self._log("architecture_proposal", proposal)
        return proposal

    def bekenstein_penalty(self, x: Tensor) -> Tensor:
        """The published term of `x` at `bekenstein_lambda`, without a floor: it can be negative."""
        return bekenstein_penalty(x, self.config.bekenstein_lambda, floor=None)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; JSON-able."""
        return {
            "step_count": self.step_count,
            "stability": self.stability,
            "proposals": self.proposals,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step_count = state["step_count"]
        self.stability = state["stability"]
        self.proposals = list(state["proposals"])

    def _change(self) -> dict[str, Any] | None:
        if has_adapters(self.model):
            return None
        if self.stability > _LAYER_STABILITY:
            layers = _layer_count(self.model)
            return {"change": ADD_LAYER, "new_num_layers": layers + 1} if layers else None
        curvature = getattr(self.model, "curvature", None)
        grown = grown_curvature(curvature) if isinstance(curvature, (int, float)) else None
        if grown is None:
            return None
        return {"change": INCREASE_CURVATURE, "new_curvature": grown}

    def _log(self, event: str, payload: dict[str, Any]) -> None:
        # Not `if self.ledger`: an empty ledger has length 0.
        if self.ledger is not None:
            self.ledger.log(event, payload)


def _layer_count(model: nn.Module) -> int:
    """0 for a converted host, which keeps its depth."""
    if isinstance(model, PreTrainedModel) and not hasattr(model, "add_layer"):
        return 0
    config = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int):
        return layers
    found = getattr(model, "layers", None)
    return len(found) if isinstance(found, nn.ModuleList) else 0
