"""How `push_to_hub` of a model ends in the library's own push, with a card of what the model is.

Cards stand on a floor above this one. The facade, which may see every floor, hands the publisher
down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Publisher = Callable[..., Any]

_publisher: Publisher | None = None


def set_publisher(publisher: Publisher) -> None:
    """Let `push_to_hub` end in `publisher(model, repo_id, **options)`."""
    global _publisher
    _publisher = publisher


def route_pushes(model_class: type[PreTrainedModel]) -> None:
    """Let `push_to_hub` of a class and those below it bring a card that says what the model is,
    where transformers would bring a form to fill in. More choices: `push_gravity_model`."""

    @functools.wraps(model_class.push_to_hub)
    def push_to_hub(self: Any, repo_id: str, **options: Any) -> Any:
        if _publisher is None:
            raise RuntimeError(
                "push_to_hub: expected the library to be imported as gravity_hf, which says how "
                "models are pushed. import gravity_hf"
            )
        given = options.pop("tags", None)
        tags = [given] if isinstance(given, str) else list(given or ())
        own = list(getattr(self, "model_tags", None) or ())
        tags = [*own, *(tag for tag in tags if tag not in own)]
        return _publisher(self, repo_id, tags=tags, **options)

    model_class.push_to_hub = push_to_hub  # type: ignore[method-assign]
