"""Sparse feed-forward layers in any transformers model that has gate, up and down maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..layers.neuron_order import restore_order
from ..layers.sparse_feed_forward import POLICIES, SparseFeedForward
from .extras import read_extras
from .gated_layers import MAPS, gated_layers, sparse_over, what_it_has
from .own_models import is_own_model
from .patching import refuse_wrapped

Model = TypeVar("Model", bound=PreTrainedModel)

# Attribute of a model's config, hence key in its `config.json`.
SETTINGS_KEY = "sparse_feed_forward"
# Where the host's own layer is kept, for `densify_feed_forward`: not a child, so its maps have one
# name only.
_HOST = "host_layer"
# Attribute of a layer whose predictor is not fitted yet: its policy afterwards.
_PENDING = "pending_policy"
# Beside the settings in a config: names of such layers.
_UNFITTED = "unfitted"


@dataclass(frozen=True)
class FeedForwardSettings:
    """block_size: neurons of a block; sparsity: share of the blocks that a token leaves out;
    gate_rank: of the predictors."""

    block_size: int = 64
    sparsity: float = 0.8
    gate_rank: int = 16


class _Plan(NamedTuple):
    """Everything that can fail, done beforehand: new layers by the names of the old ones."""

    settings: FeedForwardSettings
    layers: dict[str, SparseFeedForward]


def sparsify_feed_forward(
    model: Model,
    *,
    block_size: int | None = None,
    sparsity: float | None = None,
    gate_rank: int | None = None,
    policy: str = "block",
) -> Model:
    """Let each token use some blocks of neurons of every gated feed-forward layer, in place.

    >>> sparsify_feed_forward(model, block_size=64, sparsity=0.8)
    >>> calibrate_blocks(model, batches)
    >>> fit_predictors(model, batches)

    A layer becomes a `SparseFeedForward` over the same maps, under the same names, with a child
    `predictor`. A new predictor would choose at random, so the layers stay dense until
    `fit_predictors` has fitted them. `save_pretrained` writes predictors among the weights, which a
    plain load leaves out with a warning, and settings into `config.sparse_feed_forward`; after
    loading, `sparsify_feed_forward(model)` reads both. Layers that were saved before they were
    fitted stay dense then, too.

    Args:
        model: with layers `down_proj(activation(gate_proj(x)) * up_proj(x))`: Llama, Qwen2, Qwen3,
            Mistral, Gemma, OLMo and others; each layer is tried out before anything is changed.
            Quantized maps, and those that LoRA adapts later, are masked, not skipped.
        block_size, sparsity, gate_rank: see `FeedForwardSettings`; where all three are None, those
            of the checkpoint, or the defaults.
        policy: "block", "masked" or "dense", once the predictors are fitted or read.

    Returns:
        The same object. Calling it again with the same settings sets the policy and no more.

    Raises:
        TypeError: no transformers model, or one of this library's own.
        ValueError: no such layers; settings that do not fit; predictors that the checkpoint lacks.
        RuntimeError: under LoRA, compiled, wrapped or dispatched over devices; sparse already with
            other settings.
    """
    if policy not in POLICIES:
        raise ValueError(
            f"sparsify_feed_forward: policy: expected one of {', '.join(POLICIES)}, got {policy!r}"
        )
    wanted: dict[str, Any] = {
        "block_size": block_size,
        "sparsity": sparsity,
        "gate_rank": gate_rank,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    saved = feed_forward_settings(model)
    settings = saved if saved and not given else FeedForwardSettings(**given)
    current = sparse_layers(model)
    if current:
        _refuse_other(settings, saved)
        _set_policies(current, policy)
        return model
    plan = _plan(model, settings, policy, restored=saved is not None and not given)
    for name, layer in plan.layers.items():
        model.set_submodule(name, layer)
    waiting = [name for name, layer in plan.layers.items() if _PENDING in vars(layer)]
    setattr(model.config, SETTINGS_KEY, {**asdict(plan.settings), _UNFITTED: waiting})
    return model


def densify_feed_forward(model: Model) -> Model:
    """Undo `sparsify_feed_forward`: the host's own layers, neurons in the host's order.

    Raises:
        RuntimeError: the model is not sparse, or is wrapped.
    """
    refuse_wrapped(model, "densify_feed_forward", "first model.unload() or merge_and_unload()")
    layers = sparse_layers(model)
    if not layers or is_own_model(model):
        raise RuntimeError(
            "densify_feed_forward: expected a model made sparse by sparsify_feed_forward, got "
            f"{type(model).__name__}, which is not"
        )
    for name, layer in layers.items():
        (host,) = vars(layer)[_HOST]
        restore_order(layer)
        for part in MAPS:
            setattr(host, part, getattr(layer, part))
        model.set_submodule(name, host.train(layer.training))
    vars(model.config).pop(SETTINGS_KEY, None)
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseFeedForward]:
    """By name, those of a LeanFormer too."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseFeedForward)}


