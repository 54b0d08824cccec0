"""LGT as a classifier of sequences or tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_lgt import LGTConfig
from .modeling_lgt import LGTModel, LGTPreTrainedModel


class _LGTClassifier(LGTPreTrainedModel):
    """An LGT with `dropout` and a linear `score`."""

    def __init__(self, config: LGTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LGTModel(config)
        self.main_input_name = self.model.main_input_name
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value


class LGTForSequenceClassification(_LGTClassifier):
    """Logits `[B, labels]` of whole sequences.

    A causal model is read at its last token that is no padding, a bidirectional one at the mean of
    all that are none. Padding is what `attention_mask` says; without a mask, `pad_token_id`.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """As `LGTModel.forward`. `labels` `[B]`, or `[B, labels]` for regression and multi-label
        problems; `config.problem_type` says which loss, by default guessed from the labels.
        `token_type_ids`, which tokenizers give, are not used."""
        if attention_mask is None and input_ids is not None:
            attention_mask = self._padding(input_ids)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            positions=positions,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pooled = self._pooled(outputs.last_hidden_state, attention_mask)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _padding(self, input_ids: Tensor) -> Tensor | None:
        pad = self.config.pad_token_id
        return None if pad is None else (input_ids != pad).long()

    def _pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, d]` of `[B, T, d]`."""
        if mask is None or mask.dim() != 2:
            return hidden[:, -1] if self.config.is_causal else hidden.mean(1)
        seen = mask != 0
        if not self.config.is_causal:
            weight = seen.unsqueeze(-1).to(hidden.dtype)
            return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        index = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(seen, index, 0).argmax(-1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


class LGTForTokenClassification(_LGTClassifier):
    """Logits `[B, T, labels]`, one row for each token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> TokenClassifierOutput:
        """As `LGTModel.forward`. `labels` `[B, T]`; -100 is left out of the loss.
        `token_type_ids`, which tokenizers give, are not used."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            positions=positions,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
