"""Gravity models in transformers' own server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .autos import MODEL_TYPE_PREFIX
from .hosts import CLASS_PREFIX
from .loading import model_class_of
from .own_models import is_own_config, read_config, why_no_text
from .paging import gravity_serving

_NOTHING = object()


class _ServedClass:
    """What the server finds under the name of a gravity class: it loads the model, and opens it for
    continuous batching until the server ends."""

    def __init__(self, model_class: Any, contexts: ExitStack | None) -> None:
        self._model_class = model_class
        self._contexts = contexts

    def from_pretrained(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        # On some devices the server proposes a flash kernel; the checkpoint names its attention.
        kwargs["attn_implementation"] = None
        model = self._model_class.from_pretrained(*args, **kwargs)
        if self._contexts is not None:
            self._contexts.enter_context(gravity_serving(model))
        return model


@contextmanager
def servable(folder: str | os.PathLike, *, continuous_batching: bool) -> Iterator[None]:
    """Let transformers' server load the gravity model in `folder` while the context is open.

    The server looks for the class that `config.json` names in transformers itself. Here it stands
    there for as long, and models loaded through it run under continuous batching if asked to.

    Raises:
        ValueError: the folder holds no gravity model, or none that generates text from text, or
            continuous batching is asked of a model that is gravity by construction (LGT).
    """
    config = read_config(os.fspath(folder))
    name = _gravity_class_name(folder, config)
    if continuous_batching and is_own_config(config):
        raise ValueError(
            f"expected no continuous batching, {os.fspath(folder)!r} holds {name}, whose masses "
            "have no place in the batcher's cache. Leave out --continuous-batching"
        )
    shelf = _where_the_server_looks()
    with ExitStack() as contexts:
        served = _ServedClass(model_class_of(config), contexts if continuous_batching else None)
        before = vars(shelf).get(name, _NOTHING)
        setattr(shelf, name, served)
        try:
            yield
        finally:
            if before is _NOTHING:
                delattr(shelf, name)
            else:
                setattr(shelf, name, before)


def _where_the_server_looks() -> ModuleType:
    """The server's own `transformers`: a process can have two of them, because transformers runs
    its `__init__` once more while it loads processors."""
    from transformers.cli.serving import model_manager

    module = getattr(model_manager, "transformers", None)
    if not isinstance(module, ModuleType):
        raise NotImplementedError(
            "expected transformers' server to look classes up in transformers, but that of "
            f"{transformers.__version__} does not. Use a version from 5.17 to 5.24"
        )
    return module


def _gravity_class_name(folder: str | os.PathLike, config: PreTrainedConfig) -> str:
    """`GravityQwen2ForCausalLM` for a folder that the server can run with gravity."""
    if is_own_config(config):
        reason = why_no_text(config)
        if reason is None:
            return config.architectures[0]
        raise ValueError(
            f"expected a causal model that continues text, {os.fspath(folder)!r} holds {reason}. "
            "Load it in Python with gravity_hf.load_gravity_model"
        )
    if not config.model_type.startswith(MODEL_TYPE_PREFIX):
        raise ValueError(
            f"expected a gravity model (model_type {MODEL_TYPE_PREFIX}...), {os.fspath(folder)!r} "
            f"holds a plain {config.model_type}. Serve it with: transformers serve"
        )
    name = (config.architectures or ["no class"])[0]
    if name.removeprefix(CLASS_PREFIX) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"expected a model that continues text (Gravity...ForCausalLM), {os.fspath(folder)!r} "
            f"holds {name}. Load it in Python with gravity_hf.load_gravity_model"
        )
    return name
