"""LGT as a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from ..causal import CachedGenerationMixin, names_of, refuse_misspelt
from ..placing import CACHE_FIELD
from .configuration_lgt import LGTConfig
from .modeling_lgt import LGTModel, LGTPreTrainedModel

logger = logging.get_logger(__name__)

_OWN = names_of(LGTModel.forward)


@dataclass
class LGTCausalLMOutput(CausalLMOutputWithPast):
    """`masses`: of the tokens, one `[B, H, T]` per layer, where `output_masses` asks."""

    masses: tuple[Tensor, ...] | None = None


class LGTForCausalLM(LGTPreTrainedModel, CachedGenerationMixin):
    """A language model: next-token logits `[B, T, V]`.

    With `config.is_causal=False` it is the published, bidirectional model, which sees the tokens
    that it is asked for: for converted checkpoints, not for training.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LGTConfig) -> None:
        if config.vocab_size is None:
            raise ValueError(
                "LGTForCausalLM: expected config.vocab_size, got None. Use LGTModel for continuous "
                "inputs"
            )
        super().__init__(config)
        self.model = LGTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.has_head_bias)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        # In a bidirectional model a new token changes what the earlier ones are, which a cache
        # would keep; and without layers there is nothing to keep.
        if not (self.config.is_causal and self.config.num_hidden_layers):
            generation_config.use_cache = model_kwargs["use_cache"] = False
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
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
        positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_masses: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> LGTCausalLMOutput:
        """As `LGTModel.forward`, and:

        Args:
            labels: `[B, T]`, shifted here; -100 is left out of the loss.
            logits_to_keep: only the last so many logits, or those at these indices; 0: all.
            kwargs: for the loss, such as `num_items_in_batch`; what else generation, servers and
                tokenizers hand to any model is ignored.

        Raises:
            TypeError: a name that is nearly one of an LGT's.
        """
        refuse_misspelt("LGTForCausalLM", kwargs, _OWN)
        if labels is not None and not self.config.is_causal:
            logger.warning_once(
                "LGTForCausalLM: config.is_causal is False, so the model sees the tokens that it "
                "is asked for, and the loss says nothing"
            )
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            positions=positions,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_masses=output_masses,
            cache=cache if cache is not None else past_key_values,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        logits, loss = self.logits_and_loss(hidden, labels, logits_to_keep, kwargs)
        return LGTCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            masses=outputs.masses,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )
