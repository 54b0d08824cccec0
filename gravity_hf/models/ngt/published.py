"""How published Newton Gravity Transformers call what is called otherwise here: weights, settings.

The one table of names, read in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..converting import plain_config_errors, rows_of, some_of
from .configuration_ngt import NGTConfig

# Published on the left. What is not here has one name.
_IN_LAYER = {
    "attn.gamma": "attn.gravity.gamma",
    "attn.gravity_bias": "attn.gravity.bias",
    "attn.radius_param": "attn.gravity.radius",
    "attn.coord_proj_attn": "attn.coord_proj",
    "attn.coord_proj_next": "coord_proj_next",
    "ffn.net.0": "fc1",
    "ffn.net.3": "fc2",
}
_OURS_IN_LAYER = {ours: theirs for theirs, ours in _IN_LAYER.items()}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# Published as `[1, H, 1, 1]`, here `[H]`.
_PER_HEAD = ("attn.gamma", "attn.gravity_bias")

# A size that the weights tell, by published names, and as a field of the config.
SIZES = {
    "num_tokens": "vocab_size",
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "coord_dim": "coord_dim",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "head_coord_dim": "head_coord_dim",
}
# Switches of a published NGT that its weights do not tell, as published code fills them in.
SWITCHES = {
    "use_radius_cutoff": True,
    "use_soft_cutoff": False,
    "use_rsqrt": False,
    "mass_in_value": False,
}
DROPOUT = 0.1
# About a run, not about the model.
_OF_RUNS = ("dataset", "seed", "gradient_accumulation_steps")
KINDS = {"ngt": "gravity", "vanilla": "dot_product"}
HEAD, EMBEDDING = "head.weight", "token_emb.weight"


def our_name(published: str) -> str:
    """Of a weight of `NGTForCausalLM`, `layers.0.ffn.net.3.bias` say."""
    if published.startswith("head."):
        return f"lm_{published}"
    return f"model.{_renamed(published, _IN_LAYER)}"


def published_name(ours: str) -> str:
    """Of a weight of `NGTForCausalLM`."""
    if ours.startswith("lm_head."):
        return ours.removeprefix("lm_")
    return _renamed(ours.removeprefix("model."), _OURS_IN_LAYER)


def our_state(published: Mapping[str, Tensor], config: NGTConfig) -> dict[str, Tensor]:
    """The weights under our names, in our shapes.

    Without a cutoff the radii, which a published model has but does not read, are left out. Unknown
    names are kept: a strict load names them.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in published.items():
        if config.cutoff == "none" and key.endswith("attn.radius_param"):
            continue
        named[our_name(key)] = tensor.flatten() if key.endswith(_PER_HEAD) else tensor
    return named


