"""The steps before any training: load, patch, calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...hub.card_public import is_local
from ...hub.file_names import CALIBRATION_FILE
from ...integration.calibration import calibrate as calibrate_model
from ...integration.patching import gravity_status, patch_with_gravity
from ...training.files import write_text
from ...training.packing import require_packable
from ..steps.states import restore_gravity_state, save_gravity_state
from .context import Context

CALIBRATION_TABLE = "calibration.txt"


def load(context: Context, folder: Path) -> dict[str, Any]:
    """Check that the host is what can be converted; nothing of it is copied."""
    from ..hosts import require_text_model

    model = context.host()
    if context.settings.data.packing == "documents":
        require_packable(model)
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "writes": require_text_model(model),
        "max_positions": getattr(model.config, "max_position_embeddings", None),
        "vocabulary": model.get_input_embeddings().num_embeddings,
        "local": is_local(context.settings.model.model),
    }


def patch(context: Context, folder: Path) -> dict[str, Any]:
    """Gravity with Gravity-2's constants in place of dot-product attention."""
    # Text that does not fit is refused here, before anything is kept.
    held_out = len(context.data.rows)
    model = patch_with_gravity(context.host(), context.settings.config())
    save_gravity_state(model, folder)
    status = gravity_status(model)
    return {"layers": list(status.layers), "skipped": list(status.skipped), "held_out": held_out}


def calibrate(context: Context, folder: Path) -> dict[str, Any]:
    """Masses, softenings and key radii from the host's own queries and keys."""
    gravity = context.settings.gravity
    model = restore_gravity_state(context.host(), context.work.folder("patch"))
    options: dict[str, Any] = {"fit": gravity.fit, "max_kl": gravity.max_kl}
    report = calibrate_model(
        model,
        context.data.calibration,
        softness=None if gravity.max_kl is not None else gravity.softness,
        distance=gravity.distance,
        **options,
    )
    save_gravity_state(model, folder)
    write_text(folder / CALIBRATION_FILE, report.to_json() + "\n")
    write_text(folder / CALIBRATION_TABLE, report.table() + "\n")
    context.say(str(gravity_status(model)))
    return {"summary": report.summary()}
