"""Models of this library's own, LGT, the tri-model, NGT, the LeanFormer and the geolip: nothing is
patched, and there is no host. Those without gravity, NGT's twins, and a LeanFormer or a geolip
unless it attends by gravity, count among them, so that they are saved, loaded and served in the
same ways.

They live on this floor, too, so that they are known here by their configs and by the names of
their parameters; no model is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..layers.float32 import Float32
from ..layers.positions import CurvedPositionEmbedding, FractalPositionEmbedding
from .own_geolip import GEOLIPS, geolip_in_words, geolip_sizes_in_words, without_gravity
from .own_lean import (
    LEANFORMER,
    leanformer_in_words,
    leanformer_sizes_in_words,
    leanformer_without_gravity,
)
from .own_words import NGT, is_twin, ngt_in_words, ngt_sizes_in_words

_LIBRARY = f"{__package__.partition('.')[0]}."
_MODELS = f"{_LIBRARY}models."
_POSITIONS = (CurvedPositionEmbedding, FractalPositionEmbedding)
# Of the fusion of streams gravity is a part only; the rest is ordinary attention.
_MASSES = ("world_mass", "self_mass", "env_mass")


def is_own_config(config: PreTrainedConfig) -> bool:
    """Whether a config belongs to a model of this library's own."""
    return type(config).__module__.startswith(_MODELS)


