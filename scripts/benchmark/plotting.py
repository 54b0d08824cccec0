"""Time against length, one panel for each pass, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gravity_hf.training.files import write_text
from gravity_hf.viz.drawing import Drawing
from gravity_hf.viz.style import COLORS, LIGHT, Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "sdpa": "SDPA, torch's choice",
    "sdpa_cudnn": "SDPA, cuDNN",
    "sdpa_flash": "SDPA, flash",
    "sdpa_efficient": "SDPA, efficient",
    "flex_attention": "FlexAttention",
}
_DASHES = {"force": "-", "power": "--", "dot": "-"}
_MARKERS = {"euclidean": "o", "lifted": "^", "-": "s"}


def write_plot(file: Path, rows: list[dict[str, Any]], device: str, dtype: str) -> Path:
    """The rows that were timed, as SVG. Gravity is filled, dot product is not; the power law is
    dashed; lifted keys are triangles."""
    conditions = f"{device}, {dtype}, {_shapes(rows)}"

    def build(theme: Theme) -> Figure:
        return _draw(rows, conditions)

    return write_text(file, Drawing("benchmark", conditions, "", build).svg(LIGHT))


def _draw(rows: list[dict[str, Any]], conditions: str) -> Figure:
    timed = [row for row in rows if row.get("p50_ms")]
    panels = list(dict.fromkeys(_panel(row) for row in timed)) or ["forward"]
    figure = new_figure(4.2 * len(panels) + 2.2, 4.2)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    providers = list(dict.fromkeys(row["provider"] for row in timed))
    for axis, panel in zip(axes, panels, strict=True):
        for line in dict.fromkeys(_line(row) for row in timed):
            points = [row for row in timed if _line(row) == line and _panel(row) == panel]
            _plot_line(axis, line, points, COLORS[providers.index(line[0]) % len(COLORS)])
        axis.set(xscale="log", yscale="log", xlabel="keys", title=panel)
        lengths = sorted({row["keys"] for row in timed})
        axis.set_xticks(lengths, [f"{n}" for n in lengths], rotation=45, minor=False)
        axis.minorticks_off()
        axis.grid()
    axes[0].set_ylabel("milliseconds, median and 20-80 %")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center")
    figure.suptitle(conditions, fontsize=9)
    return figure


def _plot_line(axis: Any, line: tuple[str, ...], points: list[dict[str, Any]], color: str) -> None:
    provider, law, distance = line
    points = sorted(points, key=lambda row: row["keys"])
    keys, medians = [p["keys"] for p in points], [p["p50_ms"] for p in points]
    below = [p["p50_ms"] - min(p["p20_ms"], p["p50_ms"]) for p in points]
    above = [max(p["p80_ms"], p["p50_ms"]) - p["p50_ms"] for p in points]
    axis.errorbar(
        keys,
        medians,
        yerr=[below, above],
        color=color,
        linestyle=_DASHES[law],
        marker=_MARKERS[distance],
        markersize=4,
        markerfacecolor=color if law != "dot" else "white",
        linewidth=1.2,
        label=_title(provider, law, distance),
    )


def _panel(row: dict[str, Any]) -> str:
    work = "decode" if row["queries"] < row["keys"] else row["pass"]
    return work if row["launch"] == "eager" else f"{work}, {row['launch']}"


def _line(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["provider"], row["law"], row["distance"]


def _title(provider: str, law: str, distance: str) -> str:
    if law == "dot":
        return _TITLES.get(provider, provider)
    name = f"gravity, {provider.removeprefix('gravity_')}, {law}"
    return name if distance == "euclidean" else f"{name}, {distance}"


def _shapes(rows: list[dict[str, Any]]) -> str:
    names = {"batch": "batch", "heads": "heads", "kv_heads": "KV heads", "width": "width"}
    parts = []
    for key, title in names.items():
        values = sorted({row[key] for row in rows})
        span = f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
        parts.append(f"{title} {span}")
    return ", ".join(parts)
