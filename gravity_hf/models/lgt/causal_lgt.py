"""LGT as a language model."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .configuration_lgt import LGTConfig
from .modeling_lgt import CACHE_FIELD, LGTModel, LGTPreTrainedModel
from .visibility import is_traced

logger = logging.get_logger(__name__)

_OWN = tuple(inspect.signature(LGTModel.forward).parameters)


@dataclass
class LGTCausalLMOutput(CausalLMOutputWithPast):
    """`masses`: of the tokens, one `[B, H, T]` per layer, where `output_masses` asks."""

    masses: tuple[Tensor, ...] | None = None


class LGTForCausalLM(LGTPreTrainedModel, GenerationMixin):
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

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None = None, **arguments: Any
    ) -> Tensor | None:
        """The padding mask over a whole cache of fixed size; the model makes the rest itself."""
        cache = arguments.get("cache", arguments.get("past_key_values"))
        if attention_mask is None or attention_mask.dim() != 2:
            return attention_mask
        missing = cache.get_max_length(0) - attention_mask.shape[1]
        # Ones, which a causal model does not see until a token stands there.
        return nn.functional.pad(attention_mask, (0, max(0, missing)), value=1)

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

    def _get_static_cache_init_shape(self) -> None:
        """None: keys are masses, one per head, which the cache learns from the first ones."""

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
        _refuse_misspelt(kwargs)
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
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return LGTCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            masses=outputs.masses,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )


def _refuse_misspelt(kwargs: dict[str, Any]) -> None:
    """A mask under a name that nobody reads would be lost without a word."""
    for name in () if is_traced() else kwargs:
        near = difflib.get_close_matches(name, _OWN, n=1, cutoff=0.9)
        if near:
            raise TypeError(f"LGTForCausalLM: expected {near[0]}, got {name}: a misspelt name?")
