"""The table of a model card: every stage that was measured, with how gravitational it was."""

from __future__ import annotations

from typing import Any

from .card_law import NOT_MEASURED, contrast_in_words, learnt
from .card_words import counted

# Rows of other models than the converted one.
NO_GRAVITY = ("host", "control")
# Columns: title, key in a row, format.
COLUMNS = {
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


def measured(facts: dict[str, Any]) -> str:
    """Markdown: the table and what its columns are; says so where nothing was measured."""
    evaluation = facts["evaluation"]
    if evaluation is None:
        why = "no results lie in this folder" if facts["settings"] is None else "it was left out"
        return f"Nothing was measured: {why}."
    rows = with_gaps(evaluation["rows"])
    columns = [c for c in COLUMNS[evaluation["measure"]] if any(c[1] in row for row in rows)]
    header = ["attention", *(c[0] for c in columns), *(c[0] for c in _ATTENTION)]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for row in rows:
        attention = row.get("attention") or {}
        cells = [_cell(row, row, key, form) for _, key, form in columns]
        cells += [_cell(row, attention, key, form) for _, key, form in _ATTENTION]
        lines.append(_line([row["title"], *cells]))
    return "\n".join([*lines, "", _legend(facts, evaluation)])


def with_gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their differences to the host's loss, and the healed one's to the control's."""
    losses = {row["key"]: row["loss"] for row in rows if "loss" in row}
    return [_with_gaps(row, losses) for row in rows]


def is_encoder(facts: dict[str, Any]) -> bool:
    """Whether what it reads are whole texts, and no windows of a longer one."""
    measure = (facts["evaluation"] or {}).get("measure")
    return measure == "embeddings" or (measure is None and facts["host"]["writes"] is False)


def _legend(facts: dict[str, Any], evaluation: dict[str, Any]) -> str:
    tokens, examples = evaluation["tokens"], evaluation.get("examples")
    count = counted(examples, "example") if tokens is None else counted(tokens, "token")
    parts = [f"Held-out text: {evaluation['text']}; {count} measured"]
    what = "texts of at most" if is_encoder(facts) else "windows of"
    parts[0] += f", in {what} {evaluation['length']}"
    if evaluation["stride"] is not None:
        parts[0] += f", {evaluation['stride']} apart"
    if evaluation["attention_batches"]:
        parts.append(
            "Softness and contrast are medians over heads, KL the mean KL(dot product || gravity) "
            "of their attention in nats, at the queries and keys of that row, on the first "
            f"{_batches(evaluation['attention_batches'])} of that text"
        )
        parts.append(contrast_in_words(facts["law"]))
    if any(row["key"] == "control" for row in evaluation["rows"]):
        parts.append(
            "The control had the same LoRA rank, steps, learning rate, data and order as the "
            f"gravity model, which also trained {learnt(facts)}"
        )
    return ". ".join(parts) + ". A dash: does not apply. One run."


def _batches(count: int) -> str:
    return "batch" if count == 1 else counted(count, "batch")


def _with_gaps(row: dict[str, Any], losses: dict[str, float]) -> dict[str, Any]:
    row = dict(row)
    if "loss" in row and row["key"] != "host" and "host" in losses:
        row["gap"] = row["loss"] - losses["host"]
    if "loss" in row and row["key"] == "healed" and "control" in losses:
        row["control_gap"] = row["loss"] - losses["control"]
    return row


def _cell(row: dict[str, Any], values: dict[str, Any], key: str, form: str) -> str:
    value = values.get(key)
    if value is not None:
        return format(value, form)
    return "–" if _does_not_apply(row["key"], key) else NOT_MEASURED


def _does_not_apply(row: str, key: str) -> bool:
    """Dot-product attention has no softness; nothing is compared with itself."""
    if key == "gap":
        return row == "host"
    if key == "control_gap":
        return row != "healed"
    return row in NO_GRAVITY and key in {column[1] for column in _ATTENTION}


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
