"""A repository on the Hub as a push sees it: where its branch is, and what lies there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from .retry import logger, with_retries

PULL_REQUESTS = "refs/pr/"
_BLOCK = 2**20

# Of each file in a tree: the sha256 of a large one, else git's blob id.
Tree = dict[str, str]


@dataclass(frozen=True)
class Repository:
    """`api`, `repo_id` and `token` together; every method is one question or one change."""

    api: HfApi
    repo_id: str
    token: str | bool | None

    def head(self, revision: str | None) -> str | None:
        """The commit that `revision` (None: main) points to; None where there is no such branch.

        Raises:
            ValueError: there is no such pull request.
        """
        what = f"reading {self.repo_id}"
        try:
            return str(
                with_retries(
                    what,
                    lambda: self.api.repo_info(self.repo_id, revision=revision, token=self.token),
                ).sha
            )
        except RevisionNotFoundError as error:
            if revision is not None and not revision.startswith(PULL_REQUESTS):
                return None
            raise ValueError(
                f"{what}: expected a branch or a pull request of it, {revision!r} is neither. "
                f"Look at {self.api.endpoint}/{self.repo_id}/discussions for the number"
            ) from error

    def tree(self, revision: str) -> Tree:
        """Every file at `revision`, with what tells whether it has changed."""
        entries = with_retries(
            f"listing {self.repo_id}",
            lambda: list(
                self.api.list_repo_tree(
                    self.repo_id, recursive=True, revision=revision, token=self.token
                )
            ),
        )
        files = (entry for entry in entries if isinstance(entry, RepoFile))
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    def pull_requests(self) -> dict[str, str]:
        """`refs/pr/N` of every pull request -> its newest commit."""
        refs = with_retries(
            f"reading the pull requests of {self.repo_id}",
            lambda: self.api.list_repo_refs(
                self.repo_id, include_pull_requests=True, token=self.token
            ),
        )
        return {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}

    def create_branch(self, branch: str, start: str) -> None:
        """Let `branch` begin at the commit `start`; no harm where it is there already."""
        with_retries(
            f"creating the branch {branch}",
            lambda: self.api.create_branch(
                self.repo_id, branch=branch, revision=start, token=self.token, exist_ok=True
            ),
        )

    def drop_branch(self, branch: str, start: str) -> None:
        """Delete a branch that still is where it began; a warning where that is not possible.

        Tried once: it is called when something has failed already.
        """
        try:
            if self.api.repo_info(self.repo_id, revision=branch, token=self.token).sha == start:
                self.api.delete_branch(self.repo_id, branch=branch, token=self.token)
        except RevisionNotFoundError:
            return
        except Exception as error:
            logger.warning(
                f"{self.repo_id}: the new branch {branch} may be there, with what was on main; it "
                f"could not be looked at or deleted ({type(error).__name__})"
            )

    def holds(self, commit: str, files: Mapping[str, Path], gone: tuple[str, ...]) -> bool:
        """Whether the tree at `commit` has `files` with their content, and nothing of `gone`."""
        tree = self.tree(commit)
        return not any(path in tree for path in gone) and all(
            tree.get(path) in _identities(file) for path, file in files.items()
        )


def own_repository(api: HfApi, name: str, token: str | bool | None) -> str:
    """`name` with the namespace of whom the token belongs to: the card says how to load it."""
    user = with_retries("asking whose the token is", lambda: api.whoami(token=token))
    return f"{user['name']}/{name}"


def open_repository(
    api: HfApi, repo_id: str, *, private: bool | None, token: str | bool | None
) -> Repository:
    """The repository, created if it is not there.

    Raises:
        ValueError: it was to be private, and is there and public.
        PermissionError: the token may not write to it.
    """
    what = f"creating {repo_id}"
    url = with_retries(
        what,
        lambda: api.create_repo(repo_id, private=private, token=token, exist_ok=True),
    )
    full = url.repo_id
    if private is not None:
        _check_visibility(api, full, private, token)
    return Repository(api, full, token)


def _check_visibility(api: HfApi, repo_id: str, private: bool, token: str | bool | None) -> None:
    # An existing repository stays what it is: the Hub reads `private` for new ones only.
    info = with_retries(f"reading {repo_id}", lambda: api.repo_info(repo_id, token=token))
    if private and not info.private:
        raise ValueError(
            f"{repo_id}: expected a private repository, it is there and public. Make it private in "
            f"its settings ({api.endpoint}/{repo_id}/settings), or push without private"
        )
    if info.private and not private:
        logger.warning(f"{repo_id} is private and stays so: change that in its settings")


def _identities(file: Path) -> tuple[str, str]:
    """A file's sha256, and git's id of it as a blob."""
    size = file.stat().st_size
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            sha256.update(block)
            blob.update(block)
    return sha256.hexdigest(), blob.hexdigest()


def main_branch(revision: str | None) -> bool:
    """Whether `revision` is the branch that every repository has."""
    return revision in (None, constants.DEFAULT_REVISION)
