"""A geolip as a model: its inputs, outputs, losses and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining

import gravity_hf
from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction, GeolipModel
from gravity_hf.models.geolip.frames import critical_deviation, frame_deviation
from gravity_hf.models.geolip.patches import patchify

from .geolip_cases import IMAGES, B, N, P, mask_of, tiny, tokens

IMAGE = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8).sin()
# Every tensor that a geolip may have is in one of them.
SAVED: dict[str, dict[str, Any]] = {
    "fixed": {},
    "learned": {"lens_mode": "learned", "feature_norm": "whiten", "stem_detach": True},
    "gravity": {"spectral_attention": "gravity", "block_norm": False},
    "images": {**IMAGES, "boundary_smooth": True},
}


def test_the_facade_gives_the_models() -> None:
    assert gravity_hf.GeolipModel is GeolipModel and gravity_hf.GeolipConfig is GeolipConfig
    assert gravity_hf.GeolipForReconstruction is GeolipForReconstruction


@pytest.mark.parametrize("name", SAVED)
def test_folder_comes_back_in_either_class(name: str, tmp_path: Path) -> None:
    model = tiny(**SAVED[name])
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.001 * torch.rand_like(tensor))
    model.save_pretrained(tmp_path)
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(again) is GeolipForReconstruction and type(base) is GeolipModel
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    x = tokens(width=model.config.patch_dim)
    for loaded in (again, base):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)


def test_what_a_folder_lacks_starts_as_in_a_new_model() -> None:
    """As where a checkpoint of another kind has other spectral layers, and no lens."""
    model = tiny(lens_seed=5, spectral_attention="gravity")
    lacking = (".basis", "codebook", "alpha_logits", "gamma", "softening_log", "feature_std")
    state = {k: x for k, x in model.state_dict().items() if not k.endswith(lacking)}
    loaded = GeolipModel.from_pretrained(None, config=model.config, state_dict=state).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value), key


def test_rows_start_by_an_orthogonal_map() -> None:
    weight = tiny().encoder.proj_out.weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(16), atol=1e-5, rtol=0)


def test_only_reconstruction_has_a_loss_of_its_own() -> None:
    x, clean = tokens(), tokens(seed=1)
    base, whole = tiny(GeolipModel), tiny()
    assert base(x).loss is None and base(x).recon_cosine is not None
    assert torch.equal(whole(x).loss, base(x, labels=x).loss)
    assert torch.equal(whole(x, labels=clean).loss, base(x, labels=clean).loss)
    assert not torch.equal(whole(x, labels=clean).loss, whole(x).loss)


@pytest.mark.parametrize("kind", ["mse", "cosine", "cosine_mse"])
def test_losses_are_means_over_valid_tokens(kind: str) -> None:
    model, mask = tiny(reconstruction_loss=kind), mask_of(5, 2, 3)
    x = tokens()
    output = model(x, attention_mask=mask)
    found, target = output.reconstruction[mask == 1], x[mask == 1]
    mse = (found - target).square().mean()
    cosine = torch.cosine_similarity(found, target, dim=-1).mean()
    expected = {"mse": mse, "cosine": 1 - cosine, "cosine_mse": mse + 1 - cosine}[kind]
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.recon_cosine, cosine)


@pytest.mark.parametrize("kind", ["mse", "cosine_mse"])
def test_labels_of_padding_reach_no_gradient(kind: str) -> None:
    model, mask = tiny(reconstruction_loss=kind, stem_detach=True), mask_of(5, 2, 3)
    found = []
    for value in (0.0, torch.nan):
        labels = tokens(seed=1).masked_fill((mask == 0).unsqueeze(-1), value)
        model.zero_grad()
        loss = model(tokens(), attention_mask=mask, labels=labels).loss
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_losses_are_those_of_normalised_features() -> None:
    """Features in other units, with statistics in those units, are the same features."""
    model, x = tiny(), tokens()
    scale, shift = torch.rand(P) * 10 + 0.1, torch.randn(P) * 5
    known = model(x)
    model.set_feature_statistics(shift, scale)
    output = model(x * scale + shift)
    torch.testing.assert_close(output.loss, known.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(output.omega, known.omega, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        output.reconstruction, known.reconstruction * scale + shift, rtol=1e-4, atol=1e-4
    )


def test_whitening_is_undone_in_reconstructions() -> None:
    model, x = tiny(feature_norm="whiten"), tokens()
    model.set_feature_statistics(torch.ones(P), torch.full((P,), 2.0), torch.randn(P, P))
    torch.testing.assert_close(
        model.restore_features(model.normalize_features(x)), x, atol=1e-4, rtol=1e-4
    )
    expected = (x - 1) / 2 @ model.feature_whitening
    torch.testing.assert_close(model.normalize_features(x), expected)


def test_a_constant_dimension_makes_nothing_infinite() -> None:
    model, x = tiny(), tokens()
    x[..., 0] = 3.7
    model.set_feature_statistics(x.mean((0, 1)), x.std((0, 1)))
    output = model(x, output_frames=True)
    assert all(value.isfinite().all() for value in output.to_tuple())
    assert output.loss < 10


@pytest.mark.parametrize(
    ("norm", "arguments", "message"),
    [
        ("none", (torch.zeros(P), torch.ones(P)), "got 'none', which normalises nothing"),
        ("zscore", (torch.zeros(3), torch.ones(P)), r"mean: expected finite values \[12\]"),
        ("zscore", (torch.zeros(P), torch.full((P,), torch.nan)), "std: expected finite"),
        ("zscore", (torch.zeros(P), torch.ones(P), torch.eye(P)), "expected None with"),
        ("whiten", (torch.zeros(P), torch.ones(P)), r"expected a matrix \[P, P\]"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(norm: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(feature_norm=norm).set_feature_statistics(*arguments)


def test_behind_the_stem_nothing_teaches_the_encoder() -> None:
    model, x = tiny(stem_detach=True).train(), tokens()
    own = (model.stem_decoder(model.encode(x)) - x).square().mean()
    known = torch.autograd.grad(own, list(model.encoder.parameters()))
    output = model(x)
    torch.testing.assert_close(output.loss, own + (output.reconstruction - x).square().mean())
    output.loss.backward()
    for weight, gradient in zip(model.encoder.parameters(), known, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    assert model.decoder.proj_in.weight.grad.abs().max() > 0


def test_smoothing_starts_as_nothing_and_then_counts() -> None:
    plain, model = tiny(**IMAGES), tiny(**IMAGES, boundary_smooth=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    known, output = plain(pixel_values=IMAGE), model(pixel_values=IMAGE)
    torch.testing.assert_close(output.pixel_reconstruction, known.pixel_reconstruction)
    with torch.no_grad():
        model.smooth.conv2.bias.fill_(0.5)
    output = model(pixel_values=IMAGE)
    expected = known.pixel_reconstruction + 0.5
    torch.testing.assert_close(output.pixel_reconstruction, expected)
    torch.testing.assert_close(output.reconstruction, patchify(expected, 4))
    torch.testing.assert_close(output.loss, (expected - IMAGE).square().mean())


def test_images_are_their_patches() -> None:
    model, clean = tiny(**IMAGES), IMAGE.flip(-1)
    by_pixels = model(pixel_values=IMAGE, labels=clean)
    by_patches = model(patchify(IMAGE, 4), labels=patchify(clean, 4))
    assert torch.equal(by_pixels.loss, by_patches.loss)
    assert torch.equal(patchify(by_pixels.pixel_reconstruction, 4), by_patches.reconstruction)
    assert by_patches.pixel_reconstruction is None
    # Weights do not know how many patches there are.
    assert model(pixel_values=IMAGE[..., :4]).pixel_reconstruction.shape == (2, 1, 8, 4)


def test_parts_make_up_the_whole() -> None:
    model, x, mask = tiny(), tokens(), mask_of(4, 5, 3)
    model.set_feature_statistics(torch.ones(P), torch.full((P,), 2.0))
    output = model(x, attention_mask=mask, output_frames=True)
    frame = model.encode(x)
    omega, attended = model.attend(frame, mask)
    assert torch.equal(frame, output.frame) and torch.equal(model.get_omega(x), output.omega)
    assert torch.equal(omega, output.omega) and torch.equal(attended, output.omega_attended)
    assert torch.equal(model.decode(frame, mask), output.reconstruction)
    assert model(x).frame is None and model(x).lens_frame is None
    assert isinstance(model(x, return_dict=False), tuple)


def test_deviation_is_the_mean_over_valid_tokens() -> None:
    model, mask = tiny(), mask_of(5, 2, 3)
    output = model(tokens(), attention_mask=mask, output_frames=True)
    each = frame_deviation(output.frame)
    torch.testing.assert_close(output.frame_deviation, each[mask == 1].mean())
    published = tiny(deviation_baseline="mc4096")(tokens(), attention_mask=mask)
    shift = float(published.frame_deviation - output.frame_deviation)
    assert shift == pytest.approx(2.367e-4, abs=1e-6)
    assert model.train()(tokens()).frame_deviation is None


def test_the_barrier_brings_every_frame_inside() -> None:
    """Of few rows many frames leave the envelope, and training alone leaves them there."""
    shares = {}
    x = tokens(8, 16)
    for weight in (0.0, 100.0):
        model = tiny(num_rows=16, rigidity_weight=weight).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            model(x).loss.backward()
            optimizer.step()
        deviation = frame_deviation(model.encode(x).detach())
        shares[weight] = float((deviation.abs() < critical_deviation(4)).double().mean())
    assert shares[0.0] < 0.95 and shares[100.0] == 1.0


def test_addresses_name_the_nearest_axes_and_teach_nothing() -> None:
    model, x = tiny(codebook_size=16), tokens()
    found = model.address(x)
    cosines = (model.encode(x) @ model.codebook.T).abs()
    assert torch.equal(found.axis, cosines.argmax(-1))
    torch.testing.assert_close(found.margin, cosines.amax(-1))
    assert torch.equal(found.code, found.sign.long() * (found.axis + 1))
    torch.testing.assert_close(found.assignment, (cosines / 0.1).softmax(-1))
    assert {-1.0, 1.0} == set(found.sign.unique().tolist())
    assert not found.margin.requires_grad


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of patches and pixel_values"),
        ({"patches": tokens(width=7)}, r"patches: expected floats \[B, N, 12\], got .*\(3, 5, 7\)"),
        ({"patches": tokens().long()}, "patches: expected floats"),
        ({"patches": tokens(), "labels": tokens(2)}, "labels: expected floats in the form"),
        ({"patches": tokens(), "attention_mask": mask_of(1, 2)}, r"attention_mask: expected \(3, "),
        ({"pixel_values": IMAGE}, "one whose config has no patch_size"),
        ({"pixel_values": IMAGE.expand(-1, 3, -1, -1).byte()}, "pixel_values: expected floats"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, Any], message: str) -> None:
    model = tiny(num_channels=1)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_one_column_is_not_taken_for_all() -> None:
    for read in (GeolipModel.encode, GeolipModel.restore_features):
        with pytest.raises(ValueError, match=r"features: expected \[..., 12\].*got \(3, 5, 1\)"):
            read(tiny(), tokens(width=1))


def test_shapes_are_as_documented() -> None:
    output = tiny()(tokens(), output_frames=True)
    shapes = {name: tuple(value.shape) for name, value in output.items()}
    scalars = ("loss", "recon_cosine", "mean_alpha", "frame_deviation")
    assert shapes == {
        "reconstruction": (B, N, P),
        "omega": (B, N, 16),
        "omega_attended": (B, N, 16),
        "frame": (B, N, 8, 4),
        "lens_frame": (B, N, 8, 16),
        **dict.fromkeys(scalars, ()),
    }
