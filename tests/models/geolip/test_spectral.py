"""Omega, and the layers in which spectra attend: bounds, order, masks, causality, gravity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.models.geolip import GeolipConfig, GeolipModel
from gravity_hf.models.geolip.frames import random_frames
from gravity_hf.models.geolip.lens import Lens, seeded_lens
from gravity_hf.models.geolip.spectral import SpectralLayer, Visible, gram_from_omega, omega_of

from .geolip_cases import KINDS, B, N, mask_of, tiny, tokens

ALL = Visible(None, False, False)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> GeolipModel:
    return tiny(spectral_attention=request.param)


@pytest.fixture(scope="module", params=KINDS)
def causal(request: pytest.FixtureRequest) -> GeolipModel:
    return tiny(spectral_attention=request.param, is_causal=True)


def frame_of(rows: int = 32, d: int = 4) -> Tensor:
    """One, float64."""
    frame = random_frames((rows,), d, torch.Generator().manual_seed(0)).double()
    return F.normalize(frame, dim=-1)


def attended(model: GeolipModel, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.forward_patches(x, mask, **options).omega_attended


def test_squares_of_omega_sum_to_the_number_of_rows(model: GeolipModel) -> None:
    energy = model.get_omega(tokens()).square().sum(-1)
    torch.testing.assert_close(energy, torch.full((B, N), 8.0), atol=1e-4, rtol=0)


def test_omega_knows_neither_signs_nor_order_of_rows() -> None:
    lens, frame = Lens(GeolipConfig()), frame_of().float()
    other = (frame * torch.where(torch.arange(32) % 3 == 0, -1.0, 1.0)[:, None]).flip(0)
    torch.testing.assert_close(omega_of(lens(other)), omega_of(lens(frame)))


def test_omega_of_ten_modes_or_more_determines_the_gram_matrix() -> None:
    frame = frame_of()
    for lens_dim in (10, 16, 64):
        basis = torch.linalg.qr(torch.randn(lens_dim, 4, dtype=torch.float64))[0]
        found = gram_from_omega(omega_of(frame @ basis.T), basis)
        torch.testing.assert_close(found, frame.mT @ frame, atol=1e-10, rtol=0)


@pytest.mark.parametrize("lens_dim", [4, 9])
def test_omega_of_fewer_modes_does_not(lens_dim: int) -> None:
    basis = seeded_lens(lens_dim, 4, 0)
    with pytest.raises(ValueError, match=f"got {lens_dim} independent.*lens_dim >= 10"):
        gram_from_omega(omega_of(frame_of() @ basis.double().T), basis)


def test_alpha_starts_small_and_never_leaves_its_bounds() -> None:
    """However large the gradients are."""
    model = tiny(alpha_init=-2.0, alpha_lr_multiplier=1.0).train()
    torch.testing.assert_close(model.alphas(), torch.full((2, 16), 0.0238406), atol=1e-6, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    for sign in (1.0, -1.0):
        for step in range(3):
            optimizer.zero_grad()
            (sign * model(tokens(seed=step)).omega_attended.square().sum()).backward()
            optimizer.step()
        assert model.alphas().isfinite().all()
        assert (model.alphas() >= 0).all() and (model.alphas() <= 0.2).all()


def test_a_layer_scales_modes_by_0_8_to_1_2(model: GeolipModel) -> None:
    layer = model.spectral.layers[0]
    omega = tokens(2, 7, 16).abs() + 1e-3
    with torch.no_grad():
        after, alpha = layer(omega, ALL)
    factor = after / omega
    assert (factor > 0.8).all() and (factor < 1.2).all() and (after > 0).all()
    assert (factor - 1).abs().max() > 0.1
    assert torch.equal(alpha, layer.alpha())


def test_a_layer_is_what_its_formula_says() -> None:
    layer = tiny().spectral.layers[0]
    omega = tokens(1, 3, 16).abs()
    with torch.no_grad():
        q, k, v = layer.qkv(layer.norm(omega))[0].view(3, 3, 4, 4).permute(1, 2, 0, 3)
        y = (q @ k.mT / 2).softmax(-1) @ v
        change = layer.out_proj(y.transpose(0, 1).flatten(1)).tanh()
        expected = omega * (1 + 0.2 * layer.alpha_logits.sigmoid() * change)
        torch.testing.assert_close(layer(omega, ALL)[0], expected)


@pytest.mark.parametrize("law", ["power", "force"])
def test_gravity_weighs_by_the_distance_between_spectra(law: str) -> None:
    layer = tiny(spectral_attention="gravity", gravity_law=law).spectral.layers[0]
    omega = tokens(1, 3, 16).abs()
    with torch.no_grad():
        q, k, v = layer.qkv(layer.norm(omega))[0].view(3, 3, 4, 4).permute(1, 2, 0, 3)
        softened = (q[:, :, None] - k[:, None]).square().sum(-1) + 0.1
        force = softened.log().neg() if law == "power" else 1 / softened
        y = (3.5 * force).softmax(-1) @ v
        change = layer.out_proj(y.transpose(0, 1).flatten(1)).tanh()
        expected = omega * (1 + layer.alpha() * change)
        torch.testing.assert_close(layer(omega, ALL)[0], expected, atol=1e-5, rtol=1e-5)


def test_gravity_learns_strength_and_softening() -> None:
    model = tiny(spectral_attention="gravity").train()
    model(tokens()).loss.backward()
    for layer in model.spectral.layers:
        for name in ("gamma", "softening_log"):
            assert (getattr(layer.gravity, name).grad != 0).all()


def test_a_permutation_of_tokens_permutes_what_comes_out(model: GeolipModel) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    x = tokens()
    torch.testing.assert_close(
        attended(model, x[:, order]), attended(model, x)[:, order], atol=1e-6, rtol=0
    )


def test_tokens_feel_each_other(model: GeolipModel) -> None:
    x, other = tokens(), tokens()
    other[:, -1] += 1
    assert (attended(model, x) - attended(model, other))[:, 0].abs().max() > 1e-4


def test_nothing_leaks_from_masked_tokens(model: GeolipModel) -> None:
    mask = mask_of(3, 5, 2)
    x, other = tokens(), tokens()
    other[mask == 0] = 100.0
    with torch.no_grad():
        a, b = (model(y, attention_mask=mask) for y in (x, other))
    assert torch.equal(a.omega_attended[mask == 1], b.omega_attended[mask == 1])
    assert torch.equal(a.loss, b.loss) and torch.equal(a.recon_cosine, b.recon_cosine)


def test_padding_changes_nothing(model: GeolipModel) -> None:
    x = tokens()
    torch.testing.assert_close(
        attended(model, x, mask_of(3, 3, 3))[:, :3], attended(model, x[:, :3]), atol=1e-6, rtol=0
    )


def test_a_sample_without_tokens_is_finite(model: GeolipModel) -> None:
    output = model(tokens(), attention_mask=mask_of(0, 5, 0))
    assert output.reconstruction.isfinite().all() and output.loss.isfinite()
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    assert model(tokens(), attention_mask=mask_of(0, 0, 0)).loss == 0


def test_a_causal_layer_sees_no_later_token(causal: GeolipModel) -> None:
    x, other = tokens(), tokens()
    other[:, 3:] += 1
    for mask in (None, mask_of(5, 4, 2)):
        a, b = attended(causal, x, mask), attended(causal, other, mask)
        assert torch.equal(a[:, :3], b[:, :3])
    a, b = (attended(causal, y, swap_context=True) for y in (x, other))
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 3:], b[:, 3:])
    assert not torch.equal(attended(causal, x)[:, 3:], attended(causal, other)[:, 3:])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_swapped_context_is_the_next_samples(kind: str, is_causal: bool) -> None:
    """Each token alone among the others of the next sample, one by one."""
    model = tiny(spectral_attention=kind, num_spectral_layers=1, is_causal=is_causal)
    x, mask = tokens(), mask_of(5, 4, 3)
    found = attended(model, x, mask, swap_context=True)
    for sample in range(B):
        next_one = (sample + 1) % B
        for place in range(int(mask[sample].sum())):
            mixed, seen = x[next_one].clone(), mask[next_one].clone()
            mixed[place], seen[place] = x[sample, place], 1
            alone = attended(model, mixed[None], seen[None])
            torch.testing.assert_close(found[sample, place], alone[0, place], atol=2e-6, rtol=1e-5)


def test_swapping_among_equal_samples_changes_nothing(model: GeolipModel) -> None:
    x = tokens(1).expand(B, -1, -1)
    plain, swapped = attended(model, x), attended(model, x, swap_context=True)
    torch.testing.assert_close(swapped, plain, atol=2e-6, rtol=0)
    other = tokens()
    assert not torch.allclose(attended(model, other, swap_context=True), attended(model, other))


def test_one_sample_has_no_next(model: GeolipModel) -> None:
    with pytest.raises(ValueError, match="swap_context: expected a batch of 2 samples or more"):
        model.forward_patches(tokens(1), swap_context=True)


def test_without_spectral_layers_omega_stays() -> None:
    model = tiny(use_spectral=False)
    output = model(tokens())
    assert output.omega_attended is output.omega and output.mean_alpha is None
    assert tuple(model.alphas().shape) == (0, 16)


def test_layers_stay_float32_in_half_precision() -> None:
    layer = SpectralLayer(GeolipConfig(spectral_attention="gravity")).to(torch.float16)
    assert {x.dtype for x in layer.parameters()} == {torch.float32}
