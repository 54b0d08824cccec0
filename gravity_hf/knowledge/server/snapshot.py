"""A store as it is at one revision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..belief import Belief
from ..errors import UnknownKeyError


@dataclass(frozen=True)
class Snapshot:
    """What readers see of the store without asking the model's thread; it never changes.

    Attributes:
        revision: of the store.
        beliefs: in force, sorted by key.
        names: keys and ids -> belief.
        versions: `<id>-v<version>` of the beliefs.
    """

    revision: int
    beliefs: tuple[Belief, ...]
    names: Mapping[str, Belief]
    versions: tuple[str, ...]

    @classmethod
    def of(cls, revision: int, beliefs: Sequence[Belief]) -> Snapshot:
        """Of these beliefs. A key that looks like another's id counts as the key."""
        names = {belief.id: belief for belief in beliefs}
        names.update({belief.key: belief for belief in beliefs})
        versions = tuple(f"{belief.id}-v{belief.version}" for belief in beliefs)
        return cls(revision, tuple(beliefs), names, versions)

    def find(self, name: str) -> Belief:
        """The belief of a key or id.

        Raises:
            UnknownKeyError: there is none.
        """
        try:
            return self.names[name]
        except KeyError:
            raise UnknownKeyError(
                f"expected the key or id of a belief in the store, got {name!r:.100}. "
                "GET /beliefs lists them"
            ) from None
