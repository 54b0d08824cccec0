"""Images to pixel values in [-1, 1], to patches, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict

# Not from the top, where transformers 5.17 hides it unless torchvision is there.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import ImagesKwargs
from transformers.utils import requires_backends

from .configuration_geolip import GeolipConfig
from .image_arrays import as_channels_first, check_range, to_bytes
from .patches import patch_grid, patchify, stitch

# What transformers' loaders hand over beside settings.
_SERVICE_NAMES = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
_BILINEAR = 2


class GeolipImageKwargs(ImagesKwargs, total=False):
    """What a call or a saved file may set."""

    patch_size: int | None


class GeolipImageProcessor(PilBackend):
    """Images, as PIL, numpy or torch, one or many, to what `GeolipModel` reads.

    An image becomes RGB (grey is repeated, what is transparent lies on white), is resized, and its
    bytes `x` become `x / 127.5 - 1`. Arrays may have channels first or last, or be grey `[H, W]`;
    numbers are 0 to 255, unless `do_rescale=False`: 0 to 1 then.

        processor = GeolipImageProcessor(image_size=32, patch_size=4)
        inputs = processor(images, return_tensors="pt")      # pixel_values [B, 3, 32, 32]
        pictures = processor.post_process_reconstruction(model(**inputs))

    Args:
        image_size: height and width in pixels, or `(height, width)`; multiples of `patch_size`.
            `size` is its name in transformers, and takes a dictionary of both, too. Default 32.
        patch_size: `p` in pixels.
        do_resize: False: images keep their size, which must be a multiple of `patch_size`; images
            of several sizes are then a list, which no batch can be made of.
        do_convert_rgb: False: channels stay as they are, so that grey images have one.
        **kwargs: further settings of transformers' image processors.

    Raises:
        ValueError: a size that is no multiple of `patch_size`, unknown settings, or, when called,
            images whose numbers are out of range.
    """

    valid_kwargs = GeolipImageKwargs
    model_input_names = ["pixel_values"]
    resample = _BILINEAR
    size = {"height": 32, "width": 32}
    patch_size = 4
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    image_mean = 0.5
    image_std = 0.5

    def __init__(
        self,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        known = {*self.valid_kwargs.__annotations__, *_SERVICE_NAMES}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(
                f"GeolipImageProcessor: unknown settings {unknown}; known are image_size and "
                f"{sorted(known - set(_SERVICE_NAMES))}"
            )
        if image_size is not None:
            if kwargs.get("size") is not None:
                raise ValueError(
                    f"GeolipImageProcessor: expected image_size or size, got both, {image_size!r} "
                    f"and {kwargs['size']!r}"
                )
            kwargs["size"] = _both(image_size)
        # Of what loaders hand over nothing is a setting: kept, it would be written to files again.
        settings = {name: kwargs[name] for name in kwargs if name not in _SERVICE_NAMES}
        if patch_size is not None:
            settings["patch_size"] = patch_size
        super().__init__(**settings)
        if not (self.size.height and self.size.width):
            raise ValueError(
                "GeolipImageProcessor: expected a size with height and width, got "
                f"{dict(self.size)}; to keep sizes, set do_resize=False"
            )
        patch_grid(self.size.height, self.size.width, self.patch_size)

    @classmethod
    def from_config(cls, config: GeolipConfig, **kwargs: Any) -> GeolipImageProcessor:
        """The processor for a model of images: its `image_size`, `patch_size`, `num_channels`.

        Raises:
            ValueError: the config names no `patch_size`, so that its model reads no images.
        """
        if config.patch_size is None:
            raise ValueError(
                "GeolipImageProcessor.from_config: expected a config with a patch_size, got None: "
                "a model of features reads no images"
            )
        settings: dict[str, Any] = {"patch_size": config.patch_size}
        if config.image_size is not None and "size" not in kwargs:
            settings["image_size"] = config.image_size
        if config.num_channels == 1:
            settings["do_convert_rgb"] = False
        return cls(**{**settings, **kwargs})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, which would leave out the name that it does not know."""
        if "image_size" in kwargs:
            kwargs["size"] = _both(kwargs.pop("image_size"))
        return super().from_dict(image_processor_dict, **kwargs)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """One image `[C, H, W]`, its numbers as they were."""
        array = as_channels_first(image, to_rgb=bool(do_convert_rgb), layout=input_data_format)
        if do_rescale or do_normalize:
            check_range(array, highest=255 if do_rescale else 1)
        return array

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        """As in transformers, which refuses grey arrays without a dimension of channels."""
        if isinstance(images, (list, tuple)):
            images = [_with_channels(image) for image in images]
        return super()._prepare_images_structure(_with_channels(images), expected_ndims)

    def resize(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        """As in transformers; an image of this size stays as it is, also one of fractions."""
        if (size.height, size.width) == image.shape[-2:]:
            return image
        requires_backends(self, ["vision"])
        return super().resize(image, size=size, **kwargs)

    def _preprocess(
        self, images: list[np.ndarray], return_tensors: Any = None, **kwargs: Any
    ) -> Any:
        features = super()._preprocess(images, return_tensors=None, **kwargs)
        arrays = [np.asarray(image, dtype=np.float32) for image in features["pixel_values"]]
        for array in arrays:
            patch_grid(*array.shape[-2:], kwargs["patch_size"])
        if return_tensors is not None and len({array.shape for array in arrays}) > 1:
            raise ValueError(
                "GeolipImageProcessor: expected images of one size for a batch, got "
                f"{sorted({array.shape for array in arrays})}; set do_resize=True, or leave out "
                "return_tensors and collate the patches of each"
            )
        features["pixel_values"] = arrays
        return features.convert_to_tensors(tensor_type=return_tensors)

    def patchify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The patches `[B, N, C p p]` of `pixel_values` `[B, C, H, W]`."""
        return patchify(pixel_values, self.patch_size)

    def stitch(
        self, patches: torch.Tensor, height: int | None = None, width: int | None = None
    ) -> torch.Tensor:
        """`patchify` undone; without a size, the images are of the processor's."""
        height = self.size.height if height is None else height
        return stitch(patches, self.patch_size, height, self.size.width if width is None else width)

    def post_process_reconstruction(
        self, outputs: Any, sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[np.ndarray]:
        """What a model gives back, as pictures: uint8 `[H, W, C]` each.

        Args:
            outputs: a model's output, patches `[B, N, C p p]`, or pixel values `[B, C, H, W]`.
            sizes: of patches, `(height, width)` of each image, in pixels; patches behind those of
                an image are its padding. None: the size of the output's `pixel_reconstruction`,
                or else the processor's.

        Raises:
            ValueError: other numbers of sizes or patches than there are images.
        """
        values = outputs if isinstance(outputs, torch.Tensor) else _reconstruction(outputs, sizes)
        if values.ndim == 4:
            return [to_bytes(image) for image in values]
        sizes = [(self.size.height, self.size.width)] * len(values) if sizes is None else sizes
        if len(sizes) != len(values):
            raise ValueError(
                f"post_process_reconstruction: expected one size for each of {len(values)} images, "
                f"got {len(sizes)}"
            )
        pictures = []
        for patches, size in zip(values, sizes, strict=True):
            height, width = (int(pixels) for pixels in size)
            rows, columns = patch_grid(height, width, self.patch_size)
            image = stitch(patches[None, : rows * columns], self.patch_size, height, width)
            pictures.append(to_bytes(image[0]))
        return pictures

    def to_dict(self) -> dict[str, Any]:
        """The settings, as saved.

        Without the name of this class: `AutoImageProcessor` looks up a name that it reads among the
        classes it knows, while the model type in the `config.json` beside leads it here as soon as
        `gravity_hf` is imported.
        """
        settings = super().to_dict()
        settings.pop("image_processor_type", None)
        return settings


def _both(image_size: int | tuple[int, int]) -> dict[str, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return {"height": height, "width": width}


def _with_channels(image: Any) -> Any:
    is_grey = isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 2
    return image[None] if is_grey else image


def _reconstruction(outputs: Any, sizes: Any) -> torch.Tensor:
    pixels = outputs.get("pixel_reconstruction") if isinstance(outputs, Mapping) else None
    if pixels is not None and sizes is None:
        return pixels
    return outputs["reconstruction"]


AutoImageProcessor.register(
    GeolipConfig,
    image_processor_classes={"torchvision": GeolipImageProcessor, "pil": GeolipImageProcessor},
    exist_ok=True,
)
