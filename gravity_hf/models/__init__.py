"""Gravity models with their own architecture, as transformers' Auto classes find them.

`register()` tells transformers their names only: a model is imported when it is first asked for,
because importing transformers' modelling code takes seconds.
"""

from __future__ import annotations

import importlib
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Model type -> the package that defines it and registers its classes.
_PACKAGES = {
    "lgt": ".lgt",
    "lgt_tri": ".trimodel",
    "ngt": ".ngt",
    "geolip": ".geolip",
    "geolip_companion": ".geolip",
    "geolip_prior": ".geolip",
    "leanformer": ".leanformer",
}


def register() -> None:
    """Let `AutoConfig`, and through it every Auto class, find the models; again changes nothing."""
    known = CONFIG_MAPPING._extra_content
    if not getattr(known, "has_gravity_models", False):
        CONFIG_MAPPING._extra_content = _beside(type(known))(known)


def register_classes(config_class: Any, **auto_classes: Any) -> None:
    """Enter a model into the Auto classes: `register_classes(Config, AutoModel=Model, ...)`."""
    import transformers

    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name, model_class in auto_classes.items():
        auto_class = getattr(transformers, name)
        auto_class.register(config_class, model_class, exist_ok=True)
        # Trainer's label smoothing and pipelines look models up by name here: a language model that
        # is not there is smoothed against labels that are not shifted.
        auto_class._model_mapping._model_mapping[config_class.model_type] = model_class.__name__


def _beside(base: type[dict]) -> type[dict]:
    """The registry's extra entries, `base`, with ours, which are imported when they are read."""

    class WithModels(base):  # type: ignore[misc,valid-type]
        has_gravity_models = True

        def __contains__(self, model_type: object) -> bool:
            return super().__contains__(model_type) or model_type in _PACKAGES

        def __missing__(self, model_type: str) -> Any:
            if model_type not in _PACKAGES:
                missing = getattr(super(), "__missing__", None)
                if missing is None:
                    raise KeyError(model_type)
                return missing(model_type)
            importlib.import_module(_PACKAGES[model_type], __name__)
            # The package has entered it, unless it is being imported at this moment.
            return self[model_type]

    return WithModels
