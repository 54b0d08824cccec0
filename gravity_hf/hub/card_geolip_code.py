"""The code of a card of a geolip: ten lines that run, on features or on images."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..models.geolip import GeolipConfig

_WITHOUT_IMAGE_SIZE = 8
# What an image processor makes of any picture.
_COLOURS = 3


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
        f"output.omega_attended  # {spectra}, spectra after attention",
    ]
    body = "\n".join(lines)
    return f"```python\n{body}\n```\n\nIt needs the library: there is no code beside the weights."


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
