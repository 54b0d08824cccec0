"""Launches are remembered by what they were compiled for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gravity_hf.ops.sparse.triton import launching  # noqa: E402


class Kernel:
    """Takes what a kernel takes, and remembers it."""

    arg_names = ("x", "y", "size", "WIDTH")

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda **given: self.calls.append((grid, given))


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.setattr(launching, "_LAUNCHES", {})


def started(kernel, dtype=torch.float32, y=None, size=3, width=4, grid=(2,), device="cpu"):
    x = torch.zeros(4, dtype=dtype, device=device)
    constants = {"WIDTH": width, "STRANGE": 1, "num_warps": 4}
    launching.start(kernel, grid, {"x": x, "y": y}, {"size": size, "other": 9}, constants)
    return x


def test_a_kernel_gets_what_it_knows_by_name():
    kernel = Kernel()
    x = started(kernel)
    ((grid, given),) = kernel.calls
    assert given.pop("x") is x and grid == (2, 1, 1)
    assert given == {"y": None, "size": 3, "WIDTH": 4, "num_warps": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"y": torch.zeros(1)},
        {"size": 4},
        {"width": 8},
        {"grid": (3,)},
        {"device": "meta"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_calls_that_differ_do_not_take_each_others_launch(change, monkeypatch):
    if "device" in change:
        # A launch asks for addresses, which a tensor without memory has not.
        monkeypatch.setattr(launching.Launch, "__call__", lambda self, **tensors: None)
    kernel = Kernel()
    started(kernel)
    started(kernel)
    assert len(launching._LAUNCHES) == 1
    started(kernel, **change)
    assert len(launching._LAUNCHES) == 2
