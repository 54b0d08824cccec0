"""Text in images of byte trigrams comes back exactly, and recovery counts what a model lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gravity_hf.models.geolip.trigrams import GeolipByteTrigramProcessor

SMALL = GeolipByteTrigramProcessor(image_size=4, patch_size=2)


@settings(max_examples=60)
@given(pieces=st.lists(st.binary(max_size=3 * SMALL.bytes_per_image), max_size=3))
def test_any_bytes_come_back(pieces: list[bytes]) -> None:
    inputs = SMALL(pieces)
    for images in (inputs["pixel_values"], inputs["patches"]):
        found = [b""] * len(pieces)
        for piece, owner in zip(
            SMALL.decode_bytes(images, inputs["byte_length"]), inputs["text_index"], strict=True
        ):
            found[owner] += piece
        assert found == pieces


@pytest.mark.parametrize("text", ["", "gravity", "Schwerkraft für alle: \U0001f30d" * 90])
def test_texts_come_back_across_images(text: str) -> None:
    processor = GeolipByteTrigramProcessor()
    inputs = processor([text, "another"])
    assert inputs["pixel_values"].shape[1:] == (3, 16, 16)
    texts = processor.decode(inputs["patches"], inputs["byte_length"], inputs["text_index"])
    assert texts == [text, "another"]


def test_three_bytes_are_a_pixel_and_a_patch_is_a_stretch_of_text() -> None:
    inputs = SMALL(bytes(range(48)))
    pixels = (inputs["pixel_values"][0] * 127.5 + 127.5).round().long()
    assert pixels[:, 0, 0].tolist() == [0, 1, 2]
    assert pixels[:, 0, 1].tolist() == [3, 4, 5]
    assert pixels[:, 1, 0].tolist() == [6, 7, 8]
    # The fifth pixel begins the second patch, which stands right of the first.
    assert pixels[:, 0, 2].tolist() == [12, 13, 14]
    assert inputs["pixel_values"].dtype == torch.float32


def test_byte_recovery_is_the_share_of_equal_bytes_of_the_text() -> None:
    inputs = SMALL(b"0123456789")
    images, length = inputs["pixel_values"], inputs["byte_length"]
    changed = inputs["patches"].clone()
    changed[0, 0, 0] += 1 / 127.5  # one byte of the text
    changed[0, 3] += 1.0  # padding
    assert SMALL.byte_recovery(images + 0.4 / 127.5, images) == 1.0
    assert SMALL.byte_recovery(changed, images, length) == 0.9
    assert SMALL.byte_recovery(changed, images) == 35 / 48


def test_saved_sizes_are_found_again(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    loaded = GeolipByteTrigramProcessor.from_pretrained(tmp_path)
    assert (loaded.image_size, loaded.patch_size) == (4, 2)


def test_wrong_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match="multiple of patch_size"):
        GeolipByteTrigramProcessor(image_size=5, patch_size=2)
    with pytest.raises(ValueError, match="unknown settings \\['patches'\\]"):
        GeolipByteTrigramProcessor(patches=2)
    with pytest.raises(ValueError, match="at most 48 bytes"):
        SMALL.encode_bytes([b"x" * 49])
    with pytest.raises(ValueError, match=r"patches \[M, 4, 12\]"):
        SMALL.decode_bytes(torch.zeros(1, 4, 11))
    with pytest.raises(ValueError, match="one byte_length for each of 1 images"):
        SMALL.decode_bytes(torch.zeros(1, 4, 12), [1, 2])
