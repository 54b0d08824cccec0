"""Starts of kernels that a layer makes again and again with the same shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...triton.launch import Launch, remembered

_LAUNCHES: dict[Any, Launch] = {}


def start(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Mapping[str, Tensor | None],
    numbers: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    """`kernel[grid](...)` by the names of its arguments, remembered by all that is no tensor, by
    the dtypes of what is, and by their device, which a compiled kernel belongs to. Numbers and
    constants that the kernel does not know are left out."""
    given = {name: x for name, x in tensors.items() if x is not None}
    dtypes = tuple([None if x is None else x.dtype for x in tensors.values()])
    device = next(iter(given.values())).device
    key = (kernel, grid, device, dtypes, *numbers.values(), *constants.values())

    def make() -> Launch:
        nothing = dict.fromkeys(tensors.keys() - given.keys())
        known = {*kernel.arg_names, "num_warps"}
        fixed = {name: x for name, x in (numbers | constants).items() if name in known}
        return Launch(kernel, grid, **nothing, **fixed)

    remembered(_LAUNCHES, key, make)(**given)
