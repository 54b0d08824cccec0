"""LeanFormer as a language model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ...layers.low_rank import LowRankLinear, linear
from ..causal import CachedGenerationMixin, names_of, refuse_misspelt
from ..placing import CACHE_FIELD
from .configuration_leanformer import LeanFormerConfig
from .efficiency import efficiency
from .losses import exit_loss, share_of_batch
from .modeling_leanformer import (
    LeanFormerModel,
    LeanFormerModelOutput,
    LeanFormerPreTrainedModel,
)
from .positions import too_many
from .statistics import observed

_OWN = names_of(LeanFormerModel.forward)


@dataclass
class LeanFormerCausalLMOutput(CausalLMOutputWithPast):
    """In training with labels `loss = lm_loss + aux_loss`, `aux_loss` being the weighted sum of
    `screening_loss`, `gate_loss` and `exit_loss`; otherwise `loss = lm_loss`. All are scalars.

    exit_layer: int64 `[B, T]`, the layers that each token went through, where tokens may leave.
    statistics: float32 `[layers]` by name, where asked for; see `statistics.observed`.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    screening_loss: Tensor | None = None
    gate_loss: Tensor | None = None
    exit_loss: Tensor | None = None
    exit_layer: Tensor | None = None
    statistics: dict[str, Tensor] | None = None


class LeanFormerForCausalLM(LeanFormerPreTrainedModel, CachedGenerationMixin):
    """A language model: next-token logits `[B, T, V]`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LeanFormerConfig) -> None:
        super().__init__(config)
        self.model = LeanFormerModel(config)
        rank = config.rank_of("lm_head", config.head_rank)
        self.lm_head = linear(config.hidden_size, config.vocab_size, rank, bias=False)
        self.post_init()

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
        output_statistics: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> LeanFormerCausalLMOutput:
        """As `LeanFormerModel.forward`, and:

        Args:
            labels: `[B, T]`, shifted here; -100 is left out of the loss.
            logits_to_keep: only the last so many logits, or those at these indices; 0: all.
            output_statistics: also what the choices of this forward keep. It costs more than dense
                attention does.
            kwargs: for the loss, such as `num_items_in_batch`; what else generation, servers and
                tokenizers hand to any model is ignored.

        Raises:
            TypeError: a name that is nearly one of a LeanFormer's.
        """
        refuse_misspelt("LeanFormerForCausalLM", kwargs, _OWN)
        learns = self.training and labels is not None
        with observed(self) if output_statistics else nullcontext() as seen:
            outputs = self.model(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                output_losses=learns,
                cache=cache if cache is not None else past_key_values,
                return_dict=True,
            )
        hidden = outputs.last_hidden_state
        logits, loss = self.logits_and_loss(hidden, labels, logits_to_keep, kwargs)
        learned = self._learned(outputs, labels, kwargs) if learns else {}
        total = loss + learned["aux_loss"] if "aux_loss" in learned else loss
        return LeanFormerCausalLMOutput(
            loss=total,
            logits=logits,
            lm_loss=loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            exit_layer=outputs.exit_layer,
            statistics=None if seen is None else seen.result(),
            **learned,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )

    @classmethod
    def from_dense(cls, host: nn.Module, rank: Any = "energy:0.95", **options: Any) -> Any:
        """A LeanFormer that computes what `host` does, with maps of low rank: see
        `gravity_hf.models.leanformer.from_dense`."""
        from .from_dense import from_dense

        return from_dense(host, rank=rank, **options)

    def efficiency(self, length: int | None = None) -> dict[str, Any]:
        """Parameters, pairs and neurons beside the dense model of this shape, by arithmetic, for a
        text of `length` tokens (default: `config.max_position_embeddings`); see
        `gravity_hf.models.leanformer.efficiency`."""
        return efficiency(self, length)

    def get_output_embeddings(self) -> nn.Module:
        """The map to the vocabulary: of a head of low rank its second factor."""
        return self.lm_head.up if isinstance(self.lm_head, LowRankLinear) else self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if isinstance(self.lm_head, LowRankLinear):
            self.lm_head.up = new_embeddings
        else:
            self.lm_head = new_embeddings

    def _learned(
        self, outputs: LeanFormerModelOutput, labels: Tensor, for_loss: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The losses beside the language model's, and `aux_loss`, their weighted sum."""
        config = self.config
        losses = {"screening": outputs.screening_loss, "gate": outputs.gate_loss}
        states = outputs.exit_states
        if states is not None:
            final = outputs.last_hidden_state[:, states.rows].detach()
            counted = labels[:, states.rows] != -100
            losses["exit"] = exit_loss(self, states, final, counted)
        found = {f"{name}_loss": loss for name, loss in losses.items() if loss is not None}
        if not found:
            return {}
        weighted = [getattr(config, f"{name[:-5]}_weight") * x for name, x in found.items()]
        total = torch.stack(weighted).sum()
        return {
            **found,
            "aux_loss": total * share_of_batch(labels, for_loss.get("num_items_in_batch")),
        }

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
        if self.config.position == "learned" and read > longest:
            raise ValueError(too_many(longest, f"{read} to read"))
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def _padding(mask: Tensor | None) -> int:
    """How many places of a batch are padding in every row."""
    if mask is None or mask.dim() != 2:
        return 0
    return mask.shape[1] - int((mask != 0).sum(-1).max())
