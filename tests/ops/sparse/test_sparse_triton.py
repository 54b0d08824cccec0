"""Routed attention in Triton: in its interpreter on a CPU, compiled on a GPU."""

import os
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_within_budget
from ops.sparse.sparse_cases import as_double, budget, mask_of, score_of, vectors

from gravity_hf.ops.sparse import Gravity, sparse_attention
from gravity_hf.ops.sparse.selecting import block_means
from gravity_hf.ops.sparse.triton import triton_fused_attention

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)


def moved(x):
    if isinstance(x, Gravity):
        tensors = (x.mass, x.softening, x.law, x.key_radius_sq)
        return Gravity(*(moved(tensor) for tensor in tensors))
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def run(impl, score, tensors, block=8, **options):
    options = {name: moved(x) for name, x in options.items()}
    tensors = [moved(x) for x in tensors]
    chosen = budget(block)
    with torch.no_grad():
        output = sparse_attention(*tensors, score=moved(score), budget=chosen, impl=impl, **options)
    return output.cpu()


@pytest.mark.parametrize(
    ("score", "mask", "dtype"),
    [
        ("dot", "left", torch.float32),
        ("power", "right", torch.float32),
        ("force", "none", torch.bfloat16),
        ("lifted", "holes", torch.float16),
        ("dot", "none", torch.bfloat16),
    ],
    ids=str,
)
def test_within_budget_of_the_definition(score, mask, dtype):
    tensors = [x.to(dtype) for x in vectors(70)]
    score, mask = score_of(score), mask_of(mask, 70)
    exact = run("reference", as_double(score), [x.double() for x in tensors], mask=mask)
    peer = run("reference", score, tensors, mask=mask)
    # Weights and parts are rounded to the dtype of v.
    factor = 3.0 if dtype == torch.float32 else 6.0
    actual = run("triton", score, tensors, mask=mask)
    assert_within_budget("triton", actual, exact, peer, factor=factor)


@pytest.mark.parametrize("impl", ["triton", "flex"])
@pytest.mark.parametrize("score", ["dot", "power"])
def test_no_later_token_changes_an_output(score, impl):
    if impl == "flex" and DEVICE == "cpu":
        pytest.skip("FlexAttention has tiles on a GPU only")
    # FlexAttention has no heads as narrow as these.
    q, k, v = (torch.cat([x, x.flip(3)], 3) for x in vectors(70))
    changed = [x.clone() for x in (q, k, v)]
    changed[0][:, :, 40:] *= -3.0
    for x in changed[1:]:
        x[:, :, 120:] = x[:, :, 120:].flip(2) * -3.0
    before, after = (run(impl, score_of(score), x) for x in ((q, k, v), changed))
    assert torch.equal(after[:, :, :40], before[:, :, :40])
    assert not torch.equal(after, before)


