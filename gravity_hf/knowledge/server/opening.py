"""From two folders, of a model and of beliefs, to what is served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..store import BeliefStore
from .calibrating import FILE_NAME, Calibration, calibrate_routing
from .confidence_fit import calibrate_store
from .knowledge_base import KnowledgeBase


def load_base(
    model_dir: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto"
) -> tuple[Any, Any]:
    """A causal LM and its tokenizer from a folder; no code in it is run.

    Raises:
        ValueError: no folder of a model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(model_dir)
    for name, what in (("config.json", "a model"), ("tokenizer_config.json", "a tokenizer")):
        if not (folder / name).is_file():
            raise ValueError(
                f"serve: expected {what} in {str(folder)!r}, got no {name}. Save one there with "
                "save_pretrained"
            )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def open_knowledge(
    model_dir: str | os.PathLike[str],
    kb_dir: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    route_threshold: float | None = None,
    enforce_registry: bool = False,
    calibrate: bool = False,
) -> KnowledgeBase:
    """Model and beliefs, verified to belong together.

    The calibration is read from `calibration.json` in the folder of the beliefs. Without one,
    routing is calibrated on the store's own facts, if there are enough; otherwise, and where no
    `route_threshold` is given, beliefs are used by name only.

    Args:
        device, dtype: of the model.
        route_threshold, enforce_registry: see `KnowledgeBase`.
        calibrate: measure routing and confidence now and write that file.

    Raises:
        IncompatibleBaseError: the beliefs are for another base.
        ValueError, UnsafeFileError, IntegrityError, ValidationError: no model, no or a damaged
            store, no calibration.
    """
    model, tokenizer = load_base(model_dir, device=device, dtype=dtype)
    store = BeliefStore.open(kb_dir, model, tokenizer)
    file = Path(kb_dir) / FILE_NAME
    options: dict[str, Any] = {
        "route_threshold": route_threshold,
        "enforce_registry": enforce_registry,
    }
    if calibrate:
        with_router = KnowledgeBase(store, **options)
        calibration = calibrate_store(with_router)
        with_router.close()
        calibration.save(file)
    elif file.is_file():
        calibration = Calibration.load(file)
    elif route_threshold is None:
        calibration = Calibration(calibrate_routing(store), None)
    else:
        calibration = Calibration.empty()
    return KnowledgeBase(store, calibration=calibration, **options)
