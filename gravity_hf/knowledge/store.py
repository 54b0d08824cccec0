"""A folder of beliefs: facts as deltas of one frozen base, added, updated, taken back and checked.

    kb/manifest.json                    versions and the digests of their files
    kb/base.json                        the base's digest, tensor by tensor
    kb/deltas/<id>-v<version>.safetensors

Facts are active only inside `active` and `routed`; nothing ever writes into the base.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from . import history as versions
from . import store_exchange as exchange
from .belief import Belief, checked_bytes
from .delta import LowRankDelta
from .digest import compute_digest
from .errors import ValidationError
from .facts import Fact
from .history import Version
from .manifest import Manifest
from .pinned_base import PinnedBase
from .store_changes import MANIFEST_FILE
from .store_encoding import encoded, fact_of
from .store_files import delta_bytes, sha256, write_bytes
from .store_lock import StoreLock
from .store_reader import StoreReader

if TYPE_CHECKING:
    from .encoding import EncodedBelief
    from .encoding_config import EncodingConfig
    from .quantized_delta import PrecisionReport
    from .quantizing import Quantized

__all__ = ["Belief", "BeliefStore", "Version"]

LOCK_TIMEOUT = 60.0


class BeliefStore(StoreReader):
    """Made by `create` or `open`. Several processes may use one folder: writers wait for each
    other, and `reload` shows what others wrote.

    Attributes:
        path: of the folder.
        model, tokenizer: as given.
    """

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        tokenizer: Any = None,
        encoder: EncodingConfig | None = None,
        *,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> BeliefStore:
        """A new store for this base, whose digest it keeps.

        Args:
            path: a folder that is not there, or an empty one.
            encoder: how `add` makes facts into deltas.
            lock_timeout: seconds to wait for another writer.

        Raises:
            ValidationError: the folder holds something.
            LockTimeoutError: another process writes there.
        """
        root = Path(path).resolve()
        root.mkdir(parents=True, exist_ok=True)
        lock = StoreLock(root, lock_timeout)
        digest = compute_digest(model, tokenizer)
        with lock.held():
            there = sorted(p.name for p in root.iterdir() if p.name != lock.name)
            if there:
                raise ValidationError(
                    f"BeliefStore.create: expected a new or empty folder, got {str(root)!r} with "
                    f"{there[0]}. Open a store that is there, or choose another folder"
                )
            base = PinnedBase.pin(root, digest, model)
            settings = None if encoder is None else encoder.to_dict()
            manifest = Manifest(digest.root, base.tokenizer, versions.now(), encoder=settings)
            write_bytes(root / MANIFEST_FILE, manifest.to_bytes())
        return cls(root, model, tokenizer, base, lock_timeout)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        tokenizer: Any = None,
        *,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> BeliefStore:
        """The store of this base in a folder.

        Raises:
            IncompatibleBaseError: the base or the tokenizer is another; the message names tensors.
            UnsafeFileError, IntegrityError: no store, or a damaged one.
        """
        root = Path(path).resolve()
        base = PinnedBase.read(root, model, tokenizer)
        return cls(root, model, tokenizer, base, lock_timeout)

    def transaction(self) -> AbstractContextManager[None]:
        """All changes inside, or none where an exception leaves the block; no other writer between.

        Raises:
            LockTimeoutError: another process writes for longer than `lock_timeout`.
        """
        return self._changes.transaction()

    def add(
        self,
        prompt: str | Fact,
        answer: str | None = None,
        *,
        aliases: Sequence[str] = (),
        paraphrases: Sequence[str] = (),
        unrelated: Sequence[str] = (),
        key: str | None = None,
        source: str = "",
        progress: bool = False,
        **encoding: Any,
    ) -> Belief:
        """Encode a fact and keep it.

        Args:
            prompt: which `answer` completes; or a whole `Fact`, with none of the others.
            aliases, paraphrases, unrelated, source: see `Fact`.
            key: by default the fact's id, or one made of the prompt.
            **encoding: changes to the store's `EncodingConfig`.

        Raises:
            DuplicateKeyError: the key is in force.
            ValidationError, BudgetError: see `BeliefEncoder.encode`.
        """
        fields = {"aliases": aliases, "paraphrases": paraphrases, "unrelated": unrelated}
        fact = fact_of(prompt, answer, key, **fields, source=source)
        return self._add_encoded([key or fact.id], [fact], progress, encoding)[0]

    def add_many(
        self, facts: Sequence[Fact], *, progress: bool = True, **encoding: Any
    ) -> list[Belief]:
        """Encode facts together and keep all of them, or none; their ids are the keys."""
        return self._add_encoded([fact.id for fact in facts], facts, progress, encoding)

    def add_delta(
        self,
        key: str,
        delta: LowRankDelta,
        metadata: Mapping[str, Any] | None = None,
        fact: Fact | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> Belief:
        """Keep a delta that is there already.

        Raises:
            DuplicateKeyError: the key is in force.
            IncompatibleBaseError, UnsafeFileError: it does not fit the base, or is not finite.
        """
        versions.check_key(key)
        delta.check(self.model)
        data = delta_bytes(delta, _content(fact, metadata, report))
        with self.transaction():
            versions.check_new(self._changes.manifest, key)
            return self._stage(key, data, report or {}, ())

    def update_delta(
        self,
        key: str,
        delta: LowRankDelta,
        metadata: Mapping[str, Any] | None = None,
        fact: Fact | None = None,
        report: Mapping[str, Any] | None = None,
        *,
        quantized: Quantized | None = None,
    ) -> Belief:
        """The next version of a key, from a delta; raises as `add_delta`, and UnknownKeyError.

        Args:
            quantized: `delta` is what its codes stand for; the file gets the codes.
        """
        delta.check(self.model)
        data = delta_bytes(delta, _content(fact, metadata, report), quantized)
        with self.transaction():
            old = versions.active_entry(self._changes.manifest, key)
            return self._stage(key, data, report or {}, (old.id,))

    def update(
        self,
        key: str,
        answer: str,
        *,
        source: str | None = None,
        progress: bool = False,
        aliases: Sequence[str] = (),
        **encoding: Any,
    ) -> Belief:
        """Encode another answer to the same prompts as the next version of `key`.

        The aliases are those given: the older answer's would be wrong.

        Raises:
            UnknownKeyError: not in force.
            ValidationError: it came as a delta, without a fact.
        """
        old = self.get(key).fact
        if old is None:
            raise ValidationError(f"update: {key!r} has no fact: use update_delta, or remove it")
        said = old.source if source is None else source
        fact = dataclasses.replace(old, answer=answer, aliases=tuple(aliases), source=said)
        found = self._encode([fact], progress, encoding)[0]
        return self.update_delta(key, found.delta, fact=fact, report=found.report)

    def quantize(self, key: str, tier: int = 1, **settings: Any) -> PrecisionReport:
        """Put `key` in packed codes, as its next version; see `quantize_belief`.

        Raises:
            QuantizationError: no width of at most 8 bits meets the tier; nothing is changed.
        """
        from .quantized_beliefs import quantize_belief

        return quantize_belief(self, key, tier, **settings)

    def remove(self, key: str, purge: bool = False) -> None:
        """Take a key out of force. Its versions stay for `rollback`; with `purge` the files of all
        of them are deleted, and nothing brings them back.

        Raises:
            UnknownKeyError: not in force; to purge, one that was never there.
        """
        with self.transaction():
            self._changes.stage(versions.without_key(self._changes.manifest, key, purge))

    def rollback(self, key: str, version: int) -> Belief:
        """Put an earlier version of a key in force again, as its newest, with the same bytes.

        Raises:
            UnknownKeyError: no such version, or a purged one.
            IntegrityError: its file is damaged.
        """
        with self.transaction():
            manifest = self._changes.manifest
            old = versions.version_entry(manifest, key, version)
            data = self._changes.data(old) or checked_bytes(self.path, old)
            before = manifest.of_key(key)[-1]
            parents = (old.id,) if before is old else (old.id, before.id)
            return self._stage(key, data, old.metrics, parents)

    def import_peft(self, directory: str | os.PathLike[str], key: str | None = None) -> Belief:
        """Add a LoRA adapter of peft; `key` may be left out for one that `export_peft` wrote.

        Raises:
            UnsafeFileError: no plain LoRA in safetensors (see `adapter_files.read_adapter`).
            IncompatibleBaseError, DuplicateKeyError: see `add_delta`.
        """
        return exchange.import_peft(self, directory, key)

    def import_published(self, file: str | os.PathLike[str], key: str | None = None) -> Belief:
        """Add a published delta (`.delta`, or a `.pt` file with factors); its own id or name is the
        default key.

        Raises:
            UnsafeFileError: see `published_delta.read_published`.
            IncompatibleBaseError, DuplicateKeyError: see `add_delta`.
        """
        return exchange.import_published(self, file, key)

    def _stage(
        self, key: str, data: bytes, report: Mapping[str, Any], parents: tuple[str, ...]
    ) -> Belief:
        numbers = {
            name: value
            for name, value in report.items()
            if isinstance(value, bool | int | float) and math.isfinite(value)
        }
        manifest = self._changes.manifest
        entries, entry = versions.next_version(manifest, key, sha256(data), numbers, parents)
        self._changes.stage(entries, entry, data)
        return Belief(self.path, entry, data)

    def _encode(
        self, facts: Sequence[Fact], progress: bool, changes: Mapping[str, Any]
    ) -> list[EncodedBelief]:
        settings = self._changes.manifest.encoder or {}
        return encoded(self.model, self.tokenizer, facts, settings, changes, progress)

    def _add_encoded(
        self, keys: Sequence[str], facts: Sequence[Fact], progress: bool, changes: Mapping[str, Any]
    ) -> list[Belief]:
        # Before the long part, and again under the lock.
        for key in keys:
            versions.check_new(self._changes.manifest, versions.check_key(key))
        if len(set(keys)) < len(keys):
            raise ValidationError("add_many: expected different keys, got one twice")
        found = self._encode(facts, progress, changes)
        with self.transaction():
            return [
                self.add_delta(key, one.delta, None, fact, one.report)
                for key, fact, one in zip(keys, facts, found, strict=True)
            ]


def _content(
    fact: Fact | None, metadata: Mapping[str, Any] | None, report: Mapping[str, Any] | None
) -> dict[str, Any]:
    row = None if fact is None else fact.to_row()
    return {"fact": row, "metadata": metadata or {}, "report": report or {}}
