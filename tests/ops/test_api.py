"""What `gravity_attention` accepts, refuses and chooses."""

import inspect
import subprocess
import sys
import types

import pytest
import torch
from ops.operator_cases import cast, make_inputs, run

from gravity_hf.ops import api, gravity_attention
from gravity_hf.ops.curvature import Curvature
from gravity_hf.ops.cutoff import Cutoff

CURVED = Curvature(0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mass": torch.ones(4).int()}, "mass: expected a floating dtype, got torch.int32"),
        ({"eps": torch.ones(4, device="meta")}, "eps: expected the device of v, cpu, got meta"),
        ({"law": "newton"}, "law: expected one of .*'force', 'power'.*, got newton"),
        ({"impl": "magic"}, "impl: expected one of .*, got magic"),
        ({"dropout_p": 1.0}, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
        ({"eps": 0.0}, r"eps: expected a positive number or \[H\], got 0.0"),
        ({"eps": -1}, r"eps: expected a positive number or \[H\], got -1"),
        ({"eps": None}, r"eps: expected a positive number or \[H\], got None"),
        ({"eps": torch.ones(3)}, r"eps: expected a number or \[H\] = \[4\], got \(3,\)"),
        ({"k": None}, "k: expected a tensor .*, got None: give q and k, or inverse_distance"),
        ({"q": torch.ones(2, 3)}, r"q: expected 4 dimensions .*, got \(2, 3\)"),
        ({"k": torch.ones(2, 2, 11, 6).int()}, "k: expected a floating dtype, got torch.int32"),
        ({"v": torch.ones(2, 2, 11, 6)}, "v: expected the dtype of q, torch.float64"),
        ({"k": torch.ones(2, 3, 11, 6).double()}, r"k: expected \[2, a divisor of 4, Tk, 6\]"),
        ({"v": torch.ones(2, 2, 10, 6).double()}, r"v: expected \[2, 2, 11, Dv\]"),
        ({"mass": torch.ones(2).double()}, r"mass: expected \[4\], got \(2,\)"),
        ({"key_radius_sq": torch.ones(4)}, r"key_radius_sq: expected \[2\], got \(4,\)"),
        ({"query_mass": torch.ones(2, 4, 8)}, r"query_mass: expected \[B, H, Tq\], got"),
        ({"query_mass": torch.ones(2, 4, 9), "law": "power"}, "query_mass: expected law='force'"),
        ({"key_mass": torch.ones(2, 2, 11)}, r"key_mass: expected \[B, H, Tk\], got"),
        ({"mask": torch.ones(9, 11).int()}, "mask: expected bool .* or float"),
        ({"mask": torch.ones(9, 10)}, r"mask: expected broadcastable to \(2, 4, 9, 11\), got"),
        ({"mask": torch.ones(1, 1, 1, 9, 11)}, "mask: expected broadcastable to"),
        ({"head_bias": torch.ones(2)}, r"head_bias: expected \[4\], got \(2,\)"),
        ({"head_bias": torch.ones(4), "law": "power"}, "head_bias: expected law='force'"),
        ({"repulsive": True, "law": "power"}, "repulsive: expected law='force'"),
        ({"max_force": 1.0, "law": "power"}, "max_force: expected law='force'"),
        ({"max_force": float("inf")}, "max_force: expected a finite number, got inf"),
        ({"cutoff": 4.0}, "cutoff: expected a gravity_hf.ops.cutoff.Cutoff, got 4.0"),
        ({"cutoff": Cutoff(torch.ones(2), "log")}, r"cutoff.radius: expected \[4\], got \(2,\)"),
        ({"cutoff": Cutoff(torch.ones(4), "soft"), "law": "power"}, "cutoff: expected kind 'hard'"),
        ({"softcap": 0}, "softcap: expected a finite number > 0, or None, got 0"),
        ({"softcap": float("inf")}, "softcap: expected a finite number > 0, or None, got inf"),
        ({"softcap": True}, "softcap: expected a finite number > 0, or None, got True"),
        ({"sinks": 1.0}, r"sinks: expected a tensor \[H\] or \[B, H, Tq\], got 1.0"),
        ({"sinks": torch.ones(4).int()}, "sinks: expected a floating dtype, got torch.int32"),
        ({"sinks": torch.ones(2)}, r"sinks: expected \[4\] or \[2, 4, 9\], got \(2,\)"),
        ({"sinks": torch.ones(4, 9)}, r"sinks: expected \[4\] or \[2, 4, 9\], got \(4, 9\)"),
        ({"window": 0}, "window: expected a number of keys, an integer >= 1, got 0"),
        ({"window": 2.0}, "window: expected a number of keys, an integer >= 1, got 2.0"),
        ({"key_ranges": torch.ones(2, 9, 2)}, r"key_ranges: expected int32 \[1 or 2, 1 or 9, 2\]"),
        ({"key_ranges": torch.ones(2, 8, 2).int()}, r"key_ranges: expected .*got .*\(2, 8, 2\)"),
        ({"cu_seqlens": torch.ones(3)}, "cu_seqlens: expected int32"),
        ({"cu_seqlens": torch.ones(3).int()}, "cu_seqlens: expected B = 1 and Tq = Tk"),
        (
            {"cu_seqlens": torch.ones(3).int(), "key_ranges": torch.ones(1, 1, 2).int()},
            "cu_seqlens: expected no key_ranges beside it",
        ),
        ({"eps": -1, "curvature": CURVED}, r"eps: expected a number >= 0 or \[H\], got -1"),
        ({"curvature": 0.15}, "curvature: expected a gravity_hf.ops.curvature.Curvature, got 0.15"),
        (
            {"curvature": CURVED, "key_radius_sq": torch.ones(2)},
            "key_radius_sq: expected None beside curvature",
        ),
        (
            {"curvature": CURVED, "cutoff": Cutoff(torch.ones(4), "log")},
            "cutoff: expected None beside curvature",
        ),
        ({"force_cap": "hard"}, r"force_cap: expected one of \['clamp', 'tanh'\], got hard"),
        (
            {"force_cap": "tanh", "max_force": 0.0},
            "max_force: expected a number > 0 beside force_cap='tanh', got 0.0",
        ),
        ({"inverse_distance": torch.ones(9, 11)}, "q: expected None beside inverse_distance"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_what_was_expected_and_what_came(changes, message):
    with pytest.raises(ValueError, match="^gravity_attention: " + message):
        run(gravity_attention, {**make_inputs(), **changes})


@pytest.mark.parametrize("host_term", [{"softcap": 5.0}, {"sinks": torch.ones(4).double()}])
@pytest.mark.parametrize(
    "other",
    [
        {"query_mass": torch.ones(2, 4, 9)},
        {"key_mass": torch.ones(2, 4, 11)},
        {"head_bias": torch.ones(4)},
        {"repulsive": True},
        {"cutoff": Cutoff(torch.ones(4), "log")},
        {"curvature": CURVED},
        {"max_force": 1.0},
        {"exclude_self": True},
        {"inverse_distance": torch.ones(9, 11), "q": None, "k": None, "eps": None},
    ],
    ids="-".join,
)
def test_terms_of_patched_hosts_refuse_the_other_terms(other, host_term):
    name, other_name = next(iter(host_term)), next(iter(other))
    message = rf"^gravity_attention: {name}: expected none of .*, got \['{other_name}'\]: leave"
    with pytest.raises(ValueError, match=message):
        run(gravity_attention, {**make_inputs(), **host_term, **other})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0.1}, "eps: expected None beside inverse_distance"),
        ({"key_radius_sq": torch.ones(2)}, "key_radius_sq: expected None beside inverse_distance"),
        ({"cutoff": Cutoff(torch.ones(4), "log")}, "cutoff: expected None beside"),
        ({"curvature": CURVED}, "curvature: expected None beside inverse_distance"),
        ({"inverse_distance": torch.ones(2, 4, 9, 11)}, r"inverse_distance: .* \(2, 4, 9, 11\)"),
        ({"inverse_distance": torch.ones(3, 1, 9, 11)}, r"inverse_distance: .*or \[2, 1, Tq, 11\]"),
        ({"inverse_distance": torch.ones(9, 10)}, r"inverse_distance: expected a floating"),
        ({"inverse_distance": torch.ones(9, 11).int()}, r"inverse_distance: expected a floating"),
        ({"mass": torch.ones(3)}, r"mass: expected \[H\], H a multiple of v's 2 heads"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_with_a_table(changes, message):
    with pytest.raises(ValueError, match="^gravity_attention: " + message):
        run(gravity_attention, {**make_inputs(table=True), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sharp"}, r"Cutoff.kind: expected one of \['hard', 'soft', 'log'\], got 'sharp'"),
        ({"width": 0}, "Cutoff.width: expected a finite number > 0, got 0"),
        ({"width": float("nan")}, "Cutoff.width: expected a finite number > 0, got nan"),
        ({"radius": 4.0}, r"Cutoff.radius: expected a floating tensor \[H\], .*, got float"),
        ({"radius": torch.ones(1, 4)}, r"Cutoff.radius: .*, got torch.float32 \(1, 4\)"),
        ({"radius": torch.ones(4).int()}, r"Cutoff.radius: .*, got torch.int32 \(4,\)"),
    ],
    ids=["kind", "zero", "nan", "number", "shape", "dtype"],
)
def test_refusals_of_a_cutoff(changes, message):
    with pytest.raises(ValueError, match=message):
        Cutoff(**{"radius": torch.ones(4), "kind": "hard", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kappa": float("inf")}, "Curvature.kappa: expected a finite number, got inf"),
        ({"kappa": torch.ones(1)}, "Curvature.kappa: expected a finite number, got tensor"),
        ({"horizon": 0.0}, "Curvature.horizon: expected a finite number > 0, got 0.0"),
        ({"horizon": True}, "Curvature.horizon: expected a finite number > 0, got True"),
    ],
    ids=["inf", "tensor", "zero", "bool"],
)
def test_refusals_of_a_curvature(changes, message):
    with pytest.raises(ValueError, match=message):
        Curvature(**{"kappa": 0.15, **changes})


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_packed_documents_equal_the_documents_alone(impl):
    lengths = (3, 1, 5)
    inputs = make_inputs(batch=1, queries=9, keys=9, token_masses=True)
    options = {"impl": impl, "window": 3, "causal": True}
    cu_seqlens = torch.tensor([0, 3, 4, 9]).int()
    packed = run(gravity_attention, inputs, cu_seqlens=cu_seqlens, **options)
    alone = []
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        per_token = ("q", "k", "v", "query_mass", "key_mass")
        document = {
            name: x[:, :, start : start + length] if name in per_token else x
            for name, x in inputs.items()
        }
        alone.append(run(gravity_attention, document, **options))
    torch.testing.assert_close(packed, torch.cat(alone, 2))


def test_eps_may_be_a_number_an_integer_or_a_tensor():
    inputs = make_inputs()
    inputs["eps"] = torch.ones(4).double()
    expected = run(gravity_attention, inputs)
    for eps in (1, 1.0):
        assert torch.equal(run(gravity_attention, {**inputs, "eps": eps}), expected)


@pytest.fixture
def triton(monkeypatch):
    """The kernels' package as the chooser sees it; `triton.problem` is why it cannot serve."""
    package = types.ModuleType("gravity_hf.ops.triton")
    package.problem = None
    package.triton_refusal = lambda device, dtype, mask, width, softcap, vectors: (
        package.problem if softcap is None else "of its softcap"
    )
    package.gravity_attention_triton = lambda q, k, v, mass, **options: v
    monkeypatch.setitem(sys.modules, "gravity_hf.ops.triton", package)
    return package


@pytest.mark.parametrize("impl", ["reference", "chunked", "flex", "triton"])
def test_a_named_implementation_is_the_only_one_called(impl, triton, monkeypatch):
    called = []

    def refuse(name):
        def stand_in(*args, **options):
            called.append(name)
            raise ValueError(name)

        return stand_in

    for name in ("reference", "chunked", "flex"):
        monkeypatch.setattr(api, f"gravity_attention_{name}", refuse(name))
    monkeypatch.setattr(triton, "gravity_attention_triton", refuse("triton"))
    with pytest.raises(ValueError, match=impl):
        run(gravity_attention, make_inputs(), impl=impl)
    assert called == [impl]


def test_every_implementation_takes_the_same_arguments():
    """api.py hands on what it was given, by these names."""
    known = [
        {name: x.default for name, x in inspect.signature(function).parameters.items()}
        for function in (
            api.gravity_attention_reference,
            api.gravity_attention_chunked,
            api.gravity_attention_flex,
            gravity_attention,
        )
    ]
    whole = {name: x for name, x in known[-1].items() if name not in ("cu_seqlens", "impl")}
    assert known[:-1] == [whole] * 3


def test_a_refusal_of_a_named_implementation_reaches_the_caller(triton):
    with pytest.raises(ValueError, match="impl='flex' expects float32"):
        run(gravity_attention, make_inputs(), impl="flex")
    triton.problem = "it is raining"
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve this call: it is raining\."):
        run(gravity_attention, make_inputs(), impl="triton")


class _Cuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU: the choice depends on nothing else of the device."""

    device = torch.device("cuda")


def choose(dtype=torch.bfloat16, *, gpu=True, length=2, leaf=False, **options):
    q = torch.ones(1, 1, length, 4, dtype=dtype)
    q = q.as_subclass(_Cuda) if gpu else q
    mass = torch.ones(1, requires_grad=leaf)
    options = {"mask": None, "dropout_p": 0.0, "softcap": None, **options}
    return api.choose_implementation(q, q, q, mass, options)


def test_auto_chooses_triton_for_whatever_it_can_serve_on_a_gpu(triton):
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert choose() == "triton"
    assert choose(torch.float32) == "chunked"  # faster there than kernels without tensor cores
    assert choose(leaf=True, mask=mask, dropout_p=0.1, window=3, repulsive=True) == "triton"
    assert choose(sinks=torch.ones(1)) == "triton"
    assert choose(softcap=30.0) == "chunked"  # which neither triton nor flex has
    assert choose(length=0) == "chunked"
    assert choose(gpu=False) == "chunked"


def test_auto_without_triton_chooses_flex_only_for_plain_inference_on_a_gpu(triton, monkeypatch):
    triton.problem = "triton is not installed"
    assert choose() == "flex"
    assert choose(gpu=False) == "chunked"
    assert choose(torch.float32) == "chunked"
    assert choose(torch.float64) == "chunked"
    assert choose(mask=torch.ones(2, 2, dtype=torch.bool)) == "chunked"
    assert choose(dropout_p=0.1) == "chunked"
    assert choose(exclude_self=True) == "chunked"
    assert choose(window=3) == "chunked"
    assert choose(sinks=torch.ones(1)) == "chunked"
    assert choose(leaf=True) == "chunked"
    with torch.no_grad():
        assert choose(leaf=True) == "flex"
    assert choose(length=0) == "chunked"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose() == "chunked"


def test_the_choice_is_explained(triton):
    assert api.explain_implementation("cpu", torch.float32) == (
        "chunked",
        "the device is cpu, and triton and flex are for CUDA",
    )
    name, reason = api.explain_implementation("cuda:0", torch.bfloat16)
    assert (name, reason) == ("triton", "CUDA, torch.bfloat16, and triton is importable")
    triton.problem = "triton is not installed"
    name, reason = api.explain_implementation(torch.device("cuda"), torch.float16)
    assert name == "flex"
    assert reason.startswith("triton cannot serve: triton is not installed; chunked where")
    name, reason = api.explain_implementation("cuda", torch.float32)
    assert name == "chunked"
    assert "faster than triton and flex" in reason


def test_on_a_cpu_auto_does_not_import_triton():
    code = (
        "import sys, torch\n"
        "from gravity_hf.ops import gravity_attention\n"
        "q = torch.ones(1, 1, 2, 4)\n"
        "gravity_attention(q, q, q, torch.ones(1), eps=0.1)\n"
        "assert 'triton' not in sys.modules and 'gravity_hf.ops.triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_has_the_dtype_and_shape_of_the_values(dtype):
    output = run(gravity_attention, cast(make_inputs(value_width=3), dtype))
    assert output.dtype == dtype
    assert output.shape == (2, 4, 9, 3)