def mark_fitted(model: nn.Module, names: Iterable[str]) -> None:
    """Layers that were waiting for their predictors go over to the policy that they were given, and
    the config of the host notes it. `names`: of layers of `model`, under an adapter's, too."""
    layers, names = sparse_layers(model), tuple(names)
    for name in names:
        pending = vars(layers[name]).pop(_PENDING, None)
        if pending is not None:
            layers[name].policy = pending
    values = getattr(getattr(model, "config", None), SETTINGS_KEY, None)
    if values is not None:
        # The names of an adapted model end with the host's.
        left = [
            name
            for name in values.get(_UNFITTED, ())
            if not any(f".{fitted}".endswith(f".{name}") for fitted in names)
        ]
        setattr(model.config, SETTINGS_KEY, {**values, _UNFITTED: left})


def feed_forward_settings(model: nn.Module) -> FeedForwardSettings | None:
    """What the config says; None where it says nothing.

    Raises:
        ValueError: names that there are not.
    """
    values = getattr(getattr(model, "config", None), SETTINGS_KEY, None)
    if values is None:
        return None
    known = {field.name for field in fields(FeedForwardSettings)}
    if not isinstance(values, Mapping) or set(values) - known - {_UNFITTED}:
        raise ValueError(
            f"config.{SETTINGS_KEY}: expected {sorted(known)}, got {values!r}. The config is "
            "damaged, or of a later gravity_hf"
        )
    return FeedForwardSettings(**{name: values[name] for name in known & set(values)})


def _plan(model: Any, settings: FeedForwardSettings, policy: str, *, restored: bool) -> _Plan:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"sparsify_feed_forward: expected a transformers PreTrainedModel, got {name}. Load it "
            "with from_pretrained of an Auto class"
        )
    if is_own_model(model):
        raise TypeError(
            f"sparsify_feed_forward: expected a host from transformers, got {name}, one of this "
            "library's own. Of a LeanFormer set feed_forward_policy in its config"
        )
    refuse_wrapped(
        model,
        "sparsify_feed_forward",
        "expected this order: load, sparsify_feed_forward, fit_predictors, LoRA, then compile",
    )
    hosts = gated_layers(model)
    if not hosts:
        raise ValueError(
            f"sparsify_feed_forward: expected layers with {', '.join(MAPS)}, got {name} "
            f"{what_it_has(model)}. Llama, Qwen2, Qwen3, Mistral and Gemma have them"
        )
    layers = {}
    for where, host in hosts.items():
        layers[where] = sparse_over(where, host, asdict(settings), model.dtype)
        layers[where].policy = policy
        vars(layers[where])[_HOST] = (host,)
    waiting = set(layers)
    if restored:
        _read_predictors(model, layers)
        waiting &= set(getattr(model.config, SETTINGS_KEY).get(_UNFITTED, ()))
    for name in waiting:
        vars(layers[name])[_PENDING], layers[name].policy = policy, "dense"
    return _Plan(settings, layers)


def _read_predictors(model: PreTrainedModel, layers: Mapping[str, SparseFeedForward]) -> None:
    where = getattr(model, "name_or_path", "") or ""
    states = {
        f"{name}.predictor.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.predictor.state_dict().items()
    }
    saved = read_extras(where, states)
    missing = sorted(set(states) - set(saved))
    wrong = sorted(key for key, tensor in saved.items() if tensor.shape != states[key].shape)
    if missing or wrong:
        raise ValueError(
            f"sparsify_feed_forward: expected the predictors of {len(layers)} layers in {where!r}, "
            f"as config.{SETTINGS_KEY} has them, got {len(missing)} missing and {len(wrong)} of "
            f"other sizes, such as {(missing + wrong)[0]}. Give a block_size to begin anew"
        )
    for key, tensor in saved.items():
        states[key].copy_(tensor)


def _refuse_other(settings: FeedForwardSettings, saved: FeedForwardSettings | None) -> None:
    if settings != saved:
        raise RuntimeError(
            f"sparsify_feed_forward: sparse already with {saved}, asked for {settings}. Call "
            "densify_feed_forward(model) first"
        )


def _set_policies(layers: Mapping[str, SparseFeedForward], policy: str) -> None:
    for layer in layers.values():
        if _PENDING in vars(layer):
            vars(layer)[_PENDING] = policy
        else:
            layer.policy = policy