@pytest.mark.skipif(DEVICE == "cpu", reason="FlexAttention has a gradient on a GPU only")
def test_the_gradient_of_flex_is_that_of_the_definition():
    found = {}
    for impl in ("reference", "flex"):
        leaves = [moved(torch.cat([x, x.flip(3)], 3)).requires_grad_() for x in vectors()]
        options = {"score": score_of("dot"), "budget": budget(), "impl": impl}
        output = sparse_attention(*leaves, mask=moved(mask_of("left")), **options)
        found[impl] = torch.autograd.grad(output.square().sum(), leaves)
    for actual, expected in zip(found["flex"], found["reference"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def gradients(impl, score, tensors, mask=None):
    """Of vectors and of the score's own tensors, and the output."""
    leaves = [moved(x).requires_grad_() for x in tensors]
    score = moved(score)
    for x in score.tensors:
        x.requires_grad_()
    options = {"score": score, "budget": budget(), "impl": impl, "mask": moved(mask)}
    output = sparse_attention(*leaves, **options)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    found = torch.autograd.grad((output * weights).sum(), [*leaves, *score.tensors])
    return [x.detach().cpu() for x in (output, *found)]


@pytest.mark.parametrize(
    ("score", "mask", "dtype", "queries"),
    [
        ("force", "right", torch.float32, 70),
        ("lifted", "holes", torch.bfloat16, 70),
        ("power", "none", torch.bfloat16, 70),
        ("dot", "left", torch.float16, 70),
    ],
    ids=str,
)
def test_gradients_are_within_budget_of_the_definition(score, mask, dtype, queries):
    tensors = [x.to(dtype) for x in vectors(queries)]
    score, mask = score_of(score), mask_of(mask, queries)
    exact = gradients("reference", as_double(score), [x.double() for x in tensors], mask)
    peer = gradients("reference", score, tensors, mask)
    assert_gradients(gradients("triton", score, tensors, mask), exact, peer)


def assert_gradients(actual, exact, peer):
    names = ("output", "q", "k", "v", "mass", "softening", "radius")[: len(actual)]
    for name, found, wanted, known in zip(names, actual, exact, peer, strict=True):
        assert found.dtype == known.dtype and wanted.abs().max() > 0, name
        assert_within_budget(name, found, wanted, known, factor=6.0)


def test_gradients_repeat_to_the_last_bit_and_pass_by_what_is_hidden():
    """Keys that are hidden have none."""
    score, tensors, mask = score_of("power"), vectors(70), mask_of("left", 70)
    actual, again = (gradients("triton", score, tensors, mask) for _ in range(2))
    assert all(map(torch.equal, actual, again))
    exact = gradients("reference", as_double(score), [x.double() for x in tensors], mask)
    assert_gradients(actual, exact, gradients("reference", score, tensors, mask))
    hidden = 150 // 4
    for x in actual[2:4]:
        assert (x[1, :, :hidden] == 0).all() and (x[1, :, hidden:] != 0).any()


@pytest.fixture
def soiled(monkeypatch):
    """New memory holds what no kernel may take for a number of its own."""
    made, empty = torch.Tensor.new_empty, torch.empty

    def soil(x):
        if x.is_floating_point():
            return x.fill_(float("nan"))
        return x.fill_(torch.iinfo(x.dtype).max // 3)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **options: soil(made(*a, **options)))
    monkeypatch.setattr(torch, "empty", lambda *a, **options: soil(empty(*a, **options)))


def test_what_memory_held_before_changes_nothing(soiled, monkeypatch):
    """The choice in one kernel, as on a GPU, then outputs and gradients."""
    from gravity_hf.ops.sparse import selecting

    score, tensors, mask = score_of("power"), vectors(70), mask_of("left", 70)
    exact = gradients("reference", as_double(score), [x.double() for x in tensors], mask)
    peer = gradients("reference", score, tensors, mask)
    monkeypatch.setattr(selecting, "chooses_by_triton", lambda means, places: True)
    assert_gradients(gradients("triton", score, tensors, mask), exact, peer)


@pytest.mark.parametrize("mask", ["none", "left", "holes", "documents"])
def test_ranks_choose_as_sorting_does(mask):
    from gravity_hf.ops.sparse.selecting import _best, _choosable, whole_blocks
    from gravity_hf.ops.sparse.triton.ranking import best_blocks
    from gravity_hf.ops.sparse.visibility import visibility

    given, few = mask_of(mask, 70), budget(4)
    seen = visibility(70, 150, moved(given), None, None, torch.device(DEVICE))
    # Few values, so that many are equal, and both zeros.
    g = torch.Generator().manual_seed(0)
    scores = moved(torch.randint(-3, 4, (2, 2, 70, 38), generator=g) / 2.0 * -1.0)
    whole = seen.allowed
    whole = None if whole is None else whole_blocks(whole, seen.origin, 4, 38)
    chosen = torch.full((2, 2, 70, 9), -1, device=DEVICE)
    best_blocks(scores, seen, whole, few, chosen)
    expected = _best(scores.clone(), _choosable(seen, few, 38), few.chosen_blocks)
    assert few.chosen_blocks == 7 and (chosen[..., 7:] == -1).all()
    assert torch.equal(chosen[..., :7].sort().values, expected.sort().values)


@pytest.mark.parametrize(
    ("size", "served"),
    [
        ({"top_k": 2048}, True),
        # As many places as rows need that see few keys: too many for registers.
        ({"top_k": 512, "min_length": 4096}, False),
        ({"top_k": 2048, "block_size": 8}, False),
    ],
)
def test_one_kernel_chooses_where_its_places_fit(monkeypatch, size, served):
    from gravity_hf.ops.sparse import KeyBudget, selecting, triton
    from gravity_hf.ops.sparse.visibility import visibility

    monkeypatch.setattr(triton, "triton_refusal", lambda *call: None)
    means = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 1, 256, 64))
    # Of rows that all may see few keys, as a GPU has to expect.
    seen = visibility(8192, 8192, None, None, None, torch.device("cpu"))
    places = selecting._places(seen, KeyBudget(**size))
    assert triton.chooses_by_triton(means, places) == served


@pytest.mark.parametrize(
    ("mask", "metric", "heads", "size"),
    [
        ("none", "dot", 4, {}),
        ("left", "distance", 4, {}),
        ("holes", "dot", 2, {"top_k": 96}),
        ("documents", "distance", 4, {"min_length": 60}),
        ("right", "dot", 4, {"top_k": 13}),
    ],
)
@pytest.mark.parametrize("equal", [False, True])
def test_one_kernel_scores_and_chooses_as_two_passes_do(mask, metric, heads, size, equal):
    """Equal: of many blocks, whose scores are exact."""
    from gravity_hf.ops.sparse import selecting
    from gravity_hf.ops.sparse.triton.choosing import choose_blocks
    from gravity_hf.ops.sparse.visibility import visibility

    given, few = mask_of(mask, 70, 700), budget(4, **size)
    seen = visibility(70, 700, moved(given), None, None, torch.device(DEVICE))
    q, (_, k, _) = vectors(70)[0][:, :heads], vectors(70, 700)
    q, means = moved(q), block_means(moved(k), 4, seen.origin)
    if equal:
        q, means = q.round(), means.round()
    places = selecting._places(seen, few)
    whole = selecting._whole(seen, few, means.shape[2])
    actual = choose_blocks(q, means, seen, whole, few, metric, places)
    # What a GPU would be told otherwise: by sorting, on the CPU.
    seen = visibility(70, 700, given, None, None, torch.device("cpu"))
    expected = selecting._chosen_blocks(q.cpu(), means.cpu(), few, metric, seen)
    expected = torch.nn.functional.pad(expected, (0, places - expected.shape[3]), value=-1)
    assert bool((expected >= 0).any()) == (few.chosen_blocks > 0) == (mask != "right")
    assert torch.equal(actual.cpu().sort().values, expected.sort().values)


def decoded(
    impl, score, keys, queries, block, kept=False, screen=None, dtype=torch.float32, **size
):
    q, _, _ = vectors(queries, dtype=dtype)
    _, k, v = vectors(2, keys, dtype=dtype)
    if impl == "reference":
        score, (q, k, v) = as_double(score), (x.double() for x in (q, k, v))
    options = {"screen": screen}
    if kept:
        options["means"] = block_means(k if screen is None else screen[1], block)
    options = {
        name: tuple(map(moved, x)) if isinstance(x, tuple) else moved(x)
        for name, x in options.items()
    }
    with torch.no_grad():
        return sparse_attention(
            *map(moved, (q, k, v)), score=moved(score), budget=budget(block, **size), impl=impl,
            **options,
        ).cpu()  # fmt: skip


@pytest.mark.parametrize(
    ("score", "keys", "queries", "block", "kept", "size"),
    [
        ("dot", 150, 1, 8, False, {}),
        ("dot", 151, 3, 8, True, {}),
        ("power", 150, 1, 4, True, {}),
        ("force", 133, 2, 8, False, {"sinks": 0}),
        ("lifted", 150, 16, 16, True, {"sinks": 7}),
        # A window longer than a tile of keys, and no room for a block.
        ("dot", 150, 1, 8, False, {"top_k": 100, "window": 90, "sinks": 4}),
        ("power", 90, 1, 32, False, {"top_k": 40, "window": 38, "sinks": 2}),
        # Blocks that begin among the sinks and end in the window.
        ("dot", 60, 1, 3, True, {"top_k": 40, "window": 8, "sinks": 4}),
    ],
)
def test_a_fused_step_is_the_definition(score, keys, queries, block, kept, size):
    score = score_of(score)
    exact = decoded("reference", score, keys, queries, block, **size)
    peer = decoded("gathered", score, keys, queries, block, kept, **size)
    actual = decoded("fused", score, keys, queries, block, kept, **size)
    assert_within_budget("fused", actual, exact, peer, factor=3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_step_keeps_the_dtype(dtype):
    actual = decoded("fused", score_of("dot"), 150, 1, 8, dtype=dtype)
    exact = decoded("reference", score_of("dot"), 150, 1, 8, dtype=dtype)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kept", [False, True])
def test_a_fused_step_chooses_by_the_screening(kept):
    g = torch.Generator().manual_seed(4)
    screen = tuple(torch.randn(2, heads, n, 5, generator=g) for heads, n in ((4, 1), (2, 150)))
    exact = decoded(
        "reference", score_of("dot"), 150, 1, 8, screen=tuple(map(torch.Tensor.double, screen))
    )
    actual = decoded("fused", score_of("dot"), 150, 1, 8, kept, screen)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual, decoded("fused", score_of("dot"), 150, 1, 8, kept))


def test_of_equal_blocks_a_fused_step_takes_the_later_ones():
    q, k, v = (moved(x) for x in vectors(1, 96))
    k[:, :, :64] = k[:, :, :1]
    chosen = budget(8, top_k=30, window=8, sinks=2)
    outputs = [
        sparse_attention(q, k, v, score=score_of("dot"), budget=chosen, impl=impl)
        for impl in ("fused", "masked")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(2, 150, dtype=torch.bool)}, "causality as its only mask"),
        ({"origin": torch.zeros(1, dtype=torch.long)}, "causality as its only mask"),
        ({"dropout_p": 0.5}, "causality as its only mask"),
        ({"queries": 17}, "at most 16 queries"),
        ({"keys": 41, "queries": 2}, "queries that all see more than 40 keys"),
        ({"grad": True}, "no gradient"),
    ],
)
def test_what_no_fused_step_serves_is_refused(changes, message):
    keys, queries = changes.pop("keys", 150), changes.pop("queries", 1)
    q, _, _ = vectors(queries)
    _, k, v = vectors(2, keys)
    q, k, v = (moved(x).requires_grad_(changes.get("grad", False)) for x in (q, k, v))
    options = {name: moved(x) for name, x in changes.items() if name != "grad"}
    with pytest.raises(ValueError, match=f"impl='fused': expected {message}"):
        sparse_attention(q, k, v, score=score_of("dot"), budget=budget(), impl="fused", **options)


def test_the_fused_step_is_given_on_a_gpu_alone(monkeypatch):
    from gravity_hf.ops.sparse import attention

    asked = []

    def watched(*call):
        asked.append(call)
        return triton_fused_attention(*call)

    monkeypatch.setattr(attention, "triton_fused_attention", watched)
    actual = decoded("auto", score_of("power"), 150, 1, 8)
    assert len(asked) == (DEVICE == "cuda")
    exact = decoded("reference", score_of("power"), 150, 1, 8)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-3, atol=1e-4)
