"""A prior trained on the frames of a geolip, in memory.

    from gravity_hf.models.geolip import GeolipPrior
    from gravity_hf.training.geolip.prior import frames_of, train_prior

    frames = frames_of(geolip, images)
    prior = GeolipPrior.for_geolip(geolip, frames.shape[1])
    losses = train_prior(prior, frames, steps=2000, batch_size=32)
    prior.save_pretrained("prior")

One short run: nothing is written before it ends, and a run that was cut short starts again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ...models.geolip.prior_times import draw_times
from .fitting import CLIP, WARMUP, finite

__all__ = ["frames_of", "train_prior"]


@torch.no_grad()
def frames_of(geolip: PreTrainedModel, inputs: Tensor, *, batch_size: int = 64) -> Tensor:
    """Frames `[count, N, V, d]`, float32 on the CPU, of patches `[count, N, P]` or images
    `[count, C, H, W]`."""
    was_training = geolip.training
    geolip.eval()
    found = []
    try:
        for part in inputs.split(batch_size):
            part = part.to(geolip.device)
            patches = geolip.patchify(part) if part.dim() == 4 else part
            found.append(geolip.encode(patches).float().cpu())
    finally:
        geolip.train(was_training)
    return torch.cat(found)


def train_prior(
    prior: PreTrainedModel,
    frames: Tensor,
    *,
    steps: int,
    batch_size: int,
    attention_mask: Tensor | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    warmup: int = WARMUP,
    progress: bool = False,
) -> list[float]:
    """Train `prior` where it is: Adam, warm-up and cosine, gradients clipped at 1.

    Its frame statistics are taken from `frames` first. Batches, noise and times depend on `seed`
    alone: on the CPU the same call gives the same prior, bit for bit, where `config.dropout` is 0.

    Args:
        prior: what is trained, in place; its mode is the same afterwards.
        frames: `[count, N, V, d]`; see `frames_of`.
        steps: optimiser steps.
        batch_size: inputs of a step; at most as many as there are.
        attention_mask: `[count, N]`, 0 = padding.
        lr: largest rate.
        seed: of order, noise and times.
        warmup: steps in which the rate rises.
        progress: show a bar where there is a terminal.

    Returns:
        The loss of every step, as it was before the step.

    Raises:
        ValueError: settings outside their range, or frames that do not fit the prior.
        FloatingPointError: the loss is not finite; the prior is then of no use.
    """
    _check(len(frames), steps, batch_size, lr, warmup)
    prior.set_frame_statistics(frames, attention_mask)
    optimizer = torch.optim.Adam(prior.parameters(), lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(warmup, steps - 1), steps)
    draws = _draws(frames, batch_size, torch.Generator("cpu").manual_seed(seed))
    was_training = prior.training
    prior.train()
    losses: list[float] = []
    try:
        for _ in tqdm(range(steps), desc="prior", unit="step", disable=None if progress else True):
            chosen, noise, times = next(draws)
            mask = None if attention_mask is None else attention_mask[chosen].to(prior.device)
            batch = (x.to(prior.device) for x in (frames[chosen], noise, times))
            part, noise, times = batch
            loss = prior(part, mask, noise=noise, times=times).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            losses.append(finite(loss, len(losses), "train_prior"))
    finally:
        prior.train(was_training)
    return losses


def _draws(
    frames: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Which inputs, noise for them and times, epoch after epoch; odd ones of an epoch left out."""
    while True:
        order = torch.randperm(len(frames), generator=generator)
        for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
            noise = torch.randn((batch_size, *frames.shape[1:]), generator=generator)
            yield chosen, noise, draw_times(batch_size, generator)


def _check(count: int, steps: int, batch_size: int, lr: float, warmup: int) -> None:
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"train_prior.batch_size: expected 1 to {count}, the number of inputs, got "
            f"{batch_size!r}"
        )
    if steps < 1 or warmup < 0:
        raise ValueError(
            f"train_prior.steps, warmup: expected at least 1 and 0, got {steps!r} and {warmup!r}"
        )
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"train_prior.lr: expected a finite rate above 0, got {lr!r}")
