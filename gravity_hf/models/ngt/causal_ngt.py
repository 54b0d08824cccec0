"""NGT as a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..causal import CachedGenerationMixin, names_of, refuse_misspelt
from ..placing import CACHE_FIELD
from .configuration_ngt import NGTConfig
from .modeling_ngt import NGTModel, NGTPreTrainedModel
from .placing import too_many

_OWN = names_of(NGTModel.forward)


@dataclass
class NGTCausalLMOutput(CausalLMOutputWithPast):
    """Coordinates and masses as in `NGTModelOutput`."""

    coordinates: Tensor | None = None
    layer_coordinates: tuple[Tensor, ...] | None = None
    masses: Tensor | None = None


class NGTForCausalLM(NGTPreTrainedModel, CachedGenerationMixin):
    """A language model, of an NGT or of its twin: next-token logits `[B, T, V]`.

    Beyond `config.max_position_embeddings` tokens `generate()` goes on where places are computed.
    Where they are a table it keeps the last tokens, as published, if `config.crop_long_inputs`: of
    so long a text the window is computed anew for every token, without a cache. Otherwise it
    refuses before the first token.
    """

    _tied_weights_keys = {"lm_head.weight": "model.token_emb.weight"}

    def __init__(self, config: NGTConfig) -> None:
        super().__init__(config)
        self.model = NGTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        longest = self.config.max_position_embeddings
        read = max_cache_length - _padding(model_kwargs.get("attention_mask"))
        if self.config.crop_long_inputs and max_cache_length > longest:
            # When a window moves on, every token in it has another place.
            generation_config.use_cache = model_kwargs["use_cache"] = False
        elif self.config.has_position_table and read > longest:
            raise ValueError(too_many(longest, f"{read} to read"))
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_coordinates: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> NGTCausalLMOutput:
        """As `NGTModel.forward`, and:

        Args:
            labels: `[B, T]`, shifted here; -100 is left out of the loss, and with
                `config.crop_long_inputs` what is not read.
            logits_to_keep: only the last so many logits, or those at these indices of what is
                read; 0: all.
            kwargs: for the loss, such as `num_items_in_batch`; what else generation, servers and
                tokenizers hand to any model is ignored.

        Raises:
            TypeError: a name that is nearly one of an NGT's.
        """
        refuse_misspelt("NGTForCausalLM", kwargs, _OWN)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_coordinates=output_coordinates,
            cache=cache if cache is not None else past_key_values,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        if labels is not None:
            # Of an input that is too long its end was read.
            given = input_ids if inputs_embeds is None else inputs_embeds
            labels = labels[:, given.shape[1] - hidden.shape[1] :]
        logits, loss = self.logits_and_loss(hidden, labels, logits_to_keep, kwargs)
        return NGTCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            coordinates=outputs.coordinates,
            layer_coordinates=outputs.layer_coordinates,
            masses=outputs.masses,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )


def _padding(mask: Tensor | None) -> int:
    """How many places of a batch are padding in every row."""
    if mask is None or mask.dim() != 2:
        return 0
    return mask.shape[1] - int((mask != 0).sum(-1).max())
