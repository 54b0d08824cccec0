"""The file of a profile: which model it is of, and which of its tiers to run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .profiling import MANIFEST_VERSION

# Manifests that may lie beside a model: of several devices, say.
MANIFEST_NAMES = "profile*.json"


def folder_digest(folder: Path) -> str:
    """SHA-256 of the files that a model is loaded from, and of their names: those in its folder
    itself, but hidden ones, profiles and what is written about it. Checkpoints and figures below do
    not count."""
    total = hashlib.sha256()
    for file in sorted(x for x in folder.iterdir() if x.is_file() and _is_of_model(x)):
        total.update(f"{file.name}\0".encode())
        total.update(_digest(file))
    return total.hexdigest()


def check_place(file: Path, folder: Path) -> None:
    """ValueError for a manifest within `folder` that would count as a part of the model."""
    if file.resolve().parent == folder.resolve() and not file.match(MANIFEST_NAMES):
        raise ValueError(
            f"profile: --out: expected a name such as profile.json in the model's own folder, got "
            f"{file.name!r}, which would count as a part of the model"
        )


def read_manifest(file: Path, folder: Path | None = None) -> dict[str, Any]:
    """The manifest in `file`.

    Args:
        folder: the model that is to be run by it; None: it is not compared.

    Raises:
        ValueError: no manifest, one of another version, or one of another model than in `folder`.
    """
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"profile: expected a manifest of `gravity-hf profile`, got {str(file)!r} ({error})"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        raise ValueError(
            f"profile: {file}: expected a manifest of version {MANIFEST_VERSION}. Profile the "
            "model again"
        )
    if folder is not None and manifest.get("digest") != folder_digest(folder):
        raise ValueError(
            f"profile: {file}: expected the profile of {str(folder)!r}, which has changed since or "
            "is another model. Profile it again"
        )
    return manifest


def select_tier(
    manifest: Mapping[str, Any],
    max_latency_ms: float | None = None,
    min_quality: float | None = None,
    *,
    max_peak_bytes: int | None = None,
) -> dict[str, Any] | None:
    """The tier to run: of those within the bounds the one with the least loss, and of equals the
    fastest; None where no tier is within them.

    Args:
        max_latency_ms: of a single token, the median.
        min_quality: the share of tokens whose likeliest next one is the full tier's, in [0, 1].
        max_peak_bytes: the most memory; tiers of which it is not known do not count as within it.
    """
    within = [
        tier
        for tier in manifest["tiers"]
        if (max_latency_ms is None or tier["decode_ms"]["p50"] <= max_latency_ms)
        and (min_quality is None or tier["agreement"] >= min_quality)
        and (max_peak_bytes is None or (tier["peak_bytes"] or float("inf")) <= max_peak_bytes)
    ]
    return min(within, key=lambda tier: (tier["loss"], tier["decode_ms"]["p50"]), default=None)


def _digest(file: Path) -> bytes:
    content = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            content.update(piece)
    return content.digest()


def _is_of_model(file: Path) -> bool:
    described = file.match(MANIFEST_NAMES) or file.suffix == ".md"
    return not described and not file.name.startswith(".")
