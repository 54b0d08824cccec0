"""Trained from scratch: gravity against softmax, same shape, data, steps and order of batches.

    python scripts/experiments/from_scratch.py tune          # learning rates and starts, one seed
    python scripts/experiments/from_scratch.py bytes         # 9.5 M parameters, 5 seeds
    python scripts/experiments/from_scratch.py bytes4x       # 4 times the parameters and tokens
    python scripts/experiments/from_scratch.py shakespeare --text tinyshakespeare.txt

`tune` chooses the settings that the other stages carry below: every attention gets its own best
learning rate, on a seed that is not used again. Results are JSON lines in --results; runs that are
there already are not done again.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from pool import run_all, training_arguments

HERE = Path(__file__).resolve().parent
TUNING_SEED = 100

SIZES = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SIZES_4X = {
    **SIZES,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
NANOGPT = {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_positions": 256}
NANOGPT_DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}

SOFTMAX = {"attention": "dot_product"}
FORCE = {"attention": "gravity", "law": "force", "gravity_scale": 100.0, "softness": 1.0}
POWER = {**FORCE, "law": "power", "softness": 0.25}
ARMS = {"softmax": SOFTMAX, "force": FORCE, "power": POWER}

# From the stage `tune`.
LEARNING_RATE = {"softmax": 1.5e-3, "force": 2e-3, "power": 2e-3}


def run_of(stage: str, arm: str, seed: int, shape: dict[str, Any], **changes: Any) -> dict:
    """One run; `changes` go to the model's or to the training's arguments."""
    label = "".join(f" {name}={value}" for name, value in sorted(changes.items()))
    return {
        "id": f"{stage} {arm}{label} seed={seed}",
        "stage": stage,
        "arm": arm,
        "seed": seed,
        "shape": shape,
        "changes": changes,
    }


BYTES = {"architecture": "qwen2", "overrides": SIZES, "steps": 1000, "tokenizer": "byte"}
BYTES_4X = {**BYTES, "overrides": SIZES_4X, "steps": 4000}
QK_NORM = {**BYTES, "architecture": "qwen3", "overrides": {**SIZES, "head_dim": 64}}
SHAKESPEARE = {
    "architecture": "gpt2",
    "overrides": {**NANOGPT, **NANOGPT_DROPOUT},
    "steps": 5000,
    "tokenizer": "char",
    "adam_beta2": 0.99,
    "learning_rate": 1e-3,
    "validation_windows": 10_000,
}


def plan(stage: str, seeds: list[int]) -> list[dict]:
    if stage == "tune":
        first: dict[str, dict[str, Any]] = {
            "softmax": {},
            "force": {"gravity_scale": 30.0},
            "power": {"gravity_scale": 30.0, "softness": 1.0},
        }
        rates = (1e-3, 2e-3, 3e-3, 4e-3)
        runs = [
            run_of(stage, arm, TUNING_SEED, BYTES, learning_rate=rate, **first[arm])
            for rate in rates
            for arm in ARMS
        ]
        others = [
            ("softmax", {"learning_rate": 1.5e-3}),
            ("softmax", {"learning_rate": 8e-3}),
            ("force", {"gravity_scale": 100.0}),
            ("force", {"gravity_scale": 100.0, "learning_rate": 1e-3}),
            ("power", {"gravity_scale": 10.0, "softness": 1.0}),
            ("power", {"gravity_scale": 100.0, "softness": 1.0}),
            ("power", {"gravity_scale": 300.0, "softness": 1.0}),
            ("power", {"gravity_scale": 30.0, "softness": 0.25}),
            ("power", {"gravity_scale": 30.0, "softness": 4.0}),
            ("power", {"gravity_scale": 100.0, "softness": 0.25}),
            ("power", {"gravity_scale": 100.0, "softness": 1.0, "learning_rate": 3e-3}),
        ]
        return runs + [
            run_of(stage, arm, TUNING_SEED, BYTES, **{"learning_rate": 2e-3, **change})
            for arm, change in others
        ]
    if stage == "bytes":
        return [run_of(stage, arm, seed, BYTES) for arm in ARMS for seed in seeds]
    if stage == "qknorm":
        return [run_of(stage, arm, seed, QK_NORM) for arm in ARMS for seed in seeds]
    if stage == "bytes4x":
        return [
            run_of(stage, arm, seed, BYTES_4X, learning_rate=LEARNING_RATE[arm] / 2)
            for seed in seeds
            for arm in ("softmax", "power")
        ]
    start = {"softmax": {}, "force": {}, "power": {"softness": 1.0}}
    return [run_of(stage, arm, seed, SHAKESPEARE, **start[arm]) for seed in seeds for arm in ARMS]


@functools.cache
def _stream(tokenizer: str, text: str | None) -> Any:
    from gravity_hf.training.streams import load_stream

    return load_stream(tokenizer, None if text is None else [text])


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train one model; its record without the per-head rows."""
    import json
    import tempfile

    import torch
    from transformers.utils import logging

    from gravity_hf.training.pretraining import PretrainArguments, pretrain

    logging.set_verbosity_error()
    torch._dynamo.reset()
    shape, changes = run["shape"], dict(run["changes"])
    cuda = torch.cuda.is_available()
    rate = changes.pop("learning_rate", shape.get("learning_rate", LEARNING_RATE[run["arm"]]))
    arguments = PretrainArguments(
        architecture=shape["architecture"],
        overrides=json.dumps(shape["overrides"]),
        validation_windows=round(shape.get("validation_windows", 1024) * run.get("scale", 1.0)),
        # The compiler fuses the plain formula; into the chunked operator it cannot look.
        implementation="reference",
        **{**ARMS[run["arm"]], **changes},
    )
    steps = max(1, round(shape["steps"] * run.get("scale", 1.0)))
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(
            folder,
            steps,
            rate,
            run["seed"],
            per_device_train_batch_size=64 if cuda else 4,
            adam_beta2=shape.get("adam_beta2", 0.95),
            eval_strategy="steps",
            eval_steps=250,
            logging_steps=max(25, steps // 40),
        )
        stream = _stream(shape["tokenizer"], run.get("text"))
        record = pretrain(arguments, training, stream).record
    if "attention" in record:
        record["attention"] = record["attention"]["summary"]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = ["tune", "bytes", "qknorm", "bytes4x", "shakespeare"]
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--results", type=Path, help="JSON lines [results/from_scratch_STAGE]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--text", help="text file of the stage shakespeare")
    parser.add_argument("--gpus", type=int, default=0, help="how many GPUs; 0: CPU")
    parser.add_argument("--workers", type=int, default=1, help="processes, over all GPUs")
    parser.add_argument("--minutes", type=float, default=60, help="start no run later than this")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--only", help="only runs whose id contains this")
    options = parser.parse_args()
    if options.stage == "shakespeare" and not options.text:
        parser.error("shakespeare needs --text: the file of nanoGPT's shakespeare_char data")
    runs = plan(options.stage, options.seeds)
    for run in runs:
        run.update({"text": options.text} if options.stage == "shakespeare" else {})
        run.update({"scale": options.scale} if options.scale != 1.0 else {})
    if options.only:
        runs = [run for run in runs if options.only in run["id"]]
    results = options.results or HERE / "results" / f"from_scratch_{options.stage}.jsonl"
    run_all(
        runs,
        work,
        results,
        workers=options.workers,
        gpus=options.gpus,
        minutes=options.minutes,
    )


if __name__ == "__main__":
    main()
