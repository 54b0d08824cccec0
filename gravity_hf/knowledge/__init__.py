"""The knowledge plane: facts as removable, versioned low-rank deltas beside a frozen causal LM."""

from __future__ import annotations

import importlib

# Public name -> the module that defines it.
_EXPORTS = {
    "BaseDigest": ".digest",
    "Belief": ".belief",
    "BeliefEncoder": ".encoding",
    "BeliefStore": ".store",
    "BudgetError": ".errors",
    "CapacityError": ".errors",
    "ConfidenceModel": ".confidence",
    "DeltaBank": ".bank",
    "DuplicateKeyError": ".errors",
    "EncodedBelief": ".encoding",
    "EncodingConfig": ".encoding_config",
    "Fact": ".facts",
    "Forge": ".forge",
    "ForgeResult": ".forge_results",
    "IncompatibleBaseError": ".errors",
    "IntegrityError": ".errors",
    "InterferenceError": ".errors",
    "KnowledgeError": ".errors",
    "LockTimeoutError": ".errors",
    "LowRankDelta": ".delta",
    "ProvenanceRecorder": ".provenance",
    "QuantizationError": ".errors",
    "Registry": ".registry",
    "RegistryVerdict": ".registry_verdict",
    "ResidualDelta": ".residual_delta",
    "Router": ".routing",
    "Tolerance": ".consolidation",
    "UnknownKeyError": ".errors",
    "UnsafeFileError": ".errors",
    "Validation": ".validation",
    "ValidationError": ".errors",
    "compute_digest": ".digest",
    "consolidate": ".consolidation",
    "convert_published_facts": ".fact_conversion",
    "evaluate_facts": ".fact_metrics",
    "facts_dataset": ".facts",
    "few_shot_sweep": ".few_shot",
    "load_facts": ".facts",
    "quantize": ".quantizing",
    "quantize_belief": ".quantized_beliefs",
    "read_published": ".published_delta",
    "separation_benchmark": ".separation",
    "target_modules": ".targets",
    "validate_facts": ".facts",
    "write_facts": ".facts",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
