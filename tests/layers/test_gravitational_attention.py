"""The published attention modules: their numbers at softening 0, and what ours adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers.golden_files import OUTPUT_TOLERANCE, facts, golden, largest_difference
from torch import Tensor

from gravity_hf.layers import GravitationalAttentionHead, MultiHeadGravitationalAttention
from gravity_hf.layers.forces import gravitational_forces

# Where attention is the identity, gradients are below the smallest normal number.
SMALLEST = torch.finfo(torch.float32).tiny


def head_of(about: dict[str, Any], dtype: torch.dtype) -> GravitationalAttentionHead:
    """The head of a case, as published."""
    head = GravitationalAttentionHead(
        about["head_dim"],
        about["gravitational_constant"],
        about["event_horizon"],
        about["max_force"],
        about["curvature"],
        softening=0.0,
    )
    weights = {"G": head.G.detach(), **golden("head", "shared", "state")}
    head.load_state_dict(weights, strict=True)
    return head.to(dtype)


def results(case: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a case by their published names."""
    about, shared = facts("head")[case], golden("head", "shared", "in")
    head = head_of(about, dtype)
    x = shared["x"].to(dtype).requires_grad_()
    positions = shared.get(f"positions.{about['positions']}")
    leaves = {"x": x, **dict(head.named_parameters())}
    if positions is not None:
        positions = leaves["positions"] = positions.to(dtype).requires_grad_()
    out, masses = head(x, positions)
    table = head.inverse_distances(x, positions)
    forces = gravitational_forces(head.masses(x)[:, None], head.G.abs()[None], table)[:, 0]
    if head.max_force is not None:
        forces = forces.clamp(max=head.max_force)
    (out * shared["cotangent"].to(dtype)).sum().backward()
    outputs = {"out": out, "masses": masses, "forces": forces, "attn": forces.softmax(-1)}
    return outputs, {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("case", facts("head"))
def test_published_head_is_reproduced_with_its_gradients(case: str) -> None:
    outputs, grads = results(case, torch.float32)
    exact_outputs, exact_grads = results(case, torch.float64)
    for name, expected in golden("head", case, "out").items():
        if name == "forces":
            # Without a ceiling they reach 4e5.
            torch.testing.assert_close(outputs[name], expected, rtol=1e-5, atol=0)
            continue
        for found in (outputs[name], exact_outputs[name].float()):
            torch.testing.assert_close(found, expected, rtol=0, atol=OUTPUT_TOLERANCE)
    for name, expected in golden("head", case, "grad").items():
        allowed = 1e-4 * expected.abs() + 1e-6 * expected.abs().max() + SMALLEST
        exact = exact_grads[name].float()
        assert ((exact - expected).abs() <= allowed).all(), f"{name} in float64"
        # Forces of 50 cancel in some entries: of those float32 knows as much as the published did.
        rounding = 4 * (expected - exact).abs().max()
        assert ((grads[name] - expected).abs() <= allowed + rounding).all(), name


@pytest.mark.parametrize("case", facts("mha"))
def test_published_attention_is_reproduced_with_its_diagnostics(case: str) -> None:
    about, inputs = facts("mha")[case], golden("mha", case, "in")
    attention = MultiHeadGravitationalAttention(**about["kwargs"], softening=0.0)
    assert [head.G.item() for head in attention.heads] == pytest.approx(about["init_G"], rel=1e-6)
    attention.load_state_dict(golden("mha", case, "state"), strict=True)
    expected = golden("mha", case, "out")
    torch.testing.assert_close(attention(**inputs), expected["out"], rtol=0, atol=OUTPUT_TOLERANCE)
    as_numpy = {name: x.numpy() for name, x in inputs.items()}
    found = attention.get_attention_diagnostics(**as_numpy)
    assert largest_difference(found, about["diagnostics"]) < 1e-5
    entropy = torch.special.entr(expected["attn"]).sum(-1).mean((0, 2))
    ours = [found[f"head_{i}"]["attention_entropy"] for i in range(len(entropy))]
    assert ours == pytest.approx(entropy.tolist(), rel=1e-4, abs=1e-5)


def test_published_law_mixes_no_tokens_and_the_default_does() -> None:
    x, positions = torch.randn(1, 12, 16), torch.randn(12, 64) * 0.02
    other = x.clone()
    other[:, 5] += 1.0
    for softening, mixes in ((0.0, False), (None, True)):
        given = {} if softening is None else {"softening": softening}
        head = GravitationalAttentionHead(16, **given)
        change = (head(other, positions)[0] - head(x, positions)[0]).abs().amax((0, 2))
        change[5] = 0.0
        assert bool(change.max() > 1e-3) is mixes


def attention_of(**given: Any) -> MultiHeadGravitationalAttention:
    return MultiHeadGravitationalAttention(16, 8, 4, **given)


def test_later_tokens_never_change_earlier_outputs_of_causal_attention() -> None:
    attention, positions = attention_of(is_causal=True), torch.randn(9, 8)
    x = torch.randn(2, 9, 16)
    other = x.clone()
    other[:, 6:] = torch.randn(2, 3, 16)
    before, after = attention(x, positions), attention(other, positions)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("as_float", [False, True])
def test_padding_is_not_there(as_float: bool) -> None:
    attention, positions = attention_of(), torch.randn(9, 8)
    x = torch.randn(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[:, 6:] = True
    mask = torch.zeros(9, 9) if as_float else None
    padded = attention(x, positions, key_padding_mask=padding, mask=mask)[:, :6]
    torch.testing.assert_close(padded, attention(x[:, :6], positions[:6]), rtol=0, atol=1e-6)
    nothing = attention(x, positions, key_padding_mask=torch.ones_like(padding))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_mask_of_each_head_hides_keys_of_that_head() -> None:
    attention, positions = attention_of(), torch.randn(5, 8)
    x = torch.randn(1, 5, 16)
    mask = torch.ones(1, 4, 5, 5, dtype=torch.bool)
    mask[:, 2, :, 3] = False
    parts = [
        head(part, positions, mask=mask[:, i : i + 1])[0]
        for i, (head, part) in enumerate(zip(attention.heads, x.split(4, -1), strict=True))
    ]
    expected = attention.out_proj(torch.cat(parts, -1))
    torch.testing.assert_close(attention(x, positions, mask=mask), expected)
    assert not torch.allclose(attention(x, positions), expected)


def test_a_head_set_apart_keeps_its_own_law() -> None:
    attention, positions = attention_of(), torch.randn(5, 8)
    x = torch.randn(2, 5, 16)
    same = attention(x, positions)
    attention.heads[1].curvature, attention.heads[3].max_force = 0.6, 0.1
    parts = zip(attention.heads, x.split(4, -1), strict=True)
    one_by_one = torch.cat([head(part, positions)[0] for head, part in parts], -1)
    torch.testing.assert_close(attention(x, positions), attention.out_proj(one_by_one))
    assert not torch.allclose(attention(x, positions), same)


def test_diagnostics_tell_of_the_forces_that_act() -> None:
    attention, positions = attention_of(max_force=2.0, is_causal=True), torch.randn(6, 8) * 0.2
    x = torch.randn(2, 6, 16)
    found = attention.get_attention_diagnostics(x, positions)["head_1"]
    head, part = attention.heads[1], x[..., 4:8]
    table = head.inverse_distances(part, positions)
    force = gravitational_forces(head.masses(part)[:, None], head.G.abs()[None], table)[:, 0]
    seen = force[:, torch.ones(6, 6, dtype=torch.bool).tril()]
    assert found["force_mean"] == pytest.approx(seen.mean().item())
    assert found["force_max"] == pytest.approx(seen.max().item())
    assert found["saturation"] == pytest.approx((seen >= 2.0).float().mean().item())
    assert 0 < found["saturation"] < 1


def test_gradient_is_finite_without_gravity() -> None:
    head = GravitationalAttentionHead(4, gravitational_constant=0)
    out, _ = head(torch.randn(1, 5, 4), torch.randn(5, 3))
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in head.parameters())


def test_masses_come_from_calls_of_the_projection() -> None:
    attention, called = attention_of(), []
    for index, head in enumerate(attention.heads):
        head.mass_proj.register_forward_hook(lambda *_, index=index: called.append(index))
    attention(torch.randn(1, 5, 16))
    assert called == [0, 1, 2, 3]


def test_half_precision_keeps_its_dtype_and_stays_near_float32() -> None:
    attention, positions = attention_of(max_force=None), torch.randn(7, 8) * 0.02
    x = torch.randn(2, 7, 16)
    exact = attention(x, positions)
    half = attention.to(torch.float16)(x.half(), positions)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=2e-3)


X = torch.zeros(2, 5, 16)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: MultiHeadGravitationalAttention(65), r"dim_model \(65\) must be divisible"),
        (lambda: attention_of()(torch.zeros(5, 16)), r"x: expected floats \[B, N, 16\]"),
        (lambda: attention_of()(torch.zeros(2, 5, 16, dtype=torch.int64)), "Embed token ids"),
        (lambda: attention_of()(X, torch.zeros(2, 5, 8)), "shared by the whole batch"),
        (lambda: attention_of()(X, torch.zeros(4, 8)), "one row for every token"),
        (lambda: attention_of()(X, key_padding_mask=torch.ones(2, 5)), "attention_mask == 0"),
        (lambda: GravitationalAttentionHead(4, event_horizon=0.0, softening=0.0), "infinite"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
