"""The LeanFormer as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from ...layers.float32 import widen
from ...layers.low_rank import LowRankLinear
from ...layers.screening import Screening
from ..placing import CACHE_FIELD, documents_of
from ..visibility import is_traced
from .block import BlockOutput, LeanFormerBlock, norm_of
from .configuration_leanformer import LeanFormerConfig
from .exit_heads import ExitHead, ExitStates, Leaving
from .gravity import LeanFormerGravity
from .losses import mean_of
from .positions import Limits, Rotary, RotaryEmbedding, Tokens, place_tokens

_IMPLEMENTATIONS = (None, "sdpa", "eager")


@dataclass
class LeanFormerModelOutput(BaseModelOutputWithPast):
    """`hidden_states`: the embeddings, then what each layer gives, the last after the final norm.

    screening_loss, gate_loss: scalars, means over layers; exit_states: of a sample of tokens; all
    three where `output_losses` asks for them.
    exit_layer: int64 `[B, T]`, the layers that each token went through, where tokens may leave.
    """

    screening_loss: Tensor | None = None
    gate_loss: Tensor | None = None
    exit_states: ExitStates | None = None
    exit_layer: Tensor | None = None


class LeanFormerPreTrainedModel(PreTrainedModel):
    """What all LeanFormers share: initial weights and precision."""

    config: LeanFormerConfig
    config_class = LeanFormerConfig
    base_model_prefix = "model"
    _input_embed_layer = "embed_tokens"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LeanFormerBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # Expressions, searched for in names.
    _keep_in_fp32_modules_strict = [r"\.gravity\."]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def post_init(self) -> None:
        widen(self)
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = float(self.config.initializer_range)
        if isinstance(module, nn.Linear):
            _uniform(module.weight, module.in_features**-0.5)
            _uniform(module.bias, module.in_features**-0.5)
        elif isinstance(module, LowRankLinear):
            # After its two factors: the variance of their product is that of a dense map.
            _uniform(module.down.weight, (3 / module.in_features) ** 0.5)
            _uniform(module.up.weight, module.rank**-0.5)
            _uniform(module.up.bias, module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Screening):
            fresh = _fresh(module)
            init.copy_(module.query, fresh.query)
            init.copy_(module.key, fresh.key)
        elif isinstance(module, ExitHead):
            if not module.published:
                init.zeros_(module.layer_embedding)
        elif isinstance(module, LeanFormerGravity):
            for name, value in module.initial_values().items():
                init.copy_(getattr(module, name), value)
        elif isinstance(module, RotaryEmbedding):
            super()._init_weights(module)


class LeanFormerModel(LeanFormerPreTrainedModel):
    """A LeanFormer without a head.

    State: `embed_tokens.weight` `[V, d]`; `embed_positions.weight` `[L, d]` where positions are
    learned; `layers.{i}.{input_layernorm, post_attention_layernorm}.*`; `layers.{i}.self_attn.*`,
    see `LeanFormerAttention`; `layers.{i}.mlp.{gate_proj, up_proj, down_proj, predictor}.*`;
    `norm.*`; `exit_head.*`, where tokens can leave before the last layer. A map of low rank has
    `down.weight`, `up.weight` and `up.bias` in place of `weight` and `bias`.
    """

    def __init__(self, config: LeanFormerConfig) -> None:
        super().__init__(config)
        width, longest = config.hidden_size, config.max_position_embeddings
        learned = config.position == "learned"
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.embed_positions = nn.Embedding(longest, width) if learned else None
        self.layers = nn.ModuleList(
            LeanFormerBlock(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = norm_of(config)
        self.rotary_emb = None if learned else RotaryEmbedding(config)
        self.exit_head = ExitHead(config) if config.has_exits else None
        self.gradient_checkpointing = False
        self._limits = Limits(longest if learned else None, config.sliding_window)
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
        output_losses: bool = False,
        cache: Cache | None = None,
    ) -> LeanFormerModelOutput:
        """Hidden states `[B, T, d]` after the final norm.

        Args:
            input_ids: `[B, T]`, or else
            inputs_embeds: `[B, T, d]`.
            attention_mask: `[B, T]`, with a cache `[B, cached + T]`, 0 for padding on either side;
                or broadcastable to `[B, 1, T, Tk]`, bool or added to scores. Attention is causal,
                whatever it says.
            position_ids: `[B, T]`. None: tokens are counted, padding left out. Without a cache they
                may start again within a row, each time with a new document; no cache is made then.
            past_key_values, cache: any cache of transformers (two names of one argument).
            output_losses: also what the screening, the predictor and the exit head learn from.

        Raises:
            ValueError: inputs that do not fit, or more positions than the model has.
        """
        config = self.config
        keep = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attend = config.output_attentions if output_attentions is None else output_attentions
        cache = cache if cache is not None else past_key_values
        self._check(input_ids, inputs_embeds)
        embeds = self.embed_tokens(input_ids.long()) if inputs_embeds is None else inputs_embeds
        packed = documents_of(position_ids, attention_mask, cache, *embeds.shape[:2])
        if cache is None and (packed is None or is_traced()) and self._starts_cache(use_cache):
            cache = DynamicCache(config=config)
        tokens = place_tokens(self._limits, embeds, attention_mask, position_ids, cache, packed)
        hidden, rotary = self._start(embeds, tokens)
        run = _Run(self, tokens, rotary, cache, bool(attend), output_losses)
        hidden, layers = run.through(hidden)
        hidden = self.norm(hidden)
        return LeanFormerModelOutput(
            last_hidden_state=hidden,
            hidden_states=(*run.entered, hidden) if keep else None,
            attentions=tuple(x.weights for x in layers) if attend else None,
            screening_loss=mean_of([x.screening_loss for x in layers]),
            gate_loss=mean_of([x.gate_loss for x in layers]),
            exit_states=run.exit_states(),
            exit_layer=None if run.leaving is None else run.leaving.depth,
            **{CACHE_FIELD: cache},
        )

    def _start(self, embeds: Tensor, tokens: Tokens) -> tuple[Tensor, Rotary]:
        """What the first layer reads."""
        if self.embed_positions is not None:
            return embeds + self.embed_positions(tokens.places), None
        return embeds, self.rotary_emb(embeds, tokens.places)

    def _check(self, ids: Tensor | None, embeds: Tensor | None) -> None:
        if (ids is None) == (embeds is None):
            raise ValueError("LeanFormerModel: expected exactly one of input_ids and inputs_embeds")
        width = self.config.hidden_size
        if embeds is not None and (embeds.dim() != 3 or embeds.shape[-1] != width):
            raise ValueError(f"inputs_embeds: expected [B, T, {width}], got {tuple(embeds.shape)}")
        if ids is not None and (ids.dim() != 2 or ids.is_floating_point()):
            got = f"{ids.dtype} {tuple(ids.shape)}"
            raise ValueError(f"input_ids: expected integers [B, T], got {got}")
        if self.config._attn_implementation not in _IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation: a LeanFormer has {list(_IMPLEMENTATIONS[1:])}, as it is "
                f"sparse by its own settings, got {self.config._attn_implementation!r}"
            )

    def _starts_cache(self, use_cache: bool | None) -> bool:
        if self.gradient_checkpointing and self.training:
            return False
        return (self.config.use_cache and not self.training) if use_cache is None else use_cache


class _Run:
    """One way through the layers: who leaves, and what is learned on the way."""

    def __init__(
        self,
        model: LeanFormerModel,
        tokens: Tokens,
        rotary: Rotary,
        cache: Any,
        output_attentions: bool,
        output_losses: bool,
    ) -> None:
        self.model, self.tokens, self.rotary, self.cache = model, tokens, rotary, cache
        self.output_losses = output_losses
        how = model.config._attn_implementation or "sdpa"
        self.options = (how, output_attentions, output_losses)
        self.leaving: Leaving | None = None
        config, head = model.config, model.exit_head
        if head is not None and config.exit_threshold is not None and not model.training:
            depths = (config.min_depth, config.num_hidden_layers)
            self.leaving = Leaving(head, float(config.exit_threshold), depths, tokens.real)
        self.rows: Tensor | None = None
        # What each layer was given, and of the sample what came out where tokens may leave.
        self.entered: list[Tensor] = []
        self.sampled: list[Tensor] = []

    def through(self, hidden: Tensor) -> tuple[Tensor, list[BlockOutput]]:
        """`[B, T, d]` after the layers, and what each of them gave."""
        outputs = []
        for index, layer in enumerate(self.model.layers):
            self.entered.append(hidden)
            if self.leaving is not None and self.leaving.all_left():
                if self.cache is not None:
                    layer.remember(hidden, self.rotary, self.cache)
                continue
            output = layer(hidden, self.tokens, self.rotary, self.cache, *self.options)
            outputs.append(output)
            if self.leaving is None:
                hidden = output.hidden
            else:
                hidden = self.leaving.stay(hidden, output.hidden)
                self.leaving.decide(hidden, index + 1)
            if self.output_losses:
                self._sample(hidden, index + 1)
        return hidden, outputs

    def exit_states(self) -> ExitStates | None:
        if not self.sampled:
            return None
        return ExitStates(self.rows, torch.stack(self.sampled), self.model.config.min_depth)

    def _sample(self, hidden: Tensor, depth: int) -> None:
        config = self.model.config
        leaves = config.min_depth <= depth < config.num_hidden_layers
        if self.model.exit_head is None or not leaves:
            return
        if self.rows is None:
            drawn = torch.randperm(hidden.shape[1], device=hidden.device)
            self.rows = drawn[: config.screening_rows]
        self.sampled.append(hidden.detach()[:, self.rows])


def _fresh(module: Screening) -> Screening:
    sizes = (module.query_heads, module.key_value_heads, module.head_dim, module.screen_dim)
    return Screening(*sizes)


def _uniform(values: Tensor | None, bound: float) -> None:
    if values is not None:
        init.uniform_(values, -bound, bound)
