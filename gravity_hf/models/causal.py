"""What our language models share: generating with a cache of either kind, logits and their loss."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin

from .visibility import is_traced


class CachedGenerationMixin(GenerationMixin):
    """`generate()` of a model that makes its masks itself, and keeps in a transformers cache what
    it alone can read.

    transformers looks for `GenerationMixin` in the names of classes; this one ends in it.
    """

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

    def _get_static_cache_init_shape(self) -> None:
        """None: what stands for keys is of no usual shape; the cache learns it from the first."""

    def logits_and_loss(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        for_loss: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, K, V]` of hidden states `[B, T, D]`, and where there are labels their loss.

        Args:
            labels: `[B, T]`, shifted here; -100 is left out.
            logits_to_keep: only the last so many, or those at these indices; 0: all.
            for_loss: arguments of the loss function, such as `num_items_in_batch`.
        """
        model: Any = self
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = model.lm_head(hidden[:, keep])
        if labels is None:
            return logits, None
        size = model.config.vocab_size
        return logits, model.loss_function(
            logits=logits, labels=labels, vocab_size=size, **for_loss
        )


def names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's arguments."""
    return tuple(inspect.signature(forward).parameters)


def refuse_misspelt(name: str, kwargs: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """TypeError for an argument that is nearly a `known` one of the model class `name`: a mask
    under a name that nobody reads would be lost without a word."""
    for given in () if is_traced() else kwargs:
        near = difflib.get_close_matches(given, known, n=1, cutoff=0.9)
        if near:
            raise TypeError(f"{name}: expected {near[0]}, got {given}: a misspelt name?")
