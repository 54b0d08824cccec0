"""Does training in two processes equal training in one? One command, all ways, one JSON file.

    python scripts/experiments/two_processes.py --out scripts/experiments/results/two_processes.json

A byte-level Qwen2 is patched, calibrated and put under LoRA, then trained through GravityTrainer on
the same batches: in one process, under DDP and under FSDP2, each in float32, in mixed precision
(float32 weights, bfloat16 arithmetic) and with bfloat16 weights (masses float32 throughout). Every
run is a process of its own: one that fails leaves its error in the file, and the rest goes on.
`--device cpu` does the same on two CPU processes, with a smaller model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments  # noqa: E402

from gravity_hf import (  # noqa: E402
    GravityConfig,
    GravityTrainer,
    calibrate,
    gravity_lora,
    load_gravity_model,
    patch_with_gravity,
)
from gravity_hf.layers.parameters import GravityParameters  # noqa: E402
from gravity_hf.training.conditions import run_conditions  # noqa: E402
from gravity_hf.training.corpus import load_corpus, random_windows  # noqa: E402
from gravity_hf.training.distributed import whole_state_dict  # noqa: E402

STRATEGIES = ("single", "ddp", "fsdp2")
PRECISIONS = ("float32", "mixed", "bfloat16")
ADAPTER = "adapter_model.safetensors"
SHAPES = {
    "cuda": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "cpu": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
}
TASKS = {"cuda": {"batch": 32, "length": 256}, "cpu": {"batch": 8, "length": 64}}
BATCH_OF_CALIBRATION = 8
LEARNING_RATE = 1e-3


def main() -> None:
    options = parse()
    if options.worker:
        work_guarded(options)
        return
    started = time.time()
    work = Path(options.work or tempfile.mkdtemp(prefix="two_processes_"))
    work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "conditions": {
            **run_conditions(options.device),
            "accelerate": accelerate.__version__,
            "peft": peft.__version__,
            "devices": torch.cuda.device_count() if options.device == "cuda" else 0,
        },
        "settings": {
            **{name: getattr(options, name) for name in ("steps", "seed", "implementation")},
            **{"learning_rate": LEARNING_RATE, "gravity_scale": 30.0, "lora_r": 8},
            **{"shape": SHAPES[options.device], **TASKS[options.device]},
        },
        "runs": {},
    }
    report["settings"]["parameters"] = make_base(options, work)
    for group in launch_order(options):
        processes = {name: start(options, name, work) for name in group}
        for name, process in processes.items():
            report["runs"][name] = finish(process, name, work, options.limit)
            say(f"{name}: {report['runs'][name].get('error', 'done')}")
            write(options.out, report)
    for name, run in report["runs"].items():
        try:
            run.update(compare(name, run, report["runs"], work))
        except Exception as error:
            run["comparison_error"] = f"{type(error).__name__}: {error}"
    report["seconds"] = round(time.time() - started, 1)
    write(options.out, report)
    say(table(report["runs"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of every run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation", default="chunked", help="as in GravityConfig")
    parser.add_argument("--limit", type=float, default=120, help="seconds that one run may take")
    parser.add_argument("--only", nargs="*", help="names of runs, such as ddp-float32")
    parser.add_argument("--work", help="folder for models and adapters; default: a temporary one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def launch_order(options: argparse.Namespace) -> list[list[str]]:
    """Runs that go together; single processes share the GPUs, nothing shares the CPU."""
    names = [f"{s}-{p}" for p in PRECISIONS for s in STRATEGIES]
    names = [name for name in names if not options.only or name in options.only]
    alone = [name for name in names if name.startswith("single")]
    rest = [[name] for name in names if name not in alone]
    return ([alone] if options.device == "cuda" else [[name] for name in alone]) + rest


def make_base(options: argparse.Namespace, work: Path) -> int:
    """Save the patched, calibrated model that every run starts from; its number of parameters."""
    torch.manual_seed(options.seed)
    shape = SHAPES[options.device]
    config = Qwen2Config(
        vocab_size=256, max_position_embeddings=512, initializer_range=0.05,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0, **shape,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    patch_with_gravity(model, GravityConfig(implementation=options.implementation))
    calibrate(model, [{"input_ids": windows(options)[:BATCH_OF_CALIBRATION]}], progress=False)
    model.save_pretrained(work / "base")
    return sum(parameter.numel() for parameter in model.parameters())


def windows(options: argparse.Namespace) -> torch.Tensor:
    task = TASKS[options.device]
    corpus = load_corpus(None, 2_000_000, 200_000)
    generator = torch.Generator().manual_seed(options.seed)
    return random_windows(corpus.train, options.steps * task["batch"], task["length"], generator)


# ---- one run, in one process of its own or two ----


def start(
    options: argparse.Namespace, name: str, work: Path, script: Path = Path(__file__)
) -> subprocess.Popen:
    """`script --worker name`, once or under torchrun."""
    command = [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if name.startswith("single"):
        # With several GPUs in sight Trainer would spread one process over them.
        seen = environment.get("CUDA_VISIBLE_DEVICES") or "0,1"
        devices = seen.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[
            PRECISIONS.index(name.partition("-")[2]) % len(devices)
        ]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += [str(script.resolve()), "--worker", name, "--work", str(work)]
    command += ["--out", str(options.out), "--device", options.device, "--seed", str(options.seed)]
    command += ["--steps", str(options.steps), "--implementation", options.implementation]
    (work / name).mkdir(exist_ok=True)
    with open(work / name / "output.txt", "w") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def finish(process: subprocess.Popen, name: str, work: Path, limit: float) -> dict[str, Any]:
    """What the run wrote, or how it failed."""
    folder = work / name
    try:
        code: int | str = process.wait(limit)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = f"killed after {limit:g} s"
    if code == 0 and (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    traces = [file.read_text()[-4000:] for file in sorted(folder.glob("traceback-*.txt"))]
    last = traces[0].strip().splitlines()[-1] if traces else f"exit {code}"
    tail = (folder / "output.txt").read_text(errors="replace")[-3000:]
    return {"error": last, "exit": code, "tracebacks": traces, "output_tail": tail}


def work_guarded(options: argparse.Namespace) -> None:
    folder = Path(options.work) / options.worker
    try:
        train(options, folder)
    except Exception:
        rank = os.environ.get("RANK", "0")
        (folder / f"traceback-{rank}.txt").write_text(traceback.format_exc())
        raise


class Windows(torch.utils.data.Dataset):
    """Ids `[N, T]` as model inputs."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def train(options: argparse.Namespace, folder: Path) -> None:
    strategy, _, precision = options.worker.partition("-")
    on_cpu = options.device == "cpu"
    if on_cpu and strategy == "fsdp2":
        allow_fsdp2_on_cpu()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    base = load_gravity_model(Path(options.work) / "base", dtype=dtype)
    torch.manual_seed(options.seed)
    model = gravity_lora(base, r=8).train()
    if os.environ.get("RANK", "0") == "0":
        model.save_pretrained(folder / "start")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        str(folder / "trainer"), max_steps=options.steps, learning_rate=LEARNING_RATE,
        per_device_train_batch_size=TASKS[options.device]["batch"] // processes,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=on_cpu,
        bf16=precision == "mixed", dataloader_num_workers=0, seed=options.seed,
        **strategy_arguments(strategy, on_cpu),
    )  # fmt: skip
    trainer = GravityTrainer(model=model, args=arguments, train_dataset=Windows(windows(options)))
    dtypes = watch_masses(model)
    trained = trainer.train()
    trainer.save_model(str(folder / "final"))
    state = whole_state_dict(trainer.model)
    memory = gathered(0 if on_cpu else torch.cuda.max_memory_allocated(), processes)
    if trainer.args.process_index == 0:
        live = {k: v.contiguous() for k, v in state.items() if is_adapter(k)}
        save_file(live, folder / "live.safetensors")
        result = {
            "strategy": str(trainer.accelerator.distributed_type),
            "processes": processes,
            "device": str(trainer.args.device),
            "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
            "grad_norms": [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e],
            "mass_dtypes_in_forward": sorted(dtypes),
            "groups": [
                {
                    "parameters": len({id(p) for p in group["params"]}),
                    "learning_rate": group["initial_lr"],
                    "type": type(group["params"][0]).__name__,
                }
                for group in trainer.optimizer.param_groups
            ],
            "train_seconds": trained.metrics["train_runtime"],
            "peak_memory_bytes": memory,
        }
        (folder / "result.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def strategy_arguments(strategy: str, on_cpu: bool) -> dict[str, Any]:
    if strategy == "single":
        return {}
    backend = {"ddp_backend": "gloo"} if on_cpu else {}
    if strategy == "ddp":
        return {"ddp_find_unused_parameters": False, **backend}
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
    return {"fsdp": True, "fsdp_config": layers, **backend}


def allow_fsdp2_on_cpu() -> None:
    """accelerate knows FSDP2 on accelerators only and takes CPU processes for DDP without a word;
    its code for FSDP2 runs here all the same once its state says so."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        fresh = "fsdp_plugin" not in AcceleratorState._shared_state
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def watch_masses(model: torch.nn.Module) -> set[str]:
    seen: set[str] = set()
    for module in model.modules():
        if isinstance(module, GravityParameters):
            module.register_forward_hook(lambda _, __, terms: seen.add(str(terms.mass.dtype)))
    return seen


def gathered(value: int, processes: int) -> list[int]:
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    dist.all_gather_object(values, value)
    return values


def is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


# ---- comparison, in the first process ----


def compare(name: str, run: dict[str, Any], runs: dict[str, Any], work: Path) -> dict[str, Any]:
    """Saved against live tensors; losses and final tensors against the single process."""
    if "error" in run:
        return {}
    strategy, _, precision = name.partition("-")
    found: dict[str, Any] = {"saved": check_saved(work / name)}
    references = {"same_precision": f"single-{precision}", "float32": "single-float32"}
    for label, reference in references.items():
        other = runs.get(reference)
        if other is None or "error" in other or reference == name:
            continue
        pairs = zip(run["losses"], other["losses"], strict=True)
        found[f"against_single_{label}"] = {
            "max_loss_difference": max(abs(a - b) for a, b in pairs),
            "tensors": tensor_differences(work / name, work / reference),
        }
    return found


def check_saved(folder: Path) -> dict[str, Any]:
    """Load the adapter folder as a user would; compare with what was in the processes' memory."""
    live = load_file(folder / "live.safetensors")
    loaded = load_gravity_model(folder / "final").state_dict()
    differing = [n for n, t in live.items() if n not in loaded or not torch.equal(loaded[n], t)]
    masses = {str(t.dtype) for n, t in live.items() if "modules_to_save" in n}
    return {
        "whole": not differing and {n for n in loaded if is_adapter(n)} == set(live),
        "tensors": len(live),
        "differing": differing[:5],
        "mass_dtypes": sorted(masses),
    }


def tensor_differences(folder: Path, reference: Path) -> dict[str, dict[str, float]]:
    """By kind of tensor: the largest difference, and how far the reference moved in training."""
    ours, theirs = load_file(folder / "final" / ADAPTER), load_file(reference / "final" / ADAPTER)
    begin = load_file(reference / "start" / ADAPTER)
    found: dict[str, dict[str, float]] = {}
    for name, tensor in theirs.items():
        kind = name.rpartition(".")[-1] if "gravity" in name else "lora"
        row = found.setdefault(kind, {"max_difference": 0.0, "max_moved": 0.0, "max_value": 0.0})
        for key, value in (
            ("max_difference", ours[name].double() - tensor.double()),
            ("max_moved", tensor.double() - begin[name].double()),
            ("max_value", tensor.double()),
        ):
            row[key] = max(row[key], value.abs().max().item())
    return found


def table(runs: dict[str, Any]) -> str:
    lines = [
        f"{'run':18} {'last loss':>10} {'max loss diff':>14} {'max mass diff':>14}  saved whole"
    ]
    for name, run in runs.items():
        if "error" in run:
            lines.append(f"{name:18} failed: {run['error'][:80]}")
            continue
        versus = run.get("against_single_same_precision", {})
        loss = f"{versus['max_loss_difference']:.2e}" if versus else "-"
        mass = f"{versus['tensors']['mass_log']['max_difference']:.2e}" if versus else "-"
        whole = run.get("saved", {}).get("whole", run.get("comparison_error"))
        lines.append(f"{name:18} {run['losses'][-1]:10.5f} {loss:>14} {mass:>14}  {whole}")
    return "\n".join(lines)


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
