"""Files in a repository that a loader could pick up instead of, or on top of, what is pushed."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .checks import ADAPTER_CONFIG_FILE, CONFIG_FILE
from .contents import TRAINER_FILES
from .input_files import has_tokenizer, is_tokenizer_file
from .secret_files import PICKLES

_WEIGHTS = (
    *(*PICKLES, ".safetensors", ".index.json"),
    *(".gguf", ".ot", ".onnx", ".onnx.data", ".onnx_data"),
)
# Where other runtimes look by themselves, and what they read there.
_RUNTIMES = ("onnx/", "openvino/", "coreml/")
_RUNTIME_WEIGHTS = (*_WEIGHTS, ".xml", ".mlmodel")
_CORE_ML_PACKAGE = ".mlpackage/"
# Settings of a model that loaders apply without being asked.
_SETTINGS = ("generation_config.json", "modules.json")
_FIGURES = "figures/"

# What `stale_files` takes away, for people who have not asked the Hub yet.
STALE = (
    "weights at the top of the repository and in onnx/, openvino/ and coreml/, files of an earlier "
    "tokenizer if this push brings one, generation_config.json, modules.json and earlier figures"
)


def stale_files(there: Iterable[str], pushed: Collection[str]) -> tuple[str, ...]:
    """Of the paths in a repository, those that go in the commit that brings `pushed`.

    What the push does not replace of: weights at the top (shards of an earlier save, pickles,
    files of other formats made from other weights) and in the folders of other runtimes, the
    config of the other kind of export, files of a tokenizer where the push brings another,
    settings of an earlier model where it brings a model, and figures where it brings some.
    """
    new = set(pushed)
    figures = any(path.startswith(_FIGURES) for path in new)
    return tuple(
        sorted(
            path
            for path in there
            if path not in new and (_misleads(path, new) or (figures and path.startswith(_FIGURES)))
        )
    )


def _misleads(path: str, new: Collection[str]) -> bool:
    if path.startswith(_RUNTIMES):
        return path.lower().endswith(_RUNTIME_WEIGHTS) or _CORE_ML_PACKAGE in path
    if is_tokenizer_file(path):
        return has_tokenizer(new)
    if "/" in path:
        # Loaders look at the top unless they are told a subfolder.
        return False
    if path == CONFIG_FILE:
        return ADAPTER_CONFIG_FILE in new
    if path == ADAPTER_CONFIG_FILE or path in _SETTINGS:
        return CONFIG_FILE in new
    return path.lower().endswith(_WEIGHTS) and TRAINER_FILES.fullmatch(path) is None
