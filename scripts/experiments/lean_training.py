"""How the hosts of `lean_hosts.py` are trained, and any causal model on random windows."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train_host(
    place: Path, settings: dict[str, Any], text: Any, device: str | None
) -> dict[str, Any]:
    """Train a Llama into its folder; what is written down about it, which is not written yet.

    Args:
        settings: those of `lean_hosts.Host.record`.
        text: a `TokenStream`.
        device: to train on; None: CUDA where there is one.
    """
    import torch
    from transformers.utils import logging

    from gravity_hf.hub.card_public import public
    from gravity_hf.training.conditions import run_conditions
    from gravity_hf.training.measures import mean_loss
    from gravity_hf.training.new_models import new_model
    from gravity_hf.training.pretraining import PretrainArguments
    from gravity_hf.training.streams import ConsecutiveWindows

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    length = settings["length"]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {**settings["sizes"], "max_position_embeddings": length}
    arguments = PretrainArguments(
        architecture="llama", attention="dot_product", overrides=json.dumps(sizes), length=length
    )
    model = new_model(arguments, text.vocabulary, settings["seed"])
    started, losses = time.perf_counter(), {}
    for number, stage in enumerate(settings["stages"]):
        # Later stages go on at a third of the rate.
        rate, order = settings["rate"] / 3**number, 100 * settings["seed"] + number
        found = train(model, text, tuple(stage), rate=rate, seed=order, device=device)
        losses[f"stage {number + 1}"] = found
    seconds = time.perf_counter() - started
    windows = ConsecutiveWindows(text.validation, 16, length)
    held_out = windows.__getitems__(list(range(len(windows))))
    record = public(
        {
            "settings": settings,
            "parameters": model.num_parameters(),
            "tokens": sum(steps * rows * size for steps, rows, size in settings["stages"]),
            "training_losses": losses,
            "held_out_loss": mean_loss(model, held_out.split(1)),
            "unit": "nats per byte of the held-out text",
            "held_out_windows": len(held_out),
            "seconds": seconds,
            "text": text.description,
            "conditions": run_conditions(device),
        }
    )
    model.cpu().save_pretrained(place)
    text.tokenizer.save_pretrained(place)
    return record


def train(
    model: Any,
    text: Any,
    stage: tuple[int, int, int],
    *,
    rate: float,
    seed: int,
    device: str,
) -> dict[str, float]:
    """Train a causal model on random windows of `text.train`; training losses in nats by step.

    Args:
        stage: steps, rows of a step, tokens of a row.
        rate: AdamW's, which rises at first and falls to a tenth; bfloat16 on a GPU.
        seed: of the windows and of their order.
    """
    from pool import training_arguments
    from transformers.trainer_callback import PrinterCallback

    from gravity_hf.training.optim import GravityTrainer
    from gravity_hf.training.streams import RandomWindows, collate

    steps, rows, length = stage
    cuda = device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(
            folder,
            steps,
            rate,
            seed,
            per_device_train_batch_size=rows,
            logging_steps=max(1, steps // 10),
            disable_tqdm=not sys.stderr.isatty(),
            use_cpu=not cuda,
            bf16=cuda,
            # A minute of compiling is most of what a stage takes.
            torch_compile=False,
        )
        trainer = GravityTrainer(
            model=model,
            args=training,
            train_dataset=RandomWindows(text.train, steps * rows, length, seed=seed),
            data_collator=collate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return {str(e["step"]): e["loss"] for e in trainer.state.log_history if "loss" in e}
