"""Second moments of what linear maps get as inputs, while a model runs: sums, no stored inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..ops.precision import exact_products
from .modes import in_evaluation

# Which tokens of a batch are real, `[B, T]` bool, for a module; None: all of them.
RealTokens = Callable[[Mapping[str, Any], str], Tensor | None]


class InputMoments:
    """`E[x x^T]` over the tokens that reach each of some modules; sums in float64.

    Maps that are given the same tensor one after another, as queries, keys and values are, or gate
    and up, are summed once. Inside `with` every call of the modules counts:

        with InputMoments(modules) as moments:
            moments.real_tokens = lambda name: attention_mask.bool()
            model(**batch)
        moments["model.layers.0.self_attn.q_proj"]      # [in, in], float64

    A module costs `8 in^2` bytes, on the device of its inputs.

    Args:
        modules: by name, called with `x` `[..., in]` as their first argument.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        # `[B, T]` bool of the batch being run, for a module: padding teaches nothing. None: all
        # tokens count.
        self.real_tokens: Callable[[str], Tensor | None] = lambda name: None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._leaders: dict[str, str] = {}
        self._last: _Given | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> InputMoments:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

    def __getitem__(self, name: str) -> Tensor:
        """`[in, in]`, float64. KeyError for a module that was not called, or got padding only."""
        leader = self._leaders[name]
        return self._sums[leader] / self._counts[leader]

    def __contains__(self, name: str) -> bool:
        return self._counts.get(self._leaders.get(name, ""), 0) > 0

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.modules if name in self)

    def tokens(self, name: str) -> int:
        """How many tokens the module got that were no padding."""
        return self._counts.get(self._leaders.get(name, ""), 0)

    @property
    def unseen(self) -> tuple[str, ...]:
        """The modules that nothing has reached."""
        return tuple(name for name in self.modules if name not in self)

    @property
    def sums(self) -> int:
        """How many sums are kept: fewer than modules where inputs are shared."""
        return len(self._sums)

    def _hook(self, name: str) -> Any:
        def look(_: nn.Module, given: tuple[Any, ...]) -> None:
            self._see(name, given[0].detach())

        return look

    def _see(self, name: str, x: Tensor) -> None:
        shared = self._last.leader if self._last is not None and self._last.was(x) else None
        leader = self._leaders.setdefault(name, shared or name)
        if leader != name:
            if shared != leader:
                raise ValueError(
                    f"{name}: expected the inputs of {leader}, which it shared before, got others. "
                    "Measure the two apart"
                )
            return
        self._last = _Given(x, x._version, name)
        rows = self._rows(x, self.real_tokens(name))
        with exact_products(rows.device):
            moment = (rows.mT @ rows).double()
        if name in self._sums:
            self._sums[name] += moment
        else:
            self._sums[name] = moment
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    @staticmethod
    def _rows(x: Tensor, real: Tensor | None) -> Tensor:
        """The inputs of real tokens `[n, in]`, in float32 or float64."""
        rows = x.reshape(-1, x.shape[-1])
        # What an expert gets are some of the tokens, in an order of its own: all of them count.
        if real is not None and real.numel() == len(rows):
            rows = rows[real.reshape(-1).to(rows.device)]
        return rows if rows.dtype == torch.float64 else rows.float()


def measure_inputs(
    caller: str,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Any]],
    *,
    real_tokens: RealTokens,
    device: torch.device | None = None,
    progress: bool | None = None,
) -> InputMoments:
    """One pass of `model` over `batches`, in evaluation and without gradients.

    Args:
        caller: the function that errors and the bar name.
        model: called with each batch as keywords.
        modules: of the model, by name.
        batches: model inputs by name.
        real_tokens: which tokens are no padding.
        device: where the inputs go; None: where they are.
        progress: True or False; None shows a bar on terminals only.

    Raises:
        ValueError: no batches, or a module that none of them reached.
    """
    if not batches:
        raise ValueError(f"{caller}: expected at least one batch of model inputs, got none")
    hidden = None if progress is None else not progress
    with InputMoments(modules) as moments, in_evaluation(model), torch.no_grad():
        for batch in tqdm(batches, desc=f"{caller}: inputs", unit="batch", disable=hidden):
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            moments.real_tokens = functools.partial(real_tokens, inputs)
            model(**inputs)
    if moments.unseen:
        raise ValueError(
            f"{caller}: expected batches that reach every map, {len(moments.unseen)} of "
            f"{len(modules)} saw no token, such as {moments.unseen[0]}. Pass inputs that exercise "
            "it too, or leave it out"
        )
    return moments


def mask_of(inputs: Mapping[str, Any], _: str = "") -> Tensor | None:
    """`attention_mask` `[B, T]` as bool: which tokens of a decoder or an encoder are no padding."""
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


class _Given(NamedTuple):
    """An input, and the module that was given it first. `version` is that of then: tensors of one
    memory share the count of changes in place, which goes on."""

    x: Tensor
    version: int
    leader: str

    def was(self, x: Tensor) -> bool:
        """Whether `x` is this input, with the same values."""
        return (
            x.data_ptr() == self.x.data_ptr()
            and x.shape == self.x.shape
            and x.stride() == self.x.stride()
            and x.dtype == self.x.dtype
            and x._version == self.version
        )
