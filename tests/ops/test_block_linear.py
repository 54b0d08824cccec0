"""Skipping blocks of neurons: the numbers of the masked layer, however it is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.ops.block_linear import IMPLEMENTATIONS, BlockWeights, block_feed_forward
from gravity_hf.ops.block_linear_choice import CROSSOVERS, Crossover, choose_implementation

TOKENS, GATE, UP, OUT, NEURONS, SIZE, KEEP = 21, 16, 24, 8, 48, 8, 2


def problem(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Inputs and weights, and a choice: block 0 by every token, block 5 by none."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    leaves = [draw(TOKENS, GATE), draw(TOKENS, UP), draw(NEURONS, GATE), draw(NEURONS, UP)]
    leaves += [draw(OUT, NEURONS), *([draw(NEURONS), draw(NEURONS)] if bias else [])]
    second = torch.randint(1, 5, (TOKENS, 1), generator=generator)
    return leaves, torch.cat([torch.zeros_like(second), second], 1)


def skipped(leaves: list[Tensor], chosen: Tensor, impl: str) -> Tensor:
    gate_in, up_in, *weights = leaves
    return block_feed_forward(
        *(gate_in, up_in, BlockWeights(*weights), chosen),
        block_size=SIZE,
        activation=F.silu,
        impl=impl,
    )


def masked(leaves: list[Tensor], chosen: Tensor) -> Tensor:
    gate_in, up_in, gate, up, down, *biases = leaves
    gate_bias, up_bias = biases or (None, None)
    hidden = F.silu(F.linear(gate_in, gate, gate_bias)) * F.linear(up_in, up, up_bias)
    rows = torch.arange(NEURONS) // SIZE
    mask = (rows[None, :, None] == chosen[:, None, :]).any(-1)
    return (hidden * mask) @ down.T


def with_gradients(run: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    y = run()
    return [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y).to(y))]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_skipping_equals_masking_values_and_gradients(impl: str, bias: bool) -> None:
    dtype = torch.float32 if impl == "grouped_mm" else torch.float64
    leaves, chosen = problem(bias, dtype)
    expected = with_gradients(lambda: masked(leaves, chosen), leaves)
    actual = with_gradients(lambda: skipped(leaves, chosen, impl), leaves)
    for a, b in zip(actual, expected, strict=True):
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5 * b.detach().abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_gradients_are_right_where_weights_are_frozen() -> None:
    leaves, chosen = problem(bias=True)
    for weight in leaves[2:]:
        weight.requires_grad_(False)
    expected = with_gradients(lambda: masked(leaves, chosen), leaves[:2])
    actual = with_gradients(lambda: skipped(leaves, chosen, "grouped"), leaves[:2])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_blocks_that_nobody_chose_are_not_computed() -> None:
    leaves, chosen = problem(bias=False)
    with torch.no_grad():
        leaves[2][5 * SIZE :] = torch.nan
    for impl in IMPLEMENTATIONS[:3]:
        assert skipped(leaves, chosen, impl).isfinite().all()


@pytest.mark.parametrize("impl", ["rows", "grouped"])
def test_a_token_s_numbers_do_not_depend_on_what_others_choose(impl: str) -> None:
    """Bit for bit: later tokens choose the same block as the first one, or other blocks."""
    torch.manual_seed(0)
    tokens, width, blocks, size = 40, 96, 6, 32
    gate, up = torch.randn(2, blocks * size, width)
    weights = BlockWeights(gate, up, torch.randn(width, blocks * size))
    x = torch.randn(tokens, width)
    results = []
    for others in range(8):
        torch.manual_seed(others)
        chosen = torch.rand(tokens, blocks).topk(2).indices.sort().values
        chosen[:3] = torch.tensor([[0, 1], [0, 1], [2, 4]])
        chosen[3:] = chosen[3:] if others else torch.tensor([3, 5])
        y = block_feed_forward(x, x, weights, chosen, block_size=size, activation=F.silu, impl=impl)
        results.append(y[:3])
    assert all(torch.equal(results[0], y) for y in results)


def test_no_tokens_give_no_rows() -> None:
    leaves, chosen = problem(bias=False)
    empty = [leaves[0][:0], leaves[1][:0], *leaves[2:]]
    assert skipped(empty, chosen[:0], "grouped").shape == (0, OUT)


def test_wrong_calls_are_refused() -> None:
    leaves, chosen = problem(bias=False)
    with pytest.raises(ValueError, match="expected one of rows, gathered"):
        skipped(leaves, chosen, "fast")
    with pytest.raises(ValueError, match="20 choices"):
        skipped(leaves, chosen[:20], "rows")


LAYER = {"width": 512, "neurons": 2048, "block_size": 64, "keep": 7}


def choice(tokens: int, device: str = "cpu", **changes: object) -> str | None:
    return choose_implementation(device, torch.float32, tokens=tokens, **{**LAYER, **changes})


def test_long_texts_skip_and_short_ones_do_not() -> None:
    assert choice(1024) == "grouped"
    assert choice(16) is None


def test_a_single_token_skips_where_weights_are_large() -> None:
    assert choice(1, width=2048, neurons=8192, keep=26) == "rows"
    assert choice(1, width=64) is None


def test_what_was_not_measured_computes_everything() -> None:
    assert choice(1024, device="meta") is None
    assert CROSSOVERS.keys() == {"cpu", "cuda"}


def test_blocks_too_small_for_the_same_bits_are_not_skipped() -> None:
    assert choice(10**6, block_size=4, keep=100) == "grouped"
    assert choice(10**6, block_size=3, neurons=2049, keep=100) is None


def test_second_derivatives_of_groups_are_refused() -> None:
    """They would be left out of the sum, beside other terms."""
    leaves, chosen = problem(bias=False)
    y = skipped(leaves, chosen, "grouped").square().sum() + leaves[0].pow(3).sum()
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(y, leaves[0], create_graph=True)


def test_products_of_groups_get_rows_that_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Crossover("grouped_mm", 0.0, "gathered", 0, 0.0, 0.0)
    monkeypatch.setitem(CROSSOVERS, "cuda", rules)
    cases = {"grouped_mm": {}, "grouped": {"aligned": False}}
    for how, changes in cases.items():
        values = {**LAYER, "tokens": 64, **changes}
        assert choose_implementation("cuda", torch.bfloat16, **values) == how
    values = {**LAYER, "tokens": 64, "block_size": 4}
    assert choose_implementation("cuda", torch.bfloat16, **values) == "grouped"


def test_graphs_get_nothing_that_looks_at_the_choice() -> None:
    assert choice(1024, traced=True) is None
