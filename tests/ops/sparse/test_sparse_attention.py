"""Every implementation of sparse attention is its definition; dense where the budget says so."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_within_budget
from ops.sparse.sparse_cases import (
    BATCH,
    LENGTH,
    MASKS,
    SCORES,
    as_double,
    budget,
    mask_of,
    score_of,
    vectors,
    visible,
)
from torch.nn import functional as F

from gravity_hf.ops.sparse import (
    DotProduct,
    Gravity,
    dense_attention,
    masked,
    select_keys,
    sparse_attention,
)
from gravity_hf.ops.sparse.choosing import choose_implementation
from gravity_hf.ops.sparse.routed import plan_of

PLAIN = ("masked", "gathered", "routed")
EVERY_MASK = pytest.mark.parametrize("name", MASKS)
quiet = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


def run(impl, score, tensors, block=8, **options):
    return sparse_attention(*tensors, score=score, budget=budget(block), impl=impl, **options)


def check(impl, score, tensors, **options):
    doubles = tuple(x.double() for x in tensors)
    screen = tuple(doubles[:2])
    exact = run("reference", as_double(score), doubles, screen=screen, **options)
    peer = run("reference", score, tensors, screen=screen, **options)
    actual = run(impl, score, tensors, screen=screen, **options)
    # Fused products keep weights in the dtype of v; the reference keeps them in float32.
    factor = 3.0 if tensors[0].dtype == torch.float32 else 4.0
    assert_within_budget(impl, actual, exact, peer, factor=factor)
    return actual


@EVERY_MASK
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("impl", PLAIN)
def test_within_budget_of_the_definition(impl, score, name):
    queries = 70 if name in ("none", "right") else LENGTH
    mask = mask_of(name, queries)
    for block in (1, 8):
        check(impl, score_of(score), vectors(queries), block=block, mask=mask)


def test_flex_is_not_given_more_flags_than_its_addresses_reach(monkeypatch):
    monkeypatch.setattr("gravity_hf.ops.sparse.flex._MOST_FLAGS", 100)
    with pytest.raises(ValueError, match="impl='flex': expected fewer blocks"), torch.no_grad():
        sparse_attention(*vectors(), score=score_of("dot"), budget=budget(), impl="flex")


@quiet
@pytest.mark.parametrize(
    ("score", "name"), [("dot", "left"), ("power", "documents"), ("lifted", "none")]
)
def test_flex_is_within_budget_of_the_definition(score, name):
    with torch.no_grad():
        check("flex", score_of(score), vectors(), mask=mask_of(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["dot", "power"])
@pytest.mark.parametrize("impl", PLAIN)
def test_half_precision_is_computed_in_float32(impl, score, dtype):
    tensors = tuple(x.to(dtype) for x in vectors())
    assert check(impl, score_of(score), tensors).dtype == dtype


def test_routed_serves_blocks_where_a_row_has_them():
    """Else the test above would compare what it falls back to."""
    q, k, _ = vectors()
    for name, served in (("none", True), ("left", True), ("right", True), ("documents", False)):
        selection = select_keys(q, k, budget(), metric="dot", mask=mask_of(name))
        assert (plan_of(selection, DotProduct(1.0), torch.float32) is not None) == served


@EVERY_MASK
@pytest.mark.parametrize("score", ["dot", "power"])
def test_a_budget_for_all_keys_is_dense_attention_bit_for_bit(score, name):
    tensors, mask, score = vectors(), mask_of(name), score_of(score)
    expected = dense_attention(*tensors, score=score, mask=mask)
    whole = budget(top_k=LENGTH)
    actual = sparse_attention(*tensors, score=score, budget=whole, mask=mask)
    assert torch.equal(actual, expected)
    kept = run("reference", score, tensors, mask=mask)
    assert not torch.allclose(kept, expected)


def test_dense_attention_is_torch_s_own():
    q, k, v = vectors()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7, enable_gqa=True)
    assert torch.equal(dense_attention(q, k, v, score=DotProduct(0.7)), expected)


@pytest.mark.parametrize("score", ["dot", "power"])
@pytest.mark.parametrize("impl", ["reference", *PLAIN, "dense"])
def test_a_row_that_sees_nothing_gives_zeros(impl, score):
    tensors, score = vectors(), score_of(score)
    mask = mask_of("documents")
    blank = ~visible("documents").any(-1)[:, 0]
    if impl == "dense":
        output = dense_attention(*tensors, score=score, mask=mask)
    else:
        output = run(impl, score, tensors, mask=mask)
    assert blank.any()
    assert (output.transpose(1, 2)[blank] == 0).all() and output.isfinite().all()


@pytest.mark.parametrize("score", ["dot", "power"])
@pytest.mark.parametrize("impl", ["reference", *PLAIN])
def test_what_lies_behind_a_static_cache_is_not_read(impl, score):
    q, k, v = vectors(20)
    longer = [torch.cat([x, torch.full_like(x[:, :, :40], 1e4)], 2) for x in (k, v)]
    positions = torch.arange(LENGTH - 20, LENGTH)
    expected = run(impl, score_of(score), (q, k, v))
    actual = run(impl, score_of(score), (q, *longer), positions=positions)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("score", ["dot", "power"])
def test_decoding_equals_the_prefill(score, block):
    q, k, v = vectors()
    score = score_of(score)
    whole = run("routed", score, (q, k, v), block)
    for i in (45, 99, LENGTH - 1):
        step = (q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
        torch.testing.assert_close(run("auto", score, step, block), whole[:, :, i : i + 1])


@pytest.mark.parametrize("name", ["none", "left"])
@pytest.mark.parametrize("score", ["dot", "power"])
@pytest.mark.parametrize("impl", ["reference", *PLAIN])
def test_no_later_token_changes_an_output(impl, score, name):
    """Bit for bit: what other queries chose decides in which tiles a query is computed."""
    tensors, mask, score = vectors(), mask_of(name), score_of(score)
    for block in (1, 8):
        before = run(impl, score, tensors, block, mask=mask)
        for j in (41, 90, LENGTH - 1):
            changed = [x.clone() for x in tensors]
            for x in changed:
                x[:, :, j:] = x[:, :, j:].flip(2) * -3.0
            after = run(impl, score, changed, block, mask=mask)
            assert torch.equal(after[:, :, :j], before[:, :, :j])


@pytest.mark.parametrize("score", SCORES)
def test_what_later_queries_choose_decides_nothing_about_the_sums_of_earlier_ones(score):
    """Where a block of queries begins to see keys, without sinks, is where their choices begin."""
    # Kernels begin elsewhere with heads of an ordinary width alone.
    q, k, v = (x.repeat(1, 1, 1, 8) for x in vectors(60, 400))
    few, score = budget(2, sinks=0), score_of(score)
    selection = select_keys(q, k, few, metric=score.metric)
    g = torch.Generator().manual_seed(0)
    late = torch.rand(BATCH, 2, 60, 96, generator=g).topk(few.chosen_blocks).indices + 53
    early = late.clone()
    early[:, :, 40:] -= 52
    given = {"score": score, "budget": few, "impl": "masked"}
    found = [
        sparse_attention(q, k, v, selection=replace(selection, blocks=x), **given)
        for x in (late, early)
    ]
    assert torch.equal(found[0][:, :, :40], found[1][:, :, :40])
    assert not torch.equal(found[0], found[1])


def test_gradients_on_other_devices_than_a_cpu_are_those_of_dense_attention():
    """By blocks they would take hundreds of times as long there."""
    q, k, v = (torch.zeros(1, 2, 2048, 8) for _ in range(3))
    selection = select_keys(q, k, budget(), metric="distance")
    q, k, v = (x.to("meta") for x in (q, k, v))
    score = Gravity(torch.ones(2, requires_grad=True), torch.ones(2))
    assert choose_implementation(q, k, v, score, selection, 0.0) == "masked"


def test_masks_are_held_for_some_queries_at_a_time(monkeypatch):
    """In the backward pass, too."""
    found = {}
    for pairs in (2**23, 2 * 4 * LENGTH * 40):
        monkeypatch.setitem(masked._PAIRS, "cpu", pairs)
        held, leaves = [], [x.double().requires_grad_() for x in vectors()]
        hooks = (lambda x, held=held: held.append(x.numel()) or x, lambda x: x)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            output = run("masked", DotProduct(0.7), leaves)
        found[pairs] = torch.autograd.grad(output.square().sum(), leaves), max(held)
    (whole, all_pairs), (parts, most) = found.values()
    assert all_pairs >= 2 * 4 * LENGTH**2 > 10 * most
    for actual, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", ["reference", *PLAIN])
def test_every_weight_is_dropped_or_scaled(impl):
    q, k, v = vectors()
    ones = torch.ones_like(v)
    torch.manual_seed(0)
    output = run(impl, DotProduct(0.0), (q, k, ones), dropout_p=0.5)
    # Of 40 equal weights each counts 0 or twice.
    counts = output[0, 0, -1, 0] * 40 / 2
    assert output.std() > 0 and abs(output.mean() - 1) < 0.05
    assert impl == "masked" or abs(counts - counts.round()) < 1e-3 or counts < 40


def test_decoding_and_prefill_are_one_graph():
    def step(q, k, v):
        return sparse_attention(q, k, v, score=DotProduct(0.7), budget=budget())

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for queries in (1, LENGTH):
        tensors = vectors(queries)
        torch.testing.assert_close(compiled(*tensors), step(*tensors))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"impl": "union"}, "impl: expected one of"),
        ({"score": 0.5}, "score: expected a DotProduct or a Gravity, got float"),
        ({"dropout_p": 1.0}, "dropout_p: expected a number in"),
        ({"k": torch.zeros(BATCH, 3, LENGTH, 8)}, "k: expected"),
        ({"v": torch.zeros(BATCH, 2, 5, 8)}, "v: expected"),
        ({"score": Gravity(torch.ones(3), torch.ones(3))}, "score.mass: expected"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong, words):
    q, k, v = vectors()
    given = {"q": q, "k": k, "v": v, "score": DotProduct(1.0), "budget": budget(), **wrong}
    with pytest.raises(ValueError, match=words):
        sparse_attention(**given)
