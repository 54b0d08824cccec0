"""Factorised hosts on disk: `config.low_rank` names the maps, the weights are ordinary ones.

`{"version": 1, "ranks": {"model.layers.0.self_attn.q_proj": 12, ...}}`, and `q_proj.down.weight`,
`q_proj.up.weight`, `q_proj.up.bias` where there was `q_proj.weight`, `q_proj.bias`. The model type
is the host's. transformers alone would leave those maps at random values, so `config.json` names a
file of weights that cannot be: `from_pretrained` refuses the folder, and its error says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..layers.low_rank import LowRankLinear
from .guards import WEIGHTS_KEY
from .hosts import gravity_config_class
from .loading import model_class_of
from .own_models import read_config
from .sites import memoised

KEY = "low_rank"
VERSION = 1
# Where transformers looks for weights; its error quotes it.
REFUSAL = "factorised: load with gravity_hf.load_factorized"
# Modules that are added to a host, by the settings that tell of them: a load leaves them out, and
# `sparsify_attention(model)`, `sparsify_feed_forward(model)` read them afterwards.
_ADDED = {"sparse_attention": ".screening.", "sparse_feed_forward": ".predictor."}
_HUB_ARGUMENTS = (
    *("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder"),
)
_REFUSED = {
    "tp_plan": "two factors are not split over devices",
    "quantization_config": "quantised factors have not been tried",
    "state_dict": "the weights are those of the folder",
}


class FactorizedConfig:
    """First base of a factorised host's config: makes `config.json` say how to load the folder."""

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), WEIGHTS_KEY: REFUSAL}  # type: ignore[misc]

    def __reduce__(self) -> Any:
        # The class is made on demand, and has no name to be found by.
        order = type(self).__mro__
        at = order.index(FactorizedConfig)
        return _config_again, (order[at + 1], at > 1, self.__dict__.copy())


def save_factorized(model: PreTrainedModel, folder: str | os.PathLike[str], **kwargs: Any) -> Path:
    """`model.save_pretrained(folder)`, which is what a factorised model is saved with.

    Args:
        model: as `factorize` left it, trained further or not.
        folder: as in `save_pretrained`.
        **kwargs: for `save_pretrained`: `max_shard_size`, `push_to_hub`, ...

    Raises:
        ValueError: a model that is not factorised.
    """
    if not ranks_of(model.config):
        raise ValueError(
            f"save_factorized: expected a model after factorize(model), got {type(model).__name__} "
            "with dense maps. Save it with save_pretrained"
        )
    # `unpatch_gravity` gives a config the class that it had before it was factorised.
    mark_factorized(model, ranks_of(model.config))
    model.save_pretrained(folder, **kwargs)
    return Path(folder)


def load_factorized(name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """The model of a folder, or Hub repository, that holds a factorised host.

    Built without memory and filled from the file, as `from_pretrained` does it; every weight has to
    be there, and none may be left over.

    Args:
        name_or_path: local folder or Hub repository.
        **kwargs: for `from_pretrained`: `dtype`, `device_map`, `revision`, `token`, ...

    Returns:
        The host, in the class that wrote it, in evaluation.

    Raises:
        ValueError: no such folder, or weights that are missing, unknown or misshapen.
        NotImplementedError: `tp_plan`, `quantization_config`, `state_dict`.
    """
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"load_factorized cannot honour `{name}`: {reason}")
    where = os.fspath(name_or_path)
    if where.startswith((".", "/", "~")) and not os.path.isdir(where):
        raise ValueError(
            f"load_factorized: expected a model folder or a name on the Hub, there is no folder "
            f"{where!r}. Check the spelling"
        )
    want_info = kwargs.pop("output_loading_info", False)
    config = read_config(where, **{k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs})
    ranks = _read_ranks(where, config)
    if hasattr(config, WEIGHTS_KEY):
        delattr(config, WEIGHTS_KEY)
    loader = _loader_of(model_class_of(config), ranks)
    # What does not fit is told by all of its names below, as one error.
    kwargs.update(config=config, output_loading_info=True, ignore_mismatched_sizes=True)
    model, info = loader.from_pretrained(where, **kwargs)
    _check_complete(where, info, config)
    model.__class__ = loader.__mro__[1]
    mark_factorized(model, ranks)
    return (model, info) if want_info else model


