"""The kernel that reads codes: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_within_budget

from gravity_hf.ops.rotated_codec import Packed, RotatedCodec

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

TOKENS = 70  # more than a program reads, and no multiple of it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "codec",
    [
        RotatedCodec(64),
        RotatedCodec(64, bits=2, group=32),
        RotatedCodec(32, bits=8, ranges="half"),
        RotatedCodec(16, rotated=False),
        RotatedCodec(128, group=128),
    ],
    ids=str,
)
def test_the_kernel_reads_what_the_definition_reads(codec, dtype):
    vectors = torch.randn(2, 2, TOKENS, codec.width, device=DEVICE)
    packed = codec.quantize(vectors)
    room = torch.full((2, 2, TOKENS + 5, codec.width), 7.0, dtype=dtype, device=DEVICE)
    codec._read_by_kernel(packed, room[:, :, :TOKENS])
    exact, peer = (codec.dequantize(packed, x) for x in (torch.float64, dtype))
    assert_within_budget("read", room[:, :, :TOKENS], exact, peer)
    assert (room[:, :, TOKENS:] == 7.0).all()


def test_codes_that_lie_apart_are_read():
    codec = RotatedCodec(64)
    packed = codec.quantize(torch.randn(2, 4, TOKENS, 64, device=DEVICE))
    part = Packed(packed.codes[:, ::2, 3:], packed.ranges[:, ::2, 3:])
    out = torch.empty(2, 2, TOKENS - 3, 64, device=DEVICE)
    codec._read_by_kernel(part, out)
    expected = codec.dequantize(packed)[:, ::2, 3:]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_cache_on_a_gpu_reads_by_the_kernel(monkeypatch):
    codec, seen = RotatedCodec(64), []
    packed = codec.quantize(torch.randn(1, 2, 9, 64, device="cuda"))
    kernel = RotatedCodec._read_by_kernel
    monkeypatch.setattr(
        RotatedCodec, "_read_by_kernel", lambda *given: (seen.append(1), kernel(*given))
    )
    codec.dequantize_into(packed, torch.empty(1, 2, 9, 64, device="cuda"))
    assert seen
