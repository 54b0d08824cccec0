"""Text as images: three consecutive bytes are the colour of one pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import BatchFeature
from transformers.feature_extraction_utils import FeatureExtractionMixin

from .patches import patch_grid, patchify, stitch

_CHANNELS = 3
# Bytes 0 to 255 lie evenly in [-1, 1].
_HALF_RANGE = 127.5
# What transformers' loaders hand over beside settings.
_SERVICE_NAMES = ("feature_extractor_type", "image_processor_type", "processor_class", "auto_map")


class GeolipByteTrigramProcessor(FeatureExtractionMixin):
    """Texts to images and patches, and bytes back; exact, as a container, for any bytes.

    Bytes fill a pixel (red, green, blue), pixels fill a patch row by row, and patches fill the
    image row by row, so that a patch is a stretch of `3 patch_size**2` bytes. A byte `b` is stored
    as `(b - 127.5) / 127.5`. What a text leaves empty is byte 0; how many bytes count stands beside
    the image, in `byte_length`, and not in it, where an inexact reconstruction could change it. A
    text longer than an image goes on in the next one; an empty text is one empty image.

    Args:
        image_size: height and width, in pixels, a multiple of `patch_size`. The default holds 768
            bytes in 64 patches of 12.
        patch_size: in pixels.

    Raises:
        ValueError: a size that is no multiple of `patch_size`, or an unknown name.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int = 16, patch_size: int = 2, **kwargs: object) -> None:
        if unknown := sorted(set(kwargs) - set(_SERVICE_NAMES)):
            raise ValueError(
                f"GeolipByteTrigramProcessor: unknown settings {unknown}; known are image_size and "
                "patch_size"
            )
        patch_grid(image_size, image_size, patch_size)
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size

    @property
    def bytes_per_image(self) -> int:
        """How many bytes one image holds."""
        return _CHANNELS * self.image_size**2

    def __call__(self, text: str | bytes | Iterable[str | bytes]) -> BatchFeature:
        """`M` images, one or more for each text, in order.

        Returns:
            `pixel_values` `[M, 3, H, W]` and `patches` `[M, N, 3 p p]`, the same values, float32;
            `byte_length` `[M]` and `text_index` `[M]`, int64: how many bytes of an image count, and
            of which text they are.
        """
        texts = [text] if isinstance(text, (str, bytes)) else list(text)
        pieces, owners = [], []
        for index, one in enumerate(texts):
            content = one.encode("utf-8") if isinstance(one, str) else bytes(one)
            step = self.bytes_per_image
            for start in range(0, max(len(content), 1), step):
                pieces.append(content[start : start + step])
                owners.append(index)
        pixel_values = self.encode_bytes(pieces)
        return BatchFeature(
            {
                "pixel_values": pixel_values,
                "patches": patchify(pixel_values, self.patch_size),
                "byte_length": torch.tensor([len(piece) for piece in pieces], dtype=torch.int64),
                "text_index": torch.tensor(owners, dtype=torch.int64),
            }
        )

    def encode_bytes(self, pieces: Sequence[bytes]) -> torch.Tensor:
        """One image `[3, H, W]` for each piece, float32 `[M, 3, H, W]`.

        Raises:
            ValueError: a piece longer than `bytes_per_image`.
        """
        longest = max(map(len, pieces), default=0)
        if longest > self.bytes_per_image:
            raise ValueError(
                f"encode_bytes: expected at most {self.bytes_per_image} bytes for an image, got "
                f"{longest}; call the processor itself, which goes on in further images"
            )
        padded = b"".join(piece.ljust(self.bytes_per_image, b"\0") for piece in pieces)
        values = torch.from_numpy(np.frombuffer(padded, dtype=np.uint8).astype(np.float32))
        values = (values - _HALF_RANGE) / _HALF_RANGE
        in_patch = self.patch_size**2
        patches = (self.image_size // self.patch_size) ** 2
        colours = values.reshape(len(pieces), patches, in_patch, _CHANNELS).transpose(2, 3)
        # [M, N, 3, p p]
        return stitch(colours.flatten(2), self.patch_size, self.image_size, self.image_size)

    def decode_bytes(
        self, images: torch.Tensor, byte_length: torch.Tensor | Sequence[int] | None = None
    ) -> list[bytes]:
        """The bytes nearest to images `[M, 3, H, W]` or patches `[M, N, 3 p p]`, one for each.

        Args:
            byte_length: how many of each count; None: all that an image holds.

        Raises:
            ValueError: images of another size, or as many lengths as there are images not.
        """
        content = self._nearest_bytes(images).cpu().numpy()
        lengths = [self.bytes_per_image] * len(content) if byte_length is None else byte_length
        if len(lengths) != len(content):
            raise ValueError(
                f"decode_bytes: expected one byte_length for each of {len(content)} images, got "
                f"{len(lengths)}"
            )
        return [row[: int(length)].tobytes() for row, length in zip(content, lengths, strict=True)]

    def decode(
        self,
        images: torch.Tensor,
        byte_length: torch.Tensor | Sequence[int],
        text_index: torch.Tensor | Sequence[int],
    ) -> list[str]:
        """The texts that images hold; bytes that are no UTF-8 become U+FFFD."""
        texts: dict[int, bytes] = {}
        pieces = self.decode_bytes(images, byte_length)
        for piece, owner in zip(pieces, text_index, strict=True):
            texts[int(owner)] = texts.get(int(owner), b"") + piece
        return [texts[owner].decode("utf-8", errors="replace") for owner in sorted(texts)]

    def byte_recovery(
        self,
        reconstruction: torch.Tensor,
        original: torch.Tensor,
        byte_length: torch.Tensor | Sequence[int] | None = None,
    ) -> float:
        """The share of bytes that a reconstruction gives back exactly, in [0, 1].

        Both may be images or patches. With `byte_length`, what lies behind a text is not counted.

        Raises:
            ValueError: other numbers of images, or no byte to count.
        """
        wanted, found = self._nearest_bytes(original), self._nearest_bytes(reconstruction)
        if wanted.shape != found.shape:
            raise ValueError(
                f"byte_recovery: expected as many reconstructions as originals, {len(wanted)}, got "
                f"{len(found)}"
            )
        counts = torch.ones_like(wanted, dtype=torch.bool)
        if byte_length is not None:
            lengths = torch.as_tensor(byte_length, device=wanted.device)
            counts = torch.arange(wanted.shape[1], device=wanted.device) < lengths[:, None]
        if not counts.any():
            raise ValueError("byte_recovery: expected one byte or more to count, got none")
        return (wanted == found.to(wanted.device))[counts].double().mean().item()

    def _nearest_bytes(self, images: torch.Tensor) -> torch.Tensor:
        """`[M, bytes_per_image]` uint8, in the order of the text."""
        patches = patchify(images, self.patch_size) if images.ndim == 4 else images
        expected = (self.image_size // self.patch_size) ** 2, _CHANNELS * self.patch_size**2
        if patches.shape[1:] != expected:
            raise ValueError(
                f"GeolipByteTrigramProcessor: expected images [M, 3, {self.image_size}, "
                f"{self.image_size}] or patches [M, {expected[0]}, {expected[1]}], got shape "
                f"{tuple(images.shape)}"
            )
        values = (patches.detach().float() * _HALF_RANGE + _HALF_RANGE).round().clamp(0, 255)
        in_patch = self.patch_size**2
        colours = values.reshape(*patches.shape[:2], _CHANNELS, in_patch).transpose(2, 3)
        return colours.flatten(1).to(torch.uint8)
