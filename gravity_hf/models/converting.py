"""Reading published Lightweight Gravitational Transformers, and writing them as model folders."""

from __future__ import annotations

import math
import os
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel

_STATE_KEY = "model_state_dict"
_WRAPPERS = ("module.", "_orig_mod.")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_HEAD = re.compile(r"attn\.heads\.(\d+)\.(G|mass_proj\.weight)")
_RENAMED = {"ffn.0": "fc1", "ffn.3": "fc2", "norm1": "norm1", "norm2": "norm2"}
_QUANTISED = "_packed_params"
_NAMED_AT_MOST = 6
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What torch's readers raise for damaged files, beside their own errors.
_DAMAGED = (RuntimeError, EOFError, OSError, LookupError, AttributeError, TypeError, ValueError)


def read_published(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and metadata of a published checkpoint; code in the file is never run.

    Args:
        path: what `torch.save` wrote, either a state dict or a dict with one under
            `"model_state_dict"`, such as the published exporter and `save_checkpoint` write; or a
            `.safetensors` file.

    Returns:
        Tensors on the CPU, half precision as float32; and the file's `"metadata"`, or `{}`.

    Raises:
        ValueError: no such file, a damaged one, another layout, a quantised model, or weights that
            `check_weights` refuses.
    """
    file = Path(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"{file}: expected a checkpoint file, got {found}. Check the path")
    content = _load(file)
    metadata: Any = {}
    if isinstance(content, dict) and _STATE_KEY in content:
        metadata = content.get("metadata") or {}
        content = content[_STATE_KEY]
    if not isinstance(content, Mapping) or not isinstance(metadata, dict):
        raise ValueError(
            f"{file}: expected a state dict, or a dict with one under {_STATE_KEY!r}, got a "
            f"{type(content).__name__}. Save model.state_dict() with torch.save"
        )
    quantised = metadata.get("quantize") == "int8" or any(_QUANTISED in str(k) for k in content)
    if quantised:
        raise ValueError(
            f"{file}: expected float weights, got an int8 model, whose layers hold packed "
            "integers. Export it with quantize='none', convert that, and quantise the result"
        )
    strange = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if strange or not content:
        got = f"other things under {_some(strange)}" if strange else "nothing"
        raise ValueError(f"{file}: expected tensors by name, got {got}. Save model.state_dict()")
    check_weights(content, str(file))
    return {_unwrapped(key): _readable(value) for key, value in content.items()}, metadata


def check_weights(state: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Refuse what is no weight: a conversion would change its values, or carry on nonsense.

    Raises:
        ValueError: a key that is no name, or a tensor that is not of floats, dense and finite.
    """
    for key, tensor in state.items():
        if not isinstance(key, str):
            got = f"the key {key!r}. Save model.state_dict()"
            raise ValueError(f"{source}: expected tensors by name, got {got}")
        got = ""
        if tensor.dtype not in _FLOATS:
            got = f"{tensor.dtype}"
        elif tensor.layout != torch.strided or tensor.is_meta:
            got = "a tensor without values" if tensor.is_meta else f"{tensor.layout}"
        elif not tensor.isfinite().all():
            got = "values that are not finite"
        if got:
            raise ValueError(
                f"{source}: {key}: expected dense, finite weights of float16, bfloat16, float32 or "
                f"float64, got {got}. Save the state dict of a trained model"
            )


@contextmanager
def plain_config_errors() -> Iterator[None]:
    """What a strict config says about a value, as the ValueError that it is."""
    try:
        yield
    except StrictDataclassError as error:
        said = str(error).strip().splitlines()[-1].strip()
        raise ValueError(re.sub(r"^\w+Error: ", "", said)) from error


def rows_of(state: Mapping[str, Tensor], key: str) -> int | None:
    """`V` of a matrix `[V, d]`; None where there is none.

    Raises:
        ValueError: it is no matrix.
    """
    matrix = state.get(key)
    if matrix is not None and matrix.dim() != 2:
        raise ValueError(
            f"checkpoint: {key}: expected a matrix, got {list(matrix.shape)}. The checkpoint is "
            "damaged, or not of such a model"
        )
    return None if matrix is None else matrix.shape[0]


def core_state(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights of a published LGT without its embedding and head, under `LGTModel`'s names.

    `heads.*.G` are stacked, `heads.*.mass_proj.weight` joined; `token_mass`, which the published
    forward never reads, is left out. Unknown names are kept as they are: a strict load names them.

    Args:
        state: published names.
        prefix: of the model's names in `state`, such as `"world_model."`; others are left out.
    """
    named: dict[str, Tensor] = {}
    heads: dict[str, dict[int, Tensor]] = {}
    for full, tensor in state.items():
        if not full.startswith(prefix):
            continue
        key = full.removeprefix(prefix)
        layer = _LAYER.fullmatch(key)
        if layer is None:
            named[re.sub(r"^final_norm\.", "norm.", key)] = tensor
            continue
        index, rest = layer.groups()
        head = _HEAD.fullmatch(rest)
        if head is not None:
            name = f"layers.{index}.attn.gravity.{head[2]}"
            heads.setdefault(name, {})[int(head[1])] = tensor
        elif rest != "token_mass":
            part, _, kind = rest.rpartition(".")
            named[f"layers.{index}.{_RENAMED.get(part, part)}.{kind}"] = tensor
    for name, parts in heads.items():
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(
                f"{prefix}{name}: expected heads 0 to {len(parts) - 1}, got {sorted(parts)}. The "
                "checkpoint is incomplete"
            )
        rows = [parts[i].reshape(1, -1) for i in range(len(parts))]
        widths = sorted({row.shape[1] for row in rows})
        if len(widths) > 1:
            raise ValueError(
                f"{prefix}{name}: expected heads of one width, got {widths}. The checkpoint is "
                "damaged"
            )
        joined = torch.cat(rows)
        named[name] = joined.flatten() if name.endswith(".G") else joined
    return named


def core_sizes(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """What the weights of a published LGT say about its config, by the names of `LGTConfig`.

    They do not say the curvature of attention, event horizon, ceiling and dropout.

    Raises:
        ValueError: `state` is not that of such a model.
    """
    layers = _count(state, rf"{re.escape(prefix)}layers\.(\d+)\.")
    heads = _count(state, rf"{re.escape(prefix)}layers\.0\.attn\.heads\.(\d+)\.")
    curved = state.get(f"{prefix}pos_embedding.positions")
    fractal = state.get(f"{prefix}pos_embedding.basis")
    norm, inner = state.get(f"{prefix}final_norm.weight"), f"{prefix}layers.0.ffn.0.weight"
    table = fractal if curved is None else curved
    if table is None or norm is None or not layers or not heads or inner not in state:
        raise ValueError(
            f"expected the weights of a published LGT ({prefix}layers.0.attn.heads.0.G, "
            f"{prefix}pos_embedding.positions or .basis, {prefix}final_norm.weight, ...), got "
            f"{_some(state)}. Check that the file holds such a model"
        )
    dims = (table.dim(), norm.dim(), state[inner].dim())
    if dims != (2, 1, 2) or not norm.numel():
        shapes = [list(x.shape) for x in (table, norm, state[inner])]
        raise ValueError(
            f"expected positions [T, P], {prefix}final_norm.weight [d] and {inner} [n, d], got "
            f"{shapes}. The checkpoint is damaged"
        )
    width = norm.shape[0]
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": table.shape[0],
        "dim_position": table.shape[1],
        "ff_expansion": _expansion(state[inner].shape[0], width),
        "position_type": "fractal" if curved is None else "curved",
    }
    if curved is None:
        sizes["learnable_residual"] = f"{prefix}pos_embedding.residual" in state
    return sizes


def load_strictly(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Give `model` every weight of `state`, which must be exactly its own, names and shapes.

    Raises:
        ValueError: missing, unknown or misshapen weights; nothing is changed then.
    """
    own = model.state_dict()
    problems = [f"{key}: unknown" for key in state if key not in own]
    problems += [f"{key}: missing" for key in own if key not in state]
    problems += [
        f"{key}: expected {list(own[key].shape)}, got {list(tensor.shape)}"
        for key, tensor in state.items()
        if key in own and own[key].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f"checkpoint: expected exactly the weights of {type(model).__name__}, got "
            f"{_some(problems)}. Check the arguments that describe the model"
        )
    model.load_state_dict(dict(state), strict=True)


def check_target(target: str | os.PathLike[str]) -> Path:
    """The folder to write, which must be new or empty.

    Raises:
        ValueError: it holds something, is a file or a link, or lies in what is no folder.
    """
    folder = Path(target)
    above = next((x for x in folder.parents if x.exists() or x.is_symlink()), None)
    if folder.is_symlink() or (above is not None and not above.is_dir()):
        found = "a link" if folder.is_symlink() else f"a path below {above}, which is none"
        raise ValueError(f"{folder}: expected a new or empty folder for the model, got {found}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        found = "a file" if folder.is_file() else "a folder that is not empty"
        raise ValueError(
            f"{folder}: expected a new or empty folder for the model, got {found}. Choose another"
        )
    return folder


def write_folder(model: PreTrainedModel, target: str | os.PathLike[str]) -> Path:
    """`model.save_pretrained(target)`, whole or not at all; `target` as `check_target` wants it."""
    folder = check_target(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as room:
        building = Path(room, "new")
        model.save_pretrained(building)
        if folder.is_dir():
            folder.rmdir()
        building.rename(folder)
    return folder


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, safetensors.SafetensorError, *_DAMAGED) as error:
        raise ValueError(
            f"{file}: expected tensors and plain values, saved with torch.save or safetensors, got "
            f"a file that cannot be read as such without running code in it ({_first(error)}). "
            "Save model.state_dict() anew"
        ) from error


def _first(error: Exception) -> str:
    """The first sentence: torch goes on to recommend running the file's code."""
    said = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0]
    return f"{type(error).__name__}: {said}"


def _expansion(inner: int, width: int) -> float:
    """The ratio from which `int(width * ratio)` gives `inner` again."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


def _unwrapped(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.removeprefix(wrapper)
    return key


def _readable(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, key) for key in state)
    return len({match[1] for match in found if match})


def _some(items: Any) -> str:
    names = list(items)
    more = f" and {len(names) - _NAMED_AT_MOST} more" if names[_NAMED_AT_MOST:] else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more
