"""One `generate` call, watched: which row had which sources, and what they did to its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from .attribution import Attribution, TokenEffect
from .bank import DeltaBank
from .bank_routing import current_route
from .errors import ValidationError


@dataclass(frozen=True)
class RowPlan:
    """What is known of a row before its generation.

    Attributes:
        ids: of its beliefs, best first.
        scores: of those, in that order.
        nearest: scores of the two nearest beliefs, routed or not, best first.
        pairs: mean angle score between the pairs of their deltas; None: not computed yet.
    """

    ids: tuple[str, ...]
    scores: tuple[float, ...]
    nearest: tuple[float, ...]
    pairs: float | None = None


@dataclass
class WatchedRow:
    """A row of the batch while it is generated."""

    plan: RowPlan
    attribution: Attribution | None
    effects: list[TokenEffect] = field(default_factory=list)
    confidence: float | None = None
    abstained: bool = False


class Recording(LogitsProcessor):
    """Records at every step and returns the scores that it was given, the very same tensor.

    Args:
        model, bank: what generates, and its deltas.
        plans: one for each prompt; a batch has a multiple of them, copies side by side.
        every: after the first token, look at every n-th too; 0 looks at the first only.
        pad_id: leading tokens of this id are padding, where no mask is given.
        end_ids: tokens that end a row.
    """

    def __init__(
        self,
        model: Any,
        bank: DeltaBank,
        plans: Sequence[RowPlan],
        *,
        every: int,
        pad_id: int | None,
        end_ids: Sequence[int],
    ) -> None:
        self._model, self._bank, self._plans = model, bank, list(plans)
        self._every, self._pad_id, self._end_ids = every, pad_id, frozenset(end_ids)
        self.attention_mask: Tensor | None = None
        self.rows: list[WatchedRow] = []
        self._starts: list[int] = []
        self._prompt = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.rows:
            self._begin(input_ids)
        elif len(input_ids) != len(self.rows):
            raise ValidationError(
                f"provenance: expected the {len(self.rows)} rows that the recording began with, "
                f"got {len(input_ids)}. Open recorder.routed(...) once for each generate"
            )
        step = input_ids.shape[1] - self._prompt
        if step < 0:
            raise ValidationError(
                "provenance: expected a longer sequence at every step, got a shorter one than the "
                "prompt. Open recorder.routed(...) once for each generate"
            )
        if step == 0 or (self._every and step % self._every == 0):
            for row, start, ids in zip(self.rows, self._starts, input_ids.tolist(), strict=True):
                self._look(row, ids[start:], step)
        return scores

    def _begin(self, input_ids: Tensor) -> None:
        count, total = len(self._plans), len(input_ids)
        if total % count:
            raise ValidationError(
                f"provenance: expected a batch of {count} rows or a multiple of it, got {total}. "
                "Give recorder.routed(...) one prompt for each row"
            )
        if any(plan.ids for plan in self._plans) and current_route(self._bank) is None:
            # What generates has no deltas: to name sources of its text would be false.
            raise ValidationError(
                "provenance: expected the thread that opened recorder.routed(...), got another, "
                "which has no routes. Open it in the thread that generates"
            )
        self._prompt = input_ids.shape[1]
        self._starts = self._first_tokens(input_ids)
        for number in range(total):
            plan = self._plans[number // (total // count)]
            attribution = Attribution(self._model, self._bank, plan.ids) if plan.ids else None
            self.rows.append(WatchedRow(plan, attribution))

    def _first_tokens(self, input_ids: Tensor) -> list[int]:
        """Where each row begins, after its padding on the left."""
        mask = self.attention_mask
        if mask is None:
            return [self._after_padding(ids) for ids in input_ids.tolist()]
        if mask.ndim != 2 or mask.shape[1] != input_ids.shape[1] or len(input_ids) % len(mask):
            raise ValidationError(
                f"provenance: expected the attention mask of the prompts "
                f"{list(input_ids.shape)}, got {list(mask.shape)}"
            )
        copies = len(input_ids) // len(mask)
        mask = mask.bool().repeat_interleave(copies, 0)
        if not mask[:, -1].all():
            raise ValidationError(
                "provenance: expected padding on the left, got prompts padded on the right. Set "
                "tokenizer.padding_side = 'left'"
            )
        return mask.int().argmax(1).tolist()

    def _after_padding(self, ids: list[int]) -> int:
        # A prompt of padding alone still has its last token to go on from.
        return next((i for i, token in enumerate(ids) if token != self._pad_id), len(ids) - 1)

    def _look(self, row: WatchedRow, tokens: list[int], step: int) -> None:
        ended = self._end_ids.intersection(tokens[len(tokens) - step :])
        if row.attribution is None or row.abstained or ended:
            return
        row.effects.append(row.attribution.effect(tokens, step))
