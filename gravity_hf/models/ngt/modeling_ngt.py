"""The Newton Gravity Transformer, and its twins, as transformers models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from ...layers.float32 import widen
from ...ops.reference import compute_dtype
from ..checkpointing import refuse_reentrant
from ..implementations import implementation_of
from ..placing import CACHE_FIELD, documents_of
from ..visibility import is_traced
from .attention import NGTAttention
from .block import NGTBlock
from .configuration_ngt import NGTConfig
from .coordinates import (
    CoordinateTable,
    Geometry,
    MassEmbedding,
    normalised,
    sinusoids,
)
from .gravity import MASS_FLOOR, NGTGravity
from .placing import Inputs, Limits, cropped, place_tokens

# softplus of it is 1: the mass of a token type that nothing is known of.
MASS_OF_ONE = math.log(math.expm1(1.0))
# Of a twin's sinusoids, the usual one.
_TWIN_BASE = 10000.0


@dataclass
class NGTModelOutput(BaseModelOutputWithPast):
    """What `output_coordinates` asks for, float32 or more:

    coordinates: `[B, T, C]` after the last layer; where it moves none, those it attended with.
    layer_coordinates: those that the first layer attends with, then those after each layer.
    masses: `[B, T]` of the tokens; ones in a model without masses.

    `hidden_states`: the embeddings, then what each layer gives, the last one after the final norm.
    """

    coordinates: Tensor | None = None
    layer_coordinates: tuple[Tensor, ...] | None = None
    masses: Tensor | None = None


class NGTPreTrainedModel(PreTrainedModel):
    """What all NGT models share: initial weights, precision, and vocabularies that grow."""

    config: NGTConfig
    config_class = NGTConfig
    base_model_prefix = "model"
    _input_embed_layer = "token_emb"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NGTBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # Expressions, searched for in names.
    _keep_in_fp32_modules_strict = [
        *(r"\.gravity\.", "mass_emb", "coord_emb", "coord_norm", r"\.coord_proj\."),
        "anchor_proj",
    ]
    _supports_sdpa = True

    def post_init(self) -> None:
        widen(self)
        super().post_init()

    def _set_gradient_checkpointing(self, *args: Any, **options: Any) -> None:
        refuse_reentrant(args, options, "the masses")
        super()._set_gradient_checkpointing(*args, **options)

    def _resize_token_embeddings(self, new_num_tokens: int, *args: Any, **options: Any) -> Any:
        embeddings = super()._resize_token_embeddings(new_num_tokens, *args, **options)
        model = self.base_model
        if model.mass_emb is not None:
            model.mass_emb = _resized(model.mass_emb, embeddings.weight.shape[0])
        return embeddings

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in transformers; then the maps of keys that start as those of queries."""
        maps: list[nn.Linear] = []
        own = self.config.key_heads * self.config.head_coord_dim
        if own and self.config.shared_start:
            layers = [m for m in self.modules() if isinstance(m, NGTAttention)]
            maps = [each for layer in layers for each in layer.maps()]
        fresh = [each for each in maps if not getattr(each, "_is_hf_initialized", False)]
        weights = [weight for each in fresh for weight in each.parameters(recurse=False)]
        weights = [weight for weight in weights if not getattr(weight, "_is_hf_initialized", False)]
        super().initialize_weights()
        for weight in weights:
            weight[-own:].copy_(weight[:own])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, nn.Linear):
            # As torch makes it.
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, CoordinateTable):
            if config.coordinate_positions == "learned_sinusoidal":
                init.copy_(module.weight, module.sinusoids(float(config.position_base)))
            else:
                init.normal_(module.weight)
        elif isinstance(module, MassEmbedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=float(config.initializer_range))
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, NGTGravity):
            for name, value in module.initial_values(config).items():
                init.copy_(getattr(module, name), value)


