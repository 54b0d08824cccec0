"""What `gravity-hf figures` draws of models of this library's own: of one whose tokens have
coordinates where they are; of a geolip what it makes of the inputs that lie in its folder."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLANK_LINES = re.compile(r"\n\s*\n")
# Letters that are more than enough for the tokens of a figure.
_STRETCH = 4096


def is_geolip_folder(directory: Path) -> bool:
    """Whether `directory` holds a geolip, a companion or a prior."""
    from ..hub.own_models import is_own_folder
    from ..hub.tensor_files import read_json
    from ..integration.own_geolip import GEOLIPS

    return is_own_folder(directory) and (
        read_json(directory / "config.json").get("model_type") in GEOLIPS
    )


def draw_geolip(
    directory: Path, target: Path, options: dict[str, Any], *, theme: str, device: str
) -> list[dict[str, Any]]:
    """Draws what a geolip, or that of a companion, makes of the inputs in its folder; see
    `write_geolip_folder_figures`.

    Args:
        options: for hosts and texts only, by name, None where not given.

    Raises:
        ValueError: a prior, one of `options`, or a folder without inputs.
    """
    from ..hub.own_models import own_config
    from ..integration.own_geolip import PRIOR
    from ..viz.geolip import write_geolip_folder_figures

    config = own_config(directory)
    if config.model_type == PRIOR:
        raise ValueError(
            f"figures: expected a geolip, a companion, a converted host, or a model whose tokens "
            f"move through coordinates, {str(directory)!r} holds a {config.model_type}, of which "
            f"none are made. What it is: gravity-hf status {directory}"
        )
    _refuse_options(options, "geolip, which is drawn from the inputs that lie in its folder")
    return write_geolip_folder_figures(directory, target, theme=theme, device=device)


def require_coordinates(directory: Path, options: dict[str, Any]) -> None:
    """ValueError for a model without coordinates, or for `options` that are for hosts only.

    Args:
        directory: folder of a model of our own.
        options: by name, None where not given.
    """
    from ..hub.own_models import own_config
    from ..integration.own_models import own_model_class
    from ..viz.coordinates import gives_coordinates
    from ..viz.style import require_plotly

    require_plotly()
    config = own_config(directory)
    if not gives_coordinates(own_model_class(config), config):
        raise ValueError(
            f"figures: expected a converted host, whose queries and keys are drawn, or a model "
            f"whose tokens move through coordinates, such as NGT; {str(directory)!r} holds another "
            f"{config.model_type}, of which none of the figures are made. Its constants: "
            f"gravity-hf status {directory}"
        )
    what = f"{config.model_type}, which has no host and is drawn as coordinates of whole layers"
    _refuse_options(options, what)


def draw_coordinates(
    model: PreTrainedModel,
    directory: Path,
    target: Path,
    text: str,
    *,
    theme: str,
    layer: int | None,
) -> list[dict[str, Any]]:
    """Draws where the model's tokens are into `target`; see `write_coordinate_figures`."""
    from ..training.any_model import load_any_tokenizer
    from ..viz.coordinates import collect_coordinates
    from ..viz.export import write_coordinate_figures

    tokenizer = load_any_tokenizer(str(directory))
    coordinates = collect_coordinates(model, tokenizer, text)
    return write_coordinate_figures(coordinates, target, theme=theme, layer=layer)


def _refuse_options(options: dict[str, Any], what: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: expected none for a {what}, got {value!r}. Leave it out")


def stretch_of_text(files: list[Path] | None, seed: int) -> str:
    """Some thousand letters in a row, from the beginning of a paragraph, as they are written."""
    from ..training.text import read_texts

    whole = read_texts(files)
    starts = [0, *(match.end() for match in _BLANK_LINES.finditer(whole))]
    long = [start for start in starts if len(whole) - start >= _STRETCH]
    start = random.Random(seed).choice(long or starts[:1])
    return whole[start : start + _STRETCH]
