"""Batches of patches in which every sample has a neighbour to take its context from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .modeling_geolip import GeolipModel


class PatchBatch(NamedTuple):
    """patches, labels: `[B, N, P]`; mask: bool `[B, N]`, valid tokens; size: `(H, W)` in pixels,
    where the model smooths what it stitches, or None."""

    patches: Tensor
    labels: Tensor
    mask: Tensor
    size: tuple[int, int] | None


def patch_batches(
    model: GeolipModel, batches: Iterable[Mapping[str, Any]], device: torch.device
) -> Iterator[PatchBatch]:
    """Collated batches as patches; the label of an input without one is the input.

    Raises:
        ValueError: a batch with neither patches nor pixel_values.
    """
    for batch in batches:
        name = "patches" if "patches" in batch else "pixel_values"
        if name not in batch:
            raise ValueError(
                f"verdict: expected batches with patches or pixel_values, got {sorted(batch)}; "
                "GeolipCollator makes them"
            )
        inputs = batch[name].to(device)
        labels = batch["labels"].to(device) if batch.get("labels") is not None else inputs
        size = None
        if name == "pixel_values":
            if model.smooth is not None:
                size = (inputs.shape[2], inputs.shape[3])
            inputs, labels = model.patchify(inputs), model.patchify(labels)
        given = batch.get("attention_mask")
        if given is None:
            mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=device)
        else:
            mask = given.to(device) != 0
        yield PatchBatch(inputs, labels, mask, size)


def with_neighbours(batches: Iterable[PatchBatch]) -> Iterator[PatchBatch]:
    """The same samples in batches of two or more: one that comes alone joins those before it.

    At most two batches are held.

    Raises:
        ValueError: one sample in all, or images of two sizes that would have to share a batch.
    """
    complete: PatchBatch | None = None
    partial: PatchBatch | None = None
    for batch in batches:
        partial = batch if partial is None else _join(partial, batch)
        if len(partial.patches) >= 2:
            if complete is not None:
                yield complete
            complete, partial = partial, None
    if partial is not None:
        if complete is None:
            raise ValueError(
                "verdict: expected two samples or more, as the context of each is swapped for that "
                f"of another, got {len(partial.patches)}"
            )
        complete = _join(complete, partial)
    if complete is not None:
        yield complete


def _join(first: PatchBatch, second: PatchBatch) -> PatchBatch:
    if first.size != second.size:
        raise ValueError(
            "verdict: expected a neighbour of the same size for each image, as this model smooths "
            f"stitched images, got {first.size} beside {second.size} pixels; give batches of two "
            "or more images of one size"
        )
    longest = max(first.mask.shape[1], second.mask.shape[1])
    one, other = _padded(first, longest), _padded(second, longest)
    return PatchBatch(
        torch.cat([one.patches, other.patches]),
        torch.cat([one.labels, other.labels]),
        torch.cat([one.mask, other.mask]),
        first.size,
    )


def _padded(batch: PatchBatch, tokens: int) -> PatchBatch:
    missing = tokens - batch.mask.shape[1]
    patches, labels = (F.pad(x, (0, 0, 0, missing)) for x in (batch.patches, batch.labels))
    return PatchBatch(patches, labels, F.pad(batch.mask, (0, missing)), batch.size)
