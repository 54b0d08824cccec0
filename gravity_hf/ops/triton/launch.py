"""Launches that have done once what calls of the same form share.

Binding ninety arguments and asking each what a kernel is to be specialised for takes the host
longer than a small kernel takes the device. A compiled kernel takes its arguments in order instead,
`compiled[grid](*arguments)`: from the second call of a form on, that is what happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from triton.tools.tensor_descriptor import TensorDescriptor

# Forms and launches that are remembered; of more than these all are made again.
LIMIT = 512

Made = TypeVar("Made")


class Launch:
    """A kernel with the grid, numbers and compile-time arguments of all calls of one form.

    The caller answers for the form: dtypes, and every number, are the same in all calls. Beside
    those a kernel is compiled for which addresses are multiples of 16 bytes; of these each pattern
    has a kernel of its own. In the interpreter, which compiles nothing, arguments go by name.
    """

    __slots__ = ("_compiled", "_fixed", "_grid", "_kernel")

    def __init__(self, kernel: Any, grid: tuple[int, ...], **fixed: Any) -> None:
        self._kernel, self._fixed = kernel, fixed
        self._grid = (*grid, *(1,) * (3 - len(grid)))
        self._compiled: dict[tuple[int, ...], tuple[Any, list[Any], list[int]]] = {}

    def __call__(self, **tensors: Any) -> None:
        """Starts the kernel. `tensors`, named in the same order in every call: tensors, and
        descriptions of tensors."""
        pattern = tuple(
            [0 if type(x) is TensorDescriptor else x.data_ptr() & 15 for x in tensors.values()]
        )
        known = self._compiled.get(pattern)
        if known is None:
            self._first(pattern, tensors)
            return
        start, ordered, places = known
        arguments = ordered.copy()
        for place, tensor in zip(places, tensors.values(), strict=True):
            arguments[place] = tensor
        start(*arguments)

    def _first(self, pattern: tuple[int, ...], tensors: dict[str, Any]) -> None:
        compiled = self._kernel[self._grid](**tensors, **self._fixed)
        if compiled is None:
            return
        names = self._kernel.arg_names
        ordered = [self._fixed.get(name) for name in names]
        places = [names.index(name) for name in tensors]
        self._compiled[pattern] = compiled[self._grid], ordered, places


def remembered(store: dict[Any, Made], key: Hashable, make: Callable[[], Made]) -> Made:
    """`store[key]`, made where it is not there yet; at most LIMIT of them."""
    found = store.get(key)
    if found is None:
        if len(store) >= LIMIT:
            store.clear()
        found = store[key] = make()
    return found
