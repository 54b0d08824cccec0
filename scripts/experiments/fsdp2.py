"""Full training under FSDP2, through Trainer and accelerate, against one process: do losses agree?

    python scripts/experiments/fsdp2.py --out scripts/experiments/results/fsdp2.json

A byte-level Qwen2 is patched and calibrated; then all of it is trained, weights in bfloat16 (and in
float32, for the scale of rounding) beside masses in float32, on one GPU and sharded over two. The
losses agree if FSDP2 differs from one process by no more than twice what bfloat16 itself changes
there. LoRA, DDP and mixed precision: two_processes.py. `--device cpu` does the same on two CPU
processes over gloo, with a smaller model. The exit code is 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import two_processes as common
from transformers import TrainingArguments

from gravity_hf import GravityTrainer, load_gravity_model
from gravity_hf.layers.parameters import GravityParameters
from gravity_hf.training.conditions import run_conditions
from gravity_hf.training.distributed import whole_state_dict
from gravity_hf.training.files import write_json

RUNS = ("single-float32", "single-bfloat16", "fsdp2-float32", "fsdp2-bfloat16")
FACTOR = 2.0
# Two orders of the same float32 sums, over as many steps as we take.
FLOAT32_TOLERANCE = 1e-3


def main() -> None:
    options = parse()
    if options.worker:
        work_guarded(options)
        return
    started = time.time()
    work = Path(options.work or tempfile.mkdtemp(prefix="fsdp2_"))
    work.mkdir(parents=True, exist_ok=True)
    task = common.TASKS[options.device]
    report: dict[str, Any] = {
        "conditions": {
            **run_conditions(options.device),
            "accelerate": accelerate.__version__,
            "devices": torch.cuda.device_count() if options.device == "cuda" else 0,
            "backend": "nccl" if options.device == "cuda" else "gloo",
        },
        "settings": {
            **{name: getattr(options, name) for name in ("steps", "seed", "implementation")},
            **{"learning_rate": common.LEARNING_RATE, "gravity_scale": 30.0},
            **{"shape": common.SHAPES[options.device], **task},
            "parameters": common.make_base(options, work),
        },
        "runs": {},
    }
    for name in RUNS:
        process = common.start(options, name, work, Path(__file__))
        report["runs"][name] = common.finish(process, name, work, options.limit)
        common.say(f"{name}: {report['runs'][name].get('error', 'done')}")
        write_json(options.out, report)
    report["holds"] = verdict(report["runs"])
    report["seconds"] = round(time.time() - started, 1)
    write_json(options.out, report)
    common.say(json.dumps(report["holds"], indent=1))
    sys.exit(0 if all(entry["holds"] for entry in report["holds"].values()) else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of every run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation", default="auto", help="as in GravityConfig")
    parser.add_argument("--limit", type=float, default=150, help="seconds that one run may take")
    parser.add_argument("--work", help="folder for models; default: a temporary one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def verdict(runs: dict[str, Any]) -> dict[str, Any]:
    """What must hold, whether it does, and the numbers behind it."""
    failed = {name: run["error"] for name, run in runs.items() if "error" in run}
    found: dict[str, Any] = {"every run finished": {"holds": not failed, "failed": failed}}
    if failed:
        return found
    rounding = difference(runs, "single-bfloat16", "single-float32")
    bounds = {"bfloat16": FACTOR * rounding, "float32": FLOAT32_TOLERANCE}
    for precision, bound in bounds.items():
        apart = difference(runs, f"fsdp2-{precision}", f"single-{precision}")
        found[f"losses agree in {precision}"] = {
            "holds": apart <= bound,
            "largest_difference": apart,
            "allowed": bound,
        }
    for name, run in runs.items():
        first, last = run["losses"][0], run["losses"][-1]
        found[f"{name}: trained, float32 masses, whole on disk"] = {
            "holds": last < first
            and run["mass_dtypes"] == ["torch.float32"]
            and run["moved_masses"] == run["masses"]
            and run["saved_whole"],
            "losses": [first, last],
        }
    sharded = [run for name, run in runs.items() if name.startswith("fsdp2")]
    found["masses are sharded over the processes"] = {
        "holds": all(sum(run["local_masses"]) == run["masses"] for run in sharded),
        "local": [run["local_masses"] for run in sharded],
    }
    return found


def difference(runs: dict[str, Any], one: str, other: str) -> float:
    """The largest difference of losses, nats."""
    pairs = zip(runs[one]["losses"], runs[other]["losses"], strict=True)
    return max(abs(a - b) for a, b in pairs)


# ---- one run, in one process of its own or two ----


def work_guarded(options: argparse.Namespace) -> None:
    folder = Path(options.work) / options.worker
    try:
        train(options, folder)
    except Exception:
        rank = os.environ.get("RANK", "0")
        (folder / f"traceback-{rank}.txt").write_text(traceback.format_exc())
        raise


def train(options: argparse.Namespace, folder: Path) -> None:
    strategy, _, precision = options.worker.partition("-")
    on_cpu = options.device == "cpu"
    if on_cpu and strategy == "fsdp2":
        common.allow_fsdp2_on_cpu()
    base = Path(options.work) / "base"
    model = load_gravity_model(base, dtype=getattr(torch, precision)).train()
    start = {name: t.clone() for name, t in masses_of(model.state_dict()).items()}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        str(folder / "trainer"), max_steps=options.steps, learning_rate=common.LEARNING_RATE,
        per_device_train_batch_size=common.TASKS[options.device]["batch"] // processes,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=on_cpu,
        dataloader_num_workers=0, seed=options.seed,
        **common.strategy_arguments(strategy, on_cpu),
    )  # fmt: skip
    data = common.Windows(common.windows(options))
    trainer = GravityTrainer(model=model, args=arguments, train_dataset=data)
    dtypes = common.watch_masses(model)
    trained = trainer.train()
    trainer.save_model(str(folder / "final"))
    state = whole_state_dict(trainer.model)
    local = common.gathered(sum(local_size(p) for p in masses(trainer.model)), processes)
    memory = 0 if on_cpu else torch.cuda.max_memory_allocated()
    memory = common.gathered(memory, processes)
    if trainer.args.process_index == 0:
        after = masses_of(state)
        result = {
            "strategy": str(trainer.accelerator.distributed_type),
            "processes": processes,
            "device": str(trainer.args.device),
            "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
            "mass_dtypes": sorted(dtypes),
            "masses": sum(tensor.numel() for tensor in start.values()),
            "moved_masses": sum(int((after[n].cpu() != t).sum()) for n, t in start.items()),
            "local_masses": local,
            "saved_whole": is_whole(folder / "final", state),
            "train_seconds": trained.metrics["train_runtime"],
            "peak_memory_bytes": memory,
        }
        write_json(folder / "result.json", result)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def masses(model: torch.nn.Module) -> list[torch.Tensor]:
    modules = [module for module in model.modules() if isinstance(module, GravityParameters)]
    return [module.mass_log for module in modules]


def masses_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in state.items() if name.endswith("mass_log")}


def local_size(tensor: torch.Tensor) -> int:
    return getattr(tensor, "to_local", lambda: tensor)().numel()


def is_whole(folder: Path, live: dict[str, torch.Tensor]) -> bool:
    """Whether a user who loads the folder gets what was in the processes' memory, bit for bit."""
    loaded = load_gravity_model(folder, dtype="auto").state_dict()
    return loaded.keys() == live.keys() and all(
        torch.equal(loaded[name], tensor.cpu()) for name, tensor in live.items()
    )


if __name__ == "__main__":
    main()
