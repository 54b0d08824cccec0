"""Whether a folder is a whole and safe gravity export: asked before anything is uploaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..config import GravityConfig
from ..integration.autos import MODEL_TYPE_PREFIX
from ..integration.factorized_folder import KEY as LOW_RANK_KEY
from ..integration.guards import EXPORT_NAME, GRAVITY_LORA, WEIGHTS_KEY
from ..integration.hosts import make_child, select_sites
from ..integration.remote_code import REMOTE_CODE_MODULE
from ..integration.sites import find_attention_sites
from .card_kinds import kind_of_folder
from .contents import contents_of
from .own_models import is_own_folder, own_config
from .secret_files import refuse_unsafe
from .skeleton import CHILD, skeleton
from .tensor_files import Shapes, read_json, shapes_of_export

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_ADAPTER_PREFIX = "base_model.model."


def check_export(folder: Path) -> None:
    """Refuse a folder that is not a whole, safe gravity model or adapter.

    Reads names, JSON and the headers of safetensors files; no weights.

    Raises:
        ValueError: what is wrong, with what to do about it.
    """
    folder = Path(folder)
    refuse_unsafe(folder, contents_of(folder).files)
    if is_adapter(folder):
        _check_adapter(folder)
    else:
        _check_model(folder)


def is_adapter(folder: Path) -> bool:
    """Whether an exported folder holds an adapter (True) or a model (False).

    Raises:
        ValueError: neither, or both: loaders would mix them.
    """
    model, adapter = ((folder / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE))
    if model and adapter:
        raise ValueError(
            f"{folder}: expected a model or an adapter, got both {CONFIG_FILE} and "
            f"{ADAPTER_CONFIG_FILE}: loaders would put the one on the other. Move one of them away"
        )
    if not model and not adapter:
        raise ValueError(
            f"{folder}: expected {CONFIG_FILE} or {ADAPTER_CONFIG_FILE}, found neither. Make a "
            "gravity model with: gravity-hf convert MODEL OUT"
        )
    return adapter


def _check_model(folder: Path) -> None:
    values = read_json(folder / CONFIG_FILE)
    model_type = str(values.get("model_type"))
    if is_own_folder(folder):
        _check_own_model(folder)
        return
    if values.get(LOW_RANK_KEY) is not None:
        raise ValueError(
            f"{folder}: expected a model that an Auto class loads, got one with maps of low rank "
            f"(config.{LOW_RANK_KEY}), which gravity_hf.load_factorized alone does, and which no "
            "card is made for. Upload the folder that save_factorized writes as it is, with a "
            "README.md of yours: huggingface_hub.upload_folder(folder_path=..., repo_id=...)"
        )
    if not model_type.startswith(MODEL_TYPE_PREFIX):
        raise ValueError(
            f"{folder}: expected model_type {MODEL_TYPE_PREFIX}..., which software without gravity "
            f"refuses, got {model_type!r}, which it would run as dot product. Load the folder with "
            "gravity_hf.load_gravity_model and save it again"
        )
    _settings(folder, CONFIG_FILE, values)
    for key in ("attn_implementation", WEIGHTS_KEY):
        if values.get(key) != EXPORT_NAME:
            raise ValueError(_unguarded(folder, CONFIG_FILE, key, EXPORT_NAME))
    _check_remote_code(folder, values)
    found = _gravity_tensors(shapes_of_export(folder, "model"))
    _compare(folder, _expected_tensors(AutoConfig.from_pretrained(folder)), found)


def _check_own_model(folder: Path) -> None:
    """A model type of its own, which nothing else could run: its weights are what is asked for."""
    config = own_config(folder)
    if kind_of_folder(folder) is None:
        raise ValueError(
            f"{folder}: expected a converted host, an LGT, an NGT, a geolip or a LeanFormer, got "
            f"model type {config.model_type!r}, which no card is made for. Push it as it is, with "
            "a README.md of yours: huggingface_hub.upload_folder(folder_path=..., repo_id=...)"
        )
    found = _gravity_tensors(shapes_of_export(folder, "model"))
    _compare(folder, _expected_tensors(config), found)


def _settings(folder: Path, file: str, values: dict[str, Any]) -> GravityConfig:
    block = values.get("gravity")
    if block is None:
        raise ValueError(
            f"{folder}: expected a gravity block in {file}, found none. Save the patched model, or "
            "the gravity_lora adapter, again"
        )
    return GravityConfig.from_dict(block)


def _unguarded(folder: Path, file: str, key: str, value: str) -> str:
    return (
        f"{folder}: expected {key} {value!r} in {file}, by which software without gravity refuses "
        "it; it was saved by an older gravity_hf. Load it with gravity_hf.load_gravity_model and "
        "save it again"
    )


def _check_remote_code(folder: Path, values: dict[str, Any]) -> None:
    name = f"{REMOTE_CODE_MODULE}.py"
    entries = values.get("auto_map") or {}
    sound = "AutoConfig" in entries and all(
        str(target).startswith(f"{REMOTE_CODE_MODULE}.") for target in entries.values()
    )
    if not (folder / name).is_file() or not sound:
        raise ValueError(
            f"{folder}: expected {name} and an auto_map in {CONFIG_FILE} that leads to it, got "
            f"auto_map {entries!r} and {'a' if (folder / name).is_file() else 'no'} {name}. "
            "Nobody without gravity_hf could load it: save the model again"
        )


def _expected_tensors(config: PreTrainedConfig) -> Shapes:
    tensors = skeleton(config).state_dict()
    return _gravity_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def _gravity_tensors(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if CHILD in name}


def _compare(folder: Path, expected: Shapes, found: Shapes) -> None:
    missing = sorted(set(expected) - set(found))
    # Hosts whose tensors have other names on disk than in memory are compared by what they hold.
    if missing and _kinds(expected) != _kinds(found):
        raise ValueError(
            f"{folder}: expected {len(expected)} gravity tensors, as its config asks for, "
            f"{len(missing)} are missing, such as {missing[0]}. Save the model again; weights of "
            "the host alone are not a gravity model"
        )
    wrong = sorted(n for n in set(expected) & set(found) if expected[n] != found[n])
    if wrong:
        raise ValueError(
            f"{folder}: {wrong[0]}: expected shape {list(expected[wrong[0]])}, got "
            f"{list(found[wrong[0]])}. The weights belong to another config: save the model again"
        )


def _kinds(shapes: Shapes) -> Counter[tuple[str, tuple[int, ...]]]:
    return Counter((name.rpartition(CHILD)[2], shape) for name, shape in shapes.items())


def _check_adapter(folder: Path) -> None:
    values = read_json(folder / ADAPTER_CONFIG_FILE)
    settings = _settings(folder, ADAPTER_CONFIG_FILE, values)
    if values.get("peft_type") != GRAVITY_LORA:
        raise ValueError(_unguarded(folder, ADAPTER_CONFIG_FILE, "peft_type", GRAVITY_LORA))
    found = _gravity_tensors(shapes_of_export(folder, "adapter_model"))
    sites = {name.rpartition(CHILD)[0] for name in found}
    kinds = {"mass_log"}
    kinds |= {"softening_log"} if settings.learn_softening else set()
    kinds |= {"key_radius_sq"} if settings.distance == "lifted" else set()
    absent = sorted(f"{site}{CHILD}{kind}" for site in sites for kind in kinds)
    absent = [name for name in absent if name not in found]
    few = settings.layers is not None and len(sites) != len(settings.layers)
    if not sites or absent or few:
        raise ValueError(
            f"{folder}: expected the masses of every converted layer in the adapter, found "
            f"{len(sites)} layers with masses"
            + (f", without {absent[0]}" if absent else "")
            + ". Save the gravity_lora model again: an ordinary LoRA adapter has none"
        )
    base = _expected_by_base(str(values.get("base_model_name_or_path")), settings)
    if base is not None:
        _compare(folder, base, found)


def _expected_by_base(base: str, settings: GravityConfig) -> Shapes | None:
    """The gravity tensors that an adapter on `base` needs; None where the base is not at hand."""
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    sites = select_sites(find_attention_sites(skeleton(config)), settings)
    children = {site.name: make_child(site, settings, device="meta") for site in sites}
    return {
        f"{_ADAPTER_PREFIX}{site}{CHILD}{name}": tuple(tensor.shape)
        for site, child in children.items()
        for name, tensor in child.state_dict().items()
    }
