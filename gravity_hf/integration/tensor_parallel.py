"""Tensor parallelism: every process attends with its own heads, and with their masses.

transformers' plans split the projections of an attention module over processes by heads. Masses,
softenings and key radii are a handful of numbers, so every process keeps all of them, and hands its
attention those of its own heads; gradients are summed over the processes, which then agree on every
number. Nothing has to be gathered to save a model, whatever a mass is shared by.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, autograd, nn
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

from ..layers.parameters import GravityParameters, GravityTerms
from .sites import AttentionSite

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STYLE = "gravity_heads"


def plan_heads(model: PreTrainedModel, sites: Iterable[AttentionSite]) -> None:
    """Add gravity modules to the tensor-parallel plan of `model`, where its attention is split.

    A plan whose output projection takes its input split, `rowwise`, leaves the heads split; any
    other gathers them before attention, and then each process needs all masses.
    """
    plan = model._tp_plan or {}
    for site in sites:
        name = replace_layer_number_by_wildcard(site.name)
        inside = (style for key, style in plan.items() if key.startswith(f"{name}."))
        if "rowwise" in inside:
            plan[f"{name}.gravity"] = STYLE


def refuse_split(model: nn.Module, what: str) -> None:
    """Raise RuntimeError if transformers has split `model` by tensor parallelism: a process then
    sees its own heads, and statistics of the others would be missing."""
    processes = getattr(model, "_tp_size", None) or 1
    if processes > 1:
        raise RuntimeError(
            f"{what}: expected a whole model, got one split over {processes} processes by tensor "
            "parallelism. Patch and calibrate in one process, save_pretrained, then load with "
            f"distributed_config={{'tp_size': {processes}}}"
        )


class GravityHeads(TensorParallelLayer):
    """The style of a gravity module in a tensor-parallel plan: its terms become those of the
    process's own heads."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _refuse_uneven(module, mesh.size())
        rank, size, group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

        # A hook, not another `forward`: peft copies the module, and the copy's hook gets the copy.
        def keep_own_heads(_: nn.Module, __: Any, terms: GravityTerms) -> GravityTerms:
            mass, softening, radius = terms
            return GravityTerms(
                _part(mass, rank, size, group),
                _part(softening, rank, size, group),
                None if radius is None else _part(radius, rank, size, group),
            )

        module.register_forward_hook(keep_own_heads)
        return module


class _SumGradients(autograd.Function):
    """The same number in every process, used by each for its own heads."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _part(whole: Tensor, rank: int, size: int, group: Any) -> Tensor:
    return _SumGradients.apply(whole, group).chunk(size)[rank]


def _refuse_uneven(module: nn.Module, processes: int) -> None:
    if not isinstance(module, GravityParameters):
        raise TypeError(
            f"tensor-parallel style {STYLE!r}: expected a gravity module, got "
            f"{type(module).__name__}. Name only `gravity` children in the plan"
        )
    for field in ("query_heads", "key_value_heads"):
        heads = getattr(module, field)
        if heads % processes:
            raise ValueError(
                f"tensor parallelism: {field}: expected a multiple of tp_size {processes}, got "
                f"{heads}. Choose a tp_size that divides the heads"
            )


ALL_PARALLEL_STYLES.register(STYLE, GravityHeads())
