"""A prior over the codes of a geolip: a rectified flow from noise to frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_prior import GeolipPriorConfig
from .losses import masked_mean
from .prior_decoding import check_decoder, decoder_digest, name_of
from .prior_pretrained import FrameScale, GeolipPriorPreTrainedModel
from .prior_times import TIME_WAVES, draw_times, time_waves


@dataclass
class GeolipPriorOutput(ModelOutput):
    """What a prior gives.

    loss: mean squared error of the velocity, over valid tokens. prediction: `[B, N, V, d]`, the
    frames that the noisy ones would become at that velocity, not yet on the sphere.
    """

    loss: Tensor | None = None
    prediction: Tensor | None = None


class GeolipPrior(GeolipPriorPreTrainedModel):
    """Where the codes of inputs lie: noise goes in, frames `[N, V, d]` of one input come out.

    A rectified flow (Liu et al., arXiv 2209.03003) between normal noise `x_0` and frames `x_1` with
    mean and deviation of each coordinate taken out. On the way, `x_t = (1 - t) x_0 + t x_1`, the
    velocity is `x_1 - x_0`; it is taken for

        v = (2 t - 1) / s^2 x_t + F(x_t / s, t) / s          s^2 = t^2 + (1 - t)^2

    whose first term is the best that a coordinate can do alone; a transformer without causality, F,
    has the rest to find (Karras et al., arXiv 2206.00364, have this for another way of noise). Rows
    go back to the sphere at the end. It knows nothing of what the codes mean: `generate_images`
    lets the geolip decode them, the one whose frames it learned.

    State: `proj_in.*` `[H, Vd]`; `places.weight` `[N, H]`; `time.{0,2}.*`; `blocks.layers.{i}.*`,
    torch's `TransformerEncoderLayer`, and `blocks.norm.*`; `proj_out.*` `[Vd, H]`;
    `scale.{mean,std}` `[V, d]`.
    """

    def __init__(self, config: GeolipPriorConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.proj_in = nn.Linear(config.code_size, width)
        self.places = nn.Embedding(config.num_tokens, width)
        self.time = nn.Sequential(nn.Linear(TIME_WAVES, width), nn.SiLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(
            width,
            config.num_attention_heads,
            config.intermediate_size or 4 * width,
            dropout=float(config.dropout),
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.blocks = nn.TransformerEncoder(
            layer, config.num_hidden_layers, norm, enable_nested_tensor=False
        )
        self.proj_out = nn.Linear(width, config.code_size)
        self.scale = FrameScale(config.num_rows, config.base_dim)
        self.post_init()

    @classmethod
    def for_geolip(cls, geolip: Any, num_tokens: int, **settings: Any) -> GeolipPrior:
        """A new prior over the frames of `geolip`, which it names and will hold others against.

        Args:
            geolip: a trained `GeolipModel`; training it further makes it another one.
            num_tokens: tokens, or patches, of one input.
            settings: others of `GeolipPriorConfig`; `geolip_name_or_path` says where others find
                the geolip, where that is not the folder it was loaded from.
        """
        own = geolip.config
        sizes = {"num_rows": own.num_rows, "base_dim": own.base_dim, "num_tokens": num_tokens}
        known = {"geolip_name_or_path": name_of(geolip), "geolip_digest": decoder_digest(geolip)}
        config = GeolipPriorConfig(**{**known, **settings, **sizes})
        return cls(config).to(geolip.device)

    @can_return_tuple
    def forward(
        self,
        frames: Tensor,
        attention_mask: Tensor | None = None,
        noise: Tensor | None = None,
        times: Tensor | None = None,
        return_loss: bool = True,
    ) -> GeolipPriorOutput:
        """The error of the velocity at some time of each input's flow.

        Args:
            frames: `[B, N, V, d]`, rows on the sphere.
            attention_mask: `[B, N]`, 0 = padding, which nothing sees and which does not count.
            noise: `[B, N, V, d]`, where the flow starts; None: drawn.
            times: `[B]` in [0, 1], where each input is on its way; None: `draw_times`.
            return_loss: False gives the prediction alone.

        Raises:
            ValueError: frames of other sizes than the config's, or a mask that does not fit.
        """
        self._check(frames, attention_mask)
        target = self.normalize_frames(frames)
        if noise is None:
            noise = torch.randn_like(target)
        if times is None:
            times = draw_times(len(frames)).to(target.device)
        noise, at = noise.to(target), times.to(target)[:, None, None, None]
        noisy = torch.lerp(noise, target, at)
        velocity = self.velocity(noisy, times, attention_mask)
        loss = None
        if return_loss:
            error = (velocity - (target - noise)).square().mean(dim=(-2, -1))
            loss = masked_mean(error, None if attention_mask is None else attention_mask != 0)
        prediction = self.restore_frames(noisy + (1 - at) * velocity)
        return GeolipPriorOutput(loss=loss, prediction=prediction)

    def velocity(
        self, noisy: Tensor, times: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Of normalised frames `[B, N, V, d]` on their way at `times` `[B]`; float32."""
        at = times.to(noisy)[:, None, None, None]
        variance = at.square() + (1 - at).square()
        dtype = self.proj_in.weight.dtype
        hidden = self.proj_in((noisy * variance.rsqrt()).flatten(-2).to(dtype))
        hidden = hidden + self.places.weight[: noisy.shape[1]]
        hidden = hidden + self.time(time_waves(times).to(hidden))[:, None]
        hidden = self.blocks(hidden, src_key_padding_mask=_padding(attention_mask))
        found = self.proj_out(hidden).float().unflatten(-1, noisy.shape[-2:])
        return (2 * at - 1) / variance * noisy + variance.rsqrt() * found

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        steps: int = 50,
        num_tokens: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """New frames `[count, N, V, d]`, float32, rows on the sphere: Euler steps from noise.

        Args:
            count: how many inputs.
            seed: of the noise, drawn on the CPU, so that it is the same on every device; or else
            generator: of the CPU. Neither: torch's own.
            steps: of the flow; each runs the network once.
            num_tokens: `N`; None: as many as the prior has places.
            batch_size: inputs at a time; the noise does not depend on it.

        Raises:
            ValueError: numbers below 1, more tokens than places, or both a seed and a generator.
        """
        config = self.config
        places = config.num_tokens if num_tokens is None else num_tokens
        _check_sampling(count, steps, batch_size, places, config.num_tokens)
        if seed is not None and generator is not None:
            raise ValueError("sample: expected a seed or a generator, got both. Leave one out")
        if seed is not None:
            generator = torch.Generator("cpu").manual_seed(seed)
        shape = (count, places, config.num_rows, config.base_dim)
        noise = torch.randn(shape, generator=generator)
        was_training = self.training
        self.eval()
        try:
            parts = [self._flow(part.to(self.device), steps) for part in noise.split(batch_size)]
        finally:
            self.train(was_training)
        return F.normalize(self.restore_frames(torch.cat(parts)), dim=-1, eps=1e-12)

    def _flow(self, x: Tensor, steps: int) -> Tensor:
        for step in range(steps):
            x = x + self.velocity(x, x.new_full((len(x),), step / steps)) / steps
        return x

    @torch.no_grad()
    def set_frame_statistics(self, frames: Tensor, attention_mask: Tensor | None = None) -> None:
        """Take mean and deviation of each coordinate over tokens of frames `[B, N, V, d]`.

        Raises:
            ValueError: frames of other sizes than the config's, or a mask that does not fit.
        """
        self._check(frames, attention_mask)
        tokens = frames.flatten(0, 1).double()
        if attention_mask is not None:
            tokens = tokens[(attention_mask != 0).flatten().to(tokens.device)]
        self.scale.mean.copy_(tokens.mean(0))
        self.scale.std.copy_(tokens.std(0, correction=0).clamp(min=1e-6))

    def normalize_frames(self, frames: Tensor) -> Tensor:
        return (frames.float() - self.scale.mean) / self.scale.std

    def restore_frames(self, normalised: Tensor) -> Tensor:
        return normalised * self.scale.std + self.scale.mean

    def check_geolip(self, geolip: Any) -> None:
        """Raise ValueError for a geolip that is not the one whose frames this prior knows."""
        check_decoder(self.config, geolip)

    def _check(self, frames: Tensor, mask: Tensor | None) -> None:
        config = self.config
        fits = frames.dim() == 4 and frames.shape[2:] == (config.num_rows, config.base_dim)
        if not fits or not 1 <= frames.shape[1] <= config.num_tokens:
            expected = f"[B, N <= {config.num_tokens}, {config.num_rows}, {config.base_dim}]"
            raise ValueError(
                f"GeolipPrior.frames: expected {expected}, got {list(frames.shape)}. "
                "Frames come from the encode() of the geolip that this prior is for"
            )
        if mask is not None and mask.shape != frames.shape[:2]:
            raise ValueError(
                f"GeolipPrior.attention_mask: expected {list(frames.shape[:2])}, got "
                f"{list(mask.shape)}"
            )


def _padding(mask: Tensor | None) -> Tensor | None:
    """Bool `[B, N]`, True = not seen; a row without any token sees all, as it needs some weight."""
    if mask is None:
        return None
    hidden = mask == 0
    return hidden & ~hidden.all(-1, keepdim=True)


def _check_sampling(count: int, steps: int, batch_size: int, tokens: int, places: int) -> None:
    for name, value in (("count", count), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"sample.{name}: expected at least 1, got {value!r}")
    if not 1 <= tokens <= places:
        raise ValueError(
            f"sample.num_tokens: expected 1 to {places}, the places of this prior, got {tokens!r}"
        )


__all__ = ["GeolipPrior", "GeolipPriorOutput", "GeolipPriorPreTrainedModel"]