class NGTModel(NGTPreTrainedModel):
    """NGT without a head, or with `config.attention="dot_product"` its twin.

    State: `token_emb.weight` `[V, D]`; `mass_emb.weight` `[V, 1]`; `coord_emb.weight` `[L, C]`
    where positions are learned; `content.weight` `[C, D]`; `layers.{i}.attn.*`, see
    `NGTAttention` and `NGTGravity`; `layers.{i}.{coord_proj_next, coord_proj_hidden, coord_norm,
    norm1, norm2, fc1, fc2}.*`; `norm.*`. Of a twin `pos_emb.weight` `[L, D]` instead of masses and
    coordinates.
    """

    def __init__(self, config: NGTConfig) -> None:
        super().__init__(config)
        width, places = config.coord_dim, config.max_position_embeddings
        own = not config.is_twin
        table = config.has_position_table
        self.token_emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mass_emb = MassEmbedding(config.vocab_size, 1) if own and config.token_masses else None
        self.coord_emb = CoordinateTable(places, width) if own and table else None
        self.pos_emb = nn.Embedding(places, config.hidden_size) if table and not own else None
        reads_content = own and config.content_coordinates
        self.content = nn.Linear(config.hidden_size, width, bias=False) if reads_content else None
        self.layers = nn.ModuleList(NGTBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self._limits = Limits.of(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_coordinates: bool = False,
        cache: Cache | None = None,
    ) -> NGTModelOutput:
        """Hidden states `[B, T, D]` after the final norm.

        Args:
            input_ids: `[B, T]`, or else
            inputs_embeds: `[B, T, D]`, whose masses are 1, as no token type is known.
            attention_mask: `[B, T]`, with a cache `[B, cached + T]`, 0 for padding on either side;
                or `[B, 1, T, Tk]`, which decides alone who sees whom.
            position_ids: `[B, T]`. None: tokens are counted, padding left out. Without a cache they
                may start again within a row, each time with a new document; no cache is made then.
            past_key_values, cache: a `DynamicCache` or `StaticCache` (two names of one argument).
            output_coordinates: also return coordinates and masses.

        Raises:
            ValueError: inputs that do not fit, or more positions than the model has.
        """
        config = self.config
        keep = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attend = config.output_attentions if output_attentions is None else output_attentions
        cache = cache if cache is not None else past_key_values
        inputs = Inputs(input_ids, inputs_embeds, attention_mask, position_ids)
        self._check(inputs, output_coordinates)
        if self._is_too_long(inputs, cache):
            inputs = cropped(inputs, self._limits.crop)
        ids, embeds, mask, places = inputs
        embeds = self.token_emb(ids.long()) if embeds is None else embeds
        packed = documents_of(places, mask, cache, *embeds.shape[:2])
        if cache is None and (packed is None or is_traced()) and self._starts_cache(use_cache):
            cache = DynamicCache(config=config)
        tokens = place_tokens(self._limits, embeds, mask, places, cache, packed)
        hidden, geometry = self._start(ids, embeds, tokens.places)

        kept, weights, coordinates = [hidden], [], []
        for layer in self.layers:
            if geometry is not None:
                coordinates.append(geometry.coordinates)
            hidden, moved, weight = layer(
                hidden, geometry, tokens.visible, cache=cache, output_attentions=bool(attend)
            )
            if geometry is not None:
                geometry = geometry._replace(coordinates=moved)
            kept.append(hidden)
            weights.append(weight)
        hidden = self.norm(hidden)
        kept[-1] = hidden
        shown: dict[str, Any] = {CACHE_FIELD: cache}
        if output_coordinates:
            coordinates.append(geometry.coordinates)
            shown |= self._shown(geometry, coordinates)
        return NGTModelOutput(
            last_hidden_state=hidden,
            hidden_states=tuple(kept) if keep else None,
            attentions=tuple(weights) if attend else None,
            **shown,
        )

    def _start(
        self, ids: Tensor | None, embeds: Tensor, places: Tensor
    ) -> tuple[Tensor, Geometry | None]:
        """What the first layer reads."""
        config = self.config
        if config.is_twin:
            return self._with_positions(embeds, places), None
        dtype = compute_dtype(embeds.dtype)
        if self.coord_emb is None:
            anchors = sinusoids(places, config.coord_dim, float(config.position_base), dtype)
        else:
            anchors = self.coord_emb(places)
        coordinates = anchors
        if self.content is not None:
            read = self.content(normalised(embeds, config.layer_norm_eps))
            coordinates = normalised(anchors + read, config.layer_norm_eps)
        coordinates = coordinates.expand(embeds.shape[0], -1, -1)
        masses = log_masses = None
        if self.mass_emb is not None:
            masses = self._masses(ids, embeds)
            log_masses = (masses + MASS_FLOOR).log() if config.law == "power" else None
        times = None
        if config.fading_heads:
            times = places.to(dtype).expand(embeds.shape[0], -1)
        implementation = implementation_of(config, "an NGT")
        known = (coordinates, anchors, masses, log_masses, times, implementation)
        return embeds, Geometry(*known)

    def _masses(self, ids: Tensor | None, embeds: Tensor) -> Tensor:
        """`[B, T]`."""
        if ids is None:
            return embeds.new_ones(embeds.shape[:2], dtype=compute_dtype(embeds.dtype))
        return F.softplus(self.mass_emb(ids.long()).squeeze(-1))

    def _with_positions(self, embeds: Tensor, places: Tensor) -> Tensor:
        config = self.config
        if config.positions == "learned":
            return embeds + self.pos_emb(places)
        if config.positions == "sinusoidal":
            # As large as the embeddings of a new model.
            size = math.sqrt(2.0) * config.initializer_range
            dtype = compute_dtype(embeds.dtype)
            waves = sinusoids(places, config.hidden_size, _TWIN_BASE, dtype)
            return embeds + (size * waves).to(embeds.dtype)
        return embeds

    def _check(self, inputs: Inputs, output_coordinates: bool) -> None:
        ids, embeds = inputs.input_ids, inputs.inputs_embeds
        if (ids is None) == (embeds is None):
            raise ValueError("NGTModel: expected exactly one of input_ids and inputs_embeds")
        width = self.config.hidden_size
        if embeds is not None and (embeds.dim() != 3 or embeds.shape[-1] != width):
            raise ValueError(f"inputs_embeds: expected [B, T, {width}], got {tuple(embeds.shape)}")
        if ids is not None and (ids.dim() != 2 or ids.is_floating_point()):
            got = f"{ids.dtype} {tuple(ids.shape)}"
            raise ValueError(f"input_ids: expected integers [B, T], got {got}")
        if output_coordinates and self.config.is_twin:
            raise ValueError(
                "output_coordinates: expected a model with config.attention='gravity', got its "
                "dot-product twin, which has no coordinates. Leave it out"
            )

    def _is_too_long(self, inputs: Inputs, cache: Cache | None) -> bool:
        longest = self._limits.crop
        if longest is None or self.training or cache is not None:
            return False
        given = inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds
        return given.shape[1] > longest

    def _starts_cache(self, use_cache: bool | None) -> bool:
        if self.gradient_checkpointing and self.training:
            return False
        return (self.config.use_cache and not self.training) if use_cache is None else use_cache

    def _shown(self, geometry: Geometry, coordinates: list[Tensor]) -> dict[str, Any]:
        masses = geometry.masses
        if masses is None:
            last = geometry.coordinates
            masses = last.new_ones(last.shape[:2])
        return {
            "coordinates": coordinates[-1],
            "layer_coordinates": tuple(coordinates),
            "masses": masses,
        }


def _resized(masses: MassEmbedding, count: int) -> MassEmbedding:
    """With `count` token types; new ones have the mass 1."""
    old = masses.weight
    fresh = MassEmbedding(count, 1, device=old.device, dtype=old.dtype)
    with torch.no_grad():
        fresh.weight.fill_(MASS_OF_ONE)
        common = min(count, old.shape[0])
        fresh.weight[:common] = old[:common]
    fresh.weight.requires_grad_(old.requires_grad)
    fresh._is_hf_initialized = True
    return fresh
