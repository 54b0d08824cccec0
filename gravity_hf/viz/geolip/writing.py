"""Every figure of a geolip, in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..drawing import Drawing
from ..export import write_drawings
from ..style import require_matplotlib

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.geolip import GeolipModel
    from .measuring import GeolipSeen
    from .samples import AlphaCurves

_FIGURES = "figures"
# Of a companion's tensors those of its geolip.
_INNER = "geolip."


def write_geolip_figures(
    model: GeolipModel,
    batches: Iterable[Mapping[str, Tensor]],
    target: str | os.PathLike[str],
    *,
    history: AlphaCurves | Mapping[str, Any] | None = None,
    theme: str = "light",
) -> list[dict[str, Any]]:
    """Draw spectra, alphas, deviations of frames, and originals beside reconstructions.

    Args:
        model: a geolip, which stays as it is.
        batches: inputs of its forward pass, held-out ones to show what it does with them; dicts
            with `patches` or `pixel_values`, and `attention_mask` and `labels` where there are
            such. After 8,192 tokens no further batch is looked at.
        target: folder; gets PNG and SVG files and `figures.json`. Figures of an earlier call are
            replaced, other files stay.
        history: of the training, `steps` `[S]` and `alphas` `[S, L, D]`.
        theme: "light", "dark" or "both"; the dark files of both are called `NAME-dark`.

    Returns:
        What figures.json holds, in order: dicts with `name`, `file` (PNG), `title`, `caption`,
        `svg`; with both themes `dark` and `dark_svg`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an unknown theme, a target that is a file, no batches, a history of other
            shapes.
    """
    from .measuring import look

    return write_drawings(lambda: drawings_of(look(model, batches, history)), target, theme=theme)


def write_geolip_folder_figures(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    theme: str = "light",
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Draw the figures of a folder that a training wrote, from the inputs that it kept there.

    Args:
        folder: of a geolip or a companion, whose host is not needed, with samples.safetensors, and
            alphas.safetensors where alphas over the training are to be drawn.
        target, theme: as in `write_geolip_figures`; by default the folder's `figures`.
        device: where the model runs.

    Returns:
        As `write_geolip_figures`.

    Raises:
        ValueError: the folder keeps no inputs, or see `write_geolip_figures`.
    """
    from .samples import SAMPLES_FILE, read_history, read_samples

    require_matplotlib()
    place = Path(folder)
    batch = read_samples(place)
    if batch is None:
        raise ValueError(
            f"{place}: expected {SAMPLES_FILE} with inputs to draw, as scripts/train_geolip.py "
            "leaves it there, found none. Draw inputs of your own in Python: "
            "gravity_hf.viz.geolip.write_geolip_figures(model, batches, target)"
        )
    model = geolip_of_folder(place).to(device)
    where = place / _FIGURES if target is None else target
    return write_geolip_figures(model, [batch], where, history=read_history(place), theme=theme)


def geolip_of_folder(folder: Path) -> GeolipModel:
    """A saved geolip, or the one inside of a saved companion, without the host; in evaluation."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from ...models.geolip import GeolipModel

    config = AutoConfig.from_pretrained(folder)
    if config.model_type == GeolipModel.config_class.model_type:
        return GeolipModel.from_pretrained(folder).eval()
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    own = {n.removeprefix(_INNER): t for n, t in tensors.items() if n.startswith(_INNER)}
    model = GeolipModel(config.geolip)
    model.load_state_dict(own)
    return model.eval()


def drawings_of(seen: GeolipSeen) -> list[Drawing]:
    """In the order in which a card shows them; a model without spectral layers has no alphas."""
    from .alphas import alphas_figure
    from .deviations import deviations_figure
    from .reconstructions import reconstructions_figure
    from .spectra import sample_spectra_figure, spectra_figure

    alphas = [alphas_figure(seen)] if len(seen.alphas) else []
    return [
        reconstructions_figure(seen),
        spectra_figure(seen),
        sample_spectra_figure(seen),
        *alphas,
        deviations_figure(seen),
    ]
