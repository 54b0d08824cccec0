"""Initial weights and precision of priors over codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ...layers.float32 import Float32, widen
from .configuration_prior import GeolipPriorConfig


class FrameScale(Float32):
    """Mean and deviation of the frames' coordinates, each `[V, d]`; float32 in every model."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_rows: int, base_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_rows, base_dim))
        self.register_buffer("std", torch.ones(num_rows, base_dim))


class GeolipPriorPreTrainedModel(PreTrainedModel):
    """Initial weights of priors: as torch makes them; the last map starts as zero."""

    config: GeolipPriorConfig
    config_class = GeolipPriorConfig
    base_model_prefix = "prior"
    main_input_name = "frames"
    _no_split_modules = ["TransformerEncoderLayer"]
    _keep_in_fp32_modules_strict = ["scale"]

    def post_init(self) -> None:
        widen(self)
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "proj_out", None):
            # A new prior guesses each coordinate by itself.
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=float(self.config.initializer_range))
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, FrameScale):
            init.zeros_(module.mean)
            init.ones_(module.std)


__all__ = ["FrameScale", "GeolipPriorPreTrainedModel"]
