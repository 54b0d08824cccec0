"""Every figure of a model, in a folder; nothing is written before all of them are drawn."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .collecting import collect
from .coordinate_figures import coordinate_picture, coordinate_slider
from .coordinates import Coordinates, project
from .drawing import Drawing
from .figures import figures_of, interactive_figures_of
from .interactive import Interactive, interactive_page
from .style import Theme, require_matplotlib, require_plotly, themes_of

LIST_NAME = "figures.json"
PAGE_NAME = "interactive"
_PAGE_TITLE = "Gravity attention of this model"
_COORDINATES_TITLE = "Where the tokens are"


def write_figures(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    batches: Iterable[Mapping[str, Any]] | None = None,
    host: nn.Module | None = None,
    results: Mapping[str, Any] | None = None,
    theme: str = "light",
    example: Mapping[str, Any] | None = None,
    calibration: Sequence[Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    layer: int | None = None,
    head: int | None = None,
    interactive: bool = False,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Draw every figure of a gravity model for which there are data.

    Masses need the model alone. Contrast, score curves, attention maps and the cloud of queries and
    keys need `batches`; training curves need `results`.

    Args:
        model: patched, wrapped by peft or not.
        folder: gets PNG and SVG files and `figures.json`. Figures of an earlier call are replaced,
            other files stay.
        batches: model inputs as dicts of tensors. Padding and hidden keys do not count.
        host: the unpatched twin, shown beside gravity; patched meanwhile, then as it was. Without
            one gravity is compared with the dot product of its own queries and keys.
        results: content of a conversion's results.json, or of a trainer_state.json.
        theme: "light", "dark" or "both"; the dark files of both are called `NAME-dark`.
        example: input for the attention maps; the first row of `batches` if None. At most 24 tokens
            are shown.
        calibration: rows of a `CalibrationReport` (calibration.json), for masses and contrast as
            they were before training.
        tokenizer: writes the tokens; positions without one.
        layer, head: shown alone, `layer` by the number that the figures give it. What is left open
            goes by the highest contrast.
        interactive: also one HTML page, `interactive.html`, which fetches nothing. Needs plotly.
        progress: True or False; None shows a bar on terminals only.

    Returns:
        What figures.json holds, in order: dicts with `name`, `file` (PNG), `title`, `caption`,
        `svg`; with both themes `dark` and `dark_svg`; `interactive` where the page has it, too.

    Raises:
        ImportError: matplotlib, or plotly for the page, is not installed.
        RuntimeError: the model has no gravity.
        ValueError: an unknown theme, layer or head; see `measure_heads`, `record_host_attention`.
    """
    require_matplotlib()
    if interactive:
        require_plotly()
    themes, folder = themes_of(theme), _fillable(folder)
    data = collect(
        model,
        batches=batches,
        example=example,
        host=host,
        results=results,
        calibration=calibration,
        tokenizer=tokenizer,
        layer=layer,
        head=head,
        progress=progress,
    )
    pages = partial(interactive_figures_of, data) if interactive else None
    return _drawn_and_written(folder, themes, figures_of(data), pages, _PAGE_TITLE)


def write_coordinate_figures(
    coordinates: Coordinates,
    folder: str | os.PathLike[str],
    *,
    theme: str = "light",
    layer: int | None = None,
) -> list[dict[str, Any]]:
    """Draw the coordinates of a model's tokens: one layer as a picture, all of them as a page.

    Args:
        coordinates: see `collect_coordinates`.
        folder, theme: as in `write_figures`. The page is `interactive.html`.
        layer: after which the picture shows them, by its number; None: the last.

    Returns:
        As `write_figures`.

    Raises:
        ImportError: matplotlib or plotly is not installed.
        ValueError: an unknown theme or layer.
    """
    require_matplotlib()
    require_plotly()
    themes, folder = themes_of(theme), _fillable(folder)
    projection = project(coordinates)
    drawings = [coordinate_picture(coordinates, projection, layer)]

    def pages() -> list[Interactive]:
        return [coordinate_slider(coordinates, projection)]

    return _drawn_and_written(folder, themes, drawings, pages, _COORDINATES_TITLE)


def write_drawings(
    draw: Callable[[], Sequence[Drawing]],
    folder: str | os.PathLike[str],
    *,
    theme: str = "light",
) -> list[dict[str, Any]]:
    """Draw what `draw` gives, and write it; arguments that do not fit are refused before it runs.

    Args:
        draw: makes the drawings.
        folder, theme: as in `write_figures`.

    Returns:
        As `write_figures`.
    """
    require_matplotlib()
    themes, folder = themes_of(theme), _fillable(folder)
    return _drawn_and_written(folder, themes, draw(), None, "")


def _fillable(folder: str | os.PathLike[str]) -> Path:
    found = Path(folder)
    if found.exists() and not found.is_dir():
        raise ValueError(f"folder: expected a folder for figures, {str(found)!r} is a file")
    return found


def _drawn_and_written(
    folder: Path,
    themes: Sequence[Theme],
    drawings: Sequence[Drawing],
    pages: Callable[[], Sequence[Interactive]] | None,
    title: str,
) -> list[dict[str, Any]]:
    files: dict[str, bytes] = {}
    entries = [_drawn(drawing, themes, files) for drawing in drawings]
    if pages is not None:
        # The page and its figures are made once for each theme: a theme changes them.
        for index, chosen in enumerate(themes):
            shown = pages()
            files[f"{PAGE_NAME}{_suffix(index)}.html"] = interactive_page(
                title, shown, chosen
            ).encode()
        places = {figure.name for figure in shown}
        for entry in entries:
            if entry["name"] in places:
                entry["interactive"] = f"{PAGE_NAME}.html#{entry['name']}"
    files[LIST_NAME] = (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()
    _write(folder, files)
    return entries


def _drawn(drawing: Drawing, themes: Sequence[Theme], files: dict[str, bytes]) -> dict[str, Any]:
    """Puts the files of a drawing into `files`; its entry in the list."""
    entry = {"name": drawing.name, "file": f"{drawing.name}.png", "title": drawing.title}
    entry |= {"caption": drawing.caption, "svg": f"{drawing.name}.svg"}
    for index, theme in enumerate(themes):
        stem = drawing.name + _suffix(index)
        files |= {f"{stem}.{ending}": text for ending, text in drawing.files(theme).items()}
        if index:
            entry |= {"dark": f"{stem}.png", "dark_svg": f"{stem}.svg"}
    return entry


def _suffix(index: int) -> str:
    return "-dark" if index else ""


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files under another name first, then renamed, the list last; the earlier list's go."""
    earlier = _files_of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in files.items():
            (stage / name).write_bytes(content)
        for name in files:
            (stage / name).replace(folder / name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    for name in earlier - set(files):
        (folder / name).unlink(missing_ok=True)


def _files_of(folder: Path) -> set[str]:
    """Names of the files that an earlier list mentions, inside the folder only."""
    try:
        entries = json.loads((folder / LIST_NAME).read_text(encoding="utf-8"))
        keys = ("file", "svg", "dark", "dark_svg")
        named = {entry[key] for entry in entries for key in keys if key in entry}
        named |= {e["interactive"].split("#")[0] for e in entries if "interactive" in e}
    except (OSError, ValueError, TypeError, AttributeError):
        return set()
    if f"{PAGE_NAME}.html" in named:
        named.add(f"{PAGE_NAME}-dark.html")
    return {name for name in named if isinstance(name, str) and Path(name).name == name}
