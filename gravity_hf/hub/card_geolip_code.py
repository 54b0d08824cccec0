"""The code of a card of a geolip, on features or on images, and of a companion: ten lines that
run."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..models.geolip import GeolipCompanionConfig, GeolipConfig
from ..models.geolip.companion_hosts import type_reads_images

_WITHOUT_IMAGE_SIZE = 8
# What an image processor makes of any picture.
_COLOURS = 3
# In the place of a host that only its maker has.
_HOST = "HOST"


class _Call(NamedTuple):
    """Lines before the model is loaded and after it; the output that is looked at, its shape, and
    how many tokens there are."""

    imports: tuple[str, ...]
    lines: tuple[str, ...]
    output: str
    shape: str
    tokens: int


def loading(facts: dict[str, Any], name: str) -> str:
    """Markdown: code that runs with the library."""
    settings: GeolipConfig = facts["settings"]
    call = _features(settings) if settings.patch_size is None else _images(facts, name)
    spectra = f"[1, {call.tokens}, {settings.lens_dim}]"
    lines = [
        *call.imports,
        "",
        f'model = AutoModel.from_pretrained("{name}").eval()',
        *call.lines,
        f"{call.output}  # {call.shape}",
        f"output.omega_attended  # {spectra}, {_spectra(settings)}",
    ]
    body = "\n".join(lines)
    return f"```python\n{body}\n```\n\nIt needs the library: there is no code beside the weights."


def loading_of_companion(facts: dict[str, Any], name: str) -> str:
    """Markdown: code that runs with the library; the host is loaded by its name where it has one
    that others know, and not at all where it lies in the companion's folder."""
    own: GeolipCompanionConfig = facts["companion"]
    host = own.host_name_or_path if facts.get("host_on_hub") else _HOST
    gives_host = host == _HOST and not own.train_host
    reader, lines = _reading(own, name if facts.get("has_reader") else host)
    classes = ", ".join(sorted(["AutoModel", reader] if gives_host else [reader]))
    code = [
        *(["from PIL import Image"] if reader == "AutoImageProcessor" else []),
        f"from transformers import {classes}",
        "",
        "from gravity_hf import GeolipCompanion",
        "",
        *([f'host = AutoModel.from_pretrained("{host}")'] if gives_host else []),
        f'companion = GeolipCompanion.from_pretrained("{name}"'
        f"{', host=host' if gives_host else ''}).eval()",
        *lines,
        f"output.omega_attended  # [1, tokens, {own.geolip.lens_dim}], {_spectra(own.geolip)}",
    ]
    body = "\n".join(code)
    said = f"It needs the library{'' if own.train_host else ' and the host'}."
    if f'"{_HOST}"' in body:
        known = own.host_name_or_path
        why = "was a folder of the machine that it was made on" if known else "has no name here"
        said += f" Its host {why}: write that of yours in the place of {_HOST}."
    return f"```python\n{body}\n```\n\n{said}"


def _reading(own: GeolipCompanionConfig, where: str) -> tuple[str, tuple[str, ...]]:
    """The class that reads inputs for the host, and lines that call the companion on one."""
    if type_reads_images(own.host_model_type):
        kind = "AutoImageProcessor"
        return kind, (
            f'processor = {kind}.from_pretrained("{where}")',
            'image = Image.new("RGB", (224, 224))  # yours in its place',
            'output = companion(**processor(image, return_tensors="pt"))',
        )
    kind = "AutoTokenizer"
    return kind, (
        f'tokenizer = {kind}.from_pretrained("{where}")',
        'output = companion(**tokenizer("A stone falls.", return_tensors="pt"))',
    )


def _spectra(settings: GeolipConfig) -> str:
    return "spectra after attention" if settings.use_spectral else "spectra"


def _features(settings: GeolipConfig) -> _Call:
    tokens, width = 12, settings.patch_dim
    lines = (
        "# [batch, tokens, features]: hidden states of its host in the place of these",
        f"patches = torch.randn(1, {tokens}, {width})",
        "output = model(patches=patches)",
    )
    shape = f"[1, {tokens}, {width}]"
    return _Call(_with_tensors(), lines, "output.reconstruction", shape, tokens)


def _images(facts: dict[str, Any], name: str) -> _Call:
    settings: GeolipConfig = facts["settings"]
    patch, channels = settings.patch_size or 1, settings.num_channels
    size = settings.image_size or _WITHOUT_IMAGE_SIZE * patch
    shape, output = f"[1, {channels}, {size}, {size}]", "output.pixel_reconstruction"
    tokens = (size // patch) ** 2
    if facts["has_processor"] and channels == _COLOURS:
        imports = (
            "from PIL import Image",
            "from transformers import AutoModel",
            "",
            "from gravity_hf import GeolipImageProcessor  # and AutoModel knows what a geolip is",
        )
        lines = (
            f'processor = GeolipImageProcessor.from_pretrained("{name}")',
            f'image = Image.new("RGB", ({size}, {size}))  # yours in its place',
            'output = model(**processor(image, return_tensors="pt"))',
        )
        return _Call(imports, lines, output, shape, tokens)
    lines = (
        f"# [batch, channels, height, width] in [-1, 1]; sides are multiples of {patch}",
        f"pixel_values = 2 * torch.rand(1, {channels}, {size}, {size}) - 1",
        "output = model(pixel_values=pixel_values)",
    )
    return _Call(_with_tensors(), lines, output, shape, tokens)


def _with_tensors() -> tuple[str, ...]:
    return (
        "import torch",
        "from transformers import AutoModel",
        "",
        "import gravity_hf  # tells AutoModel what a geolip is",
    )
