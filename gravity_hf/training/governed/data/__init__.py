"""The data of governed training: how hard each sample is, and how often it is drawn."""

from __future__ import annotations

import importlib

# Public name -> the module that defines it.
_EXPORTS = {
    "Deduplicated": ".dedup",
    "RescoringCallback": ".rescoring",
    "Tier": ".tiers",
    "TierSettings": ".tiers",
    "TieredSampler": ".sampling",
    "TieredTrainer": ".trainer",
    "deduplicate": ".dedup",
    "sample_losses": ".scoring",
    "score_samples": ".scoring",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
