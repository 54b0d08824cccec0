"""Gravity attention for transformers in one self-contained file.

It lies beside the weights of every exported gravity model, so that
`AutoModel....from_pretrained(folder, trust_remote_code=True)` works where the library gravity_hf is
not installed. It needs torch and transformers only. `import gravity_hf` before loading uses the
library instead, which is faster and can also patch, calibrate and unpatch.
Any class name `Gravity<Host>` is made from transformers' `<Host>` when it is asked for.
"""

import dis
import functools
import inspect
import sys
import threading
from types import CodeType

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import conversion_mapping as renamings
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.auto import modeling_auto

# Not "gravity": that name belongs to the library, which may be imported in the same process.
ATTENTION_NAME = "gravity_remote"
# What config.json names: no attention and no file is called so, and the host's own class refuses.
ATTENTION_KEY, WEIGHTS_KEY = "attn_implementation", "transformers_weights"
EXPORT_NAME = "gravity-only: load by an Auto class with gravity_hf or trust_remote_code=True"
OURS = (None, ATTENTION_NAME, EXPORT_NAME)
VERSION = 1
SETTINGS = {"epsilon", "mass_init", "mass_per", "law", "distance", "learn_softening", "layers"}
SETTINGS |= {"implementation", "softness", "max_kl", "version"}
REFUSED_ARGUMENTS = dict.fromkeys(("cache", "read_index"), "a paged cache (continuous batching)")
# Classes that look attention up for something else than attention between tokens.
NO_HEADS = tuple(f"Inkling2{x}AttentionResidual" for x in ("Block", "LoopBlock", "LoopMessage"))
# Towers whose attention inverts its mask: right for a boolean one only.
BOOLEAN_MASKS = ("nemotron_asr_streaming_encoder",)
# Classes whose `is_causal` is set and not meant: their hosts know eager attention only.
CAUSAL_IN_NAME_ONLY = ("BridgeTowerSelfAttention",)
EPSILON_FLOOR = 1e-6
HEAD_COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
# Rows of the score matrix computed at once; bounds memory, not results.
BLOCK_ELEMENTS = 1 << 24


