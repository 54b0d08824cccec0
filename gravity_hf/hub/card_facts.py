"""What a card may say: the results of a conversion, or what a folder shows of itself.

Both have the same keys. What was not measured or is not known is None; a card says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import __version__
from ..config import GravityConfig
from .card_host import read_host_card
from .card_lora import facts_of_lora, is_lora_run
from .card_public import is_hub_name, is_local, public
from .card_tensors import count_parameters, gravity_layers
from .file_names import CALIBRATION_FILE, RESULTS_FILE
from .tensor_files import read_json

_MODEL, _ADAPTER = "config.json", "adapter_config.json"
_TYPE_PREFIX, _CLASS_PREFIX = "gravity_", "Gravity"


def complete(results: dict[str, Any]) -> dict[str, Any]:
    """`results` with every key that a card reads. Files written before there was a key get None
    there, or what follows from the others. No path is left in any."""
    found = {
        **dict.fromkeys(("settings", "training", "evaluation", "calibration", "conditions")),
        **dict.fromkeys(("layers", "parameters", "lora", "dataset_local")),
        "gravity_hf": __version__,
        "left_out": [],
        **public(results),
    }
    unknown = ("name", "local", "class", "dtype", "parameters", "max_positions", "writes", "card")
    found["host"] = {**dict.fromkeys((*unknown, "base_model")), **found["host"]}
    found["gravity"] = _settings(found)
    found["evaluation"] = _evaluation(found)
    return found


def facts_of_folder(
    folder: Path, host: str | None = None, *, online: bool = True
) -> dict[str, Any]:
    """The same keys for an exported model or adapter: of its results.json, or else of its settings
    and the headers of its tensors.

    Args:
        folder: as `save_pretrained` wrote it.
        host: folder or Hub name of the host, where no file in it records that.
        online: whether the Hub may be asked for the host's card.

    Raises:
        ValueError: no gravity model or adapter.
    """
    file = folder / RESULTS_FILE
    results = read_json(file) if file.is_file() else None
    if results is not None and not is_lora_run(results):
        found = complete(results)
    elif (folder / _ADAPTER).is_file():
        found = _of_adapter(folder, host, results, online)
    else:
        found = _of_model(folder, host, online)
    if found["layers"] is None:
        found["layers"] = gravity_layers(folder)
    return found


def gravity_block(folder: Path) -> dict[str, Any]:
    """The settings of the patch of a saved model or adapter."""
    adapter = folder / _ADAPTER
    file = adapter if adapter.is_file() else folder / _MODEL
    block = read_json(file).get("gravity")
    if not isinstance(block, dict):
        raise ValueError(
            f"{file}: expected a block 'gravity' with the settings of the patch, got none: not a "
            "gravity model. Patch and save the model first: patch_with_gravity(model)"
        )
    return block


def _settings(results: dict[str, Any]) -> dict[str, Any]:
    """The `gravity` block; of older files the part of it that they hold."""
    if results.get("gravity") is not None:
        return GravityConfig.from_dict(results["gravity"]).to_dict()
    calibration, settings = results["calibration"] or {}, results["settings"] or {}
    return GravityConfig(
        law=results["law"],
        distance=calibration.get("distance", "euclidean"),
        mass_per=settings.get("mass_per", "query_head"),
        learn_softening=bool(calibration),
        softness=calibration.get("softness"),
        max_kl=calibration.get("max_kl"),
    ).to_dict()


def _evaluation(results: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured; of data that were split to train on, what they were used for."""
    evaluation, training = results["evaluation"], results["training"]
    if not evaluation or training is None or training.get("transfer") or training.get("lora"):
        return evaluation
    used = "to calibrate on" if results["calibration"] else "left unused"
    return {**evaluation, "text": evaluation["text"].replace(") to train", f") {used}")}


def _of_model(folder: Path, host: str | None, online: bool) -> dict[str, Any]:
    if not (folder / _MODEL).is_file():
        raise ValueError(
            f"{folder}: expected a saved gravity model or adapter, found neither {_MODEL} nor "
            f"{_ADAPTER}. Save the model with save_pretrained first"
        )
    gravity, config = gravity_block(folder), read_json(folder / _MODEL)
    counts = count_parameters(folder)
    architectures = config.get("architectures") or [None]
    name = architectures[0] or str(config.get("model_type", "")).removeprefix(_TYPE_PREFIX)
    known = {
        "name": host,
        "class": name.removeprefix(_CLASS_PREFIX),
        "model_type": str(config.get("model_type", "")).removeprefix(_TYPE_PREFIX),
        "parameters": None if config.get("quantization_config") else counts["others"],
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "writes": name.endswith(("ForCausalLM", "LMHeadModel")),
        "max_positions": config.get("max_position_embeddings") or config.get("n_positions"),
    }
    known |= _sources(host, online)
    return _bare(folder, gravity, known, "model")


def _of_adapter(
    folder: Path, host: str | None, run: dict[str, Any] | None, online: bool
) -> dict[str, Any]:
    config = read_json(folder / _ADAPTER)
    known = {
        "name": host or config.get("base_model_name_or_path") or None,
        "class": None,
        "model_type": None,
        "writes": {"CAUSAL_LM": True, "SEQ_2_SEQ_LM": True}.get(config.get("task_type")),
    }
    known |= _sources(known["name"], online)
    if run is not None:
        known["class"] = run["model"]["class"].removeprefix(_CLASS_PREFIX)
        known["dtype"] = run["model"].get("dtype")
        where = run["model"].get("local")
        if where is not None and known["name"] == config.get("base_model_name_or_path"):
            # The run knew whether this was a folder.
            known |= {"local": where, "base_model": None}
    found = _bare(folder, gravity_block(folder), known, "adapter")
    if run is not None:
        found |= facts_of_lora(public(run))
    keys = {"rank": "r", "alpha": "lora_alpha", "type": "peft_type"}
    found["lora"] = {name: config.get(key) for name, key in keys.items()}
    return found


def _sources(name: str | None, online: bool) -> dict[str, Any]:
    """The host's card, and the host's name on the Hub where that is certain: a name that a folder
    here could have had as well needs a card there."""
    if name is None:
        return {"card": None, "local": None}
    card, local = read_host_card(name, online=online), is_local(name)
    known = not local and card["found"] and is_hub_name(name)
    return {
        "card": card,
        "local": True if local else False if known else None,
        "base_model": name if known else None,
    }


def _bare(
    folder: Path, gravity: dict[str, Any], host: dict[str, Any], saved: str
) -> dict[str, Any]:
    """What a folder shows that no conversion described."""
    calibration = None
    if (folder / CALIBRATION_FILE).is_file():
        calibration = read_json(folder / CALIBRATION_FILE).get("summary")
    layers = gravity_layers(folder)
    return complete(
        {
            "format": 1,
            "host": host,
            "saved": saved,
            "law": gravity.get("law"),
            "gravity": gravity,
            "layers": layers,
            "parameters": count_parameters(folder),
            "patch": {"layers": [row["layer"] for row in layers], "skipped": None},
            "calibration": calibration,
        }
    )
