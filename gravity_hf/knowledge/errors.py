"""What can go wrong in the knowledge plane: a class for each thing a caller may want to handle."""

from __future__ import annotations

from collections.abc import Sequence


class KnowledgeError(RuntimeError):
    """Of all errors here the base; its text is the message."""


class DuplicateKeyError(KnowledgeError):
    """A key that the store has already."""


class UnknownKeyError(KnowledgeError, KeyError):
    """A key, id or version that the store does not have."""

    # KeyError would show the message in quotes, with its line breaks escaped.
    __str__ = RuntimeError.__str__


class IncompatibleBaseError(KnowledgeError):
    """A model or tokenizer other than the one that the deltas were made for."""


class CapacityError(KnowledgeError):
    """A module has no directions left that no other delta uses."""


class InterferenceError(KnowledgeError):
    """A delta would disturb others.

    Attributes:
        conflicts: ids of those.
    """

    def __init__(self, message: str, conflicts: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.conflicts = list(conflicts)


class ValidationError(KnowledgeError):
    """Facts, factors or settings that are not what they have to be, or a delta that does not do
    what it is for."""


class IntegrityError(KnowledgeError):
    """Something is not as it was written.

    Attributes:
        names: of the tensors or files that differ.
    """

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = list(names)


class UnsafeFileError(KnowledgeError):
    """A file that is refused before anything in it is used: not of the format, too large, not
    finite, or one that would run code."""


class BudgetError(KnowledgeError):
    """More parameters for a fact than it may have."""


class QuantizationError(KnowledgeError):
    """No width meets the tier that was asked for."""


class LockTimeoutError(KnowledgeError):
    """Another process held the store for longer than this one waits."""
