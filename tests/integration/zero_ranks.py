"""What test_zero.py runs in two processes under DeepSpeed: `torchrun ... THIS FOLDER`.

Separate from parallel_ranks.py because DeepSpeed changes torch for the whole process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from hosts import logits
from integration import parallel_ranks as cases

from gravity_hf import gravity_param_groups, load_gravity_model


def main(folder):
    # A C++ extension that only speeds up communication; compiling it takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    model = load_gravity_model(folder / "gravity").train()
    optimizer = torch.optim.SGD(gravity_param_groups(model, cases.RATE))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": cases.BATCH // 2,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # 1.0 unless said
        },
    )
    seen = cases.masses_in_forward(model)
    outputs = {"logits": logits(engine, cases.inputs_of())}
    cases.leave(folder, "logits.safetensors", outputs)
    local = [len(module.mass_log) for module in cases.gravity_children(model)]
    loss = cases.loss_of(engine, cases.half(cases.inputs_of()))
    engine.backward(loss)
    found = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
    cases.leave(folder, "gradients.safetensors", found)
    engine.step()
    stepped = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            stepped[name] = parameter.detach().clone()
    cases.leave(folder, "stepped.safetensors", stepped)
    if dist.get_rank() == 0:
        results = {"local_masses": local, "masses_in_forward": [len(mass) for mass in seen]}
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
