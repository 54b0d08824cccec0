"""Gravity attention for transformers in one self-contained file.

It lies beside the weights of every exported gravity model, so that
`AutoModel....from_pretrained(folder, trust_remote_code=True)` works where the library gravity_hf is
not installed. It needs torch and transformers only. `import gravity_hf` before loading uses the
library instead, which is faster and can also patch, calibrate and unpatch.

Any class name `Gravity<Host>` is made from transformers' `<Host>` when it is asked for.
"""

import functools
import inspect
from types import CodeType

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

# Not "gravity": that name belongs to the library, which may be imported in the same process.
ATTENTION_NAME = "gravity_remote"
VERSION = 1
SETTINGS = {
    "epsilon",
    "mass_init",
    "mass_per",
    "law",
    "distance",
    "learn_softening",
    "layers",
    "implementation",
    "softness",
    "max_kl",
    "version",
}
REFUSED_ARGUMENTS = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "indices",
    "block_indices",
    "cache",
)
EPSILON_FLOOR = 1e-6
HEAD_COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
# Rows of the score matrix computed at once; bounds memory, not results.
BLOCK_ELEMENTS = 1 << 24


class GravityParameters(nn.Module):
    """Masses `softplus(mass_log)`, softenings `softplus(softening_log)`, squared key radii."""

    def __init__(self, settings, query_heads, key_value_heads):
        super().__init__()
        self.settings, self.query_heads = settings, query_heads
        counts = {"query_head": query_heads, "kv_head": key_value_heads, "layer": 1}
        self.mass_count = counts[settings["mass_per"]]
        # Values come from the checkpoint; `from_pretrained` below insists on it.
        self.mass_log = nn.Parameter(torch.zeros(self.mass_count, dtype=torch.float32))
        if settings["learn_softening"]:
            self.softening_log = nn.Parameter(torch.zeros(query_heads, dtype=torch.float32))
        if settings["distance"] == "lifted":
            radius_sq = torch.zeros(key_value_heads, dtype=torch.float32)
            self.register_buffer("key_radius_sq", radius_sq)

    def forward(self):
        mass = F.softplus(self.mass_log.float())
        mass = mass.repeat_interleave(self.query_heads // self.mass_count)
        if self.settings["learn_softening"]:
            softening = F.softplus(self.softening_log.float()).clamp(min=EPSILON_FLOOR)
        else:
            softening = torch.full_like(mass, self.settings["epsilon"])
        lifted = self.settings["distance"] == "lifted"
        return mass, softening, self.key_radius_sq.float() if lifted else None


def gravity_weights(q, k, allowed, bias, mass, softening, radius_sq, law):
    """Softmax over `M^2/(d^2+eps)` (force) or `-M^2 ln(d^2+eps)` (power); hidden rows: zeros."""
    kappa = k.square().sum(-1)[:, :, None] if radius_sq is None else radius_sq[:, None, None]
    distance_sq = q.square().sum(-1, keepdim=True) + kappa - 2.0 * q @ k.transpose(-2, -1)
    softened = distance_sq.clamp(min=0.0) + softening[:, None, None]
    strength = mass.square()[:, None, None]
    score = -strength * softened.log() if law == "power" else strength / softened
    if allowed is None:
        return score.softmax(-1)
    if bias is not None:
        score = score + bias
    score = score.masked_fill(~allowed, torch.finfo(score.dtype).min)
    return score.softmax(-1) * allowed.any(-1, keepdim=True)


def gravity_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
):
    """transformers' attention signature; modules without a `gravity` child use dot products."""
    gravity = getattr(module, "gravity", None)
    if gravity is None:
        if attention_mask is None:
            kwargs["is_causal"] = False
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in REFUSED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ValueError(f"gravity attention cannot honour argument `{name}`")

    mass, softening, radius_sq = gravity()
    groups = query.shape[1] // key.shape[1]
    q = query.float()
    k, v = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    if radius_sq is not None:
        radius_sq = radius_sq.repeat_interleave(groups)
    allowed, bias = _split_mask(attention_mask)
    rows = max(1, BLOCK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    outputs, weights = [], None
    for start in range(0, q.shape[2], rows):
        block = slice(start, start + rows)
        weights = gravity_weights(
            q[:, :, block],
            k,
            _rows(allowed, block),
            _rows(bias, block),
            mass,
            softening,
            radius_sq,
            gravity.settings["law"],
        )
        outputs.append(F.dropout(weights, dropout) @ v)
    output = torch.cat(outputs, 2).to(value.dtype)
    asked = kwargs.get("output_attentions") and len(outputs) == 1
    return output.transpose(1, 2).contiguous(), weights.to(query.dtype) if asked else None


def _split_mask(mask):
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    allowed = mask > torch.finfo(mask.dtype).min / 2
    return allowed, mask.masked_fill(~allowed, 0.0).float()


def _rows(mask, block):
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, block]


