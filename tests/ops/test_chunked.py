"""The chunked implementation keeps the reference's numbers, in linear memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_within_budget
from ops.operator_cases import (
    FAMILIES,
    cast,
    make_inputs,
    padding_mask,
    run,
    values_and_gradients,
)
from torch.utils.checkpoint import checkpoint

from gravity_hf.ops import blocks
from gravity_hf.ops.chunked import augment, gravity_attention_chunked
from gravity_hf.ops.reference import gravity_attention_reference

ROOT = Path(__file__).resolve().parents[2]
LAW_AND_DISTANCE = [(law, lifted) for law in ("force", "power") for lifted in (False, True)]
MASKS = ("none", "bool", "float", "per_head_float", "keys", "queries", "left", "right")


def make_mask(kind: str, queries: int, keys: int, heads: int = 4, batch: int = 2):
    g = torch.Generator().manual_seed(5)
    if kind in ("left", "right"):
        return padding_mask(batch, keys, kind)
    if kind == "keys":
        return torch.randn(keys, generator=g).double()
    if kind == "queries":
        return torch.randn(1, heads, queries, 1, generator=g) > -0.5
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, keys, generator=g) > 0.3
        mask[0, :, queries // 2] = False
        return mask
    if kind in ("float", "per_head_float"):
        lead = (batch, heads) if kind == "per_head_float" else (1, 1)
        mask = torch.randn(*lead, queries, keys, generator=g).double()
        mask[mask > 1.5] = torch.finfo(torch.float64).min
        mask[0, 0, queries // 2] = -float("inf")
        return mask
    return None


@pytest.fixture(params=["one_block", "many_blocks"])
def block_size(request, monkeypatch):
    if request.param == "many_blocks":
        monkeypatch.setitem(blocks.ELEMENTS, "cpu", 24)
        monkeypatch.setitem(blocks.ROWS_MASKED, "cpu", 4)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("law", "lifted"), LAW_AND_DISTANCE)
def test_values_and_all_gradients_equal_the_reference(block_size, law, lifted, kind, causal):
    for queries, keys in ((9, 11), (11, 9)):
        inputs = make_inputs(
            queries=queries, keys=keys, value_width=5, lifted=lifted, token_masses=True, law=law
        )
        inputs["k"][:, :, 2] = inputs["q"][:, ::2, 3]
        options = {"law": law, "mask": make_mask(kind, queries, keys), "causal": causal}
        expected = values_and_gradients(gravity_attention_reference, inputs, **options)
        actual = values_and_gradients(gravity_attention_chunked, inputs, **options)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("law", "lifted"), LAW_AND_DISTANCE)
def test_decoding_equals_the_reference(law, lifted, queries):
    """Few queries and no gradient: keys are not augmented."""
    for kind, causal in itertools.product(("none", "bool", "left"), (False, True)):
        inputs = make_inputs(queries=queries, lifted=lifted, token_masses=True, law=law)
        options = {"law": law, "mask": make_mask(kind, queries, 11), "causal": causal}
        with torch.no_grad():
            expected = run(gravity_attention_reference, inputs, **options)
            actual = run(gravity_attention_chunked, inputs, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", ["force", "power"])
def test_gradcheck(law):
    inputs = make_inputs(batch=1, heads=2, key_heads=1, queries=3, keys=4, width=3, law=law)
    names = list(inputs)

    def function(*leaves):
        arguments = dict(zip(names, leaves, strict=True))
        return run(gravity_attention_chunked, arguments, law=law, causal=True)

    torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


def check_budgets(dtype, shape, *, seeds=8, **options):
    """Against float64 on the rounded inputs; the peer is the reference in the same dtype.

    The largest error of a gradient with 4 elements is a lottery, so several seeds are pooled.
    """
    truth, peer, actual = {}, {}, {}
    for seed in range(seeds):
        given = cast(make_inputs(**shape, law=options["law"], seed=seed), dtype)
        doubles = {name: x.double() for name, x in given.items()}
        for results, implementation, inputs in (
            (truth, gravity_attention_reference, doubles),
            (peer, gravity_attention_reference, given),
            (actual, gravity_attention_chunked, given),
        ):
            for name, value in values_and_gradients(implementation, inputs, **options).items():
                results.setdefault(name, []).append(value)
    for name, values in truth.items():
        factor = 2.0 if name == "output" else 3.0
        assert [x.dtype for x in actual[name]] == [x.dtype for x in peer[name]]
        assert_within_budget(
            name,
            torch.stack(actual[name]),
            torch.stack(values),
            torch.stack(peer[name]),
            factor=factor,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("law", "lifted"), LAW_AND_DISTANCE)
def test_error_budget_for_every_input_family(family, dtype, law, lifted):
    """F16: near and exact collisions are where the expanded distance loses digits."""
    shape = {"queries": 63, "keys": 63, "width": 64, "token_masses": True}
    check_budgets(dtype, {"family": family, "lifted": lifted, **shape}, law=law, causal=True)


def shapes(*rows):
    names = ("queries", "keys", "width", "heads", "key_heads")
    cases = [dict(zip(names, row, strict=True)) for row in rows]
    return pytest.mark.parametrize(
        "shape", cases, ids=["-".join(str(x) for x in case.values()) for case in cases]
    )


SOME_SHAPES = shapes(
    (1, 7, 32, 4, 1),
    (7, 1, 64, 4, 4),
    (63, 128, 80, 8, 8),
    (128, 63, 128, 8, 1),
    (128, 1000, 32, 4, 4),
    (1, 1000, 64, 8, 1),
    (1, 1, 128, 1, 1),
)
ALL_SHAPES = shapes(
    *(
        (queries, keys, width, heads, key_heads)
        for queries, keys in itertools.product((1, 7, 63, 128, 1000), repeat=2)
        for width in (32, 64, 80, 128)
        for heads, key_heads in ((1, 1), (4, 1), (8, 1), (4, 4), (8, 8))
    )
)


@SOME_SHAPES
@pytest.mark.parametrize("side", ["left", "right"])
def test_error_budget_for_shapes(shape, side):
    mask, causal = padding_mask(2, shape["keys"], side), shape["keys"] > 7
    for law in ("force", "power"):
        check_budgets(torch.float32, shape, law=law, mask=mask, causal=causal)


@pytest.mark.slow
@ALL_SHAPES
def test_error_budget_for_all_shapes(shape):
    for law, dtype in itertools.product(("force", "power"), (torch.float32, torch.bfloat16)):
        seeds = 32 if shape["queries"] * shape["keys"] < 20_000 else 8
        check_budgets(dtype, {**shape, "batch": 1}, seeds=seeds, law=law, causal=True)


def test_non_contiguous_inputs():
    inputs = make_inputs(queries=33, keys=40, width=8)
    strided = dict(inputs)
    strided["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["k"] = inputs["k"].transpose(2, 3).contiguous().transpose(2, 3)
    strided["v"] = torch.stack([inputs["v"], inputs["v"]], -1)[..., 0]
    assert not any(strided[name].is_contiguous() for name in "qkv")
    mask = make_mask("float", 40, 33).mT
    expected = values_and_gradients(gravity_attention_chunked, inputs, mask=mask.contiguous())
    actual = values_and_gradients(gravity_attention_chunked, strided, mask=mask)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(queries, keys):
    inputs = make_inputs(queries=queries, keys=keys)
    results = values_and_gradients(gravity_attention_chunked, inputs)
    assert results["output"].shape == (2, 4, queries, 6)
    assert all((x == 0).all() for x in results.values())


def test_hidden_keys_may_hold_anything():
    """Keys that the mask hides for a whole block are not even read."""
    inputs = make_inputs(queries=20, keys=20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    inputs["q"] = inputs["q"][:, :, :10]
    clean = run(gravity_attention_chunked, inputs, mask=mask[:10])
    inputs["k"][:, :, 10:] = float("nan")
    inputs["v"][:, :, 10:] = float("nan")
    assert torch.equal(run(gravity_attention_chunked, inputs, mask=mask[:10]), clean)


def test_nan_inputs_are_not_hidden():
    inputs = make_inputs()
    inputs["k"][0, 0, 0] = float("nan")
    output = run(gravity_attention_chunked, inputs, causal=True)
    assert output[0, :2].isnan().all()
    assert output[1].isfinite().all()


@pytest.mark.parametrize("law", ["force", "power"])
def test_opcheck(law):
    inputs = make_inputs(queries=5, keys=6, token_masses=True, law=law)
    query, key = augment(inputs["q"], inputs["k"], inputs["eps"], None)
    strength = inputs["mass"].square()[None, :, None]
    mask = torch.randn(1, 1, 5, 6).double()
    tensors = [query, key, inputs["v"], strength, inputs["eps"], inputs["key_mass"], mask]
    *leaves, key_mass, mask = (x.detach().requires_grad_() for x in tensors)
    operator, seed = torch.ops.gravity_hf.attention.default, torch.tensor([3])
    rules, flat = (None, False, None, 1.0, None), (None, 1.0, False)
    rest = (mask, None, None, law, True, *rules, 0.0, None, False, *flat)
    torch.library.opcheck(operator, (*leaves, None, key_mass, None, None, None, *rest))
    rest = (*[None] * 7, seed, law, False, *rules, 0.5, None, False, *flat)
    torch.library.opcheck(operator, (*leaves, *rest))
    sink = torch.randn(2, 4, 5).double().requires_grad_()
    rest = (*[None] * 4, sink, None, None, None, law, True, *rules, 0.0, 2.0, False, *flat)
    torch.library.opcheck(operator, (*leaves, *rest))


@pytest.mark.parametrize("queries", [1, 16])
def test_fullgraph_compile_equals_eager(queries):
    inputs = make_inputs(queries=queries, keys=16)
    mask = torch.randn(1, 1, queries, 16).double()

    def function(*tensors, **options):
        return gravity_attention_chunked(*tensors, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(function, inputs, mask=mask, causal=True)
    actual = values_and_gradients(compiled, inputs, mask=mask, causal=True)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, inputs), run(function, inputs))


def test_shapes_without_data():
    """Meta tensors: no memory is touched, so lengths beyond 2^31 scores cost nothing."""
    q = torch.empty(1, 2, 70_000, 8, device="meta", requires_grad=True)
    terms = {"mass": torch.empty(2, device="meta"), "eps": torch.empty(2, device="meta")}
    output = run(gravity_attention_chunked, {"q": q, "k": q, "v": q, **terms})
    assert output.shape == q.shape and output.is_meta
    output.sum().backward()
    assert q.grad.shape == q.shape


def test_dropout_drops_the_right_share_and_keeps_the_mean():
    inputs = make_inputs(batch=1, heads=1, key_heads=1, queries=400, keys=500)
    inputs["v"] = torch.eye(500).double()[None, None]
    weights = run(gravity_attention_chunked, inputs)
    dropped = run(gravity_attention_chunked, inputs, dropout_p=0.25)
    zero = dropped == 0
    assert abs(zero.double().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 200_000) ** 0.5
    torch.testing.assert_close(dropped[~zero], weights[~zero] / 0.75)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_dropout_backward_uses_the_mask_of_the_forward(block_size, causal):
    """With v = identity the output is the dropped weights, and dL/dv follows from them."""
    inputs = make_inputs(batch=1, heads=2, key_heads=1, queries=6, keys=6, width=3)
    inputs["v"] = torch.eye(6).double()[None, None]
    torch.manual_seed(3)
    results = values_and_gradients(gravity_attention_chunked, inputs, dropout_p=0.5, causal=causal)
    direction = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(7)).double()
    expected = (results["output"].mT @ direction).sum(1, keepdim=True)
    torch.testing.assert_close(results["v"], expected)
    names = ["q", "k", "mass", "eps"]

    def function(*leaves):
        torch.manual_seed(3)
        arguments = {**inputs, **dict(zip(names, leaves, strict=True))}
        return run(gravity_attention_chunked, arguments, dropout_p=0.5, causal=causal)

    torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


def test_dropout_follows_manual_seed_and_checkpointing():
    inputs = make_inputs()

    def seeded(function, **arguments):
        torch.manual_seed(11)
        return values_and_gradients(function, inputs, **arguments)

    def checkpointed(*tensors, **options):
        call = gravity_attention_chunked
        return checkpoint(call, *tensors, use_reentrant=False, **options)

    first = seeded(gravity_attention_chunked, dropout_p=0.4)
    for again in (
        seeded(gravity_attention_chunked, dropout_p=0.4),
        seeded(checkpointed, dropout_p=0.4),
    ):
        for name, value in first.items():
            assert torch.equal(again[name], value), name
    other = values_and_gradients(gravity_attention_chunked, inputs, dropout_p=0.4)
    assert not torch.equal(other["output"], first["output"])


def test_autocast_leaves_the_distance_in_float32():
    """F16: under autocast a plain product would be rounded to bfloat16."""
    inputs = cast(make_inputs(family="near", queries=40, keys=40, width=64), torch.float32)
    expected = values_and_gradients(gravity_attention_chunked, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = values_and_gradients(gravity_attention_chunked, inputs)
        with torch.no_grad():
            decoded = run(gravity_attention_chunked, {**inputs, "q": inputs["q"][:, :, :1]})
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    torch.testing.assert_close(decoded, expected["output"][:, :, :1])


def test_precision_settings_are_ieee_inside_and_restored_outside():
    """F16: TF32 products would ruin the distance. The settings exist without a GPU."""
    from gravity_hf.ops.precision import exact_products

    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
            with exact_products(torch.device("cpu")):
                pass
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_second_derivatives_are_refused():
    inputs = make_inputs()
    inputs["q"].requires_grad_()
    output = run(gravity_attention_chunked, inputs)
    gradient = torch.autograd.grad(output.sum(), inputs["q"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivatives only. Use impl='reference'"):
        gradient.sum().backward()


MEMORY = """
import torch
from pathlib import Path
from gravity_hf.ops import gravity_attention
torch.set_num_threads(1)
def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
def extra(impl, length, backward):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kib("VmRSS")
    q, k, v = (torch.randn(1, 1, length, 64, requires_grad=backward) for _ in range(3))
    out = gravity_attention(q, k, v, torch.ones(1), eps=0.1, impl=impl)
    if backward:
        out.sum().backward()
    return kib("VmHWM") - before
