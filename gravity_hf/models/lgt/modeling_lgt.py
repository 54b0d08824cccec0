"""The Lightweight Gravitational Transformer as transformers models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from ...layers.float32 import Float32, widen
from ...layers.positions import CurvedPositionEmbedding, FractalPositionEmbedding
from ..checkpointing import refuse_reentrant
from ..placing import CACHE_FIELD, documents_of
from ..visibility import is_traced
from .attention import LGTAttention, LGTGravity
from .block import LGTBlock
from .configuration_lgt import LGTConfig
from .geometry import Geometry, TableCache, geometry_of_places, geometry_of_positions
from .growing import add_layer
from .law import Law
from .placing import Tokens, place_tokens

# Gain of every linear map of a new model, as published.
_GAIN = 0.1


@dataclass
class LGTModelOutput(BaseModelOutputWithPast):
    """`masses`: of the tokens, one `[B, H, T]` per layer, where `output_masses` asks.

    `hidden_states`: the embeddings, then what each layer gives, the last one after the final norm.
    """

    masses: tuple[Tensor, ...] | None = None


class LGTCurvedPositions(Float32, CurvedPositionEmbedding):
    """Curved positions, float32 in models of half precision."""


class LGTFractalPositions(Float32, FractalPositionEmbedding):
    """Fractal positions, float32 in models of half precision."""


class LGTPreTrainedModel(PreTrainedModel):
    """What all LGT models share: initial weights, precision, and how they grow."""

    config: LGTConfig
    config_class = LGTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LGTBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["gravity", "pos_embedding"]
    _supports_sdpa = True
    _supports_flex_attn = True

    @property
    def curvature(self) -> float:
        """Of the distance, in all layers. Setting it changes what the model computes at once."""
        return float(self.config.curvature)

    @curvature.setter
    def curvature(self, value: float) -> None:
        previous = self.config.curvature
        self.config.curvature = float(value)
        try:
            self.config.validate_architecture()
        except ValueError:
            self.config.curvature = previous
            raise

    def add_layer(self) -> LGTBlock:
        """Grow by one layer without changing what the model computes; see `growing.add_layer`."""
        block = LGTBlock(self.config, len(self.base_model.layers))
        return add_layer(self, block)

    def post_init(self) -> None:
        widen(self)
        super().post_init()

    def _set_gradient_checkpointing(self, *args: Any, **options: Any) -> None:
        refuse_reentrant(args, options)
        super()._set_gradient_checkpointing(*args, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight, gain=_GAIN)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # A tied model's logits would start at the size of sqrt(d) with entries of size 1.
            init.normal_(module.weight, std=self._embedding_std())
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LGTGravity):
            init.copy_(module.G, module.initial_constants(config))
            # Each row is a map of its own from h channels to one mass.
            bound = _GAIN * (6 / (module.width + 1)) ** 0.5
            init.uniform_(module.mass_proj.weight, -bound, bound)
        elif isinstance(module, LGTAttention) and module.v_proj is not None:
            # At the usual gain attention would start a tenth as strong as without a projection.
            init.xavier_uniform_(module.v_proj.weight)
        elif isinstance(module, CurvedPositionEmbedding):
            init.normal_(module.positions, std=0.02)
            init.constant_(module.curvature_scale, float(config.curvature))
        elif isinstance(module, FractalPositionEmbedding):
            init.ones_(module.scale)
            init.constant_(module.curvature, 0.1)
            init.copy_(module.basis, module.compute_basis())
            if module.residual is not None:
                init.zeros_(module.residual)

    def _embedding_std(self) -> float:
        return self.config.initializer_range if self.config.tie_word_embeddings else 1.0


class LGTModel(LGTPreTrainedModel):
    """LGT without a head: token ids, or `inputs_embeds` for continuous inputs.

    State: `embed_tokens.weight` `[V, d]` unless `vocab_size` is None; `pos_embedding.*`;
    `layers.{i}.attn.gravity.{G, mass_proj.weight}`, `layers.{i}.attn.out_proj.weight`,
    `layers.{i}.{fc1, fc2, norm1, norm2}.*`; `norm.*`.
    """

    def __init__(self, config: LGTConfig) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            self.embed_tokens = None
            self.main_input_name = "inputs_embeds"
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_embedding = _positions(config)
        blocks = [LGTBlock(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self._tables = TableCache()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def train(self, mode: bool = True) -> LGTModel:
        if mode:
            self._tables.clear()
        return super().train(mode)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_masses: bool = False,
        cache: Cache | None = None,
    ) -> LGTModelOutput:
        """Hidden states `[B, T, d]` after the final norm.

        Args:
            input_ids: `[B, T]`, or else
            inputs_embeds: `[B, T, d]`.
            attention_mask: `[B, T]`, with a cache `[B, cached + T]`, 0 for padding on either side;
                or `[B, 1, T, Tk]`, which decides alone who sees whom.
            position_ids: `[B, T]`. None: tokens are counted, padding left out. Without a cache they
                may start again within a row, each time with a new document; no cache is made then.
            past_key_values, cache: a `DynamicCache` or `StaticCache` (two names of one argument).
                Of a causal model.
            positions: the tokens' points themselves, `[T, P]` or `[B, T, P]`, in place of those of
                the model; not with a cache.
            output_masses: also return the tokens' masses.

        Raises:
            ValueError: inputs that do not fit, or more positions than the model has.
        """
        config = self.config
        embeds = self._embed(input_ids, inputs_embeds)
        keep = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attend = config.output_attentions if output_attentions is None else output_attentions
        cache = cache if cache is not None else past_key_values
        if cache is not None:
            cache = self._checked(cache)
        packed = documents_of(position_ids, attention_mask, cache, *embeds.shape[:2])
        one = packed is None or is_traced()
        if cache is None and positions is None and one and self._starts_cache(use_cache):
            cache = DynamicCache(config=config)
        law = Law.of(config)
        tokens = place_tokens(law, embeds, attention_mask, position_ids, cache, packed)
        geometry = self._geometry(law, tokens, positions, embeds, attend, cache)

        hidden, kept, weights, masses = embeds, [embeds], [], []
        for layer in self.layers:
            hidden, weight, mass = layer(
                hidden, geometry, law, cache=cache, output_attentions=bool(attend)
            )
            kept.append(hidden)
            weights.append(weight)
            masses.append(mass)
        hidden = self.norm(hidden)
        kept[-1] = hidden
        return LGTModelOutput(
            last_hidden_state=hidden,
            hidden_states=tuple(kept) if keep else None,
            attentions=tuple(weights) if attend else None,
            masses=tuple(masses) if output_masses else None,
            **{CACHE_FIELD: cache},
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LGTModel: expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds: expected [B, T, {self.config.hidden_size}], got "
                    f"{tuple(inputs_embeds.shape)}"
                )
            return inputs_embeds
        if self.embed_tokens is None:
            raise ValueError(
                "input_ids: expected inputs_embeds [B, T, d], as this model has no vocabulary "
                "(vocab_size is None), got token ids"
            )
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids: expected integers [B, T], got {input_ids.dtype} "
                f"{tuple(input_ids.shape)}"
            )
        return self.embed_tokens(input_ids.long())

    def _checked(self, cache: Cache) -> Cache | None:
        """A cache that can be gone on with; None where there is no layer to keep anything of."""
        if not self.config.is_causal:
            raise ValueError(
                "past_key_values: expected none, as config.is_causal is False: every new token "
                f"changes what the earlier ones are, got a {type(cache).__name__}. Give the whole "
                "text each time"
            )
        return cache if len(self.layers) else None

    def _starts_cache(self, use_cache: bool | None) -> bool:
        if not (self.config.is_causal and len(self.layers)):
            return False
        if self.gradient_checkpointing and self.training:
            return False
        return (self.config.use_cache and not self.training) if use_cache is None else use_cache

    def _geometry(
        self,
        law: Law,
        tokens: Tokens,
        positions: Tensor | None,
        embeds: Tensor,
        output_attentions: bool,
        cache: Cache | None,
    ) -> Geometry:
        if positions is not None:
            length = embeds.shape[1]
            fits = positions.dim() in (2, 3) and positions.shape[-2] == length
            if cache is not None or not fits or positions.shape[:-2] not in ((), embeds.shape[:1]):
                got = "a cache beside them" if cache is not None else tuple(positions.shape)
                raise ValueError(
                    f"positions: expected [{length}, P] or [{embeds.shape[0]}, {length}, P] and no "
                    f"cache, got {got}"
                )
            return geometry_of_positions(positions, law, tokens.visible, embeds, output_attentions)
        needs_gradient = torch.is_grad_enabled() and any(
            x.requires_grad for x in self.pos_embedding.parameters()
        )
        fixed = not (self.training or needs_gradient or is_traced())
        return geometry_of_places(
            self.pos_embedding,
            self._tables if fixed else None,
            law,
            tokens,
            embeds,
            output_attentions,
        )


def _positions(config: LGTConfig) -> nn.Module:
    length, width = config.max_position_embeddings, config.dim_position
    if config.position_type == "curved":
        return LGTCurvedPositions(length, width, float(config.curvature))
    return LGTFractalPositions(
        length,
        width,
        num_scales=config.num_scales,
        fractal_dim=float(config.fractal_dim),
        base_freq=float(config.base_freq),
        scale_factor=float(config.scale_factor),
        learnable_residual=config.learnable_residual,
    )
