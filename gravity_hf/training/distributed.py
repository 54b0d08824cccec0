"""Gravity over several processes: masses stay float32 and whole.

DDP needs nothing: parameters of two dtypes are fine there, and autocast leaves masses alone. FSDP2
casts every parameter of a group to the policy's dtype, and refuses a group of two dtypes; a mass in
bfloat16 is off by 0.4 %, which is a change of temperature. So each gravity module is a group of its
own here, with a policy of its own: float32, whatever happens to the weights around it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from ..layers.parameters import GravityParameters

if TYPE_CHECKING:
    from accelerate import Accelerator

_FLOAT32 = MixedPrecisionPolicy(
    param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
)


def shard_gravity(
    model: nn.Module, mesh: DeviceMesh | None = None, *, offload_policy: OffloadPolicy | None = None
) -> None:
    """Make each gravity module a float32 FSDP2 group; comes before `fully_shard` on anything else.

    The order is: load, patch, calibrate, LoRA, `shard_gravity`, `fully_shard` layer by layer and on
    the model, optimizer. `GravityTrainer` does this by itself.

    Args:
        model: patched, with or without LoRA. Every copy of a gravity module counts, those of
            inactive adapters too. Calling it twice changes nothing.
        mesh: as in `fully_shard`, and the same one as for the layers; None takes all processes.
        offload_policy: as in `fully_shard`, and the same one as for the layers.

    Raises:
        ValueError: the model has no gravity modules.
        RuntimeError: a module that contains gravity modules is sharded already.
    """
    modules = _gravity_copies(model)
    if not modules:
        raise ValueError(
            f"shard_gravity: expected a patched model, got {type(model).__name__} without gravity "
            "modules. Call patch_with_gravity(model) first"
        )
    unsharded = [module for module in modules if not isinstance(module, FSDPModule)]
    _refuse_sharded_parents(model, unsharded)
    for module in unsharded:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=_FLOAT32,
            offload_policy=OffloadPolicy() if offload_policy is None else offload_policy,
        )


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model under DDP, FSDP2 or neither, in full and on the CPU, on rank 0; an
    empty dict on the other ranks. All ranks must call it."""
    model = _unwrapped(model)
    if not _is_distributed():
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    # Whole and offloaded together mean rank 0 only: the others would hold copies for nothing.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return state if dist.get_rank() == 0 else {}


def save_whole(model: nn.Module, folder: str | os.PathLike, **kwargs: Any) -> None:
    """`save_pretrained` of a model under DDP, FSDP2 or neither: whole tensors, masses in float32.

    All ranks must call it; rank 0 writes and the others wait. `load_gravity_model(folder)` reads it
    back in one process.

    Args:
        model: patched, or the LoRA model over it (then the adapter and its masses are written).
        folder: where to; on rank 0's disk.
        **kwargs: for `save_pretrained`.
    """
    state = whole_state_dict(model)
    try:
        if not _is_distributed() or dist.get_rank() == 0:
            _unwrapped(model).save_pretrained(folder, state_dict=state, **kwargs)
    finally:
        # A failure on rank 0 must not leave the others waiting.
        if _is_distributed():
            dist.barrier()


def check_strategy(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse the ways of sharding that would round the masses of a patched model, or lose them.

    Raises:
        ValueError: DeepSpeed, FSDP1, or FSDP2 with `cpu_ram_efficient_loading` or, under LoRA, with
            FSDP's own activation checkpointing.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        raise ValueError(
            "GravityTrainer: expected one process, DDP or FSDP2, got DeepSpeed, which casts masses "
            "with the weights (0.4 % off in bfloat16). Launch with an FSDP config, fsdp_version: 2"
        )
    if accelerator.distributed_type != "FSDP":
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"GravityTrainer: fsdp_version: expected 2, got {plugin.fsdp_version!r}, which puts "
            "masses and weights into one buffer and casts it. Set fsdp_version: 2"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "GravityTrainer: fsdp_cpu_ram_efficient_loading: expected false, got true: only rank 0 "
            "would hold weights to patch and calibrate, and accelerate cannot hand out the key "
            "radii, a buffer. Set fsdp_cpu_ram_efficient_loading: false"
        )
    if plugin.activation_checkpointing and hasattr(model, "peft_config"):
        raise ValueError(
            "GravityTrainer: fsdp_activation_checkpointing: expected false under LoRA, got true: "
            "it renames the layers, and peft would not find the masses when it saves. Set it to "
            "false and pass gradient_checkpointing=True"
        )


def fsdp2_options(accelerator: Accelerator) -> dict[str, Any] | None:
    """Arguments of `shard_gravity` that match what accelerate will shard the layers with; None
    where it will not shard."""
    if not accelerator.is_fsdp2:
        return None
    mesh = accelerator.torch_device_mesh
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    return {"mesh": mesh, "offload_policy": accelerator.state.fsdp_plugin.cpu_offload}


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether FSDP2 is in force and its checkpoints are one file for each process."""
    if not accelerator.is_fsdp2:
        return False
    return "FULL_STATE_DICT" not in str(accelerator.state.fsdp_plugin.state_dict_type)


def _gravity_copies(model: nn.Module) -> list[GravityParameters]:
    return [module for module in model.modules() if isinstance(module, GravityParameters)]


def _refuse_sharded_parents(model: nn.Module, unsharded: list[GravityParameters]) -> None:
    wanted = set(unsharded)
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule) and not wanted.isdisjoint(module.modules()):
            raise RuntimeError(
                f"shard_gravity: expected gravity modules before anything around them, got "
                f"{name or type(module).__name__!r} sharded already, masses included. The order "
                "is: patch, calibrate, LoRA, shard_gravity, then fully_shard"
            )


def _unwrapped(model: nn.Module) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
