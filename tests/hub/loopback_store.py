"""The repositories of a Hub in memory: commits, branches, pull requests, large files."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

MAIN = "main"


class Refused(Exception):
    """An answer other than 200: status, the Hub's error code, and words."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Entry:
    """A file of a tree. `sha256` where it is a large one."""

    content: bytes
    sha256: str | None = None

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id


Tree = dict[str, Entry]


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # As on the Hub, a new repository has a first commit.
        first = {".gitattributes": Entry(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        self.refs[MAIN] = self._store(first, "initial commit")

    def oid(self, revision: str) -> str:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def tree(self, revision: str) -> Tree:
        return self.commits[self.oid(revision)]

    def paths(self, revision: str = MAIN) -> set[str]:
        return set(self.tree(revision)) - {".gitattributes"}

    def branch(self, name: str, start: str | None) -> None:
        if name in self.refs:
            raise Refused(409, f"Reference already exists: {name}")
        self.refs[name] = self.oid(start or MAIN)

    def commit(self, revision: str, lines: list[dict[str, Any]], create_pr: bool) -> dict[str, str]:
        """All operations or none; the new commit, and the pull request's ref if there is one."""
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = header.get("parentCommit")
        head = self.oid(revision)
        if parent is not None and parent != head and not create_pr:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(self.commits[parent if create_pr and parent else head])
        for line in lines:
            if line["key"] != "header":
                self._apply(tree, line["key"], line["value"])
        oid = self._store(tree, header["summary"])
        ref = f"refs/pr/{self._next_pull_request()}" if create_pr else revision
        self.refs[ref] = oid
        return {"oid": oid, "ref": ref}

    def _apply(self, tree: Tree, key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = Entry(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.large:
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
            tree[path] = Entry(self.large[value["oid"]], value["oid"])
        elif key == "deletedFile":
            if tree.pop(path, None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise Refused(400, f"unknown operation {key}")

    def _next_pull_request(self) -> int:
        return 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)

    def _store(self, tree: Tree, message: str) -> str:
        oid = hashlib.sha1(repr((len(self.messages), message, sorted(tree))).encode()).hexdigest()
        self.commits[oid] = tree
        self.messages.append(message)
        return oid


class Store:
    """Repositories by `namespace/name`, and who may write."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}

    def create(self, name: str, private: bool) -> Repo:
        if name in self.repos:
            raise Refused(409, "You already created this model repo")
        self.repos[name] = Repo(name, private)
        return self.repos[name]

    def repo(self, name: str, user: str | None) -> Repo:
        found = self.repos.get(name)
        if found is None or (found.private and user is None):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return found
