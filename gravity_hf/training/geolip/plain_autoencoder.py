"""A plain autoencoder to compare a geolip with: the same networks, a code without a sphere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers.utils import ModelOutput

from ...models.geolip.coders import ResidualNetwork


@dataclass
class PlainAutoencoderOutput(ModelOutput):
    """`loss`: squared error of normalised features; `reconstruction` `[B, N, P]`, of features."""

    loss: Tensor | None = None
    reconstruction: Tensor | None = None


class PlainAutoencoder(nn.Module):
    """`decode(tanh(encode(x)))` of normalised features, token by token.

    `gravity_hf.training.geolip.fitting.fit` trains it on the rows that it trains a geolip on.

    Args:
        patch_dim: width `P` of the features.
        code_dim: width of the code, each coordinate in (-1, 1).
        hidden_size: of the networks on both sides, which are those of a geolip.
        depth: residual blocks of each.
        mean, std: `[P]`, of training tokens.
    """

    # It has no alphas, and so none of a geolip's settings that a fit would ask for.
    config = None

    def __init__(
        self,
        patch_dim: int,
        code_dim: int,
        hidden_size: int,
        *,
        mean: Tensor,
        std: Tensor,
        depth: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = ResidualNetwork(patch_dim, hidden_size, code_dim, depth, norm=True)
        self.decoder = ResidualNetwork(code_dim, hidden_size, patch_dim, depth, norm=True)
        self.register_buffer("feature_mean", mean.clone())
        self.register_buffer("feature_std", std.clone())

    @property
    def device(self) -> torch.device:
        return self.feature_mean.device

    def normalize_features(self, features: Tensor) -> Tensor:
        return (features - self.feature_mean) / self.feature_std

    def restore_features(self, values: Tensor) -> Tensor:
        return values * self.feature_std + self.feature_mean

    def encode(self, features: Tensor) -> Tensor:
        """Codes `[..., k]` of features `[..., P]`."""
        return torch.tanh(self.encoder(self.normalize_features(features)))

    def decode(self, code: Tensor) -> Tensor:
        """Normalised features `[..., P]` of codes."""
        return self.decoder(code)

    def forward(
        self, patches: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> PlainAutoencoderOutput:
        """Features `[B, N, P]`, a mask `[B, N]`, and what is to be found, by default the input."""
        found = self.decode(self.encode(patches))
        wanted = self.normalize_features(patches if labels is None else labels)
        seen = slice(None) if attention_mask is None else attention_mask.bool()
        return PlainAutoencoderOutput(
            mse_loss(found[seen], wanted[seen]), self.restore_features(found)
        )


__all__ = ["PlainAutoencoder", "PlainAutoencoderOutput"]
