"""The lens keeps what it promises, before and after training: it is an isometry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from gravity_hf.models.geolip import GeolipConfig, GeolipModel
from gravity_hf.models.geolip.frames import (
    effective_rank,
    frame_deviation,
    simplex_volume_spread,
    spectrum,
)
from gravity_hf.models.geolip.lens import (
    Lens,
    check_isometry,
    lens_error,
    orthonormal,
    seeded_lens,
)

from .geolip_cases import SMALL, tiny, tokens, train

MODES = ["fixed", "learned"]
CLOSE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module", params=[(m, n) for m in MODES for n in (0, 50)], ids=str)
def model(request: pytest.FixtureRequest) -> GeolipModel:
    mode, steps = request.param
    return train(tiny(lens_mode=mode), steps)


def test_lens_is_orthonormal(model: GeolipModel) -> None:
    assert lens_error(model.lens.matrix()) < 1e-6


def test_lifted_frames_have_the_same_gram_angles_and_singular_values(model: GeolipModel) -> None:
    with torch.no_grad():
        output = model(tokens(), output_frames=True)
    frame, lifted = output.frame, output.lens_frame
    torch.testing.assert_close(lifted @ lifted.mT, frame @ frame.mT, **CLOSE)
    torch.testing.assert_close(lifted.norm(dim=-1), torch.ones_like(lifted[..., 0]), **CLOSE)
    known = spectrum(frame)
    torch.testing.assert_close(spectrum(lifted)[..., :4], known, **CLOSE)
    assert spectrum(lifted)[..., 4:].max() < 1e-5
    torch.testing.assert_close(frame_deviation(lifted, base_dim=4), frame_deviation(frame), **CLOSE)
    torch.testing.assert_close(effective_rank(known), effective_rank(spectrum(lifted)[..., :4]))
    spread = simplex_volume_spread(frame[0, 0])
    assert simplex_volume_spread(lifted[0, 0]) == pytest.approx(spread, abs=1e-5)


def test_a_lifted_frame_is_not_measured_from_the_baseline_of_its_lens(model: GeolipModel) -> None:
    lifted = model(tokens(), output_frames=True).lens_frame
    assert frame_deviation(lifted).mean() < -0.2


def test_only_a_learned_lens_learns() -> None:
    for mode in MODES:
        model = tiny(lens_mode=mode)
        start = model.lens.matrix().detach().clone()
        moved = (train(model, 3).lens.matrix() - start).abs().max()
        assert moved > 1e-4 if mode == "learned" else moved == 0


def test_a_lens_that_learned_a_lot_is_still_an_isometry() -> None:
    lens = Lens(GeolipConfig(lens_mode="learned"))
    with torch.no_grad():
        lens.basis.mul_(torch.tensor([30.0, -1.0, 0.05, 1.0])).add_(torch.randn(16, 4))
    assert lens_error(lens.matrix()) < 1e-6
    lens(torch.randn(2, 8, 4)).square()[..., 0].sum().backward()
    assert lens.basis.grad.isfinite().all() and lens.basis.grad.abs().max() > 0


def test_weights_that_are_no_lens_are_not_loaded(tmp_path: Path) -> None:
    """What a learned lens stores is one by its orthonormal factor only."""
    model = train(tiny(lens_mode="learned"), 3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lens.basis: expected E with.*keep its lens_mode"):
        AutoModel.from_pretrained(tmp_path, lens_mode="fixed")
    fixed = tiny()
    fixed.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, lens_mode="learned")
    torch.testing.assert_close(loaded.lens.matrix(), fixed.lens.matrix())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_lens_that_was_rounded_is_one_still(dtype: torch.dtype) -> None:
    lens = Lens(GeolipConfig())
    lens.basis = lens.basis.to(dtype).float()
    check_isometry(lens)
    lens.basis[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got nan"):
        check_isometry(lens)


def test_lens_is_drawn_by_its_seed_wherever_it_is_made() -> None:
    known = seeded_lens(16, 4, 3)
    with torch.device("meta"):
        assert torch.equal(Lens(GeolipConfig(lens_seed=3)).start(), known)
    assert torch.equal(tiny(lens_seed=3).lens.basis, known)
    assert not torch.equal(seeded_lens(16, 4, 4), known)
    # The triangle beside it has a positive diagonal, which makes it the only one.
    torch.testing.assert_close(orthonormal(2 * known), known)


def test_canonical_lens_drops_the_signs_of_rows() -> None:
    lens = Lens(GeolipConfig(**SMALL, lens_sign="canon"))
    frame = tiny().encode(tokens())
    flipped = frame * torch.where(torch.arange(8) % 2 == 0, -1.0, 1.0)[:, None]
    assert torch.equal(lens(flipped), lens(frame))
    signed = tiny().lens
    assert not torch.equal(signed(flipped), signed(frame))


def test_canonical_frames_have_positive_first_coordinates() -> None:
    frame = tiny(frame_sign="canon").encode(tokens())
    assert (frame[..., 0] > 0).all()
    assert (tiny().encode(tokens())[..., 0] < 0).any()
