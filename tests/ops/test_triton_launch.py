"""Launches that are remembered: the same arguments, and the same compiled kernel, as triton's own
way finds; and no two calls that differ take each other's."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ops.triton_cases import DEVICE, require_kernels

require_kernels()

import triton.compiler.compiler as compiler  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import jit  # noqa: E402

from gravity_hf.ops.triton import attention as operator  # noqa: E402
from gravity_hf.ops.triton import problem as problems  # noqa: E402
from gravity_hf.ops.triton.launch import LIMIT, Launch, remembered  # noqa: E402
from gravity_hf.ops.triton.problem import Problem, vectors  # noqa: E402

# Triton's interpreter leaves parts of the language changed in a process that has used it.
FRESH = "GRAVITY_HF_FRESH_PROCESS"
fresh_only = pytest.mark.skipif(FRESH not in os.environ, reason="runs in a process of its own")


def doubled(x, y, desc, size, scale, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0) * scale
    if TWICE:
        value += desc.load([0, 0]).reshape(BLOCK)
    tl.store(y + at, value, mask=at < size)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What reaches the driver of a machine that has no GPU: grid and arguments of every launch."""
    found = []

    class Launcher:
        def __init__(self, source, metadata):
            pass

        def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            found.append(((x, y, z), function, arguments))

    functions = iter(range(1, 100))
    active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=Launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *_: ("a module", next(functions), 0, 0, 1024),
        ),
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for module in (jit, compiler):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    return found


def test_launches_are_those_of_triton_in_a_process_of_its_own():
    name = f"{__file__}::{test_a_launch_starts_what_triton_would_start.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    child = subprocess.run(
        command, env={**os.environ, FRESH: "1"}, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0 and "1 passed" in child.stdout, child.stdout


@fresh_only
def test_a_launch_starts_what_triton_would_start(started):
    kernel = jit.JITFunction(doubled)
    numbers = {"size": 48, "scale": 2.0, "BLOCK": 32, "TWICE": True, "num_warps": 4}
    launch = Launch(kernel, (2,), **numbers)
    memory = torch.zeros(3, 64)
    for offset in (0, 0, 1, 1, 0, 16):  # floats: 1 is no multiple of 16 bytes
        x = memory[0, offset : offset + 48]
        tensors = {"y": memory[1], "x": x, "desc": vectors(memory, 32)}
        launch(**tensors)
        kernel[(2,)](**tensors, **numbers)
        (grid, function, own), (_, expected, usual) = started[-2:]
        assert grid == (2, 1, 1)
        assert function == expected
        assert len(own) == len(usual) == len(kernel.arg_names)
        assert all(a is b or a == b for a, b in zip(own[3:], usual[3:], strict=True))
        assert [a.data_ptr() for a in own[:2]] == [x.data_ptr(), memory[1].data_ptr()]
        assert own[2].base is memory
    assert len({function for _, function, _ in started}) == 2
    for compiled in kernel.device_caches[0][0].values():
        compiled.module = None  # there is nothing to unload


def problem(**changes):
    def rand(*shape):
        return torch.rand(shape, device=DEVICE)

    tensors = dict.fromkeys([field.name for field in dataclasses.fields(Problem)[:15]])
    tensors |= {"q": rand(2, 4, 8, 16), "k": rand(2, 4, 8, 16), "v": rand(2, 4, 8, 16)}
    tensors |= {"strength": rand(4), "eps": rand(4)}
    options = {"law": "force", "causal": True, "window": 0, "exclude_self": False}
    options |= {"repulsive": False, "cutoff": "none", "width": 1.0, "max_force": float("inf")}
    return Problem(**{**tensors, **options, "dropout_p": 0.0, **changes})


def test_no_two_calls_that_differ_have_one_form(monkeypatch):
    monkeypatch.setattr(problems, "_FORMS", {})
    per_token, ranges = torch.rand(2, 4, 8), torch.zeros(2, 8, 2, dtype=torch.int32)
    transposed = torch.rand(2, 8, 4, 16).transpose(1, 2)
    changes = [
        {},
        {"q": transposed},
        {"k": transposed},
        {"v": transposed},
        {"q": torch.rand(1, 4, 8, 16).expand(2, 4, 8, 16)},
        {"q": None, "k": None, "table": torch.rand(2, 8, 8)},
        {"q": None, "k": None, "table": torch.rand(1, 8, 8)},
        {"v": torch.rand(2, 4, 8, 16).bfloat16()},
        {"key_radius_sq": torch.rand(4)},
        {"query_mass": per_token},
        {"key_term": per_token},
        {"key_term": per_token, "law": "power"},
        {"head_bias": torch.rand(4)},
        {"radius": torch.rand(4), "cutoff": "soft"},
        {"radius": torch.rand(4), "cutoff": "hard"},
        {"sink": per_token},
        {"mask": torch.rand(8, 8) > 0.5},
        {"mask": torch.rand(8, 8)},
        {"mask": torch.rand(8, 8).t()},
        {"mask": torch.rand(8, 8).bfloat16()},
        {"key_ranges": ranges},
        {"key_ranges": ranges[:1]},
        {"causal": False},
        {"window": 3},
        {"exclude_self": True},
        {"repulsive": True},
        {"width": 2.0},
        {"max_force": 4.0},
        {"max_force": 4.0, "cap": "smooth"},
        {"dropout_p": 0.1},
        {"kappa": 0.5},
        {"kappa": 0.5, "horizon": 2.0},
    ]
    # The second round finds the forms of the first.
    for call in [problem(**change) for change in changes] * 2:
        assert dataclasses.replace(call.form, launches={}) == call._form()
    assert len(problems._FORMS) == len(changes)


def test_a_second_call_makes_no_launch(monkeypatch):
    made = []
    first = Launch.__init__

    def watched(self, *arguments, **fixed):
        made.append(self)
        first(self, *arguments, **fixed)

    monkeypatch.setattr(Launch, "__init__", watched)
    monkeypatch.setattr(problems, "_FORMS", {})
    for _ in range(2):
        q, k, v = (torch.rand(1, 2, 8, 16, device=DEVICE, requires_grad=True) for _ in range(3))
        mass, eps = torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE)
        out = operator.gravity_attention_triton(q, k, v, mass, eps=eps, law="power", causal=True)
        out.sum().backward()
        # Norms, forward, gradients of queries, of keys: the norms were kept.
        assert len(made) == 4


def test_what_is_remembered_has_a_limit():
    store = {}
    for key in range(LIMIT + 2):
        assert remembered(store, key, lambda key=key: [key]) == [key]
        assert len(store) <= LIMIT
    assert remembered(store, LIMIT + 1, list) == [LIMIT + 1]