class GravityParameters(nn.Module):
    """Masses `softplus(mass_log)`, softenings `softplus(softening_log)`, squared key radii."""

    def __init__(self, settings, query_heads, key_value_heads):
        super().__init__()
        self.settings = settings
        self.query_heads, self.key_value_heads = query_heads, key_value_heads
        counts = {"query_head": query_heads, "kv_head": key_value_heads, "layer": 1}
        self.mass_count = counts[settings["mass_per"]]
        # Values come from the checkpoint; `from_pretrained` below insists on it.
        self.mass_log = nn.Parameter(torch.zeros(self.mass_count, dtype=torch.float32))
        if settings["learn_softening"]:
            self.softening_log = nn.Parameter(torch.zeros(query_heads, dtype=torch.float32))
        if settings["distance"] == "lifted":
            self.register_buffer("key_radius_sq", torch.zeros(key_value_heads, dtype=torch.float32))

    def forward(self):
        mass = F.softplus(self.mass_log.float())
        mass = mass.repeat_interleave(self.query_heads // self.mass_count)
        softening = torch.full_like(mass, self.settings["epsilon"])
        if self.settings["learn_softening"]:
            softening = F.softplus(self.softening_log.float()).clamp(min=EPSILON_FLOOR)
        lifted = self.settings["distance"] == "lifted"
        return mass, softening, self.key_radius_sq.float() if lifted else None


class Law:
    """Scores of one module: `M^2/(d^2+eps)` (law force) or `-M^2 ln(d^2+eps)` (law power)."""

    def __init__(self, gravity, groups):
        mass, softening, radius_sq = gravity()
        self.strength = mass.square()[:, None, None]
        self.softening = softening[:, None, None]
        self.is_power = gravity.settings["law"] == "power"
        lifted = radius_sq is not None
        self.radius_sq = radius_sq.repeat_interleave(groups)[:, None, None] if lifted else None

    def score(self, distance_sq):
        softened = distance_sq.clamp(min=0.0) + self.softening
        return -self.strength * softened.log() if self.is_power else self.strength / softened

    def scores(self, q, k, softcap):
        """`[B, H, rows, Tk]`; a cap bounds how far a score departs from that of a right angle."""
        query_sq = q.square().sum(-1, keepdim=True)
        kappa = k.square().sum(-1)[:, :, None] if self.radius_sq is None else self.radius_sq
        score = self.score(query_sq + kappa - 2.0 * q @ k.transpose(-2, -1))
        if softcap is None:
            return score
        neutral = self.score(query_sq + kappa)
        return neutral + softcap * ((score - neutral) / softcap).tanh()

    def sink_scores(self, q, sinks):
        """`[B, H, rows, 1]`: a key at the origin, to whose score `sinks` are added."""
        query_sq = q.square().sum(-1, keepdim=True)
        return self.score(query_sq if self.radius_sq is None else query_sq + self.radius_sq) + sinks


def gravity_weights(law, q, k, allowed, bias, softcap, sinks):
    """Softmax over the scores, beside a sink if there is one; rows that see nothing: zeros."""
    score = law.scores(q, k, softcap)
    if bias is not None:
        score = score + bias
    if allowed is not None:
        score = score.masked_fill(~allowed, torch.finfo(score.dtype).min)
    if sinks is None:
        weights = score.softmax(-1)
    else:
        weights = torch.cat([score, law.sink_scores(q, sinks)], -1).softmax(-1)[..., :-1]
    return weights if allowed is None else weights * allowed.any(-1, keepdim=True)


def gravity_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
):
    """transformers' attention signature; modules without a `gravity` child use dot products."""
    for name, meaning in REFUSED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"gravity attention cannot honour argument `{name}`: {meaning}. Expected a call "
                "without it; use generate(), or pip install gravity_hf and its gravity_serving"
            )
    if attention_mask is not None and attention_mask.dim() == 2:
        # Additive `[Tq, Tk]`, or raw padding `[B, Tk]`, where not 0 is real.
        is_bias, mask = attention_mask.is_floating_point(), attention_mask
        attention_mask = mask[None, None] if is_bias else (mask != 0)[:, None, None]
    if attention_mask is None and _is_causal_unsaid(module, query, kwargs):
        causal = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        attention_mask = causal[None, None]
    if getattr(module, "gravity", None) is None:
        return _dot_product(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    law, groups = _law_of_call(module, query, key), query.shape[1] // key.shape[1]
    q = query.float()
    k, v = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    allowed, bias = _visible_and_bias(module, query, key, attention_mask, kwargs)
    softcap, sinks, head_mask = (kwargs.get(x) for x in ("softcap", "s_aux", "head_mask"))
    sinks = _per_head(kwargs.get("sinks") if sinks is None else sinks)
    sinks, head_mask = None if sinks is None else sinks.float(), _per_head(head_mask)
    fitting = BLOCK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2])
    rows = max(1, q.shape[2] if kwargs.get("output_attentions") else fitting)
    outputs, weights = [], None
    for start in range(0, q.shape[2], rows):
        block = slice(start, start + rows)
        parts = (_rows(x, block) for x in (allowed, bias))
        weights = gravity_weights(law, q[:, :, block], k, *parts, softcap, _rows(sinks, block))
        weights = F.dropout(weights, dropout)
        if head_mask is not None:
            weights = weights * _rows(head_mask, block)
        outputs.append(weights @ v)
    output = torch.cat(outputs, 2).to(value.dtype).transpose(1, 2).contiguous()
    return output, weights.to(query.dtype) if kwargs.get("output_attentions") else None


