"""Measurements as fixed-width text: a measure a line, one model or two with their difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Content = Mapping[str, Any]

# Name in the table, where the value is, and digits after the point (None: as it is).
_ROWS: tuple[tuple[str, tuple[str, ...], int | None], ...] = (
    ("loss, nats per token", ("loss", "nats_per_token"), 4),
    ("perplexity", ("loss", "perplexity"), 3),
    ("bits per byte", ("loss", "bits_per_byte"), 4),
    ("tokens predicted", ("loss", "tokens"), None),
    ("embeddings: mean cosine", ("likeness", "cosine_mean"), 4),
    ("embeddings: lowest cosine", ("likeness", "cosine_min"), 4),
    ("embeddings: rank correlation", ("likeness", "spearman"), 4),
    ("embeddings: same neighbour", ("likeness", "same_neighbour"), 4),
    ("law", ("attention", "summary", "law"), None),
    ("distance", ("attention", "summary", "distance"), None),
    ("softness of calibration", ("attention", "summary", "softness"), 4),
    ("softness now, median", ("attention", "summary", "softness_median"), 4),
    ("contrast, lowest", ("attention", "summary", "contrast_min"), 3),
    ("contrast, median", ("attention", "summary", "contrast_median"), 3),
    ("contrast, highest", ("attention", "summary", "contrast_max"), 3),
    ("KL to dot product, mean", ("attention", "summary", "kl_mean"), 4),
    ("KL to dot product, highest", ("attention", "summary", "kl_max"), 4),
)
# A difference of these says nothing.
_ALONE = frozenset({"tokens predicted"})


def evaluation_table(content: Content, against: Content | None = None) -> str:
    """`content`, `against`: of `Evaluation.to_dict`. Rows that neither has are left out."""
    lines = [_header(content, against)]
    for name, path, digits in _ROWS:
        values = [_value(c, path) for c in (content, against) if c is not None]
        if all(value is None for value in values):
            continue
        cells = [_shown(value, digits) for value in values]
        if against is not None:
            alone = name in _ALONE or not all(isinstance(v, int | float) for v in values)
            cells.append("" if alone else f"{values[0] - values[1]:+.{digits or 0}f}")
        lines.append((name, *cells))
    return "\n".join([*_aligned(lines), *_samples(content), *_conditions(content)])


def _header(content: Content, against: Content | None) -> tuple[str, ...]:
    if against is None:
        return ("", content["model"])
    return ("", content["model"], against["model"], "difference")


def _aligned(lines: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for first, *cells in lines:
        right = (f"{c:>{w}}" for c, w in zip(cells, widths[1:], strict=True))
        yield f"{first:<{widths[0]}}  {'  '.join(right)}".rstrip()


def _samples(content: Content) -> Iterator[str]:
    for sample in content["samples"]:
        yield ""
        yield f"> {sample['prompt']}{sample['text']}"


def _conditions(content: Content) -> Iterator[str]:
    known = content["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    yield ""
    yield f"{known['device']}, {known['dtype']}, {versions}, {known['date']}"
    read = [f"{n} {known[n]:,}" for n in ("length", "stride", "tokens_read") if n in known]
    if read or "text" in known:
        yield ", ".join([*([known["text"]] if "text" in known else []), *read])


def _value(content: Content, path: tuple[str, ...]) -> Any:
    found: Any = content
    for key in path:
        if found is None:
            return None
        found = found.get(key)
    return found


def _shown(value: Any, digits: int | None) -> str:
    if value is None:
        return "-"
    if digits is None:
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.{digits}f}"
