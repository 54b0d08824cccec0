"""The space that features are reconstructed in: each dimension centred and scaled, or whitened.

Statistics are those of the tokens that a model is trained on. They live in buffers of the model,
float32, so that whoever loads it reads features as it did.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...layers.float32 import without_autocast
from ...ops.reference import compute_dtype
from .feature_statistics import STD_FLOOR


class FeatureSpace(nn.Module):
    """Of a model with the buffers `feature_mean`, `feature_std` `[P]` and, where it whitens,
    `feature_whitening` and its inverse `feature_unwhitening` `[P, P]`."""

    feature_mean: Tensor
    feature_std: Tensor
    feature_whitening: Tensor
    feature_unwhitening: Tensor
    feature_norm: str

    def normalize_features(self, x: Tensor) -> Tensor:
        """`(x - mean) / std` of `[..., P]`, then `@ whitening` where the model whitens; at least
        float32. With `feature_norm="none"` the features as they are.

        Raises:
            ValueError: features of another width.
        """
        mean, std = self.feature_mean, self.feature_std
        _check_width(x, mean.shape[0])
        x = x.to(_common(x, mean))
        if self.feature_norm == "none":
            return x
        x = (x - mean) / std
        return self._mapped(x, self.feature_whitening) if self.feature_norm == "whiten" else x

    def restore_features(self, x: Tensor) -> Tensor:
        """What `normalize_features` undoes, `[..., P]`."""
        mean, std = self.feature_mean, self.feature_std
        _check_width(x, mean.shape[0])
        x = x.to(_common(x, mean))
        if self.feature_norm == "none":
            return x
        x = self._mapped(x, self.feature_unwhitening) if self.feature_norm == "whiten" else x
        return x * std + mean

    @torch.no_grad()
    def set_feature_statistics(
        self, mean: Tensor, std: Tensor, whitening: Tensor | None = None
    ) -> None:
        """What features are normalised with from now on.

        Args:
            mean, std: `[P]`, of the tokens that the model is trained on; a std below 1e-6 counts as
                1e-6.
            whitening: `[P, P]`, applied after them, as `FeatureStatistics` has it; with
                `feature_norm="whiten"`, and only there.

        Raises:
            ValueError: shapes that do not fit, values that are not finite, or a model with another
                feature_norm.
        """
        self._check_statistics(mean, std, whitening)
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.to(self.feature_std).clamp(min=STD_FLOOR))
        if whitening is not None:
            self.feature_whitening.copy_(whitening)
            self.feature_unwhitening.copy_(torch.linalg.pinv(whitening.detach().double()))

    def _check_statistics(self, mean: Tensor, std: Tensor, whitening: Tensor | None) -> None:
        if self.feature_norm == "none":
            raise ValueError(
                "set_feature_statistics: expected a model with feature_norm='zscore' or 'whiten', "
                "got 'none', which normalises nothing. Make it with another feature_norm"
            )
        whitens = self.feature_norm == "whiten"
        if whitens != (whitening is not None):
            expected = "a matrix [P, P]" if whitens else "None"
            got = None if whitening is None else tuple(whitening.shape)
            raise ValueError(
                f"whitening: expected {expected} with feature_norm={self.feature_norm!r}, got {got}"
            )
        width = self.feature_mean.shape[0]
        given = {"mean": (mean, (width,)), "std": (std, (width,))}
        if whitening is not None:
            given["whitening"] = (whitening, (width, width))
        for name, (value, shape) in given.items():
            if tuple(value.shape) != shape or not bool(value.isfinite().all()):
                raise ValueError(
                    f"{name}: expected finite values {list(shape)}, got {tuple(value.shape)}"
                )

    def _mapped(self, x: Tensor, matrix: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            return x @ matrix.to(x.dtype)


def _check_width(x: Tensor, width: int) -> None:
    """A single column would be taken for all of them."""
    if x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(
            f"features: expected [..., {width}], as config.patch_dim says, got {tuple(x.shape)}"
        )


def _common(x: Tensor, buffer: Tensor) -> torch.dtype:
    return torch.promote_types(compute_dtype(x.dtype), compute_dtype(buffer.dtype))
