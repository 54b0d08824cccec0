"""Reading published models, without running what is in their files, and writing model folders."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STATE_KEY = "model_state_dict"
_WRAPPERS = ("module.", "_orig_mod.")
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
    content = read_content(file)
    metadata: Any = {}
    if isinstance(content, dict) and _STATE_KEY in content:
        metadata = content.get("metadata") or {}
        content = content[_STATE_KEY]
    if not isinstance(metadata, dict):
        raise _no_state(file, metadata, _STATE_KEY)
    if metadata.get("quantize") == "int8":
        raise _is_quantised(file)
    return weights_in(content, file, _STATE_KEY), metadata


def read_content(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` or safetensors wrote, tensors on the CPU; code in the file is never run.

    Raises:
        ValueError: no such file, a damaged one, or one that holds code.
    """
    file = Path(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"{file}: expected a checkpoint file, got {found}. Check the path")
    return _load(file)


def weights_in(content: Any, file: Path, state_key: str) -> dict[str, Tensor]:
    """A state dict that was read, half precision as float32, without prefixes of wrappers.

    Args:
        content: the state dict.
        file: where it is from, for errors.
        state_key: under which name of a dict it would have been found, too.

    Raises:
        ValueError: something else, a quantised model, or weights that `check_weights` refuses.
    """
    if not isinstance(content, Mapping):
        raise _no_state(file, content, state_key)
    if any(_QUANTISED in str(k) for k in content):
        raise _is_quantised(file)
    strange = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if strange or not content:
        got = f"other things under {some_of(strange)}" if strange else "nothing"
        raise ValueError(f"{file}: expected tensors by name, got {got}. Save model.state_dict()")
    check_weights(content, str(file))
    return {_unwrapped(key): _readable(value) for key, value in content.items()}


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
            f"{some_of(problems)}. Check the arguments that describe the model"
        )
    model.load_state_dict(dict(state), strict=True)


def some_of(items: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    names = list(items)
    more = f" and {len(names) - _NAMED_AT_MOST} more" if names[_NAMED_AT_MOST:] else ""
    return (", ".join(names[:_NAMED_AT_MOST]) or "nothing") + more


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


def write_folder(
    model: PreTrainedModel,
    target: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """`save_pretrained(target)` of both, whole or not at all; `target` as `check_target` wants."""
    folder = check_target(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as room:
        building = Path(room, "new")
        model.save_pretrained(building)
        if tokenizer is not None:
            tokenizer.save_pretrained(building)
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


def _no_state(file: Path, got: Any, state_key: str) -> ValueError:
    return ValueError(
        f"{file}: expected a state dict, or a dict with one under {state_key!r}, got a "
        f"{type(got).__name__}. Save model.state_dict() with torch.save"
    )


def _is_quantised(file: Path) -> ValueError:
    return ValueError(
        f"{file}: expected float weights, got an int8 model, whose layers hold packed integers. "
        "Export it with quantize='none', convert that, and quantise the result"
    )


def _first(error: Exception) -> str:
    """The first sentence: torch goes on to recommend running the file's code."""
    said = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0]
    return f"{type(error).__name__}: {said}"


def _unwrapped(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.removeprefix(wrapper)
    return key


def _readable(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
