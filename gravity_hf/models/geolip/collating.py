"""Batches of patches or images, with a mask and with the labels that Trainer evaluates on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_INPUTS = ("patches", "pixel_values")


@dataclass(frozen=True)
class GeolipCollator:
    """Rows to a batch for `GeolipModel`; other columns of the rows are left out.

    A row holds `"patches"` `[N, P]`, whose `N` may differ from row to row, or `"pixel_values"`
    `[C, H, W]`, whose size may not; and optionally `"labels"`, the clean target in the same form.
    A row of patches may bring an `"attention_mask"` `[N]` of its own.

    A batch holds what the rows hold, stacked, with zeros behind the shorter ones; `"labels"`,
    always: without them `Trainer.evaluate` measures no loss, so inputs are copied where rows have
    none; and of patches an `"attention_mask"` `[B, N]`, int64, 1 where a token is one.

    With `Trainer`, set `remove_unused_columns=False`.

    Raises, when called:
        ValueError: rows that do not fit together, or values that are no floating-point numbers.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        name = _input_name(rows)
        inputs = [_floats(row[name], name) for row in rows]
        _check_shapes(inputs, name)
        has_labels = ["labels" in row for row in rows]
        if any(has_labels) != all(has_labels):
            raise ValueError(
                f"GeolipCollator: expected labels in every row or in none, got them in "
                f"{sum(has_labels)} of {len(rows)} rows"
            )
        labels = inputs
        if all(has_labels):
            labels = [_floats(row["labels"], "labels") for row in rows]
            _check_labels(inputs, labels, name)
        if name == "pixel_values":
            return {name: torch.stack(inputs), "labels": torch.stack(labels)}
        masks = [_mask(row, len(tokens)) for row, tokens in zip(rows, inputs, strict=True)]
        return {
            name: _pad(inputs),
            # A batch of its own: whoever adds noise to its inputs must not change the target.
            "labels": _pad(labels),
            "attention_mask": _pad(masks),
        }


def _input_name(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        raise ValueError("GeolipCollator: expected one row or more, got none")
    for name in _INPUTS:
        if all(name in row for row in rows):
            return name
    raise ValueError(
        f"GeolipCollator: expected 'patches' [N, P] in every row, or 'pixel_values' [C, H, W], got "
        f"{sorted(set().union(*rows))}; with Trainer, set remove_unused_columns=False"
    )


def _floats(value: Any, name: str) -> torch.Tensor:
    tensor = torch.as_tensor(value)
    if not tensor.is_floating_point():
        raise ValueError(
            f"GeolipCollator: expected {name} of floating-point numbers, got {tensor.dtype}; "
            "GeolipImageProcessor makes them of images"
        )
    return tensor


def _check_shapes(inputs: list[torch.Tensor], name: str) -> None:
    is_patches = name == "patches"
    shapes = {tuple(tensor.shape) for tensor in inputs}
    fits = all(len(shape) == (2 if is_patches else 3) for shape in shapes)
    # Of patches only the width must agree.
    if fits and len({shape[1:] if is_patches else shape for shape in shapes}) == 1:
        return
    expected = "[N, P] of one P" if is_patches else "[C, H, W] of one size"
    further = "" if is_patches else "; resize them, or pass the patches of each"
    raise ValueError(f"GeolipCollator: expected {name} {expected}, got {sorted(shapes)}{further}")


def _check_labels(inputs: list[torch.Tensor], labels: list[torch.Tensor], name: str) -> None:
    for row, (tensor, label) in enumerate(zip(inputs, labels, strict=True)):
        if tensor.shape != label.shape:
            raise ValueError(
                f"GeolipCollator: expected labels of the shape of {name}, {tuple(tensor.shape)}, "
                f"got {tuple(label.shape)} in row {row}"
            )


def _mask(row: Mapping[str, Any], tokens: int) -> torch.Tensor:
    given = row.get("attention_mask")
    mask = torch.ones(tokens) if given is None else torch.as_tensor(given)
    if mask.shape != (tokens,):
        raise ValueError(
            f"GeolipCollator: expected an attention_mask [{tokens}], one entry for each token, got "
            f"shape {tuple(mask.shape)}"
        )
    return mask.long()


def _pad(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