def published_state(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under published names, in published shapes."""
    named = {published_name(key): tensor for key, tensor in ours.items()}
    return {
        key: tensor.view(1, -1, 1, 1) if key.endswith(_PER_HEAD) else tensor
        for key, tensor in named.items()
    }


def kind_of(state: Mapping[str, Tensor]) -> str:
    """`"ngt"` or `"vanilla"`, by the weights of a published model.

    Raises:
        ValueError: they are of neither.
    """
    for kind, table in (("ngt", "coord_emb.weight"), ("vanilla", "pos_emb.weight")):
        if table in state:
            return kind
    raise ValueError(
        "checkpoint: expected the weights of a published NGT (coord_emb.weight, token_emb.weight, "
        "layers.0.attn.gamma, ...) or of the vanilla transformer published beside it "
        f"(pos_emb.weight, ...), got {some_of(state)}. Check that the file holds such a model"
    )


def config_of(state: Mapping[str, Tensor], given: Mapping[str, Any], **version: Any) -> NGTConfig:
    """The config of a published model: sizes by its weights, switches by `given`.

    Args:
        state: published names.
        given: published settings, `SIZES`, `SWITCHES`, `dropout`, `model_type`; what was said about
            the training run is not read.
        version: settings of `NGTConfig` that a version of the published code had otherwise.

    Raises:
        ValueError: unknown names, values out of range, or a size that the weights contradict.
    """
    kind = kind_of(state)
    said = _checked(given, kind)
    sizes = _sizes(state, kind, said)
    for name, value in said.items():
        own = sizes.get(SIZES.get(name, ""))
        if own is not None and own != value:
            raise ValueError(
                f"{name}: expected {own}, which the weights say, got {value!r}. Leave it out, or "
                "check that these are the weights that are meant"
            )
    settings: dict[str, Any] = {**sizes, "dropout": said.get("dropout", DROPOUT)}
    if kind == "ngt":
        settings.update(_switched({x: said.get(x, default) for x, default in SWITCHES.items()}))
    settings["attention"] = KINDS[kind]
    with plain_config_errors():
        return NGTConfig.from_preset("reference", **settings, **version)


def published_settings(config: NGTConfig) -> dict[str, Any]:
    """What a published checkpoint's `config` says about the model, `config_of` backwards.

    `config` must be one that the published layout can hold.
    """
    settings: dict[str, Any] = {
        "hidden_dim": config.hidden_size,
        "coord_dim": config.coord_dim,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_dim": config.intermediate_size,
        "max_seq_len": config.max_position_embeddings,
        "dropout": float(config.dropout),
        "vocab_size": config.vocab_size,
    }
    if config.is_twin:
        del settings["coord_dim"]
        return {**settings, "model_type": "vanilla"}
    return {
        **settings,
        "use_radius_cutoff": config.cutoff != "none",
        "use_rsqrt": config.use_rsqrt,
        "mass_in_value": config.mass_in_value,
        "use_soft_cutoff": config.cutoff == "soft",
        "model_type": "ngt",
    }


def _renamed(key: str, table: Mapping[str, str]) -> str:
    layer = _LAYER.fullmatch(key)
    if layer is None:
        return key
    index, rest = layer.groups()
    if rest in table:
        return f"layers.{index}.{table[rest]}"
    part, _, kind = rest.rpartition(".")
    return f"layers.{index}.{table.get(part, part)}.{kind}"


def _checked(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    known = {*SIZES, *SWITCHES, "dropout", "model_type", *_OF_RUNS}
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"settings: expected published ones, {sorted(known)}, got {some_of(unknown)}. A "
            "setting that is not understood may be another model"
        )
    said = {name: value for name, value in given.items() if name not in _OF_RUNS}
    named = said.get("model_type", kind)
    if named != kind:
        raise ValueError(
            f"model_type: expected {kind!r}, which the weights say, got {named!r}. Leave it out, "
            "or check that these are the weights that are meant"
        )
    for name in SWITCHES:
        value = said.get(name, True)
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}")
    if kind == "vanilla":
        of_gravity = [x for x in ("coord_dim", "head_coord_dim", *SWITCHES) if x in said]
        if of_gravity:
            raise ValueError(
                f"settings: expected those of a vanilla transformer, as its weights are, got "
                f"{some_of(of_gravity)}. Leave them out"
            )
    return said


def _switched(switches: Mapping[str, bool]) -> dict[str, Any]:
    soft = "soft" if switches["use_soft_cutoff"] else "hard"
    return {
        "cutoff": soft if switches["use_radius_cutoff"] else "none",
        "use_rsqrt": switches["use_rsqrt"],
        "mass_in_value": switches["mass_in_value"],
    }


def _sizes(state: Mapping[str, Tensor], kind: str, said: Mapping[str, Any]) -> dict[str, int]:
    """By the names of `NGTConfig`."""
    table = "coord_emb.weight" if kind == "ngt" else "pos_emb.weight"
    inner, gamma = "layers.0.ffn.net.0.weight", "layers.0.attn.gamma"
    mapped = "layers.0.attn.coord_proj_attn.weight"
    needed = [EMBEDDING, table, inner, *((gamma, mapped) if kind == "ngt" else ())]
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(
            f"checkpoint: expected the weights of a published {kind} model, got none of the name "
            f"{some_of(missing)}. The checkpoint is incomplete"
        )
    rows = {key: rows_of(state, key) or 0 for key in needed if key != gamma}
    found = {match[1] for key in state if (match := _LAYER.fullmatch(key))}
    sizes = {
        "vocab_size": rows[EMBEDDING],
        "hidden_size": state[EMBEDDING].shape[1],
        "num_hidden_layers": len(found),
        "intermediate_size": rows[inner],
        "max_position_embeddings": rows[table],
    }
    if kind == "vanilla":
        # Its weights have the same shapes for any number of heads.
        if "num_heads" not in said:
            raise ValueError(
                "num_heads: expected the number of heads, which the weights of a vanilla "
                "transformer do not tell, got none. Give num_heads"
            )
        return {**sizes, "num_attention_heads": said["num_heads"]}
    heads = state[gamma].numel()
    if not heads or rows[mapped] % heads:
        raise ValueError(
            f"{mapped}: expected as many rows for each of {heads} heads ({gamma}), got "
            f"{rows[mapped]} rows. The checkpoint is damaged"
        )
    return {
        **sizes,
        "coord_dim": state[table].shape[1],
        "num_attention_heads": heads,
        "head_coord_dim": rows[mapped] // heads,
    }
