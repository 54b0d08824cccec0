"""A name that transformers accepts where it takes no other, lent to gravity for a while.

Continuous batching has a closed list of attention names. `"paged|eager"` is the one that every
supported version leaves as it is: masks are made for it, and no flash kernel is put in its place.
While models are served their configs carry that name, and what is registered under it asks whose
call it is: served models get gravity, all others what was registered before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .implementations import ATTENTION_NAME
from .masks import gravity_mask

CARRIER_NAME = "paged|eager"

Function = Callable[..., Any]


@dataclass
class _Served:
    """A config that reads `CARRIER_NAME` now, and how many open contexts want it to."""

    config: PreTrainedConfig  # held, so that its id stays its own
    contexts: int = 0


@dataclass
class _Carrier:
    """Whose configs carry the name, and what stands and stood under it. Changed under the lock."""

    served: dict[int, _Served] = field(default_factory=dict)
    gravity: Function | None = None
    attention: Function | None = None
    mask: Function | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


_carrier = _Carrier()


@contextmanager
def carried(configs: Iterable[PreTrainedConfig], gravity: Function) -> Iterator[None]:
    """Let attention modules with these config objects call `gravity` under `CARRIER_NAME`.

    Contexts may be nested and may overlap in threads; the last one that wants a config gives it its
    own name back, the last of all restores the registries.
    """
    wanted = list({id(config): config for config in configs}.values())  # each once
    with _carrier.lock:
        _open(wanted, gravity)
    try:
        yield
    finally:
        with _carrier.lock:
            _close(wanted)


def is_served(config: object) -> bool:
    """Whether attention modules with this config object run gravity under `CARRIER_NAME`."""
    return id(config) in _carrier.served


def _open(configs: list[PreTrainedConfig], gravity: Function) -> None:
    if not _carrier.served:
        _carrier.gravity = gravity
        _carrier.attention = ALL_ATTENTION_FUNCTIONS[CARRIER_NAME]
        _carrier.mask = ALL_MASK_ATTENTION_FUNCTIONS.get(CARRIER_NAME)
        AttentionInterface.register(CARRIER_NAME, _attend)
        AttentionMaskInterface.register(CARRIER_NAME, _mask)
    for config in configs:
        _carrier.served.setdefault(id(config), _Served(config)).contexts += 1
        # Not the public setter: it would write the name into sub-configs that are not patched.
        config._attn_implementation_internal = CARRIER_NAME


def _close(configs: list[PreTrainedConfig]) -> None:
    for config in configs:
        served = _carrier.served[id(config)]
        served.contexts -= 1
        if served.contexts:
            continue
        del _carrier.served[id(config)]
        # A model that was unpatched meanwhile has its host's name back already.
        if config._attn_implementation_internal == CARRIER_NAME:
            config._attn_implementation_internal = ATTENTION_NAME
    if not _carrier.served:
        _restore_registries()


def _restore_registries() -> None:
    AttentionInterface.register(CARRIER_NAME, _carrier.attention)
    if _carrier.mask is None:
        # The interface has no public way back from `register`.
        AttentionMaskInterface._global_mapping.pop(CARRIER_NAME, None)
    else:
        AttentionMaskInterface.register(CARRIER_NAME, _carrier.mask)


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The attention function under `CARRIER_NAME` while models are served."""
    served = is_served(getattr(module, "config", None))
    function = _carrier.gravity if served else _carrier.attention
    return function(module, *args, **kwargs)  # type: ignore[misc]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function beside it. Paged calls bring their own mask and do not come here."""
    if is_served(kwargs.get("config")):
        return gravity_mask(*args, **kwargs)
    # transformers makes no mask where no function is registered.
    return None if _carrier.mask is None else _carrier.mask(*args, **kwargs)
