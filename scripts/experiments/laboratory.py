"""One trained host, its attention replaced in many ways, the same LoRA budget for all of them.

Shared by `conversion.py` and `mass_granularity.py`. The host is a byte-level Qwen2 trained on the
Python standard library's source; there is one for every seed. `--size large`: 9.5 M parameters and
25 MB of text, for a GPU. `--size small`: 1 M parameters, for two CPU cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from pool import run_all, training_arguments

HERE = Path(__file__).resolve().parent

SIZES: dict[str, dict[str, Any]] = {
    "large": {
        "overrides": {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "rows": 64,
        "host_steps": 1526,  # of 64 x 256 bytes: 25 MB
        "host_rate": 1.5e-3,  # softmax's best: from_scratch.py tune
        "heal_steps": 300,
        "validation_windows": 1024,
    },
    "small": {
        "overrides": {
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "rows": 4,
        "host_steps": 1000,
        "host_rate": 3e-3,
        "heal_steps": 60,
        "validation_windows": 96,
    },
}
HEAL_RATE = 4e-3
RANK, ALPHA = 8, 16
CALIBRATION_WINDOWS = 32
LENGTH = 256
CONTROL = {"constants": "host"}


def heal_run(arm: str, seed: int, how: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """One conversion of the host of `seed`. `how`: see `convert`; `changes`: of the heal."""
    rate = f" learning_rate={changes['learning_rate']}" if "learning_rate" in changes else ""
    return {"id": f"{arm}{rate} seed={seed}", "arm": arm, "seed": seed, "how": how, **changes}


@functools.cache
def stream() -> Any:
    from gravity_hf.training.streams import load_stream

    return load_stream("byte")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def train_host(run: dict[str, Any]) -> dict[str, Any]:
    """Train the host of a seed into its folder; its record."""
    from transformers.utils import logging

    from gravity_hf.training.pretraining import PretrainArguments, pretrain

    logging.set_verbosity_error()
    size = SIZES[run["size"]]
    steps = max(1, round(size["host_steps"] * run["scale"]))
    arguments = PretrainArguments(
        attention="dot_product",
        overrides=json.dumps(size["overrides"]),
        validation_windows=max(1, round(size["validation_windows"] * run["scale"])),
    )
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(
            folder,
            steps,
            size["host_rate"],
            run["seed"],
            per_device_train_batch_size=size["rows"],
            logging_steps=100,
        )
        result = pretrain(arguments, training, stream())
    result.model.save_pretrained(run["folder"])
    return result.record


def convert(model: Any, how: dict[str, Any], batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Replace the attention of `model` in the way of `how`.

    `constants`: "host" leaves it; "published" takes Gravity-2's; "calibrated" calibrates with the
    keys `softness`, `distance`, `fit`, `max_kl`. `law` and `mass_per` as in GravityConfig.
    """
    from gravity_hf import GravityConfig, calibrate, patch_with_gravity
    from gravity_hf.integration.calibration import measure_attention

    if how["constants"] == "host":
        return {}
    patch_with_gravity(
        model,
        GravityConfig(law=how.get("law", "force"), mass_per=how.get("mass_per", "query_head")),
    )
    if how["constants"] == "calibrated":
        options = {k: how[k] for k in ("softness", "distance", "fit", "max_kl") if k in how}
        return calibrate(model, batches, progress=False, **options).summary()
    return measure_attention(model, batches, progress=False).summary()


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Convert, measure, heal, measure again."""
    import torch
    from transformers import Qwen2ForCausalLM, set_seed
    from transformers.utils import logging

    from gravity_hf.integration.calibration import measure_attention
    from gravity_hf.training.conditions import run_conditions
    from gravity_hf.training.measures import mean_loss
    from gravity_hf.training.streams import ConsecutiveWindows, RandomWindows

    logging.set_verbosity_error()
    text, seed = stream(), run["seed"]
    count = max(1, round(SIZES[run["size"]]["validation_windows"] * run["scale"]))
    validation = ConsecutiveWindows(text.validation, count, LENGTH)
    windows = validation.__getitems__(list(range(len(validation)))).split(64)
    sample = RandomWindows(text.train, CALIBRATION_WINDOWS, LENGTH, seed=10_000 + seed)
    batches = [
        {"input_ids": ids} for ids in sample.__getitems__(list(range(CALIBRATION_WINDOWS))).split(8)
    ]
    model = Qwen2ForCausalLM.from_pretrained(run["folder"]).to(device()).eval()
    before = convert(model, run["how"], batches)
    raw = mean_loss(model, windows)
    set_seed(seed)
    adapted, losses = heal(model, run)
    result: dict[str, Any] = {
        "raw": raw,
        "healed": mean_loss(adapted, windows),
        "attention_converted": before,
        "training_losses": losses,
    }
    if before:
        held_out = [{"input_ids": windows[0][:32]}]
        result["attention_healed"] = measure_attention(adapted, held_out, progress=False).summary()
        result["softening_growth"] = _growth(adapted)
    result["conditions"] = run_conditions(device())
    result["trainable"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device() == "cuda" else 0.0
    return result


def heal(model: Any, run: dict[str, Any]) -> tuple[Any, dict[int, float]]:
    """The same LoRA budget for every row, control included; distilled where `run` says so."""
    from gravity_hf import GravityTrainer, gravity_lora
    from gravity_hf.training.lora import host_lora
    from gravity_hf.training.streams import RandomWindows, collate

    size = SIZES[run["size"]]
    if run["how"]["constants"] == "host":
        adapted = host_lora(model, r=RANK, alpha=ALPHA)
    else:
        adapted = gravity_lora(model, r=RANK, alpha=ALPHA)
    steps = max(1, round(size["heal_steps"] * run["scale"]))
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(
            folder,
            steps,
            run["learning_rate"],
            run["seed"],
            per_device_train_batch_size=size["rows"],
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=max(1, steps // 20),
            weight_decay=0.0,
            torch_compile=False,
            logging_steps=25,
        )
        rows = steps * training.train_batch_size
        options: dict[str, Any] = {
            "model": adapted,
            "args": training,
            "train_dataset": RandomWindows(stream().train, rows, LENGTH, seed=20_000 + run["seed"]),
            "data_collator": collate,
            "gravity_scale": run.get("gravity_scale", 30.0),
        }
        if "transfer" in run:
            from gravity_hf.training.transfer import TransferSettings, TransferTrainer

            settings = TransferSettings(**run["transfer"])
            trainer = TransferTrainer(transfer=settings, **options)
        else:
            trainer = GravityTrainer(**options)
        trainer.train()
        losses = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
    return adapted, losses


def _growth(model: Any) -> float:
    """Median over heads of softening after the heal over softening before; 1 if it is not learned.

    The base under the adapter keeps the softenings of the conversion."""
    import torch

    from gravity_hf.integration.hosts import gravity_modules

    ratios = []
    after = {n: m().softening.detach() for n, m in gravity_modules(model).items()}
    with model.disable_adapter():
        for name, module in gravity_modules(model).items():
            ratios.append(after[name] / module().softening.detach())
    return torch.cat(ratios).median().item()


def add_options(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    parser.add_argument("--results", type=Path, help="JSON lines [results/conversion*.jsonl]")
    parser.add_argument("--hosts", type=Path, default=Path("hosts"), help="folder of the hosts")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--size", choices=list(SIZES), default="large", help="of the host")
    parser.add_argument("--gpus", type=int, default=0, help="how many GPUs; 0: CPU")
    parser.add_argument("--workers", type=int, default=1, help="processes, over all GPUs")
    parser.add_argument("--minutes", type=float, default=60, help="start no run later than this")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--only", help="only conversions whose id contains this")


def run_experiment(options: argparse.Namespace, heals: list[dict[str, Any]]) -> None:
    """Train the hosts that are missing, then do every conversion of them."""
    pooled = {"workers": options.workers, "gpus": options.gpus, "minutes": options.minutes}
    hosts = [{"id": f"host seed={s}", "seed": s} for s in options.seeds]
    for run in [*hosts, *heals]:
        run["scale"], run["size"] = options.scale, options.size
        run["folder"] = str(options.hosts / options.size / f"host-{run['seed']}")
    for run in heals:
        run.setdefault("learning_rate", HEAL_RATE)
    # Beside the weights: a machine that has not got them has to train them again.
    run_all(hosts, train_host, options.hosts / options.size / "hosts.jsonl", **pooled)
    if options.only:
        heals = [run for run in heals if options.only in run["id"]]
    name = {"large": "conversion.jsonl", "small": "conversion_small.jsonl"}[options.size]
    run_all(heals, work, options.results or HERE / "results" / name, **pooled)
