"""Which formats there are, and which there cannot be."""

from __future__ import annotations

import importlib.util

# Name -> what it is, for people.
FORMATS = {
    "onnx": "an ONNX file: encoders, and decoders with their key-value cache as inputs and outputs",
    "torch": "a torch.export program (.pt2), core operators only, which needs torch alone",
    "fp16": "safetensors in float16, masses in float32",
    "bf16": "safetensors in bfloat16, masses in float32",
    "int8": "safetensors with 8-bit weights in the linear layers (torchao), masses in float32",
}
PROGRAMS = ("onnx", "torch")
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "int8": ("torchao",)}

_REFUSED = {
    "gguf": (
        "GGUF runtimes such as llama.cpp compute dot-product attention, and ggml has no operator "
        "for gravity: the same weights would be another model there. Use --format onnx, or "
        "transformers itself. unpatch_gravity is no way round: it gives the host back, yet another"
        " model"
    )
}


def require_format(name: str) -> str:
    """The format's own name, in small letters.

    Raises:
        ValueError: a format that does not exist or cannot.
        ImportError: packages lack that it needs.
    """
    name = name.lower()
    if name in _REFUSED:
        raise ValueError(f"format {name!r} is refused: {_REFUSED[name]}")
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {list(FORMATS)}, got {name!r}")
    missing = [p for p in NEEDS.get(name, ()) if importlib.util.find_spec(p) is None]
    if missing:
        raise ImportError(
            f"format {name!r} needs {', '.join(missing)}, not installed: "
            f"pip install {' '.join(missing)}"
        )
    return name
