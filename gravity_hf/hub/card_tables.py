"""The table of a model card: every stage that was measured, with how gravitational it was."""

from __future__ import annotations

from typing import Any

_COLUMNS = {
    "loss": (
        ("loss, nats per token", "loss", ".4f"),
        ("against the host", "gap", "+.4f"),
        ("against the control", "control_gap", "+.4f"),
    ),
    "embeddings": (
        ("mean cosine to the host's", "cosine_mean", ".4f"),
        ("lowest", "cosine_min", ".4f"),
        ("Spearman", "spearman", ".4f"),
        ("same neighbour", "same_neighbour", ".2f"),
    ),
}
_ATTENTION = (
    ("softness", "softness_median", ".3g"),
    ("contrast", "contrast_median", ".3g"),
    ("KL", "kl_mean", ".3g"),
)


def measured(results: dict[str, Any]) -> str:
    """Markdown: the table and what its columns are; says so where nothing was measured."""
    evaluation = results["evaluation"]
    if evaluation is None:
        return "Nothing was measured: the evaluation was left out."
    rows = [_with_gaps(row, evaluation["rows"]) for row in evaluation["rows"]]
    columns = [c for c in _COLUMNS[evaluation["measure"]] if any(c[1] in row for row in rows)]
    header = ["attention", *(c[0] for c in columns), *(c[0] for c in _ATTENTION)]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for row in rows:
        attention = row.get("attention") or {}
        cells = [_cell(row, key, form) for _, key, form in columns]
        cells += [_cell(attention, key, form) for _, key, form in _ATTENTION]
        lines.append(_line([row["title"], *cells]))
    return "\n".join([*lines, "", _legend(evaluation)])


def _legend(evaluation: dict[str, Any]) -> str:
    parts = [f"Held-out text: {evaluation['text']}; {evaluation['tokens']:,} tokens measured"]
    parts[0] += f", in windows of {evaluation['length']}"
    if evaluation["stride"] is not None:
        parts[0] += f", {evaluation['stride']} apart"
    parts.append(
        "Softness and contrast are medians over heads, KL the mean KL(dot product || gravity) of "
        "their attention in nats, at the queries and keys of that row, on the first "
        f"{evaluation['attention_batches']} batches of that text. Contrast: by how much the "
        "pull of a near key exceeds that of a far one; 1 = distance makes no difference"
    )
    if any(row["key"] == "control" for row in evaluation["rows"]):
        parts.append(
            "The control had the same LoRA rank, steps, learning rate, data and order as the "
            "gravity model, which also trained masses and softenings"
        )
    return ". ".join(parts) + ". One run."


def _with_gaps(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    losses = {other["key"]: other["loss"] for other in rows if "loss" in other}
    row = dict(row)
    if "loss" in row and row["key"] != "host":
        row["gap"] = row["loss"] - losses["host"]
    if row["key"] == "healed" and "control" in losses:
        row["control_gap"] = row["loss"] - losses["control"]
    return row


def _cell(values: dict[str, Any], key: str, form: str) -> str:
    value = values.get(key)
    return "–" if value is None else format(value, form)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
