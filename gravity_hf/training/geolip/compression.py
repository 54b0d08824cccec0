"""What frames cost and keep as codes, beside other codes of the same bytes: PCA, an autoencoder,
the features themselves in fewer bits.

Bytes are those of packed storages, token by token in whole bytes; what a reader needs once, for all
tokens (weights, a basis, ends of steps, feature statistics), is counted beside them. Nobody's codes
are entropy-coded. Cosines are of held-out tokens: of normalised features, and of the features as
the host gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...models.geolip.codes import dequantize_frames, quantize_frames
from ...models.geolip.features import feature_statistics
from .fitting import Rows, batches_of
from .plain_autoencoder import PlainAutoencoder
from .scalar_codes import Distortions, allocate_bits, measure_distortions, some_rows

GEOLIP, AUTOENCODER = "geolip", "autoencoder"
PCA, PCA_ALLOCATED, FEATURES = "PCA", "PCA, bits by variance", "features"
METHODS = (GEOLIP, AUTOENCODER, PCA, PCA_ALLOCATED, FEATURES)


@dataclass(frozen=True)
class CodePoint:
    """One way to write a token, measured on held-out tokens.

    Args:
        method: one of `METHODS`.
        size: rows of a frame, width of a code, or directions.
        bits: of each degree of freedom, coordinate or coefficient; None where they differ, or
            where nothing is quantised.
        bytes_per_token: of packed storages; of float32 where nothing is quantised.
        side_bytes: what a reader needs once for all tokens.
        cosine: mean cosine between normalised features and what comes back.
        raw_cosine: the same of the features as they are.
        relative_error: squared error over squared length, of normalised features.
    """

    method: str
    size: int
    bits: int | None
    bytes_per_token: float
    side_bytes: int
    cosine: float
    raw_cosine: float
    relative_error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def geolip_points(
    model: Any, rows: Rows, bits: Sequence[int], *, batch_size: int = 64
) -> list[CodePoint]:
    """A geolip's frames at several numbers of bits, and last as float32 without quantisation.

    Args:
        model: a `GeolipModel` with its feature statistics; it is put in evaluation for the time.
        rows: held-out windows of features, as `fit` takes them.
        bits: of each degree of freedom, 2 to 8.
        batch_size: windows that are encoded at once.
    """
    was_training = model.training
    model.eval()
    choices: list[int | None] = [*bits, None]
    sums = {choice: _Sums() for choice in choices}
    counted = dict.fromkeys(choices, 0)
    try:
        for batch in batches_of(rows, batch_size):
            patches = batch["patches"].to(model.device)
            valid = batch["attention_mask"].to(model.device).bool()
            frame = model.encode(patches)
            for choice in choices:
                read = frame
                if choice is None:
                    counted[choice] += frame[valid].numel() * 4
                else:
                    # Padding has no codes: what is stored is what is valid.
                    codes = quantize_frames(frame[valid], choice)
                    counted[choice] += codes.nbytes
                    read = frame.clone()
                    read[valid] = dequantize_frames(codes).to(frame)
                found = model.decode(read, valid)
                sums[choice].add(
                    model.normalize_features(patches)[valid],
                    model.normalize_features(found)[valid],
                    patches[valid],
                    found[valid],
                )
    finally:
        model.train(was_training)
    side = _bytes_of(model, without=("encoder.", "stem_decoder.", "codebook"))
    return [
        sums[choice].point(GEOLIP, model.config.num_rows, choice, counted[choice], side)
        for choice in choices
    ]


@torch.no_grad()
def autoencoder_points(
    model: PlainAutoencoder, training: Tensor, held_out: Tensor, bits: Sequence[int]
) -> list[CodePoint]:
    """A plain autoencoder's codes at several numbers of bits, and last as float32.

    Args:
        model: with its feature statistics.
        training: tokens `[n, P]` that choose the ends of the steps.
        held_out: tokens `[m, P]` that are measured.
        bits: of each coordinate of the code, 1 to 8.
    """
    spread = measure_distortions(model.encode(some_rows(training)).float())
    code = model.encode(held_out).float()
    normalised = model.normalize_features(held_out)
    side = _bytes_of(model, without=("encoder.",))
    points = []
    for choice in [*bits, None]:
        if choice is None:
            read, size, ends = code, code.numel() * 4, 0
        else:
            quantiser = spread.codes([choice] * code.shape[1])
            packed = quantiser.encode(code)
            read = quantiser.decode(packed)
            size, ends = packed.untyped_storage().nbytes(), quantiser.side_bytes
        found = model.decode(read)
        sums = _Sums()
        sums.add(normalised, found, held_out, model.restore_features(found))
        points.append(sums.point(AUTOENCODER, code.shape[1], choice, size, side + ends))
    return points


class LinearCodes:
    """PCA of normalised training tokens, its coefficients in bits; and the features themselves."""

    def __init__(self, training: Tensor) -> None:
        """Args: training: tokens `[n, P]`, from which everything is measured."""
        self.statistics = feature_statistics(training)
        values = self._normalised(training)
        covariance = values.double().T @ values.double() / len(values)
        # Directions in columns, the largest variance first; they are orthonormal.
        self.basis = torch.linalg.eigh(covariance).eigenvectors.flip(1).float().contiguous()
        self._of_coefficients = measure_distortions(values @ self.basis)
        self._of_features = measure_distortions(values)

    def points(self, held_out: Tensor, budgets: Sequence[int]) -> list[CodePoint]:
        """For each budget of bytes: the best number of directions at one number of bits, and bits
        dealt out by what they save, both chosen on training tokens. Then the features in 8 and 4
        bits.
        """
        found = []
        for budget in budgets:
            bits, count = self._best_uniform(8 * budget)
            dealt = allocate_bits(self._of_coefficients.error, 8 * budget)
            # Variances fall, so directions without bits are the last ones, but for close calls.
            kept = int(dealt.nonzero().max()) + 1
            found.append(self._point(PCA, held_out, [bits] * count, bits))
            found.append(self._point(PCA_ALLOCATED, held_out, dealt[:kept].tolist(), None))
        return found + [self._of_plain_features(held_out, bits) for bits in (8, 4)]

    def _normalised(self, features: Tensor) -> Tensor:
        return (features - self.statistics.mean) / self.statistics.std

    def _best_uniform(self, total: int) -> tuple[int, int]:
        """Bits of a coefficient, and how many directions."""
        error = self._of_coefficients.error
        width = error.shape[1]
        losses = {}
        for bits in range(1, len(error)):
            count = min(width, total // bits)
            losses[bits, count] = float(error[bits, :count].sum() + error[0, count:].sum())
        return min(losses, key=lambda choice: losses[choice])

    def _point(
        self, method: str, held_out: Tensor, bits: list[int], shown: int | None
    ) -> CodePoint:
        basis = self.basis[:, : len(bits)].clone(memory_format=torch.contiguous_format)
        side = basis.untyped_storage().nbytes()
        return self._measured(method, held_out, self._of_coefficients, basis, bits, shown, side)

    def _of_plain_features(self, held_out: Tensor, bits: int) -> CodePoint:
        width = held_out.shape[1]
        each = [bits] * width
        return self._measured(FEATURES, held_out, self._of_features, None, each, bits, 0)

    def _measured(
        self,
        method: str,
        held_out: Tensor,
        spread: Distortions,
        basis: Tensor | None,
        bits: list[int],
        shown: int | None,
        side: int,
    ) -> CodePoint:
        values = self._normalised(held_out)
        quantiser = spread.codes(bits)
        packed = quantiser.encode(values if basis is None else values @ basis)
        read = quantiser.decode(packed)
        found = read if basis is None else read @ basis.T
        sums = _Sums()
        mean, std = self.statistics.mean, self.statistics.std
        sums.add(values, found, held_out, found * std + mean)
        side += quantiser.side_bytes + mean.nbytes + std.nbytes
        size = packed.untyped_storage().nbytes()
        return sums.point(method, len(bits), shown, size, side)


class _Sums:
    """Cosines and errors over tokens, added up batch by batch in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.cosine = self.raw = self.error = self.length = 0.0

    def add(self, wanted: Tensor, found: Tensor, raw_wanted: Tensor, raw_found: Tensor) -> None:
        self.tokens += len(wanted)
        self.cosine += float(cosine_similarity(wanted, found, dim=-1).double().sum())
        self.raw += float(cosine_similarity(raw_wanted, raw_found, dim=-1).double().sum())
        self.error += float((wanted - found).double().square().sum())
        self.length += float(wanted.double().square().sum())

    def point(self, method: str, size: int, bits: int | None, held: int, side: int) -> CodePoint:
        count = max(self.tokens, 1)
        error = self.error / self.length if self.length else math.nan
        each = (self.cosine / count, self.raw / count, error)
        return CodePoint(method, size, bits, held / count, side, *each)


def _bytes_of(model: torch.nn.Module, without: tuple[str, ...]) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if not name.startswith(without)
    )


__all__ = [
    "METHODS",
    "CodePoint",
    "LinearCodes",
    "autoencoder_points",
    "geolip_points",
]
