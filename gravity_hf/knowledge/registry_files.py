"""A registry on disk, beside its store: whole or as it was before.

`<store>/registry/registry.json` names everything else: one safetensors file for each delta with
its factors and the moments of its prompts, one for the moments of unrelated text, and the SHA-256
of each. New files are written first, then the JSON by a rename, then files that nothing names any
more are deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ..runtime.encoding import parsed_json
from .delta import LowRankDelta
from .errors import IncompatibleBaseError, IntegrityError, KnowledgeError, LockTimeoutError
from .leakage import Moments, SecondMoment
from .registry_member import Member
from .registry_verdict import Limits

FORMAT = "gravity-registry/1"
FOLDER, FILE = "registry", "registry.json"
_MOMENT = ".moment"
_PATIENCE = 60.0  # seconds that another process may hold the lock


@dataclass(frozen=True, eq=False)
class State:
    """What is kept.

    Args:
        base: digest of the base.
        members: in the order of registration.
        generic: moments of unrelated text.
        limits: that the last delta was judged by.
    """

    base: str
    members: list[Member]
    generic: Moments
    limits: Limits


class RegistryFiles:
    """Reads and writes the registry of one store's folder.

    Args:
        store: the folder.
    """

    def __init__(self, store: str | os.PathLike[str]) -> None:
        self.folder = Path(store) / FOLDER
        self._revision = 0

    def read(self, base: str) -> State | None:
        """What was written last; None where nothing was.

        Raises:
            IntegrityError: something is not as it was written.
            IncompatibleBaseError: it is of another base than `base`.
        """
        content = self._content()
        if content is None:
            self._revision = 0
            return None
        if content["base"] != base:
            raise IncompatibleBaseError(
                f"{self.folder}: expected a registry of the base {base[:12]}, got one of "
                f"{content['base'][:12]}. Open it with its own base"
            )
        try:
            members = [self._member(entry) for entry in content["members"]]
            generic = self._moments(content["generic"]) if content["generic"] else {}
            limits = Limits(**content["limits"])
        except (KeyError, TypeError) as error:
            raise self._damaged(FILE, f"got an entry without {error}") from error
        self._revision = content["revision"]
        return State(base, members, generic, limits)

    def is_current(self) -> bool:
        """Whether nobody has written since this one read or wrote."""
        content = self._content()
        return self._revision == (0 if content is None else content["revision"])

    def write(self, state: State) -> None:
        """Put `state` in the place of what was read or written last.

        Raises:
            KnowledgeError: another process has written meanwhile.
            LockTimeoutError: one is writing, for a minute now.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=_PATIENCE):
                self._write(state)
        except Timeout as error:
            raise LockTimeoutError(
                f"{self.folder}: expected to write within {_PATIENCE:g} s, another process holds "
                "the lock. Try again when it is done"
            ) from error

    def _write(self, state: State) -> None:
        old = self._content() or {"revision": 0}
        if old["revision"] != self._revision:
            raise KnowledgeError(
                f"{self.folder}: expected revision {self._revision}, which was read, got "
                f"{old['revision']}: another process wrote it. Call reload() and register again"
            )
        content = {
            "format": FORMAT,
            "base": state.base,
            "revision": self._revision + 1,
            "limits": dataclasses.asdict(state.limits),
            "generic": self._write_moments(state.generic) if state.generic else None,
            "members": [self._write_member(member) for member in state.members],
        }
        _replace(self.folder / FILE, (json.dumps(content, indent=1) + "\n").encode())
        self._revision += 1
        for file in _named(old) - _named(content):
            (self.folder / file).unlink(missing_ok=True)

    def _write_member(self, member: Member) -> dict[str, Any]:
        tensors = {**member.delta.to_tensors(), **_kept(member.moments)}
        return {"id": member.id, **self._write_tensors(tensors), "moments": _told(member.moments)}

    def _write_moments(self, moments: Moments) -> dict[str, Any]:
        return {**self._write_tensors(_kept(moments)), "moments": _told(moments)}

    def _write_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Under the name of its content, so that what is there already is not written again."""
        from safetensors.torch import save

        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        digest = hashlib.sha256(content).hexdigest()
        file = f"{digest}.safetensors"
        if not (self.folder / file).is_file():
            _replace(self.folder / file, content)
        return {"file": file, "sha256": digest}

    def _content(self) -> dict[str, Any] | None:
        file = self.folder / FILE
        if not file.is_file():
            return None
        try:
            content = parsed_json(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise self._damaged(FILE, "got something that is no JSON") from error
        known = isinstance(content, dict) and content.get("format") == FORMAT
        whole = known and isinstance(content.get("revision"), int) and "base" in content
        if not whole:
            raise self._damaged(FILE, f"got none of the format {FORMAT}")
        return content

    def _member(self, entry: Mapping[str, Any]) -> Member:
        tensors = self._tensors(entry)
        factors = {name: x for name, x in tensors.items() if not name.endswith(_MOMENT)}
        moments = self._moments_in(tensors, entry["moments"])
        return Member.of(entry["id"], LowRankDelta.from_tensors(factors), moments)

    def _moments(self, entry: Mapping[str, Any]) -> dict[str, SecondMoment]:
        return self._moments_in(self._tensors(entry), entry["moments"])

    @staticmethod
    def _moments_in(
        tensors: Mapping[str, Tensor], told: Mapping[str, Any]
    ) -> dict[str, SecondMoment]:
        return {
            name: SecondMoment(tensors[name + _MOMENT], int(own["tokens"]), float(own["energy"]))
            for name, own in told.items()
        }

    def _tensors(self, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        from safetensors.torch import load

        digest, name = entry["sha256"], entry["file"]
        # The name follows from the content: no path of somebody else's choosing is opened.
        file = self.folder / f"{digest}.safetensors"
        if name != file.name or file.parent != self.folder or not file.is_file():
            raise self._damaged(str(name), "got no such file")
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise self._damaged(file.name, "got another content")
        return load(content)

    def _damaged(self, file: str, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self.folder / file}: expected what was written, {what}: edited or damaged. Restore "
            "it from a copy, or delete the folder and register the deltas again",
            [file],
        )


def _named(content: Mapping[str, Any]) -> set[str]:
    entries = [*content.get("members", []), *filter(None, [content.get("generic")])]
    return {entry["file"] for entry in entries}


def _kept(moments: Moments) -> dict[str, Tensor]:
    return {name + _MOMENT: moment.kept for name, moment in moments.items()}


def _told(moments: Moments) -> dict[str, Any]:
    return {name: {"tokens": m.tokens, "energy": m.output_energy} for name, m in moments.items()}


def _replace(file: Path, content: bytes) -> None:
    """Written whole under another name, forced to the disk, renamed."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(unfinished, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(file)
