"""Half precision, autocast, compilers, checkpointing and placing: the geometry stays exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from gravity_hf.models.geolip import GeolipModel
from gravity_hf.models.geolip.address import address_of
from gravity_hf.models.geolip.frames import frame_deviation
from gravity_hf.models.geolip.lens import lens_error

from .geolip_cases import KINDS, mask_of, tiny, tokens

HALVES = [torch.bfloat16, torch.float16]
FLOAT32 = ("spectral.", "lens.", "codebook", "feature_")
WAYS: dict[str, Callable[[Path, GeolipModel, torch.dtype], GeolipModel]] = {
    "loaded": lambda folder, _, dtype: AutoModel.from_pretrained(folder, dtype=dtype),
    "converted": lambda folder, _, dtype: AutoModel.from_pretrained(folder).to(dtype),
    "new": lambda _, model, dtype: AutoModel.from_config(model.config, dtype=dtype),
}


def assert_isometric(model: GeolipModel, x: Tensor) -> None:
    with torch.no_grad():
        output = model(x, output_frames=True)
    frame, lifted = output.frame, output.lens_frame
    assert lens_error(model.lens.matrix()) < 1e-6
    apart = frame_deviation(lifted, base_dim=4) - frame_deviation(frame)
    assert apart.abs().max() < 1e-5
    energy = output.omega.square().sum(-1)
    torch.testing.assert_close(energy, torch.full_like(energy, 8.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("lens_mode", ["fixed", "learned"])
def test_half_precision_keeps_the_isometry(
    lens_mode: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """However a model was made."""
    model = tiny(GeolipModel, lens_mode=lens_mode, spectral_attention="gravity")
    model.set_feature_statistics(tokens().mean((0, 1)), tokens().std((0, 1)))
    model.save_pretrained(tmp_path)
    for way, make in WAYS.items():
        half = make(tmp_path, model, dtype).eval()
        for name, tensor in half.state_dict().items():
            kept = name.startswith(FLOAT32)
            assert tensor.dtype == (torch.float32 if kept else dtype), f"{way}: {name}"
            known = model.state_dict()[name]
            assert not kept or way == "new" or torch.equal(tensor, known), f"{way}: {name}"
        assert_isometric(half, tokens())
        assert half(tokens().to(dtype)).reconstruction.dtype == dtype
        if way != "new":
            apart = half(tokens()).reconstruction - model(tokens()).reconstruction
            assert apart.abs().max() < 0.05


def test_autocast_keeps_the_isometry() -> None:
    model, x = tiny(lens_mode="learned"), tokens()
    known = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_isometric(model, x)
        output = model(x)
    assert output.omega_attended.dtype == torch.float32
    torch.testing.assert_close(output.loss, known.loss, atol=0.02, rtol=0)


def test_autocast_changes_no_address() -> None:
    model = tiny()
    frame = model.encode(tokens())
    known = address_of(frame, model.codebook, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = address_of(frame, model.codebook, 0.1)
    assert torch.equal(found.code, known.code) and torch.equal(found.margin, known.margin)


def test_float64_is_float64_throughout() -> None:
    model = tiny(lens_mode="learned").double()
    output = model(tokens().double(), output_frames=True)
    assert {value.dtype for value in output.values()} == {torch.float64}
    gram = output.frame @ output.frame.mT
    torch.testing.assert_close(output.lens_frame @ output.lens_frame.mT, gram, atol=1e-14, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_patches_compiles_without_breaks(kind: str) -> None:
    torch._dynamo.reset()
    model, x, mask = tiny(spectral_attention=kind, rigidity_weight=1.0), tokens(), mask_of(5, 3, 2)
    compiled = torch.compile(model.forward_patches, fullgraph=True, backend="eager")
    for swap in (False, True):
        found = compiled(x, mask, swap_context=swap)
        known = model.forward_patches(x, mask, swap_context=swap)
        torch.testing.assert_close(found.reconstruction, known.reconstruction)
        torch.testing.assert_close(found.loss, known.loss)


class Reconstruction(nn.Module):
    """What is exported: tensors in, a tensor out."""

    def __init__(self, model: GeolipModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, mask: Tensor) -> Tensor:
        return self.model.forward_patches(patches, mask).reconstruction


@pytest.mark.parametrize("kind", KINDS)
def test_exported_model_takes_other_numbers_of_tokens(kind: str) -> None:
    small = {"num_spectral_layers": 1, "encoder_depth": 0, "decoder_depth": 0}
    module = Reconstruction(
        tiny(
            GeolipModel, spectral_attention=kind, lens_mode="learned", feature_norm="none", **small
        )
    )
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    example = (tokens(), mask_of(5, 3, 2))
    program = torch.export.export(module, example, dynamic_shapes=(sizes, sizes))
    x, mask = tokens(2, 7), mask_of(7, 4, count=7)
    valid = mask == 1
    found, known = program.module()(x, mask), module(x, mask)
    torch.testing.assert_close(found[valid], known[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    found = []
    for checkpoints in (False, True):
        model = tiny(spectral_attention=kind, lens_mode="learned").train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(tokens()).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_a_model_is_placed_by_name(tmp_path: Path) -> None:
    model = tiny(GeolipModel)
    model.save_pretrained(tmp_path / "model")
    parts = ["encoder", "lens", "spectral", "codebook", "feature_mean", "feature_std"]
    placed = {**dict.fromkeys(parts, "cpu"), "decoder": "disk"}
    for device_map in ("auto", placed):
        loaded = AutoModel.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
        )
        torch.testing.assert_close(loaded(tokens()).reconstruction, model(tokens()).reconstruction)
