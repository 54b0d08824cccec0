"""What a store is asked: its beliefs, their history, whether all is as it was, and their use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import history as versions
from . import store_exchange as exchange
from . import store_use as use
from .belief import Belief
from .digest import BaseDigest
from .errors import UnknownKeyError
from .history import Version
from .manifest import Entry
from .pinned_base import PinnedBase, Verified
from .store_changes import Changes
from .store_lock import StoreLock

if TYPE_CHECKING:
    from .bank import DeltaBank


class StoreReader:
    """The part of `BeliefStore` that changes nothing.

    Attributes:
        path: of the folder.
        model, tokenizer: as given.
    """

    def __init__(
        self, path: Path, model: nn.Module, tokenizer: Any, base: PinnedBase, timeout: float
    ) -> None:
        self.path = path
        self.model = model
        self.tokenizer = tokenizer
        self._base = base
        self._changes = Changes(path, StoreLock(path, timeout))

    @property
    def base_digest(self) -> BaseDigest:
        """Of the base that the store is for."""
        return self._base.digest

    @property
    def revision(self) -> int:
        """One more with every change; below 0 in a transaction, another after every step of it."""
        return self._changes.manifest.revision

    def keys(self) -> list[str]:
        """Of the beliefs in force, sorted."""
        return list(self._changes.manifest.active)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._changes.manifest.active)

    def __contains__(self, key: object) -> bool:
        return key in self._changes.manifest.active

    def get(self, key: str) -> Belief:
        """The belief in force. UnknownKeyError where there is none."""
        return self._belief(versions.active_entry(self._changes.manifest, key))

    def by_id(self, belief_id: str) -> Belief:
        """Any version of any key, also one not in force. UnknownKeyError where there is none."""
        entry = self._changes.manifest.entries.get(belief_id)
        if entry is None:
            raise UnknownKeyError(f"{belief_id!r}: expected the id of a version in the store")
        return self._belief(entry)

    def history(self, key: str) -> list[Version]:
        """Every version that `key` had, oldest first. UnknownKeyError where it never had one."""
        return versions.history_of(self._changes.manifest, key)

    def reload(self) -> None:
        """See what other processes wrote."""
        self._changes.reload()

    def verify(self) -> Verified:
        """Compare the base in memory and every file with their digests; how many were compared.

        Raises:
            IntegrityError: some differ; `names` has them all.
        """
        return self._base.verify(self.model, self.tokenizer, self._changes.manifest)

    def active(self, keys: Sequence[str]) -> AbstractContextManager[None]:
        """Calls of the model inside have these beliefs in every row, through peft's layers, summed
        in the order of their ids. Afterwards the model has the very modules it had.

        For one thread at a time; requests beside each other go through `compile_bank`.

        Raises:
            UnknownKeyError: a key not in force.
            KnowledgeError: peft is missing.
        """
        return use.activated(self.model, [self.get(key) for key in keys])

    def compile_bank(
        self, keys: Sequence[str] | None = None, dtype: torch.dtype | None = None
    ) -> DeltaBank:
        """A bank with the beliefs of `keys`, by id; None takes all in force. It does not follow
        later changes of the store."""
        beliefs = [self.get(key) for key in (self.keys() if keys is None else keys)]
        return use.compiled(self.model, beliefs, dtype)

    def routed(
        self, router: Any, texts: Sequence[str], bank: DeltaBank | None = None
    ) -> AbstractContextManager[list[list[str]]]:
        """Calls of the model inside have in each row what `router` finds for its text; the ids.

        Args:
            router: with `rows(texts)`, as `Router`.
            texts: one for each row of the batch.
            bank: by default one with the beliefs that are needed.
        """
        return use.routed(self, router, texts, bank)

    def export_peft(self, key: str, directory: str | os.PathLike[str]) -> None:
        """Write the belief as an adapter that peft loads; the folder must be new or empty.

        Raises:
            ValidationError: a residual delta, which peft has no adapter for; a folder in use.
        """
        exchange.export_peft(self, key, directory)

    def _belief(self, entry: Entry) -> Belief:
        return Belief(self.path, entry, self._changes.data(entry))