def peaks(impl, length):
    extra(impl, 64, True)
    return [extra(impl, length, backward) for backward in (False, True)]
print(*peaks("chunked", 8192), *peaks("reference", 4096))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of resident memory")
def test_peak_memory_at_length_8192_is_under_an_eighth_of_the_reference():
    """Forward, then forward and backward, in a fresh process. The reference is measured at half the
    length, where its scores of all pairs are a quarter."""
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    forward, backward, *reference = (int(x) for x in done.stdout.split())
    for mode, ours, half in zip(
        ("forward", "backward"), (forward, backward), reference, strict=True
    ):
        assert 0 < ours < 4 * half / 8, f"{mode}: {ours} KiB, reference {half} KiB at half of it"


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("law", "lifted"), LAW_AND_DISTANCE)
def test_values_and_all_gradients_on_a_gpu(law, lifted, kind, causal):
    """There, mask values are not read to choose the keys."""
    inputs = make_inputs(queries=11, keys=9, lifted=lifted, token_masses=True, law=law)
    mask = make_mask(kind, 11, 9)
    on_gpu = {name: x.cuda() for name, x in inputs.items()}
    gpu_mask = None if mask is None else mask.cuda()
    options = {"law": law, "causal": causal}
    expected = values_and_gradients(gravity_attention_reference, inputs, mask=mask, **options)
    actual = values_and_gradients(gravity_attention_chunked, on_gpu, mask=gpu_mask, **options)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].cpu(), value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_no_tf32_on_a_gpu_whatever_the_process_allows(setting):
    """F16: TF32 products change near-collision scores by more than their size."""
    inputs = make_inputs(family="near", queries=100, keys=100, width=64)
    inputs["eps"] = torch.full((4,), 0.01).double()
    exact = run(gravity_attention_reference, inputs)
    given = {name: x.float().cuda() for name, x in inputs.items()}
    torch.set_float32_matmul_precision(setting)
    try:
        actual = run(gravity_attention_chunked, given)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (actual.cpu() - exact).abs().max() < 1e-5
