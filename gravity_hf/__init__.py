"""Gravity attention for Hugging Face transformers: tokens attend to what is near."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Public name -> the module that defines it. One table for `__all__` and for lazy access.
_EXPORTS = {
    "CalibrationReport": ".integration.calibration_report",
    "GeolipCollator": ".models.geolip",
    "GeolipCompanion": ".models.geolip",
    "GeolipCompanionConfig": ".models.geolip",
    "GeolipConfig": ".models.geolip",
    "GeolipForReconstruction": ".models.geolip",
    "GeolipImageProcessor": ".models.geolip",
    "GeolipModel": ".models.geolip",
    "GeolipPrior": ".models.geolip",
    "GeolipPriorConfig": ".models.geolip",
    "GovernedTraining": ".training.governed",
    "GravityConfig": ".config",
    "GravityTrainer": ".training.optim",
    "KeyBudget": ".ops.sparse",
    "LGTConfig": ".models.lgt",
    "LGTForCausalLM": ".models.lgt",
    "LGTForSequenceClassification": ".models.lgt",
    "LGTForTokenClassification": ".models.lgt",
    "LGTModel": ".models.lgt",
    "LeanFormerConfig": ".models.leanformer",
    "LeanFormerForCausalLM": ".models.leanformer",
    "LeanFormerModel": ".models.leanformer",
    "MaskAwarePhase": ".training.mask_aware",
    "NGTConfig": ".models.ngt",
    "NGTForCausalLM": ".models.ngt",
    "NGTModel": ".models.ngt",
    "RotatedQuantCache": ".integration.rotated_cache",
    "ScreenedCache": ".integration.screened_cache",
    "SofteningAnnealing": ".training.annealing",
    "TransferSettings": ".training.transfer",
    "TransferTrainer": ".training.transfer",
    "TriModel": ".models.trimodel",
    "TriModelConfig": ".models.trimodel",
    "align_frames": ".models.geolip",
    "calibrate": ".integration.calibration",
    "calibrate_blocks": ".integration.predictor_fit",
    "densify_attention": ".integration.sparse_attention",
    "densify_feed_forward": ".integration.sparse_feed_forward",
    "extract_features": ".models.geolip",
    "factorize": ".integration.factorized",
    "fit_predictors": ".integration.predictor_fit",
    "fit_screening": ".integration.screening_fit",
    "gravity_attention": ".ops.api",
    "gravity_lora": ".training.lora",
    "gravity_param_groups": ".training.optim",
    "gravity_serving": ".integration.paging",
    "gravity_status": ".integration.patching",
    "load_factorized": ".integration.factorized",
    "load_gravity_adapter": ".integration.adapters",
    "load_gravity_mass_log": ".integration.loading",
    "load_gravity_model": ".integration.loading",
    "measure_attention": ".integration.calibration",
    "measure_screening": ".integration.screening_fit",
    "patch_with_gravity": ".integration.patching",
    "push_gravity_model": ".hub.push",
    "save_factorized": ".integration.factorized",
    "sparsify_attention": ".integration.sparse_attention",
    "sparsify_feed_forward": ".integration.sparse_feed_forward",
    "sparsity": ".layers.sparsity_policy",
    "unpatch_gravity": ".integration.patching",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _publish(model: object, repo_id: str, **options: object) -> object:
    push = importlib.import_module(".hub.push", __name__)
    return push.push_gravity_model(model, repo_id, **options)


# `model.push_to_hub` belongs to a floor that must not import the one that pushes.
importlib.import_module(".integration.publishing", __name__).set_publisher(_publish)
importlib.import_module(".models.publishing", __name__).set_publisher(_publish)

# `AutoModel.from_pretrained` must know the gravity model types as soon as this package is imported.
_autos = importlib.import_module(".integration.autos", __name__)
_autos.register()
importlib.import_module(".models", __name__).register()
