"""Positions: published tables, and calls that ask for more than there are."""

from __future__ import annotations

import pytest
import torch
from layers.golden_files import facts, golden

from gravity_hf.layers import CurvedPositionEmbedding, FractalPositionEmbedding

KINDS = {"curved": CurvedPositionEmbedding, "fractal": FractalPositionEmbedding}


@pytest.mark.parametrize("case", facts("positions"))
def test_published_positions_are_reproduced(case: str) -> None:
    about = facts("positions")[case]
    embedding = KINDS[case.split("_")[0]](**about["kwargs"])
    embedding.load_state_dict(golden("positions", case, "state"), strict=True)
    for length in about["seq_lens"]:
        expected = golden("positions", case, "out")[str(length)]
        torch.testing.assert_close(embedding(length), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", [x for x in facts("positions") if x.startswith("fractal")])
def test_fractal_basis_is_the_published_one(case: str) -> None:
    embedding = FractalPositionEmbedding(**facts("positions")[case]["kwargs"])
    basis = golden("positions", case, "state")["basis"]
    torch.testing.assert_close(embedding.basis, basis, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_position_ids_pick_the_rows_of_a_length(kind: str) -> None:
    embedding = KINDS[kind](9, 6)
    ids = torch.tensor([[3, 0, 8], [1, 1, 2]])
    torch.testing.assert_close(embedding(ids), embedding(9)[ids], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "which", [10, -1, torch.tensor([2, 9]), torch.tensor([-1]), torch.tensor([0.5])]
)
def test_positions_that_do_not_exist_are_refused(kind: str, which: int | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="positions: expected"):
        KINDS[kind](9, 6)(which)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_positions_gets_a_gradient(kind: str) -> None:
    embedding = KINDS[kind](9, 6)
    embedding(5).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in embedding.parameters())


def test_frequencies_that_alias_are_counted() -> None:
    assert FractalPositionEmbedding(8, 64).aliased_frequencies == 3
    assert FractalPositionEmbedding(8, 64, base_freq=0.01).aliased_frequencies == 0


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_positions_without_size_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected a number >= 1"):
        CurvedPositionEmbedding(*sizes)
