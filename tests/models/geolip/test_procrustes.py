"""Alignment of two companions' frames: exact where it can be, and honest where it cannot."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.models.geolip.procrustes import SCOPES, align_frames

V, D = 5, 3


def frames(tokens: int, seed: int = 0, rows: int = V, width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(tokens, rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(draws, dim=-1)


def orthogonal(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64)).Q


def rotated(x: Tensor, scope: str) -> Tensor:
    if scope == "code":
        return (x.flatten(1) @ orthogonal(V * D, V * D)).unflatten(1, (V, D))
    if scope == "slot":
        return torch.einsum("tvi,vij->tvj", x, orthogonal(V, D, D))
    return x @ orthogonal(D, D)


@pytest.mark.parametrize("scope", SCOPES)
def test_rotated_frames_are_found_exactly_and_on_other_tokens_too(scope: str) -> None:
    every = frames(200)
    turned = rotated(every, scope)
    found = align_frames(every[:100], turned[:100], scope=scope)
    held_out = found.evaluate(every[100:], turned[100:])
    assert found.residual < 1e-12 and found.relative_residual < 1e-12 and found.is_unique
    assert held_out.residual < 1e-12 < 0.5 < min(held_out.residual_before, held_out.random_residual)


@pytest.mark.parametrize("scope", ["frame", "slot"])
def test_applied_frames_are_those_of_the_other_companion_in_their_own_dtype(scope: str) -> None:
    every = frames(40)
    found = align_frames(every, rotated(every, scope), scope=scope)
    applied = found.apply(every.float().view(4, 10, V, D))
    assert applied.dtype == torch.float32
    torch.testing.assert_close(applied.double().flatten(0, 1), rotated(every, scope))


def test_codes_are_put_back_on_the_sphere() -> None:
    found = align_frames(frames(100), frames(100, seed=5), scope="code")
    for turned in (found.apply(frames(7, seed=9)), found.apply_control(frames(7, seed=9))):
        torch.testing.assert_close(turned.norm(dim=-1), torch.ones(7, V, dtype=torch.float64))


@pytest.mark.parametrize("scope", SCOPES)
def test_no_other_orthogonal_matrix_is_better(scope: str) -> None:
    a = frames(60)
    b = F.normalize(rotated(a, scope) + 0.5 * frames(60, seed=3), dim=-1)
    found = align_frames(a, b, scope=scope)
    steps = torch.linalg.matrix_exp(0.05 * _skew(found.rotation.shape))
    near = type(found)(**{**vars(found), "rotation": found.rotation @ steps})
    assert found.residual < near.evaluate(a, b).residual


def _skew(shape: torch.Size) -> Tensor:
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return draws - draws.mT


def test_frames_that_know_nothing_of_each_other_align_no_better_than_shuffled_ones() -> None:
    found = align_frames(frames(2000), frames(2000, seed=5), scope="slot")
    assert found.residual == pytest.approx(found.random_residual, abs=0.02)
    assert found.evaluate(frames(500, seed=8), frames(500, seed=9)).residual == pytest.approx(
        math.sqrt(2), abs=0.03
    )


def test_a_reflection_is_found_only_where_it_is_allowed() -> None:
    a = frames(30)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    free = align_frames(a, a @ mirror)
    strict = align_frames(a, a @ mirror, allow_reflection=False)
    torch.testing.assert_close(free.rotation, mirror)
    assert torch.linalg.det(strict.rotation).item() == pytest.approx(1.0)
    assert strict.residual > 0.1


def test_masked_tokens_are_left_out() -> None:
    a = frames(12).view(3, 4, V, D)
    b = rotated(a.flatten(0, 1), "frame").view_as(a)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])
    b = b.masked_fill(mask[..., None, None] == 0, float("nan"))
    found = align_frames(a, b, mask)
    assert found.residual < 1e-12 and found.tokens == 8


@pytest.mark.parametrize(
    ("a", "scope", "reason"),
    [
        (F.pad(frames(30, width=D - 1), (0, 1)), "frame", "the frames lie flat"),
        (frames(V * D - 1), "code", "14 tokens for 15 coordinates"),
    ],
    ids=["flat", "few tokens"],
)
def test_a_rotation_that_is_not_the_only_one_is_said_to_be_so(
    a: Tensor, scope: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = align_frames(a, a, scope=scope)
    assert not found.is_unique and found.rank == found.rotation.shape[-1] - 1
    assert reason in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_makes_flat_frames_no_rounder_and_faint_ones_no_flatter(
    dtype: torch.dtype,
) -> None:
    turn = orthogonal(D, D)
    flat = F.pad(frames(3000, width=D - 1), (0, 1)) @ turn
    faint = flat + 0.05 * frames(3000, seed=3)[..., :1] * turn[-1]
    ranks = [align_frames(x.to(dtype), x.to(dtype)).rank for x in (flat, faint)]
    assert ranks == [D - 1, D]


def test_a_determinant_of_one_settles_the_last_direction() -> None:
    flat = F.pad(frames(30, width=D - 1), (0, 1))
    assert align_frames(flat, flat, allow_reflection=False).is_unique


def test_one_token_has_no_control() -> None:
    found = align_frames(frames(1), frames(1))
    assert math.isnan(found.random_residual) and found.control is None
    with pytest.raises(ValueError, match="one token, which cannot be shuffled"):
        found.apply_control(frames(1))


def test_the_control_depends_on_the_seed_alone() -> None:
    a, b = frames(20), frames(20, seed=2)
    first, again, other = (align_frames(a, b, seed=seed).random_residual for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("a", "b", "mask", "scope", "message"),
    [
        (frames(3), frames(4), None, "frame", "two tensors of one shape"),
        (frames(3)[0], frames(3)[0], None, "frame", "two tensors of one shape"),
        (frames(3), frames(3), torch.ones(2), "frame", r"attention_mask: expected \[3\]"),
        (frames(3), frames(3), torch.zeros(3), "frame", "at least one valid token"),
        (frames(3), frames(3) * float("nan"), None, "frame", "b: expected finite values"),
        (frames(3), frames(3), None, "row", "expected one of .*'code'.*got 'row'"),
    ],
)
def test_input_that_does_not_fit_is_refused(
    a: Tensor, b: Tensor, mask: Tensor | None, scope: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        align_frames(a, b, mask, scope=scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_frames_of_another_shape_than_the_fit_are_refused(scope: str) -> None:
    found = align_frames(frames(20), frames(20), scope=scope)
    with pytest.raises(ValueError, match="expected frames"):
        found.apply(frames(2, rows=V + 1, width=D + 1))
