"""The best map of a rank on given inputs, against searches for a better one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gravity_hf.layers.factorizing import (
    Factors,
    RankRule,
    break_even,
    factors_of,
    output_error,
    output_spectrum,
)

SHAPES = [(12, 12), (20, 8), (8, 20)]


def uneven(width: int, directions: int | None = None) -> Tensor:
    """A second moment with eigenvalues from 1 to 1e-4, or so many that are not zero."""
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    values = torch.logspace(0, -4, width, dtype=torch.float64)
    if directions is not None:
        values[directions:] = 0
    return rotation * values @ rotation.mT


def weight_of(shape: tuple[int, int]) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def best(weight: Tensor, moment: Tensor | None, rank: int) -> Factors:
    return factors_of(weight, output_spectrum(weight, moment, ridge=0.0), rank)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_step_of_alternating_least_squares_does_better(shape: tuple[int, int]) -> None:
    weight, moment = weight_of(shape), uneven(shape[1])
    found = best(weight, moment, 3)
    error = output_error(weight, found, moment)
    for _ in range(5):
        start = Factors(*(x + 0.1 * torch.randn_like(x) for x in found))
        down, up = start
        for _ in range(30):
            gram = down @ moment @ down.mT
            up = torch.linalg.solve(gram, down @ moment @ weight.mT).mT
            down = torch.linalg.solve(up.mT @ up, up.mT @ weight)
        assert output_error(weight, Factors(down, up), moment) >= error * (1 - 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_energy_that_was_not_kept(shape: tuple[int, int]) -> None:
    weight, moment = weight_of(shape), uneven(shape[1])
    spectrum = output_spectrum(weight, moment, ridge=0.0)
    for rank in (1, 4, 8):
        error = output_error(weight, factors_of(weight, spectrum, rank), moment)
        assert error == pytest.approx(1 - spectrum.kept(rank), abs=1e-12)


def test_uneven_inputs_are_where_plain_svd_is_worse() -> None:
    weight, moment = weight_of((16, 16)), uneven(16)
    plain = output_error(weight, best(weight, None, 4), moment)
    assert output_error(weight, best(weight, moment, 4), moment) < 0.5 * plain


def test_without_inputs_it_is_the_truncated_svd() -> None:
    weight = weight_of((9, 7))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    down, up = best(weight, None, 3)
    torch.testing.assert_close(up @ down, left[:, :3] * values[:3] @ right[:3])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["few directions", "no inputs", "uneven"])
def test_full_rank_is_the_map_whatever_the_inputs(shape: tuple[int, int], kind: str) -> None:
    moments = {
        "few directions": uneven(shape[1], directions=2),
        "no inputs": torch.zeros(shape[1], shape[1]),
        "uneven": uneven(shape[1]),
    }
    weight = weight_of(shape).float()
    down, up = factors_of(weight, output_spectrum(weight, moments[kind]), min(shape))
    torch.testing.assert_close(up @ down, weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-10, 1e10])
def test_the_size_of_the_inputs_changes_no_map(size: float) -> None:
    weight, moment = weight_of((12, 12)), uneven(12)
    spectra = [output_spectrum(weight, x) for x in (moment, size * moment)]
    first, second = (factors_of(weight, x, 4) for x in spectra)
    torch.testing.assert_close(first.up @ first.down, second.up @ second.down)
    torch.testing.assert_close(size * spectra[0].energies, spectra[1].energies)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_energy_is_below_zero(shape: tuple[int, int]) -> None:
    weight = weight_of((shape[0], 1)) @ weight_of((1, shape[1]))
    assert (output_spectrum(weight, uneven(shape[1])).energies >= 0).all()


def test_few_input_directions_need_no_more_rank_than_their_number() -> None:
    weight, moment = weight_of((10, 10)), uneven(10, directions=3)
    assert output_error(weight, best(weight, moment, 3), moment) < 1e-12


def test_components_are_balanced_and_nested() -> None:
    weight, moment = weight_of((10, 14)), uneven(14)
    spectrum = output_spectrum(weight, moment)
    down, up = factors_of(weight, spectrum, 5)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    fewer = factors_of(weight, spectrum, 2)
    torch.testing.assert_close(fewer.up @ fewer.down, up[:, :2] @ down[:2])


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97])
def test_an_energy_is_kept_by_the_smallest_rank_that_does(energy: float) -> None:
    weight, moment = weight_of((40, 40)), uneven(40)
    spectrum = output_spectrum(weight, moment)
    rank = RankRule.of(f"energy:{energy}").choose(spectrum, 40, 40)
    assert rank is not None
    assert spectrum.kept(rank) >= energy > spectrum.kept(rank - 1)


def test_a_fraction_is_of_the_rank_at_which_nothing_is_saved() -> None:
    spectrum = output_spectrum(weight_of((30, 60)))
    assert break_even(60, 30) == 19
    assert 19 * (30 + 60) < 30 * 60 <= 20 * (30 + 60)
    assert RankRule.of(0.5).choose(spectrum, 60, 30) == 9
    assert RankRule.of(1.0).choose(spectrum, 60, 30) == 19


@pytest.mark.parametrize("rank", ["full", "energy:1.0", 15, 99])
def test_maps_that_two_factors_would_not_make_smaller_stay_dense(rank: str | int) -> None:
    spectrum = output_spectrum(weight_of((30, 30)))
    assert RankRule.of(rank).choose(spectrum, 30, 30) is None


@pytest.mark.parametrize("rank", ["energy:0", "energy:1.5", "energy:x", "0.9", 0, -3, 1.5, True])
def test_other_ranks_are_refused_with_what_there_is(rank: object) -> None:
    with pytest.raises(ValueError, match=r"rank: expected 'energy:0.95'.*'full'.*got"):
        RankRule.of(rank)  # type: ignore[arg-type]


def test_a_moment_of_other_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"second_moment: expected a finite matrix \[8, 8\]"):
        output_spectrum(weight_of((4, 8)), torch.eye(4))
    with pytest.raises(ValueError, match="weight: expected a finite matrix"):
        output_spectrum(torch.full((4, 8), float("nan")))
