"""What a verdict sums up while batches go by: nothing of a batch is kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_geolip import GeolipConfig
from .frames import critical_deviation, frame_deviation, random_frames

# Frames whose pairs of rows are looked at together: 33 MB of 128 rows.
_FRAMES = 256
# A gain is measured against no smaller loss.
_LEAST_LOSS = 1e-12


class VerdictTotals:
    """Sums and maxima over tokens, in float64 and on the CPU."""

    def __init__(self, config: GeolipConfig) -> None:
        self.config = config
        self.critical = critical_deviation(config.base_dim, config.envelope_coeff)
        self.tokens = 0
        self.squared = self.cosine = self.swapped_squared = self.swapped_cosine = 0.0
        self.deviation = self.inside = 0.0
        self.absmax = self.angle_error = self.energy_error = 0.0

    def add_reconstruction(self, found: Tensor, target: Tensor, *, swapped: bool) -> None:
        """`[T, P]`, in the normalised space."""
        squared = float((found - target).square().mean(-1).cpu().double().sum())
        cosine = float(F.cosine_similarity(found, target, dim=-1).cpu().double().sum())
        if swapped:
            self.swapped_squared += squared
            self.swapped_cosine += cosine
        else:
            self.squared += squared
            self.cosine += cosine

    def add_frames(self, frames: Tensor, lens_frames: Tensor, omega: Tensor) -> None:
        """`[T, V, d]`, `[T, V, D]`, `[T, D]`."""
        config = self.config
        dim, baseline = config.base_dim, config.deviation_baseline
        self.tokens += len(frames)
        for frame, lens_frame in zip(
            frames.split(_FRAMES), lens_frames.split(_FRAMES), strict=True
        ):
            found = frame_deviation(frame, baseline)
            lifted = frame_deviation(lens_frame, baseline, base_dim=dim)
            self.deviation += float(found.sum())
            self.inside += int((found.abs() < self.critical).sum())
            self.absmax = _larger(self.absmax, found.abs())
            self.angle_error = _larger(self.angle_error, (lifted - found).abs())
        energy = omega.float().cpu().double().square().sum(-1)
        self.energy_error = _larger(self.energy_error, (energy - config.num_rows).abs())

    def random_numbers(self, seed: int) -> tuple[float, float]:
        """Largest deviation of as many random frames, and the share of them in the envelope.

        Drawn when all are counted, so that they do not depend on how tokens came in batches.
        """
        config, generator = self.config, torch.Generator("cpu").manual_seed(seed)
        largest, inside = 0.0, 0
        for start in range(0, self.tokens, _FRAMES):
            count = min(_FRAMES, self.tokens - start)
            drawn = random_frames((count, config.num_rows), config.base_dim, generator)
            deviation = frame_deviation(drawn, config.deviation_baseline).abs()
            largest = _larger(largest, deviation)
            inside += int((deviation < self.critical).sum())
        return largest, inside / self.tokens

    def loss(self, squared: float, cosine: float) -> float:
        """Of the task, from sums over tokens."""
        kind = self.config.reconstruction_loss
        loss = 0.0 if kind == "cosine" else squared / self.tokens
        return loss if kind == "mse" else loss + 1.0 - cosine / self.tokens

    def gain(self) -> float:
        loss = self.loss(self.squared, self.cosine)
        swapped = self.loss(self.swapped_squared, self.swapped_cosine)
        return (swapped - loss) / max(loss, _LEAST_LOSS)


def _larger(most: float, values: Tensor) -> float:
    return max(most, float(values.max())) if values.numel() else most
