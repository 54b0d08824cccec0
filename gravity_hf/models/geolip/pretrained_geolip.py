"""What all geolip models share: initial weights, and what stays float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ...layers.float32 import widen
from .coders import RowOutput, ZeroConvolution
from .configuration_geolip import GeolipConfig
from .gravity import SpectralGravity
from .lens import Lens, check_isometry
from .spectral import SpectralLayer

_HALF = (torch.float16, torch.bfloat16)


class GeolipPreTrainedModel(PreTrainedModel):
    """Initial weights and precision of a geolip. Its own buffers stay float32, as the spectral
    layers and the lens do, in models of half precision."""

    config: GeolipConfig
    config_class = GeolipConfig
    base_model_prefix = "geolip"
    main_input_name = "patches"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "SpectralLayer"]
    # Expressions, searched for in names.
    _keep_in_fp32_modules_strict = [
        *(r"spectral\.layers", r"lens\.basis", "codebook", "feature_mean", "feature_std"),
        *("feature_whitening", "feature_unwhitening"),
    ]
    _supports_sdpa = True

    def post_init(self) -> None:
        widen(self)
        super().post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **options: Any
    ) -> Any:
        """As of any model.

        Raises:
            ValueError: weights of the lens that are no isometry.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, Lens):
                check_isometry(module)
        return loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `half`, `bfloat16` call; buffers of the model itself are moved only."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None:
                continue
            if new.dtype in _HALF and old.dtype not in _HALF:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    def initial_buffers(self) -> dict[str, Tensor]:
        """Of a new model's own buffers, on the CPU, by their names."""
        return {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RowOutput):
            init.orthogonal_(module.weight)
            _as_torch(module.bias, module.in_features)
        elif isinstance(module, ZeroConvolution):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            inputs = module.weight[0].numel()
            _as_torch(module.weight, inputs)
            _as_torch(module.bias, inputs)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SpectralLayer):
            init.constant_(module.alpha_logits, module.alpha_init)
        elif isinstance(module, SpectralGravity):
            for name, value in module.initial_values().items():
                init.copy_(getattr(module, name), value)
        elif isinstance(module, Lens):
            init.copy_(module.basis, module.start())
        elif isinstance(module, GeolipPreTrainedModel):
            for name, value in module.initial_buffers().items():
                init.copy_(getattr(module, name), value)


def _as_torch(values: Tensor, inputs: int) -> None:
    """As torch makes linear maps and convolutions."""
    init.uniform_(values, -(inputs**-0.5), inputs**-0.5)