AttentionInterface.register(ATTENTION_NAME, gravity_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, eager_mask)


@functools.cache
def _routes_through_interface(cls):
    if issubclass(cls, PreTrainedModel):
        return False
    members = (m for base in cls.__mro__ if base is not nn.Module for m in vars(base).values())
    codes = [getattr(inspect.unwrap(m), "__code__", None) for m in members if callable(m)]
    codes = [code for code in codes if code is not None]
    codes += [c for code in codes for c in code.co_consts if isinstance(c, CodeType)]
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def _head_counts(module):
    owners = (module, getattr(module, "config", None))
    found = (getattr(owner, name, None) for owner in owners for name in HEAD_COUNT_NAMES)
    heads = next(count for count in found if isinstance(count, int))
    groups = getattr(module, "num_key_value_groups", None)
    if isinstance(groups, int) and groups > 0:
        return heads, heads // groups
    names = ("num_key_value_heads", "num_kv_heads")
    kv_heads = (getattr(module, name, None) for name in names)
    return heads, next((count for count in kv_heads if isinstance(count, int)), heads)


def _settings(config, owner):
    settings = getattr(config, "gravity", None)
    if not isinstance(settings, dict) or set(settings) - SETTINGS:
        raise ValueError(f"{owner}: expected config.gravity with keys {SETTINGS}, got {settings}")
    if settings.get("version") != VERSION:
        raise ValueError(
            f"{owner}: expected gravity settings of version {VERSION}, got "
            f"{settings.get('version')}; pip install -U gravity_hf"
        )
    return settings


class GravityHost:
    """First base of every `Gravity<Host>`: attaches the gravity modules, guards what is loaded."""

    def __init__(self, config, *args, **kwargs):
        settings = _settings(config, type(self).__name__)
        if config._attn_implementation not in (None, ATTENTION_NAME):
            raise ValueError(
                f"{type(self).__name__}: expected no attn_implementation, got "
                f"{config._attn_implementation!r}: these weights were made for gravity"
            )
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config, *args, **kwargs)
        sites = [m for m in self.modules() if _routes_through_interface(type(m))]
        layers = settings["layers"]
        for module in sites if layers is None else [sites[i] for i in layers]:
            module.gravity = GravityParameters(settings, *_head_counts(module))

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        want_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if ".gravity." in key)
        if missing:
            raise ValueError(f"{cls.__name__}: the checkpoint lacks gravity tensors: {missing[:3]}")
        return (model, info) if want_info else model

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation != ATTENTION_NAME:
            raise ValueError(
                f"{type(self).__name__}: expected {ATTENTION_NAME!r}, got {attn_implementation!r}: "
                "these weights were made for gravity"
            )


@functools.cache
def _config_class(host):
    model_type = "gravity_" + host.model_type
    _inherit_weight_conversions(host.model_type, model_type)
    body = {"model_type": model_type, "__module__": __name__}
    return type("Gravity" + host.__name__, (host,), body)


@functools.cache
def _model_class(host):
    name = "Gravity" + host.__name__
    _inherit_weight_conversions(host.__name__, name)
    keep = {*(getattr(host, "_keep_in_fp32_modules_strict", None) or ()), "gravity"}
    body = {
        "config_class": _config_class(host.config_class),
        "_keep_in_fp32_modules_strict": keep,
        "__module__": __name__,
    }
    return type(name, (GravityHost, host), body)


def _inherit_weight_conversions(host, name):
    conversions = get_checkpoint_conversion_mapping(host)
    if conversions is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)


def __getattr__(name):
    host = getattr(transformers, name.removeprefix("Gravity"), None)
    if name.startswith("Gravity") and isinstance(host, type):
        if issubclass(host, PreTrainedConfig):
            return _config_class(host)
        if issubclass(host, PreTrainedModel):
            return _model_class(host)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
