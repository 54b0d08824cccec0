"""The base that a store was made for: its digest on disk, and whether a model is still that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..runtime.encoding import parsed_json, strict_json
from .belief import checked_bytes
from .digest import TOKENIZER_LEAF, BaseDigest, compute_digest, passing_leaves
from .errors import IncompatibleBaseError, IntegrityError, KnowledgeError, UnsafeFileError
from .manifest import Manifest
from .store_changes import read_manifest
from .store_files import LARGEST_JSON, confined, read_bytes, write_bytes

BASE_FILE = "base.json"


class Verified(NamedTuple):
    """How much `verify` compared: leaves of the base (tensors, configuration, tokenizer), files."""

    leaves: int
    files: int


@dataclass(frozen=True)
class PinnedBase:
    """The digest that a store keeps of its base.

    Attributes:
        root: of the store.
        digest: as pinned when the store was made.
        passing: leaves of what is not saved with the model, as they were when it was opened.
    """

    root: Path
    digest: BaseDigest
    passing: Mapping[str, str]

    @property
    def tokenizer(self) -> str:
        """The tokenizer's digest, "" without one."""
        return self.digest.leaves.get(TOKENIZER_LEAF, "")

    @classmethod
    def pin(cls, root: Path, digest: BaseDigest, model: nn.Module) -> PinnedBase:
        """Write the digest into a new store."""
        text = strict_json({"root": digest.root, "leaves": dict(digest.leaves)})
        write_bytes(root / BASE_FILE, (text + "\n").encode())
        return cls(root, digest, passing_leaves(model))

    @classmethod
    def read(cls, root: Path, model: nn.Module, tokenizer: Any) -> PinnedBase:
        """The digest that a store has.

        Raises:
            IncompatibleBaseError: `model` or `tokenizer` is another.
            UnsafeFileError: no store, or one whose files contradict each other.
        """
        manifest = read_manifest(root)
        digest = _read_leaves(root, manifest)
        changes = digest.compare(_digest_now(digest, model, tokenizer))
        if changes:
            raise IncompatibleBaseError(
                f"{root}: expected the base that its deltas were made for "
                f"({manifest.base_digest[:12]}), got another {type(model).__name__}. {changes}. "
                "Load that base, or create a store for this one"
            )
        return cls(root, digest, passing_leaves(model))

    def verify(self, model: nn.Module, tokenizer: Any, manifest: Manifest) -> Verified:
        """Compare everything. Raises IntegrityError with the names of what differs."""
        wrong = self.digest.compare(_digest_now(self.digest, model, tokenizer)).names()
        passing = BaseDigest(self.passing).compare(BaseDigest(passing_leaves(model))).names()
        entries = [e for e in manifest.entries.values() if e.state != "purged"]
        files, reasons = [], []
        for entry in entries:
            try:
                checked_bytes(self.root, entry)
            except (KnowledgeError, OSError) as error:
                files.append(entry.file)
                reasons.append(str(error))
        names = [*wrong, *passing, *files]
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise IntegrityError(
                f"{self.root}: expected the base and the files as they were pinned, "
                f"{len(names)} differ: {shown}. {reasons[0] if reasons else 'Load the base anew'}",
                names,
            )
        return Verified(len(self.digest.leaves) + len(self.passing), len(entries))


def _digest_now(pinned: BaseDigest, model: nn.Module, tokenizer: Any) -> BaseDigest:
    """Of a model; a tokenizer that is not given counts as the pinned one, as one not pinned."""
    has_tokenizer = TOKENIZER_LEAF in pinned.leaves
    digest = compute_digest(model, tokenizer if has_tokenizer else None)
    if has_tokenizer and tokenizer is None:
        leaf = {TOKENIZER_LEAF: pinned.leaves[TOKENIZER_LEAF]}
        return BaseDigest({**digest.leaves, **leaf})
    return digest


def _read_leaves(root: Path, manifest: Manifest) -> BaseDigest:
    path = confined(root, BASE_FILE)
    try:
        leaves = parsed_json(read_bytes(path, LARGEST_JSON))["leaves"]
        digest = BaseDigest({str(name): str(leaf) for name, leaf in leaves.items()})
        is_pinned = digest.root == manifest.base_digest
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        is_pinned = False
    if not is_pinned:
        raise UnsafeFileError(
            f"{path}: expected the leaves of the digest {manifest.base_digest[:12]}, got none or "
            "others: damaged or edited. Bring the file back from a copy"
        )
    return digest
