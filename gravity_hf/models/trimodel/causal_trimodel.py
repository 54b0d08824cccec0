"""A language model of the world, given a self and an environment."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..placing import CACHE_FIELD
from .configuration_trimodel import TriModelConfig
from .modeling_trimodel import Streams, TriModel, TriPreTrainedModel


class TriModelForCausalLM(TriPreTrainedModel, GenerationMixin):
    """`p(world_t | world_<t, self, env)`: the world's next token, given all of self and env.

    The world is a causal stream. Each of its tokens reads the two context streams, which are known
    as a whole, and keeps its own content through the fusion's gate: as published, a stream's output
    is made of the two others alone, and would know the world only as a query. What the world tells
    self and env is not used, so that a later token never changes an earlier logit.

    Of the model inside, only the streams, the world's part of the fusion and the embedding are
    used; the other weights are kept, frozen, so that `TriModel` loads the same folder.

    `generate(input_ids, self_input_ids=..., env_input_ids=...)` keeps a cache of the world; both
    contexts are encoded anew for every token.

    Needs `vocab_size`, `is_causal=True` and `use_gate=True`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    main_input_name = "input_ids"

    def __init__(self, config: TriModelConfig) -> None:
        needed = {"is_causal": True, "use_gate": True}
        wrong = {key: getattr(config, key) for key in needed if not getattr(config, key)}
        if config.vocab_size is None or wrong or not config.stream_config("world").is_causal:
            raise ValueError(
                "TriModelForCausalLM: expected a config with vocab_size, is_causal=True (also of "
                f"the world) and use_gate=True, got vocab_size={config.vocab_size} and {wrong}. "
                "Without them a token would see what it is asked for, or not see its own past"
            )
        super().__init__(config)
        self.model = TriModel(config)
        self.lm_head: nn.Module = nn.Linear(
            config.hidden_size, config.vocab_size, bias=not config.tie_word_embeddings
        )
        fusion = self.model.fusion
        for unused in (
            *(self.model.final_norm, self.model.output_proj),
            *(fusion.self_cross_attn, fusion.env_cross_attn, fusion.world_mass),
        ):
            unused.requires_grad_(False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        self_input_ids: Tensor | None = None,
        env_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        env_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        self_inputs_embeds: Tensor | None = None,
        env_inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, N, V]` of the world's next tokens.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: the world's `[B, N]`, with a
                cache the new tokens, and a mask over the cached ones, too.
            self_input_ids, env_input_ids: `[B, N_s]`, or `self_inputs_embeds`,
                `env_inputs_embeds` `[B, N_s, d]`; with `self_attention_mask`,
                `env_attention_mask` `[B, N_s]`, 0 = padding.
            past_key_values, cache: of the world (two names of one argument).
            labels: `[B, N]`, the world's tokens, shifted here; -100 is left out of the loss.
            logits_to_keep: only the last so many logits, or those at these indices; 0: all.
            kwargs: for the loss, such as `num_items_in_batch`.
        """
        model = self.model
        world = model.stream("world")(
            inputs_embeds=model.embed("world", input_ids, inputs_embeds),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if cache is not None else past_key_values,
            use_cache=self._wants_cache(use_cache),
        )
        hidden = world.last_hidden_state
        contexts = [
            model.stream(name)(
                inputs_embeds=model.embed(name, ids, embeds), attention_mask=mask
            ).last_hidden_state
            for name, ids, embeds, mask in (
                ("self", self_input_ids, self_inputs_embeds, self_attention_mask),
                ("env", env_input_ids, env_inputs_embeds, env_attention_mask),
            )
        ]
        # The world's own mask does not matter: its tokens are queries only.
        streams = Streams((hidden, *contexts), (None, self_attention_mask, env_attention_mask))
        fused = model.fusion.fuse("world", *streams)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(fused[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, **{CACHE_FIELD: world.get(CACHE_FIELD)}
        )

    def _get_static_cache_init_shape(self) -> None:
        """None: keys are masses, one per head, which the cache learns from the first ones."""

    def _wants_cache(self, use_cache: bool | None) -> bool:
        return (self.config.use_cache and not self.training) if use_cache is None else use_cache
