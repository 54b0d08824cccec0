"""What governed training cannot be combined with, said before anything is changed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments


def check_training(args: TrainingArguments, model: nn.Module, *, is_routed: bool = False) -> None:
    """Raise ValueError for arguments under which groups could not be governed."""
    if getattr(args, "fp16", False):
        raise _refused(
            "fp16=False",
            "fp16=True",
            "its loss scaler leaves steps out after gradients were read. Use bf16=True or float32",
        )
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise _refused(
            "one process or DDP",
            f"fsdp={args.fsdp!r}, deepspeed={args.deepspeed!r}",
            "shards have no gradients of single groups. Train with DDP",
        )
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise _refused(
            "whole parameters", "sharded ones", "norms of groups would be of this shard alone"
        )
    if args.world_size > 1 and not _finds_unused(args):
        raise _refused(
            "ddp_find_unused_parameters=True",
            f"{args.ddp_find_unused_parameters!r}",
            "DDP would wait for the gradients of frozen groups",
        )
    if is_routed and args.torch_compile:
        raise _refused(
            "no router or torch_compile=False",
            "both",
            "which groups learn is decided within the forward, which is compiled before",
        )
    if _reentrant(model):
        raise _refused(
            "gradient_checkpointing_kwargs={'use_reentrant': False}",
            "reentrant checkpointing",
            "it drops the gradients of a layer whose inputs need none, as behind frozen embeddings",
        )


def _finds_unused(args: TrainingArguments) -> bool:
    asked = args.ddp_find_unused_parameters
    # What Trainer does where nothing is said.
    return not _checkpointing(args) if asked is None else asked


def _reentrant(model: nn.Module) -> bool:
    """Trainer turns checkpointing on before training begins."""
    return any(
        getattr(module, "gradient_checkpointing", False)
        and _checkpoint_kwargs(module).get("use_reentrant", False)
        for module in model.modules()
    )


def _checkpointing(args: TrainingArguments) -> bool:
    names = ("gradient_checkpointing", "activation_checkpointing")
    return any(bool(getattr(args, name, False)) for name in names)


def _checkpoint_kwargs(module: nn.Module) -> dict[str, Any]:
    """What transformers has bound to the function that recomputes a layer."""
    bound = getattr(module, "_gradient_checkpointing_func", None)
    return dict(getattr(bound, "keywords", None) or {})


def _refused(expected: str, got: str, reason: str) -> ValueError:
    return ValueError(f"GovernedTraining: expected {expected}, got {got}: {reason}")
