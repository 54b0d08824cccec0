"""From which similarity on a belief is used, and how sure answers are: measured on the store."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..confidence import ConfidenceModel
from ..errors import ValidationError
from ..routing import Router, RouterCalibration
from ..routing_index import indexed_texts

FILE_NAME = "calibration.json"
# Of what was tried the one that found most beliefs.
DEFAULT_ENCODER = "hidden:quarter"
_FORMAT = "gravity-calibration/1"
# Fewer queries of a kind say nothing about a precision.
_ENOUGH = 10


@dataclass(frozen=True)
class Calibration:
    """What was measured, for a file beside the beliefs.

    Attributes:
        router: threshold of routing; None: beliefs are used by name only.
        confidence: model of an answer's chance to be right; None: none.
        encoder: of the router.
    """

    router: RouterCalibration | None
    confidence: ConfidenceModel | None
    encoder: str = DEFAULT_ENCODER

    @classmethod
    def empty(cls) -> Calibration:
        """Nothing was measured."""
        return cls(None, None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """From a file.

        Raises:
            ValidationError: it is no calibration.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            found = content.pop("format", None)
            router, confidence = content.pop("router"), content.pop("confidence")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValidationError(f"{path}: expected a calibration as JSON ({error})") from error
        if found != _FORMAT or content:
            raise ValidationError(
                f"{path}: expected the format {_FORMAT}, got {found!r:.60}. Calibrate again"
            )
        made = None if router is None else RouterCalibration.from_json(router)
        return cls(
            made,
            None if confidence is None else ConfidenceModel.from_json(confidence),
            cls.encoder if made is None else made.encoder,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        content = {
            "format": _FORMAT,
            "router": None if self.router is None else self.router.to_json(),
            "confidence": None if self.confidence is None else self.confidence.to_json(),
        }
        target = Path(path)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def make_router(self, store: Any, threshold: float | None = None) -> Router:
        """A router of `store` with this calibration, or with a threshold of its own."""
        router = Router(
            store, self.encoder, threshold="calibrated" if threshold is None else threshold
        )
        if self.router is not None:
            router.calibration = self.router
        return router


def queries(store: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Texts with the key that they are about, which the router was not given; and texts about no
    belief of the store, near as they are."""
    facts = [(key, store.get(key)) for key in sorted(store.keys())]
    known, about = [], set()
    for key, belief in facts:
        if belief.fact is None:
            continue
        about.update(belief.fact.prompts)
        indexed = set(indexed_texts(belief))
        known += [(text, key) for text in belief.fact.paraphrases if text not in indexed]
    near = {text for _, belief in facts if belief.fact for text in belief.fact.unrelated}
    return known, sorted(near - about)


def calibrate_routing(
    store: Any, *, precision: float = 0.95, encoder: str = DEFAULT_ENCODER
) -> RouterCalibration | None:
    """Measure the threshold on the store's own held-out paraphrases and unrelated prompts; None
    where it has fewer than ten of either."""
    known, unknown = queries(store)
    if min(len(known), len(unknown)) < _ENOUGH:
        return None
    return Router(store, encoder).calibrate(known, unknown, precision)
