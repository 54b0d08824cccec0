"""Reading peft's LoRA files from anywhere: every setting is checked, no code or pattern is run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..runtime.encoding import parsed_json
from .delta import LowRankDelta
from .errors import UnsafeFileError, ValidationError
from .store_files import LARGEST_DELTA, header_metadata, read_bytes

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Metadata of a file that a store wrote.
CONTENT = "gravity_belief"
_LARGEST_CONFIG = 2**20
_TENSOR = re.compile(r"base_model\.model\.(?P<map>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
# What a LoRA may have besides `B A`, and what it has without it.
_PLAIN = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "arrow_config": (None,),
}


def read_adapter(directory: str | os.PathLike[str]) -> tuple[LowRankDelta, dict[str, Any]]:
    """The delta in a folder of peft's, its scale multiplied into B, and what a store put beside it.

    Only `adapter_config.json` and `adapter_model.safetensors` are read.

    Raises:
        UnsafeFileError: no plain LoRA of linear maps, no safetensors, other tensors than its
            factors, more than 1 GiB, or numbers that are not finite.
    """
    folder = Path(directory)
    where = str(folder / WEIGHTS_FILE)
    config = _config(folder)
    try:
        data = read_bytes(folder / WEIGHTS_FILE, LARGEST_DELTA)
    except (FileNotFoundError, NotADirectoryError) as error:
        is_pickle = (folder / "adapter_model.bin").is_file()
        raise UnsafeFileError(
            f"{where}: expected the adapter's tensors, got no such file"
            + (" but a .bin, which could run code: save it with safetensors" if is_pickle else "")
        ) from error
    content = _content(header_metadata(data, where), where)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UnsafeFileError(f"{where}: expected a safetensors file, {error}") from error
    pairs = _pairs(tensors, where)
    try:
        delta = LowRankDelta({n: _scaled(n, pair, config, where) for n, pair in pairs.items()})
    except ValidationError as error:
        raise UnsafeFileError(f"{where}: {error}") from error
    delta.check_finite()
    return delta, content


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = parsed_json(read_bytes(path, _LARGEST_CONFIG))
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        raise UnsafeFileError(f"{path}: expected an adapter's settings in JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UnsafeFileError(
            f"{path}: expected peft_type 'LORA', got {kind!r}. Other adapters are no low-rank "
            "deltas of linear maps"
        )
    odd = [name for name, plain in _PLAIN.items() if config.get(name) not in (*plain, None)]
    if odd:
        raise UnsafeFileError(
            f"{path}: expected a LoRA that is B A alone, got {odd[0]}={config[odd[0]]!r:.80}. It "
            "does more than a delta can"
        )
    return dict(config)


def _pairs(tensors: Mapping[str, Tensor], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match["factor"] in found.get(match["map"], {}):
            raise UnsafeFileError(
                f"{where}: expected tensors {PREFIX}<map>.lora_A.weight and .lora_B.weight, once "
                f"each, got {name!r:.200}"
            )
        found.setdefault(match["map"], {})[match["factor"]] = tensor
    alone = [name for name, pair in found.items() if len(pair) < 2]
    if alone or not found:
        raise UnsafeFileError(f"{where}: expected both factors of maps, got {alone or 'none'}")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _scaled(
    name: str, pair: tuple[Tensor, Tensor], config: Mapping[str, Any], where: str
) -> tuple[Tensor, Tensor]:
    A, B = pair
    rank = _of_map(name, config.get("rank_pattern"), config.get("r"), where)
    alpha = _of_map(name, config.get("alpha_pattern"), config.get("lora_alpha", 8), where)
    if A.ndim != 2 or A.shape[0] != rank:
        raise UnsafeFileError(
            f"{where}: {name}: expected factors of rank {rank!r}, as the settings say, got "
            f"{list(A.shape)}"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise UnsafeFileError(f"{where}: {name}: expected a finite scale, got {scale!r}")
    return A, (B if scale == 1 else B * scale)


def _of_map(name: str, pattern: Any, default: Any, where: str) -> Any:
    """What the settings say of one map. Patterns of peft are regular expressions; from a file of
    somebody else only plain names are taken, since others can take for ever to match."""
    values = {} if pattern is None else pattern
    if not isinstance(values, dict):
        raise UnsafeFileError(f"{where}: expected rank_pattern as an object, got {values!r:.80}")
    value = default
    for key, own in values.items():
        plain = key.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise UnsafeFileError(
                f"{where}: expected names of maps in rank_pattern, alpha_pattern, got {key!r:.80}"
            )
        if name == plain or name.endswith(f".{plain}"):
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UnsafeFileError(f"{where}: {name}: expected a positive rank and alpha, got {value!r}")
    return value


def _content(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    if CONTENT not in metadata:
        return {}
    try:
        content = parsed_json(metadata[CONTENT])
    except (ValueError, TypeError) as error:
        raise UnsafeFileError(f"{where}: expected JSON in {CONTENT}: {error}") from error
    return content if isinstance(content, dict) else {}