def ranks_of(config: PreTrainedConfig) -> dict[str, int]:
    """By the name of the map; empty for a host that is not factorised."""
    block = getattr(config, KEY, None)
    return dict(block["ranks"]) if isinstance(block, Mapping) and "ranks" in block else {}


def mark_factorized(model: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    """Enter the ranks into the config, and let it refuse to be loaded without them."""
    config: Any = model.config
    if not ranks:
        return
    setattr(config, KEY, {"version": VERSION, "ranks": dict(ranks)})
    if not isinstance(config, FactorizedConfig):
        config.__class__ = factorized_config_class(type(config))


@memoised
def factorized_config_class(host: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`Factorized<Host>Config`, of the host's model type."""
    body = {"__module__": __name__}
    return type(f"Factorized{host.__name__}", (FactorizedConfig, host), body)


def replace_map(model: nn.Module, name: str, rank: int) -> LowRankLinear:
    """Put a `LowRankLinear` where a linear map is; it keeps the bias, and all else is unset."""
    old: Any = model.get_submodule(name)
    in_features, out_features = widths_of(old)
    kind = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = LowRankLinear(in_features, out_features, rank, bias=old.bias is not None, **kind)
    if old.bias is not None:
        new.up.bias = old.bias
    for parameter in (new.down.weight, new.up.weight):
        parameter.requires_grad_(old.weight.requires_grad)
    model.set_submodule(name, new.train(old.training))
    return new


def widths_of(module: nn.Module) -> tuple[int, int]:
    """`in`, `out` of an `nn.Linear` or a `Conv1D`."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features  # type: ignore[return-value]


def _loader_of(host: type[PreTrainedModel], ranks: Mapping[str, int]) -> Any:
    """The host's class, with maps replaced as soon as it is built: before weights are read."""

    def build(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        host.__init__(self, config, *args, **kwargs)
        _check_names(self, ranks)
        for name, rank in ranks.items():
            replace_map(self, name, rank)

    # By the host's own name and place: transformers has tables by the names of classes, and
    # treats classes of other packages in another way.
    body = {"__init__": build, "__module__": host.__module__, "__qualname__": host.__qualname__}
    return type(host.__name__, (host,), body)


def _check_names(model: nn.Module, ranks: Mapping[str, int]) -> None:
    found = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    unknown = [name for name in ranks if name not in found]
    if unknown:
        raise ValueError(
            f"config.{KEY}: expected names of linear maps of {type(model).__name__}, got "
            f"{unknown[:4]}. The config belongs to another model"
        )


def _read_ranks(where: str, config: PreTrainedConfig) -> dict[str, int]:
    block: Any = getattr(config, KEY, None)
    if block is None:
        raise ValueError(
            f"{where}: expected a model that factorize(model) made, got a plain "
            f"{config.model_type}, without config.{KEY}. Load it with its Auto class"
        )
    ranks = block.get("ranks") if isinstance(block, Mapping) else None
    fits = isinstance(ranks, Mapping) and all(
        isinstance(n, str) and isinstance(r, int) and r >= 1 for n, r in ranks.items()
    )
    if not fits or not ranks or block.get("version") != VERSION:
        raise ValueError(
            f"{where}: config.{KEY}: expected version {VERSION} and ranks by name, got {block!r}. "
            "The config is damaged, or of a later gravity_hf"
        )
    return dict(ranks)


def _check_complete(where: str, info: Mapping[str, Any], config: PreTrainedConfig) -> None:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info.get(kind) or ())) for kind in kinds}
    added = [part for key, part in _ADDED.items() if getattr(config, key, None) is not None]
    left = wrong["unexpected_keys"]
    wrong["unexpected_keys"] = [key for key in left if not any(part in key for part in added)]
    problems = [f"{kind.replace('_', ' ')} {names[:3]}" for kind, names in wrong.items() if names]
    if problems:
        raise ValueError(
            f"{where}: expected the weights that config.{KEY} describes, got {', '.join(problems)}."
            " The folder is incomplete, or its config belongs to another one"
        )


def _config_again(
    host: type[PreTrainedConfig], patched: bool, values: dict[str, Any]
) -> PreTrainedConfig:
    """`patched`: with gravity, after it was factorised."""
    own = factorized_config_class(host)
    cls = gravity_config_class(own) if patched else own
    config: PreTrainedConfig = object.__new__(cls)
    config.__dict__.update(values)
    return config
