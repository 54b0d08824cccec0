"""One commit that brings all files of a push, sent once: everything before it changes nothing that
a loader sees, so a push that fails leaves the repository as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from .repository import PULL_REQUESTS, Repository, main_branch
from .retry import TRIES, give_up, is_conflict, is_passing, is_unsure, logger, pause
from .stale import stale_files

# A repository's own ignore rules would leave files out of the commit without a word.
_IGNORE_NOTHING = "# nothing\n"
_WEIGHTS = (".safetensors", ".onnx")


@dataclass(frozen=True)
class Commit:
    """What is to be committed, and where. `parent`: the commit that it was planned on."""

    repository: Repository
    files: Mapping[str, Path]
    gone: tuple[str, ...]
    revision: str | None
    create_pr: bool
    parent: str
    message: str
    description: str | None


def commit_files(
    repository: Repository,
    files: Mapping[str, Path],
    *,
    revision: str | None,
    create_pr: bool,
    message: str,
    description: str | None,
) -> CommitInfo:
    """Upload `files`, then commit them and the deletion of stale ones in one piece.

    Raises:
        PermissionError, ConnectionError, ValueError, RuntimeError: nothing was changed.
    """
    parent = repository.head(revision)
    new_branch = parent is None
    if parent is None:
        if create_pr:
            raise ValueError(
                f"{repository.repo_id}: expected a branch that a pull request can be made against, "
                f"there is none named {revision!r}. Push to main, or create the branch first"
            )
        parent = repository.head(None)
    if parent is None:
        raise ValueError(f"{repository.repo_id}: expected a main branch, found none")
    gone = stale_files(repository.tree(parent), files)
    commit = Commit(repository, files, gone, revision, create_pr, parent, message, description)
    upload_from = None if new_branch else revision
    additions = _upload(commit, upload_from)
    if new_branch and revision is not None:
        return _send_to_new(commit, revision, additions)
    return _send(commit, additions)


def _upload(commit: Commit, revision: str | None) -> list[CommitOperationAdd]:
    """Send the large files, each on its own; those that the server has are not sent again."""
    additions = [CommitOperationAdd(path, str(file)) for path, file in commit.files.items()]
    weights = [a for a in additions if a.path_in_repo.endswith(_WEIGHTS)]
    rest = [a for a in additions if not a.path_in_repo.endswith(_WEIGHTS)]
    with _bars_on_terminals():
        for batch in [rest, *([weight] for weight in weights)]:
            _upload_batch(commit, batch, revision)
    return additions


def _upload_batch(commit: Commit, batch: list[CommitOperationAdd], revision: str | None) -> None:
    repository = commit.repository
    names = batch[0].path_in_repo + (f" and {len(batch) - 1} more" if batch[1:] else "")
    try:
        # The Hub's client tries this again by itself.
        repository.api.preupload_lfs_files(
            repository.repo_id,
            batch,
            token=repository.token,
            revision=revision,
            create_pr=commit.create_pr,
            free_memory=False,
            gitignore_content=_IGNORE_NOTHING,
        )
    except Exception as error:
        give_up(f"uploading {names}", error)
    ignored = [a.path_in_repo for a in batch if getattr(a, "_should_ignore", False)]
    if ignored:
        raise RuntimeError(
            f"{repository.repo_id}: expected to upload {ignored[0]}, the repository's .gitignore "
            "keeps it out. Nothing was changed; delete that line there and push again"
        )


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """The Hub's client draws its bars into logs, too."""
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _send_to_new(commit: Commit, branch: str, additions: list[CommitOperationAdd]) -> CommitInfo:
    """A branch that this push has made for nothing goes again."""
    try:
        commit.repository.create_branch(branch, commit.parent)
        return _send(commit, additions)
    except BaseException:
        commit.repository.drop_branch(branch, commit.parent)
        raise


def _send(commit: Commit, additions: list[CommitOperationAdd]) -> CommitInfo:
    repository = commit.repository
    what = f"committing to {repository.repo_id}"
    before = set(repository.pull_requests()) if commit.create_pr else set()
    unsure = False
    attempt = 0
    while True:
        attempt += 1
        try:
            return _request(commit, additions)
        except Exception as error:
            unsure = unsure or is_unsure(error)
            if unsure and (done := _already_made(commit, before)) is not None:
                return done
            if is_conflict(error):
                raise RuntimeError(_raced(commit)) from error
            if attempt == TRIES or not is_passing(error):
                give_up(what, error)
            pause(what, error, attempt)


def _request(commit: Commit, additions: list[CommitOperationAdd]) -> CommitInfo:
    repository = commit.repository
    deletions = [CommitOperationDelete(path, is_folder=False) for path in commit.gone]
    return repository.api.create_commit(
        repository.repo_id,
        operations=[*additions, *deletions],
        commit_message=commit.message,
        commit_description=commit.description,
        token=repository.token,
        revision=None if main_branch(commit.revision) else commit.revision,
        create_pr=commit.create_pr,
        parent_commit=commit.parent,
    )


def _already_made(commit: Commit, before: set[str]) -> CommitInfo | None:
    """The commit, if a try has made it without our being told.

    An answer that was lost, or a fault after the work, hides a commit that was made: sent once
    more it would open a second pull request, or be refused for the wrong reason.
    """
    repository = commit.repository
    try:
        for ref, oid in _news(commit, before).items():
            if repository.holds(oid, commit.files, commit.gone):
                logger.warning(f"{repository.repo_id}: the commit was made; its answer was lost")
                return _info(commit, oid, ref if commit.create_pr else None)
    except (OSError, ValueError) as error:
        home = f"{repository.api.endpoint}/{repository.repo_id}"
        raise ConnectionError(
            f"committing to {repository.repo_id}: the connection was lost, and whether the commit "
            f"was made cannot be seen now. Look at {home}, or push again: a commit that is there "
            "is not made twice"
        ) from error
    return None


def _news(commit: Commit, before: set[str]) -> dict[str, str]:
    """Where our commit could be: pull requests since `before`, or the branch if it has moved."""
    if commit.create_pr:
        now = commit.repository.pull_requests()
        return {ref: oid for ref, oid in now.items() if ref not in before}
    head = commit.repository.head(commit.revision)
    return {} if head in (None, commit.parent) else {commit.revision or "": str(head)}


def _info(commit: Commit, oid: str, pull_request: str | None) -> CommitInfo:
    repository = commit.repository
    home = f"{repository.api.endpoint}/{repository.repo_id}"
    more: dict[str, Any] = {}
    if pull_request is not None:
        more["pr_url"] = f"{home}/discussions/{pull_request.removeprefix(PULL_REQUESTS)}"
    return CommitInfo(
        commit_url=f"{home}/commit/{oid}",
        commit_message=commit.message,
        commit_description=commit.description or "",
        oid=oid,
        _endpoint=repository.api.endpoint,
        **more,
    )


def _raced(commit: Commit) -> str:
    branch = commit.revision or constants.DEFAULT_REVISION
    return (
        f"{commit.repository.repo_id}: expected {branch} at {commit.parent[:7]}, where this push "
        "began, but somebody has committed to it since. Nothing was changed; look at what is new "
        "there and push again"
    )