def is_own_model(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and is_own_config(model.config)


def read_config(where: Any, **options: Any) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained`; ValueError where values in it do not fit together."""
    try:
        return AutoConfig.from_pretrained(where, **options)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: expected settings that fit together in config.json: {reason}"
        ) from error


def own_model_class(config: PreTrainedConfig) -> Any:
    """The class that wrote the checkpoint of such a model.

    ValueError for a name that its package does not have.
    """
    package = importlib.import_module(type(config).__module__.rpartition(".")[0])
    for name in config.architectures or ():
        found = getattr(package, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(
        f"expected one of the classes of model type {config.model_type!r} as `architectures` in "
        f"config.json, got {config.architectures!r}. Load it with from_pretrained of the class "
        "that wrote it"
    )


def refuse_own(model: nn.Module, what: str, instead: str) -> None:
    """Raise TypeError for a model that is gravity by construction, where a host is expected.

    `instead`: a sentence, what is done with such a model.
    """
    unwrap: Any = getattr(model, "get_base_model", None)  # a PeftModel's
    base = model if unwrap is None else unwrap()
    if not is_own_model(base):
        return
    config: Any = base.config
    kind = "is gravity by construction"
    if config.model_type in GEOLIPS:
        kind = "is none: its tokens are frames on a sphere"
        instead = "Convert the host that it stands beside, if there is one"
    elif config.model_type == LEANFORMER and leanformer_without_gravity(config):
        kind, instead = "chooses its keys by itself", "Take config.attention='gravity' for gravity"
    elif is_twin(config):
        kind, instead = "is the twin of an NGT", "Take config.attention='gravity' for gravity"
    raise TypeError(
        f"{what}: expected a model with dot-product attention, or one converted from it, got "
        f"{type(base).__name__}, which {kind}. {instead}"
    )


def why_no_text(config: PreTrainedConfig) -> str | None:
    """Why a model with this config cannot continue a text by itself, in words; None if it can."""
    name = (config.architectures or [config.model_type])[0]
    if getattr(config, "streams", None) is not None:
        return f"{name}, which reads three inputs, a world, a self and an environment"
    if not name.endswith("ForCausalLM"):
        return f"{name}, which writes no text"
    if not getattr(config, "is_causal", True):
        return f"{name} with is_causal=False, which sees the tokens that it is asked for"
    return None


def own_gravity_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What makes a model of our own gravitational, and is no map between vectors: the constants of
    its heads, and what `own_tables` yields.

    Of LGT and the tri-model `G` and the maps to masses; of NGT strengths, softenings, radii,
    exponents, fadings and biases. Of published modules on their own, too. Under peft every copy
    counts. A parameter may come more than once.
    """
    yield from own_constants(model)
    yield from own_tables(model)


def own_constants(model: nn.Module) -> Iterator[nn.Parameter]:
    """Of heads: a few numbers for each; see `own_gravity_parameters`."""
    for module in model.modules():
        if _has_own(module, "gamma"):
            yield from module.parameters()
        elif _has_own(module, "G"):
            masses = [module._modules[name] for name in _MASSES if name in module._modules]
            if not masses:
                yield from module.parameters()
                continue
            yield module.get_parameter("G")
            for mass in masses:
                yield from mass.parameters()  # type: ignore[union-attr]


def own_tables(model: nn.Module) -> Iterator[nn.Parameter]:
    """Masses of token types and places of positions: a row for each."""
    for module in model.modules():
        if isinstance(module, _POSITIONS) or _is_table(module):
            yield from module.parameters()


def own_attention_names(model: nn.Module) -> tuple[str, ...]:
    """The attention modules with gravity of their own, by name."""
    found = ((name, module._modules.get("gravity")) for name, module in model.named_modules())
    return tuple(name for name, own in found if hasattr(own, "G") or hasattr(own, "gamma"))


def other_attention_names(model: nn.Module) -> tuple[str, ...]:
    """The attention modules of such a model that take dot products: the tri-model's fusion, all of
    a twin, the spectral layers of a geolip."""
    config = getattr(model, "config", None)
    if config is not None and config.model_type in GEOLIPS:
        own = set(own_attention_names(model))
        modules = model.named_modules()
        found = (name for name, module in modules if _has_own(module, "alpha_logits"))
        return tuple(name for name in found if name not in own)
    names = ("attn",) if config is not None and is_twin(config) else ()
    if config is not None and config.model_type == LEANFORMER:
        names = ("self_attn",) if leanformer_without_gravity(config) else ()
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or name.rpartition(".")[2] in names
    )


def has_no_gravity(config: PreTrainedConfig) -> bool:
    """Whether a config of our own is that of a model in which nothing attends by distances."""
    if config.model_type in GEOLIPS:
        return without_gravity(config)
    return is_twin(config)


def gravity_in_words(config: PreTrainedConfig) -> tuple[str, ...]:
    """The law, the distance and the cap of such a model, a line each; of several streams, what
    they share and what each has of its own; of a twin, that it has none."""
    if config.model_type in GEOLIPS:
        return geolip_in_words(config)
    if config.model_type == NGT:
        return ngt_in_words(config)
    if config.model_type == LEANFORMER:
        return leanformer_in_words(config)
    streams = getattr(config, "streams", None)
    sight = "causal" if config.is_causal else "sees both ways"
    law = "softmax over forces"
    if config.force_law == "power":
        law = "weights proportional to (mass / distance)^|G|"
    distance = f"{config.position_type} positions of {config.dim_position} coordinates"
    if streams is None:
        distance += f", curvature {config.curvature:g}"
    lines = [
        f"law {config.force_law}: {law}; {sight}",
        f"{distance}, {_softening(config.softening)}",
    ]
    if config.force_law != "power":
        lines.append(f"forces {_cap(config.max_force, config.force_cap)}")
    for name, own in (streams or {}).items():
        lines.append(f"stream {name}: " + ", ".join(f"{key} {value}" for key, value in own.items()))
    return tuple(lines)


def sizes_in_words(config: PreTrainedConfig) -> str:
    """Layers, heads, width, and what can be read."""
    if config.model_type in GEOLIPS:
        return geolip_sizes_in_words(config)
    if config.model_type == NGT:
        return ngt_sizes_in_words(config)
    if config.model_type == LEANFORMER:
        return leanformer_sizes_in_words(config)
    sizes = f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, width "
    if config.vocab_size is None:
        inputs = "continuous inputs"
    else:
        inputs = f"vocabulary {config.vocab_size}, {config.max_position_embeddings} positions"
    each = " in each stream" if getattr(config, "streams", None) is not None else ""
    return f"{sizes}{config.hidden_size}{each}, {inputs}"


def _has_own(module: nn.Module, name: str) -> bool:
    """Whether a module of this library has a parameter of this name."""
    return name in module._parameters and type(module).__module__.startswith(_LIBRARY)


def _is_table(module: nn.Module) -> bool:
    """Masses or places, one row each: embeddings that stay float32."""
    return isinstance(module, Float32) and isinstance(module, nn.Embedding)


def _cap(max_force: float | None, kind: str) -> str:
    return "no cap" if max_force is None else f"capped at {max_force:g} ({kind})"


def _softening(softening: float) -> str:
    what = "the published law" if softening == 0 else "added to the squared distance"
    return f"softening {softening:g} ({what})"
