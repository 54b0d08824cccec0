"""What test_parallel.py runs in two processes: `torchrun --nproc_per_node 2 THIS FOLDER`.

FOLDER holds the models that the tests have saved, by name. Every case leaves tensors beside them;
the tests compare these with one process. The functions at the top run in one process, too.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import transformers
from hosts import logits, tiny_host, tiny_inputs
from packaging.version import Version
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gravity_hf import calibrate, gravity_param_groups, load_gravity_model, patch_with_gravity
from gravity_hf.layers.parameters import GravityParameters
from gravity_hf.training.distributed import save_whole, shard_gravity, whole_state_dict

# Older ones put parameters of two dtypes into one FSDP2 group, which torch refuses.
SHARDS_TWO_DTYPES = Version(transformers.__version__) >= Version("5.24")
TIME_LIMIT = 240  # seconds; a collective that one process never joins would wait for ever
BATCH, RATE = 4, 0.01
# Name of the model -> family, granularity of its masses, heads that one of two processes has.
SPLIT = {
    "query_head": ("qwen2", 3),
    "kv_head": ("qwen2", 3),
    "layer": ("qwen2", 3),
    # Its plan gathers heads before attention.
    "gathered": ("phi3", 6),
}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def inputs_of(family="qwen2"):
    return tiny_inputs(family, batch=BATCH)


def loss_of(model, inputs):
    return model(**inputs, labels=inputs["input_ids"]).loss


def gradients(model):
    """Whole gradients by name; collective where they are sharded."""
    return {
        name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None
    }


def step(model):
    """One step of gradient descent, masses with a rate of their own."""
    torch.optim.SGD(gravity_param_groups(model, RATE), foreach=False).step()


def stepped(model, inputs):
    """Gradients of one process on the whole batch, and its state after one step."""
    loss_of(model.train(), inputs).backward()
    found = gradients(model)
    step(model)
    return found, model.state_dict()


def run_in_two(script, folder):
    """Run `script` with `folder` in two processes; the `results.json` that it leaves there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_addr", "127.0.0.1", "--master_port", str(port), str(script), str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads((folder / "results.json").read_text())


def whole(tensor):
    return getattr(tensor, "full_tensor", lambda: tensor)()


def half(inputs):
    rows = BATCH // 2
    start = dist.get_rank() * rows
    return {name: value[start : start + rows] for name, value in inputs.items()}


def gravity_children(model):
    return [module for module in model.modules() if isinstance(module, GravityParameters)]


def masses_in_forward(model):
    """Fills with the masses that attention gets, once each gravity module is called."""
    seen = []
    for module in gravity_children(model):
        module.register_forward_hook(lambda _, __, terms: seen.append(terms.mass.detach().clone()))
    return seen


def leave(folder, name, tensors):
    if dist.get_rank() == 0:
        # A tied weight is one tensor under two names, which safetensors refuses.
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / name)


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def ddp_case(folder):
    model = DistributedDataParallel(load_gravity_model(folder / "kv_head").train())
    loss_of(model, half(inputs_of())).backward()
    found = gradients(model.module)
    leave(folder, "ddp-gradients.safetensors", found)
    step(model.module)
    leave(folder, "ddp-stepped.safetensors", whole_state_dict(model))
    masses = {name: value.tolist() for name, value in found.items() if ".gravity." in name}
    first, second = gathered(masses)
    return {"masses_agree": first == second}


def fsdp2_case(folder):
    """Weights in bfloat16, every parameter trained, masses in float32."""
    model = load_gravity_model(folder / "query_head", dtype=torch.bfloat16)
    shard_gravity(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    seen = masses_in_forward(model)
    outputs = {"logits": logits(model, inputs_of())}
    leave(folder, "fsdp2-logits.safetensors", outputs)
    leave(folder, "fsdp2-masses.safetensors", {str(i): mass for i, mass in enumerate(seen)})
    loss_of(model, half(inputs_of())).backward()
    leave(folder, "fsdp2-gradients.safetensors", gradients(model))
    step(model)
    state = whole_state_dict(model)
    leave(folder, "fsdp2-stepped.safetensors", state)
    save_whole(model, folder / "fsdp2")
    local = gravity_children(model)[0].mass_log
    return {"local_masses": gathered(local.to_local().numel()), "dtype": str(local.dtype)}


def transformers_fsdp_case(folder):
    """The same through `from_pretrained`, which shards while it loads."""
    model = load_gravity_model(
        folder / "query_head", dtype=torch.bfloat16, distributed_config={"fsdp_size": 2}
    )
    seen = masses_in_forward(model)
    leave(folder, "loaded-logits.safetensors", {"logits": logits(model, inputs_of())})
    local = gravity_children(model)[0].mass_log
    return {"placed": type(local).__name__, "dtypes": sorted({str(mass.dtype) for mass in seen})}


def split_case(folder, name):
    family, _ = SPLIT[name]
    model = load_gravity_model(folder / name, distributed_config={"tp_size": 2})
    seen = masses_in_forward(model)
    outputs = {"logits": logits(model, inputs_of(family))}
    heads = gathered([len(mass) for mass in seen])
    leave(folder, f"split-{name}-logits.safetensors", outputs)
    ids = model.generate(**inputs_of(family), **GREEDY)
    leave(folder, f"split-{name}-ids.safetensors", {"ids": ids})
    loss_of(model, inputs_of(family)).backward()
    leave(folder, f"split-{name}-gradients.safetensors", gradients(model))
    step(model)
    leave(folder, f"split-{name}-stepped.safetensors", whole_state_dict(model))
    model.save_pretrained(folder / f"split-{name}")
    own = [module.mass_log.detach().tolist() for module in gravity_children(model)]
    first, second = gathered(own)
    return {"heads": heads, "masses_agree": first == second}


def refusals(folder):
    """What two processes cannot do, and the message that says so."""
    options = {"distributed_config": {"tp_size": 2}}
    host = type(tiny_host("qwen2"))
    attempts = {
        "patch": lambda: patch_with_gravity(host.from_pretrained(folder / "host", **options)),
        "calibrate": lambda: calibrate(
            load_gravity_model(folder / "query_head", **options), [inputs_of()], progress=False
        ),
        "uneven": lambda: load_gravity_model(folder / "uneven", **options),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def main(folder):
    dist.init_process_group("gloo")
    results = {
        "ddp": ddp_case(folder),
        "fsdp2": fsdp2_case(folder),
        "transformers": transformers_fsdp_case(folder) if SHARDS_TWO_DTYPES else None,
        "split": {name: split_case(folder, name) for name in SPLIT},
        "refusals": refusals(folder),
    }
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
