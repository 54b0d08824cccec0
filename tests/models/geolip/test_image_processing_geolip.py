"""Images of every kind become pixel values and patches, and reconstructions become pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING,
    AutoImageProcessor,
)

from gravity_hf import models
from gravity_hf.models.geolip import (
    GeolipConfig,
    GeolipForReconstruction,
    GeolipImageProcessor,
    GeolipOutput,
)

PROCESSOR = GeolipImageProcessor(image_size=8, patch_size=4)
BYTES = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(BYTES.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(BYTES),
        BYTES,
        BYTES.transpose(2, 0, 1),
        torch.from_numpy(BYTES).permute(2, 0, 1),
        BYTES.astype(np.float32),
    ],
    ids=["pil", "channels-last", "channels-first", "torch", "float"],
)
def test_bytes_become_numbers_from_minus_one_to_one(image: Any) -> None:
    values = PROCESSOR(image, return_tensors="pt")["pixel_values"]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, EXPECTED[None], rtol=0, atol=1e-6)


GREY = BYTES[..., 0]
CLEAR = np.dstack([BYTES, np.zeros((8, 8), np.uint8)])
HALF = np.dstack([BYTES, np.full((8, 8), 51, np.uint8)])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY), np.repeat(GREY[..., None], 3, 2)),
        (GREY, np.repeat(GREY[..., None], 3, 2)),
        (torch.from_numpy(GREY)[None], np.repeat(GREY[..., None], 3, 2)),
        (Image.fromarray(CLEAR), np.full_like(BYTES, 255)),
        (CLEAR, np.full_like(BYTES, 255)),
        (HALF, (0.2 * BYTES + 0.8 * 255).round().astype(np.uint8)),
        (Image.fromarray(BYTES).quantize(16), None),
    ],
    ids=["grey-pil", "grey-array", "grey-torch", "clear-pil", "clear", "half", "palette"],
)
def test_every_kind_becomes_rgb(image: Any, expected: np.ndarray | None) -> None:
    values = PROCESSOR(image, return_tensors="pt")["pixel_values"]
    if expected is None:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(PROCESSOR.post_process_reconstruction(values)[0], expected)


def test_numbers_from_zero_to_one_need_to_be_named() -> None:
    unit = BYTES.astype(np.float32) / 255
    values = PROCESSOR(unit, do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values[0], EXPECTED, rtol=0, atol=1e-6)
    # Of the right size already: not rounded to bytes on the way.
    fractions = np.linspace(0.0, 1.0, 192, dtype=np.float32).reshape(8, 8, 3)
    values = PROCESSOR(fractions, do_rescale=False, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(values[0], 2 * fractions.transpose(2, 0, 1) - 1, atol=1e-6)
    with pytest.raises(ValueError, match="do_rescale=False"):
        PROCESSOR(unit)
    with pytest.raises(ValueError, match="from 0 to 255, got -1 to "):
        PROCESSOR(EXPECTED)


def test_images_of_several_sizes_are_resized_to_one() -> None:
    images = [Image.new("RGB", (5, 9), (255, 0, 0)), Image.new("RGB", (20, 8), (0, 0, 255))]
    values = PROCESSOR(images, return_tensors="pt")["pixel_values"]
    assert values.shape == (2, 3, 8, 8)
    assert values[0, 0].unique().tolist() == [1.0] and values[1, 0].unique().tolist() == [-1.0]
    assert GeolipImageProcessor()(images, return_tensors="pt")["pixel_values"].shape[2:] == (32, 32)
    wide = GeolipImageProcessor(image_size=(4, 12), patch_size=4)
    assert wide(images, return_tensors="np")["pixel_values"].shape == (2, 3, 4, 12)


def test_sizes_are_kept_where_asked() -> None:
    images = [np.zeros((8, 12, 3), np.uint8), np.zeros((4, 8, 3), np.uint8)]
    kept = PROCESSOR(images, do_resize=False)["pixel_values"]
    assert [tuple(image.shape) for image in kept] == [(3, 8, 12), (3, 4, 8)]
    with pytest.raises(ValueError, match="images of one size for a batch"):
        PROCESSOR(images, do_resize=False, return_tensors="pt")
    with pytest.raises(ValueError, match=r"multiple of patch_size \(4\), got 6"):
        PROCESSOR(np.zeros((8, 6, 3), np.uint8), do_resize=False)


def test_pixels_go_through_a_model_and_come_back_as_pictures() -> None:
    config = GeolipConfig(patch_size=4, image_size=8, num_rows=4, hidden_size=8)
    model = GeolipForReconstruction(config).eval()
    processor = GeolipImageProcessor.from_config(config)
    inputs = processor([Image.fromarray(BYTES), BYTES[::-1]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    pictures = processor.post_process_reconstruction(outputs)
    assert [(p.shape, p.dtype) for p in pictures] == [((8, 8, 3), np.uint8)] * 2
    expected = (outputs.pixel_reconstruction[1] * 127.5 + 127.5).round().clamp(0, 255)
    assert np.array_equal(pictures[1], expected.permute(1, 2, 0).to(torch.uint8).numpy())


def test_what_lies_outside_is_clipped_in_pictures() -> None:
    values = torch.tensor([-9.0, -1.01, 1.01, 9.0]).reshape(1, 1, 2, 2)
    assert PROCESSOR.post_process_reconstruction(values)[0].ravel().tolist() == [0, 0, 255, 255]


def test_patches_of_images_of_several_sizes_come_back() -> None:
    images = [np.full((8, 12, 3), 7, np.uint8), BYTES]
    kept = PROCESSOR(images, do_resize=False)["pixel_values"]
    patches = [PROCESSOR.patchify(torch.as_tensor(image)[None])[0] for image in kept]
    padded = torch.nn.utils.rnn.pad_sequence(patches, batch_first=True)
    for outputs in (padded, GeolipOutput(reconstruction=padded)):
        found = PROCESSOR.post_process_reconstruction(outputs, sizes=[(8, 12), (8, 8)])
        assert all(np.array_equal(a, b) for a, b in zip(found, images, strict=True))
    with pytest.raises(ValueError, match="one size for each of 2 images"):
        PROCESSOR.post_process_reconstruction(padded, sizes=[(8, 8)])


def test_settings_come_back_from_a_file(tmp_path: Path) -> None:
    GeolipImageProcessor(image_size=(4, 6), patch_size=2, do_convert_rgb=False).save_pretrained(
        tmp_path
    )
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["patch_size"] == 2
    loaded = GeolipImageProcessor.from_pretrained(tmp_path)
    assert (loaded.size.height, loaded.size.width, loaded.patch_size) == (4, 6, 2)
    assert loaded(GREY, return_tensors="pt")["pixel_values"].shape == (1, 1, 4, 6)
    changed = GeolipImageProcessor.from_pretrained(tmp_path, image_size=12, patch_size=3)
    assert (changed.size.width, changed.patch_size, changed.do_convert_rgb) == (12, 3, False)


def test_auto_image_processor_finds_it_before_the_model_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PROCESSOR.save_pretrained(tmp_path)
    GeolipConfig(patch_size=4, image_size=8).save_pretrained(tmp_path)
    # What `import gravity_hf` leaves: entries by name only.
    monkeypatch.setattr(models, "geolip", None)
    for name in [name for name in sys.modules if name.startswith("gravity_hf.models.geolip")]:
        monkeypatch.delitem(sys.modules, name)
    lazy = type(CONFIG_MAPPING._extra_content)
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", lazy())
    monkeypatch.setattr(IMAGE_PROCESSOR_MAPPING, "_extra_content", {})
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "GeolipImageProcessor"
    assert (loaded.patch_size, loaded.size.height) == (4, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_size": 10, "patch_size": 4}, "height: expected a multiple"),
        ({"image_size": 8, "size": 8}, "image_size or size"),
        ({"size": {"shortest_edge": 8}}, "a size with height and width"),
        ({"patchsize": 4}, r"unknown settings \['patchsize'\]"),
    ],
    ids=["multiple", "two-sizes", "edge", "unknown"],
)
def test_settings_that_do_not_fit_are_errors(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GeolipImageProcessor(**settings)
