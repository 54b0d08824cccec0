"""A hard cutoff leaves out blocks of keys that are out of reach, and changes no number by it."""

from __future__ import annotations

import pytest
import torch
from ops.cluster_cases import RUN, clusters, ngt_call, small_blocks
from ops.operator_cases import padding_ranges, run, values_and_gradients

from gravity_hf.ops import near_blocks, problem
from gravity_hf.ops.chunked import gravity_attention_chunked
from gravity_hf.ops.reach import blocks_in_reach
from gravity_hf.ops.reference import gravity_attention_reference, squared_distance

# Runs of tokens of clusters that are alone, that come back, and that have a neighbour.
ORDER = [0, 1, 0, 2, 2, 0, 1]
RULES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 21},
    "left": {"causal": True, "key_ranges": padding_ranges(2, RUN * len(ORDER), "left")},
    "right": {"key_ranges": padding_ranges(2, RUN * len(ORDER), "right")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["clusters", "random", "line"])
def test_no_visible_pair_is_out_of_reach(family, dtype):
    """Radii are distances of pairs as they are computed, so that every rounding counts; on a line
    far from the origin, in blocks that touch, nothing but the margin keeps them."""
    g = torch.Generator().manual_seed(3)
    q = clusters(ORDER, heads=4) if family == "clusters" else torch.randn(2, 4, 45, 6, generator=g)
    if family == "line":
        q = 100.0 + torch.arange(45.0)[:, None] * torch.randn(2, 4, 1, 6, generator=g)
    k = q[:, ::2, :30] + (family != "line") * 0.1 * torch.randn(2, 2, 30, 6, generator=g)
    q, k = q.to(dtype), k.to(dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    every = squared_distance(q.to(working), k.to(working).repeat_interleave(2, 1))
    for quantile in (0.0, 0.02, 0.1, 0.5):
        radius_sq = every.transpose(0, 1).flatten(1).quantile(quantile, dim=1)
        visible = every <= radius_sq.sqrt().square()[:, None, None]
        for sides in ((7, 4), (1, 1)):
            near = blocks_in_reach(q, k, radius_sq.sqrt(), *sides)
            near = near.repeat_interleave(sides[0], 2).repeat_interleave(sides[1], 3)
            assert not (visible & ~near[:, :, : q.shape[2], :30]).any()


def test_what_is_far_is_out_of_reach():
    """Without this the bound above could be kept by leaving nothing out. Numbers that are none are
    no reason to leave anything out."""
    x = clusters(ORDER)
    near = blocks_in_reach(x, x, torch.full((2,), 5.0), RUN, RUN)
    labels = torch.tensor(ORDER)
    assert torch.equal(near, (labels[:, None] == labels).expand_as(near))
    x[0, 0, 3] = float("nan")
    assert blocks_in_reach(x, x, torch.full((2,), 5.0), RUN, RUN)[0, 0, 0].all()


@pytest.mark.parametrize("exclude_self", [False, True], ids=["self", "exclude_self"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("law", ["force", "power"])
def test_values_and_all_gradients_are_those_of_all_pairs(monkeypatch, law, rule, exclude_self):
    small_blocks(monkeypatch)
    inputs = ngt_call(clusters(ORDER), law=law)
    options = {"law": law, "cutoff": "hard", "exclude_self": exclude_self, **RULES[rule]}
    expected = values_and_gradients(gravity_attention_reference, inputs, **options)
    scores = count_scores(monkeypatch)
    actual = values_and_gradients(gravity_attention_chunked, inputs, **options)
    assert scores
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_only_blocks_in_reach_are_worked_on(monkeypatch):
    """Forward and backward: of 2 batch entries and 2 heads the pairs of each cluster, causal."""
    small_blocks(monkeypatch)
    inputs = ngt_call(clusters(ORDER))
    scores = count_scores(monkeypatch)
    values_and_gradients(gravity_attention_chunked, inputs, cutoff="hard", causal=True)
    # A run sees one of its blocks of 4 tokens from its first 4 and both from the others, and all
    # of the runs before it that are of its cluster.
    earlier = sum(ORDER[:n].count(cluster) for n, cluster in enumerate(ORDER))
    assert sum(scores) == 2 * 4 * (len(ORDER) * (4 * 4 + 4 * 8) + earlier * RUN * RUN)


def test_grouped_queries_and_fewer_queries_than_keys(monkeypatch):
    small_blocks(monkeypatch)
    inputs = ngt_call(clusters(ORDER, heads=4))
    inputs["q"], inputs["query_mass"] = inputs["q"][:, :, -21:], inputs["query_mass"][..., -21:]
    inputs["k"], inputs["v"] = inputs["k"][:, :2], inputs["v"][:, :2]
    options = {"cutoff": "hard", "causal": True}
    expected = values_and_gradients(gravity_attention_reference, inputs, **options)
    scores = count_scores(monkeypatch)
    actual = values_and_gradients(gravity_attention_chunked, inputs, **options)
    assert scores
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("implementation", [gravity_attention_reference, gravity_attention_chunked])
def test_alone_within_the_radius_a_token_keeps_itself(monkeypatch, implementation):
    small_blocks(monkeypatch)
    x = clusters(list(range(6)))[:, :, ::RUN]
    inputs = ngt_call(x.float().double())
    inputs["radius"] = torch.full((2,), 2.0, dtype=torch.float64)
    # With a gradient, as without one few queries are decoding.
    inputs["v"].requires_grad_()
    output = run(implementation, inputs, cutoff="hard", exclude_self=True)
    torch.testing.assert_close(output, inputs["v"])


def test_dropout_backward_uses_the_mask_of_the_forward(monkeypatch):
    """The output is linear in v, so `sum(output G) = sum(v dL/dv)` if the weights are the same."""
    small_blocks(monkeypatch)
    inputs = ngt_call(clusters(ORDER))
    scores = count_scores(monkeypatch)
    v = inputs["v"].requires_grad_()
    output = run(gravity_attention_chunked, inputs, cutoff="hard", causal=True, dropout_p=0.4)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).double()
    (gradient,) = torch.autograd.grad(output, v, direction)
    assert scores
    torch.testing.assert_close((gradient * v).sum(), (output * direction).sum())


def count_scores(monkeypatch) -> list[int]:
    """A list that gets the number of scores of each block that is worked on from now on; empty
    where no block has been left out."""
    scores: list[int] = []

    def counted(sizes, *arguments):
        found = near_blocks.near_blocks(sizes, *arguments)
        return found if found is None else _counting(found, sizes.groups, scores)

    monkeypatch.setattr(problem, "near_blocks", counted)
    return scores


def _counting(found, groups: int, scores: list[int]):
    for block in found:
        sides = [part.stop - part.start for part in (block.batch, block.heads, block.rows)]
        scores.append(sides[0] * sides[1] * sides[2] * groups * block.window.count)
        yield block
