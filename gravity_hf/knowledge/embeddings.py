"""Vectors of texts: contextual hidden states of the base model, one text at a time."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..integration.placement import execution_device
from ..layers.modes import in_evaluation
from .errors import ValidationError
from .fact_tokens import prompt_ids
from .first_layers import FirstLayers
from .targets import base_model

TextEncoder = Callable[[Sequence[str]], Tensor]

POOLINGS = ("content", "all", "last")
# Of the median norm of a text's tokens. Attention sinks are tens of times longer than all others,
# and would be all that is left of a mean (Sun et al., 2024, "Massive activations").
_SINK = 4.0


class HiddenStates:
    """Mean of the base's hidden states over a text's content tokens.

    Every text is run by itself, without padding: its vector depends, to the last bit, on that text
    alone, never on the texts beside it. Deltas that the caller has active on a `DeltaBank` do not
    reach it.

    Args:
        model: a causal LM whose body returns hidden states.
        tokenizer: of the model.
        layer: `"quarter"`, `"mid"`, `"last"`, or a number of layers from 0 (embeddings, without
            context) to all.
        pooling: `"content"` averages over tokens that carry a letter or a digit and are neither
            special nor attention sinks; `"all"` over all; `"last"` takes the last token.
        max_tokens: of a longer text the last ones are read.

    Raises:
        ValidationError: another layer or pooling.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        layer: str | int = "quarter",
        pooling: str = "content",
        max_tokens: int = 512,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValidationError(
                f"HiddenStates.pooling: expected {', '.join(POOLINGS)}, got {pooling!r}"
            )
        self.model: Any = base_model(model)
        self.tokenizer, self.pooling, self.max_tokens = tokenizer, pooling, max_tokens
        self.layer = layer_number(self.model, layer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._carries: dict[int, bool] = {}
        self._layers: FirstLayers | None = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """`[n, hidden]`, float32, on the CPU."""
        if not texts:
            return torch.empty(0, self.model.config.get_text_config().hidden_size)
        # In a context of its own no delta of the caller's is active.
        return contextvars.Context().run(self._vectors, list(texts))

    @torch.no_grad()
    def _vectors(self, texts: list[str]) -> Tensor:
        with in_evaluation(self.model):
            return torch.stack([self._vector(self._ids(text)) for text in texts])

    def _vector(self, ids: list[int]) -> Tensor:
        tensor = torch.tensor([ids], device=execution_device(self.model))
        if self._layers is None:
            self._layers = FirstLayers(self.model, self.layer, tensor)
        states = self._layers(tensor).float().cpu()
        if self.pooling == "last":
            return states[-1]
        return states[self._pooled(ids, states)].mean(0)

    def _pooled(self, ids: list[int], states: Tensor) -> Tensor:
        """Which tokens to average over, bool `[T]`; all where none has content."""
        everything = torch.ones(len(ids), dtype=torch.bool)
        if self.pooling == "all":
            return everything
        content = torch.tensor([self._is_content(token) for token in ids])
        norms = states.norm(dim=-1)
        chosen = content & (norms < _SINK * norms.median())
        return next(kept for kept in (chosen, content, everything) if kept.any())

    def _ids(self, text: str) -> list[int]:
        if text.strip():
            return prompt_ids(self.tokenizer, text)[-self.max_tokens :]
        # A model cannot read nothing: one special token stands for an empty text.
        special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        return [next(token for token in special if token is not None)]

    def _is_content(self, token: int) -> bool:
        if token not in self._carries:
            text = "" if token in self._special else self.tokenizer.decode([token])
            # Bytes of a letter that several tokens make up decode to the replacement mark.
            self._carries[token] = any(x.isalnum() or x == "\ufffd" for x in text)
        return self._carries[token]


def layer_number(model: nn.Module, layer: str | int) -> int:
    """Which of the hidden states `layer` names: 0 is the embeddings, `n` what layer `n` returns."""
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    named = {"quarter": count // 4, "mid": count // 2, "last": count}
    number = named.get(str(layer))
    if number is None and str(layer).isdigit():
        number = int(layer)
    if number is None or not 0 <= number <= count:
        raise ValidationError(
            f"HiddenStates.layer: expected {', '.join(named)} or a number from 0 to {count}, got "
            f"{layer!r}"
        )
    return number


def untrained_copy(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model of the same class and config with fresh weights: the control for what training adds.

    The process's random state is left as it was.
    """
    model = base_model(model)
    config: Any = model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: Any = type(model)(type(config).from_dict(config.to_dict()))
    return fresh.to(device=execution_device(model), dtype=torch.float32).eval()