def _law_of_call(module, query, key):
    """The module's law; ValueError if it was made for other heads than this call has."""
    gravity, got = module.gravity, (query.shape[1], key.shape[1])
    expected = (gravity.query_heads, gravity.key_value_heads)
    if got != expected:
        raise ValueError(
            f"{type(module).__name__}: expected (query heads, key-value heads) {expected}, got "
            f"{got}: masses of other heads. Load with the transformers version that exported it"
        )
    return Law(gravity, got[0] // got[1])


def _per_head(tensor):
    """`[H]` as `[H, 1, 1]`; what has more dimensions broadcasts already."""
    return tensor if tensor is None or tensor.dim() > 1 else tensor[:, None, None]


def _is_causal_unsaid(module, query, arguments):
    """Whether a call without a mask means causal attention, as SDPA and flash attention read it."""
    given = arguments.get("is_causal")
    if given is None and type(module).__name__ not in CAUSAL_IN_NAME_ONLY:
        given = getattr(module, "is_causal", False)
    return bool(given) and query.shape[2] > 1


def _dot_product(module, query, key, value, mask, **kwargs):
    """By SDPA where it can, else by the eager function of the module's own file."""
    mask = _selected_only(module, query, key, mask, kwargs)
    terms = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "output_attentions")
    asked = [x for x in terms if kwargs.get(x) is not None and kwargs[x] is not False]
    if not asked:
        if mask is None:
            kwargs["is_causal"] = False
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    kwargs["scaling"] = kwargs["scaling"] or query.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, hidden)
    eager = _eager_attention_of(type(module))
    if eager is None:
        raise ValueError(f"{type(module)}: expected an eager_attention_forward for {asked}")
    output, weights = eager(module, query, key, value, mask, **kwargs)
    if kwargs.get("head_mask") is not None and weights is not None:
        weights = weights * _per_head(kwargs["head_mask"])
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
        output = (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()
    return output, weights


@functools.cache
def _eager_attention_of(module_class):
    """What the module's file falls back to, by whichever prefix it names it; None for nothing."""
    for cls in module_class.__mro__:
        names = vars(sys.modules.get(cls.__module__, object))
        found = [name for name in names if name.endswith("eager_attention_forward")]
        if cls is not nn.Module and found:
            return names.get("eager_attention_forward", names[found[0]])
    return None


def _visible_and_bias(module, query, key, mask, arguments):
    """What a query sees, bool, and what is added to its scores."""
    allowed, bias = _selected_only(module, query, key, mask, arguments), None
    if allowed is not None and allowed.dtype != torch.bool:
        mask, allowed = allowed, allowed > torch.finfo(allowed.dtype).min / 2
        bias = mask.masked_fill(~allowed, 0.0).float()
    position_bias = arguments.get("position_bias")
    if position_bias is not None:
        added = position_bias.float() if position_bias.dim() == 4 else position_bias.float()[None]
        bias = added if bias is None else bias + added
    return allowed, bias


def _selected_only(module, query, key, mask, arguments):
    """The mask without the keys that the host's own sparse indexer left out."""
    indices, blocks, keys = arguments.get("indices"), arguments.get("block_indices"), key.shape[2]
    if blocks is not None:
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(keys - query.shape[2], keys, device=query.device)
        positions = (positions if positions.dim() > 1 else positions[None]).expand(len(query), -1)
        build = module.indexer.build_block_mask
        mask = build(blocks, mask, keys, query.dtype, query.device, positions)
    if indices is None:
        return mask
    # One column more takes what selects nothing.
    selected = indices.new_zeros(*indices.shape[:2], keys + 1, dtype=torch.bool)
    indices = torch.where(indices < 0, keys, indices).long()
    selected = selected.scatter(-1, indices, torch.ones_like(indices, dtype=torch.bool))
    selected = selected[:, None, :, :-1]
    if mask is None or mask.dtype == torch.bool:
        return selected if mask is None else mask & selected
    return mask.masked_fill(~selected, torch.finfo(mask.dtype).min)


def _rows(tensor, block):
    """The block's rows of something that broadcasts to `[B, H, Tq, x]`."""
    return tensor if tensor is None or tensor.shape[-2] == 1 else tensor[..., block, :]


def gravity_mask(*, dtype=torch.float32, config=None, **request):
    """The additive mask of eager attention; a boolean one for hosts that can read no other."""
    model_type = (getattr(config, "model_type", None) or "").removeprefix("gravity_")
    if model_type in BOOLEAN_MASKS:
        return sdpa_mask(**{**request, "allow_is_causal_skip": False})
    # Hosts that have only token ids at hand name their dtype, which means nothing for scores.
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    return eager_mask(**request, dtype=dtype, config=config)


AttentionInterface.register(ATTENTION_NAME, gravity_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, gravity_mask)


@functools.cache
def _routes_through_interface(cls):
    if issubclass(cls, PreTrainedModel) or cls.__name__ in NO_HEADS:
        return False
    members = (m for base in cls.__mro__ if base is not nn.Module for m in vars(base).values())
    codes = [getattr(inspect.unwrap(m), "__code__", None) for m in members if callable(m)]
    codes = [code for code in codes if code is not None]
    codes += [c for code in codes for c in code.co_consts if isinstance(c, CodeType)]
    return any(_looks_up(code) for code in codes)


def _looks_up(code):
    """`getattr(registry, name, eager)` asks for an attribute that is never there."""
    if "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return False
    names = [step.argval for step in dis.get_instructions(code)]
    places = [i for i, name in enumerate(names) if name == "ALL_ATTENTION_FUNCTIONS"]
    return any(names[i - 1] != "getattr" for i in places)


def _head_counts(module):
    """`(query heads, key-value heads)`, found in the order in which the library looks for them."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    groups = _count(module, ("num_key_value_groups",)) or 0
    heads = (
        _count(module, HEAD_COUNT_NAMES)
        or _count(module, ("heads", "groups"))
        or _heads_by_width(module) * max(groups, 1)
        or _count(config, HEAD_COUNT_NAMES, layer)
    )
    if groups > 0:
        return heads, heads // groups
    return heads, _count(module, ("num_key_value_heads", "num_kv_heads")) or heads


def _heads_by_width(module):
    width = _count(module, ("head_dim",))
    projections = (getattr(module, name, None) for name in ("k_proj", "k_content_proj"))
    out = next(filter(None, (_count(x, ("out_features",)) for x in projections)), 0)
    return out // width if width and out % width == 0 else 0


def _count(owner, names, layer=None):
    values = (getattr(owner, name, None) for name in names)
    if layer is not None:
        values = (v[layer] if isinstance(v, list | tuple) and len(v) > layer else v for v in values)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _settings(config, owner):
    settings = getattr(config, "gravity", None)
    if not isinstance(settings, dict) or set(settings) - SETTINGS:
        raise ValueError(f"{owner}: expected config.gravity with keys {SETTINGS}, got {settings}")
    if (got := settings.get("version")) != VERSION:
        raise ValueError(f"{owner}: version {got}, expected {VERSION}: pip install -U gravity_hf")
    return settings


def _parts(config, values):
    """`config` and the configs of its parts, each with its own dict within `values`."""
    yield config, values
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), transformers.PreTrainedConfig):
            yield from _parts(part, values.get(name, {}))


def _mark(config, values, key):
    for _, part in _parts(config, values):
        part[key] = EXPORT_NAME
    return values


def _read(values):
    """What config.json says without the file of weights that it names to refuse other classes."""
    kept = {k: v for k, v in values.items() if (k, v) != (WEIGHTS_KEY, EXPORT_NAME)}
    return {k: _read(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _refuse_attention(owner, name, *allowed):
    if name not in allowed:
        raise ValueError(
            f"{type(owner).__name__}: expected no attn_implementation, got {name!r}: it would run "
            "dot products on weights made for gravity. Load the model without one"
        )


def _only_gravity(module, _):
    """Asked before each call of a converted module: anybody may write a name into a config."""
    _refuse_attention(module, module.config._attn_implementation, ATTENTION_NAME)


_building = threading.local()


class GravityHost:
    """First base of every `Gravity<Host>`: attaches the gravity modules, guards what is loaded."""

    def __init__(self, config, *args, **kwargs):
        if getattr(_building, "now", False):
            # A head's base model, built within it: the head sees to all of its modules.
            return super().__init__(config, *args, **kwargs)
        settings = _settings(config, type(self).__name__)
        # Runtimes with an attention of their own name it in the config of the text part alone.
        for part, _ in _parts(config, {}):
            defaults = () if part is config else ("eager", "sdpa")
            _refuse_attention(self, part._attn_implementation, *OURS, *defaults)
        # Not ours yet: towers with a class per attention name have none for this one.
        config._attn_implementation = None
        _building.now = True
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            _building.now = False
        configs = [getattr(m, "config", None) for m in self.modules()]
        configs = [c for c in configs if isinstance(c, transformers.PreTrainedConfig)]
        for part in configs:
            vars(part).pop("_attn_was_changed", None)  # left by transformers 5.17, and saved
        PreTrainedModel.set_attn_implementation(self, ATTENTION_NAME)
        # Parts may have copies of one config, which transformers does not reach.
        named = {type(c) for c in configs if c._attn_implementation == ATTENTION_NAME}
        for part in configs:
            if type(part) in named:
                part._attn_implementation_internal = ATTENTION_NAME
        sites = [m for m in self.modules() if _routes_through_interface(type(m))]
        layers = settings["layers"]
        for module in sites if layers is None else [sites[i] for i in layers]:
            module.gravity = GravityParameters(settings, *_head_counts(module))
            module.register_forward_pre_hook(_only_gravity)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Noted below: a host's own loader may give no loading info back.
        missing = model.__dict__.pop("_gravity_missing", None)
        if missing is None:
            raise RuntimeError(f"{cls.__name__}: expected to be told what is missing, was not")
        if missing := sorted(key for key in missing if ".gravity." in key):
            raise ValueError(f"{cls.__name__}: expected gravity tensors, got none: {missing[:3]}")
        return loaded

    @classmethod
    def _finalize_model_loading(cls, model, *args, **kwargs):
        found = super()._finalize_model_loading(model, *args, **kwargs)
        model.__dict__["_gravity_missing"] = found.missing_keys
        return found

    @classmethod
    def is_custom_code(cls):
        # transformers leaves buffers of custom code uninitialised that a host initialises.
        return cls.__mro__[cls.__mro__.index(GravityHost) + 1].is_custom_code()

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        _refuse_attention(self, attn_implementation, *OURS)


@functools.cache
def _config_class(host):
    model_type = "gravity_" + host.model_type
    _inherit_weight_conversions(host.model_type, model_type)

    def to_dict(self):
        values = host.to_dict(self)
        return values if torch.compiler.is_compiling() else _mark(self, values, ATTENTION_KEY)

    body = {"model_type": model_type, "__module__": __name__, "to_dict": to_dict}
    # What config.json is written from: no config in memory names a file of weights.
    body["to_diff_dict"] = lambda self: _mark(self, host.to_diff_dict(self), WEIGHTS_KEY)
    read = host.from_dict.__func__
    body["from_dict"] = classmethod(lambda cls, values, **kw: read(cls, _read(values), **kw))
    cls = type("Gravity" + host.__name__, (host,), body)
    base = _class_in(modeling_auto.MODEL_MAPPING, host)
    # A type without code of its own borrows the classes of another, which have another config.
    borrows = base is None or base.config_class is not host
    parts = (getattr(host, "sub_configs", None) or {}).values()
    for mapping in _auto_mappings():
        model = _class_in(mapping, host)
        lent = borrows and model is not None and model.config_class not in (host, *parts)
        # Heads on a base model ask AutoModel for one with their own config.
        if model is not None and (lent or mapping is modeling_auto.MODEL_MAPPING):
            mapping.register(cls, _model_class(model, cls), exist_ok=True)
    return cls


def _auto_mappings():
    autos = [getattr(auto, "_model_mapping", None) for auto in vars(modeling_auto).values()]
    return [mapping for mapping in autos if hasattr(mapping, "_model_mapping")]


def _class_in(mapping, host):
    """The model class that an Auto class has for a config class; None for none, or several."""
    try:
        model = mapping.get(host, None)
    except (ImportError, ValueError):  # named, and not there
        return None
    return model if isinstance(model, type) and issubclass(model, PreTrainedModel) else None


@functools.cache
def _model_class(host, config_class):
    name = "Gravity" + host.__name__
    _inherit_weight_conversions(host.__name__, name)
    keep = {*(getattr(host, "_keep_in_fp32_modules_strict", None) or ()), "gravity"}
    body = {"config_class": config_class, "_keep_in_fp32_modules_strict": keep}
    # Trainer's label smoothing shifts labels only for classes that it finds in these tables.
    for mapping in _auto_mappings():
        if _class_in(mapping, config_class.__base__) is host:
            mapping._model_mapping[config_class.model_type] = name
    return type(name, (GravityHost, host), {**body, "__module__": __name__})


def _inherit_weight_conversions(host, name):
    if (conversions := renamings.get_checkpoint_conversion_mapping(host)) is not None:
        renamings.register_checkpoint_conversion_mapping(name, conversions, overwrite=True)


def __getattr__(name):
    host = getattr(transformers, name.removeprefix("Gravity"), None)
    if name.startswith("Gravity") and isinstance(host, type):
        if issubclass(host, transformers.PreTrainedConfig):
            return _config_class(host)
        if issubclass(host, PreTrainedModel):
            return _model_class(host, _config_class(host.config_class))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
