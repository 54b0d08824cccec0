"""What the distributed tests run in two processes: `torchrun --nproc_per_node 2 THIS FOLDER`.

Every case leaves files under FOLDER; the tests compare them with one process. The functions at the
top run in one process, too: they are the other side of the comparison.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from accelerate.state import AcceleratorState, DistributedType, PartialState
from hosts import tiny_host, tiny_inputs
from packaging.version import Version
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import TrainingArguments

from gravity_hf import (
    GravityConfig,
    GravityTrainer,
    calibrate,
    gravity_lora,
    gravity_param_groups,
    patch_with_gravity,
)
from gravity_hf.layers.parameters import GravityParameters
from gravity_hf.training.distributed import save_whole, shard_gravity, whole_state_dict

STEPS, BATCH, RATE = 4, 4, 1e-3
# Older ones restore the optimizer to the device `cpu:0`, which torch does not know.
RESUMES_DDP_ON_CPU = Version(transformers.__version__) >= Version("5.24")


def base(mass_per="query_head"):
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(mass_per=mass_per))
    calibrate(model, [tiny_inputs("qwen2")], progress=False)
    return model


def adapted(mass_per="query_head"):
    torch.manual_seed(0)
    return gravity_lora(base(mass_per), r=4).train()


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS * BATCH

    def __getitem__(self, index):
        ids = tiny_inputs("qwen2", batch=1, seed=index)["input_ids"][0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainer(model, folder, processes=1, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH // processes,
        learning_rate=RATE, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        save_steps=STEPS // 2, weight_decay=0.1, **options,
    )  # fmt: skip
    return GravityTrainer(model=model, args=arguments, train_dataset=Dataset())


def train(model, folder, processes=1, resume=None, **options):
    """Train, save to `folder/final`; losses, the last optimizer group, dtypes of masses in use."""
    run = trainer(model, folder, processes, **options)
    dtypes = watch_masses(model)
    run.train(resume_from_checkpoint=resume)
    run.save_model(str(folder / "final"))
    gravity = run.optimizer.param_groups[-1]
    return {
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "gravity_rate": gravity["initial_lr"],
        "gravity_parameters": fewest(len({id(p) for p in gravity["params"]})),
        "strategy": str(run.accelerator.distributed_type).rpartition(".")[-1],
        "mass_dtypes": sorted(dtypes),
    }


def fewest(count):
    """The smallest of every process's count."""
    if not dist.is_initialized():
        return count
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return min(counts)


def watch_masses(model):
    seen = set()
    for module in model.modules():
        if isinstance(module, GravityParameters):
            module.register_forward_hook(lambda _, __, terms: seen.add(str(terms.mass.dtype)))
    return seen


def loss_of(model, inputs):
    return model(**inputs, labels=inputs["input_ids"]).loss


def half(inputs):
    rows = BATCH // 2
    start = dist.get_rank() * rows
    return {name: value[start : start + rows] for name, value in inputs.items()}


def sharded(model, policy=None):
    shard_gravity(model)
    options = {} if policy is None else {"mp_policy": policy}
    for module in model.modules():
        if type(module).__name__ == "Qwen2DecoderLayer":
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def gradients(model):
    """Whole gradients by name; collective under FSDP2."""
    return {
        name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def steps(model, optimizer, first, last, share=lambda inputs: inputs):
    for seed in range(first, last):
        optimizer.zero_grad()
        loss_of(model, share(tiny_inputs("qwen2", batch=BATCH, seed=seed))).backward()
        optimizer.step()


def bfloat16_case(folder):
    """One backward pass under a bfloat16 policy: gradients, and the masses that forward saw."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(adapted(), policy)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, GravityParameters):
            module.register_forward_hook(
                lambda _, __, terms, name=name: seen.update({name: terms.mass.detach().clone()})
            )
    loss_of(model, half(tiny_inputs("qwen2", batch=BATCH))).backward()
    found = gradients(model)
    if dist.get_rank() == 0:
        save_file(seen, folder / "bfloat16-masses.safetensors")
        save_file(found, folder / "bfloat16-gradients.safetensors")


def checkpoint_case(folder):
    """Train with torch's own loop, checkpoint half-way with DCP; `again` goes on from there."""

    def fresh():
        model = sharded(adapted())
        return model, torch.optim.AdamW(gravity_param_groups(model, RATE))

    model, optimizer = fresh()
    steps(model, optimizer, 0, 2, half)
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")
    steps(model, optimizer, 2, 4, half)
    save_whole(model, folder / "raw")
    again, optimizer = fresh()
    state, optimizer_state = get_state_dict(again, optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")
    set_state_dict(again, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    steps(again, optimizer, 2, 4, half)
    save_whole(again, folder / "raw-resumed")
    whole = whole_state_dict(model)
    if dist.get_rank() == 0:
        save_file(
            {k: v.contiguous() for k, v in whole.items() if "modules_to_save" in k},
            folder / "raw-masses.safetensors",
        )


def refusals(folder):
    """Messages of the settings that would round or lose masses, and of a wrong order."""
    model = adapted()
    settings = {
        "ram": {"cpu_ram_efficient_loading": True},
        "checkpointing": {"activation_checkpointing": True},
    }
    messages = {}
    for name, setting in settings.items():
        try:
            trainer(model, folder / name, 2, fsdp=True, fsdp_config={"version": 2, **setting})
        except ValueError as error:
            messages[name] = str(error)
    fully_shard(model)
    try:
        shard_gravity(model)
    except RuntimeError as error:
        messages["order"] = str(error)
    return messages


def allow_fsdp2_on_cpu():
    """accelerate knows FSDP2 on accelerators only and takes CPU processes for DDP without a word;
    its code for FSDP2 runs here all the same once its state says so."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        fresh = "fsdp_plugin" not in AcceleratorState._shared_state
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def main(folder):
    results = {}
    results["ddp"] = train(adapted(), folder / "ddp", 2)
    half_way = str(folder / "ddp" / f"checkpoint-{STEPS // 2}")
    if RESUMES_DDP_ON_CPU:
        results["ddp-resumed"] = train(adapted(), folder / "ddp-resumed", 2, half_way)
    allow_fsdp2_on_cpu()
    # One mass for each layer: fewer than processes, so some shards are empty.
    options = {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }
    results["fsdp2"] = train(adapted("layer"), folder / "fsdp2", 2, **options)
    half_way = str(folder / "fsdp2" / f"checkpoint-{STEPS // 2}")
    results["fsdp2-resumed"] = train(
        adapted("layer"), folder / "fsdp2-resumed", 2, half_way, **options
    )
    bfloat16_case(folder)
    checkpoint_case(folder)
    save_whole(sharded(base()), folder / "whole")
    results["refusals"] = refusals(folder)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
