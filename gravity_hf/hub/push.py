"""`push_gravity_model`: a gravity model or adapter to the Hub, whole, in one commit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import validate_repo_id
from torch import nn

from .commit import commit_files
from .extras import Extras
from .plan import PlannedFile, UploadPlan, what_is
from .repository import PULL_REQUESTS, open_repository, own_repository
from .retry import logger
from .staging import Staged, staged

_MESSAGE = "Upload gravity model"


def push_gravity_model(
    model: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    tokenizer: Any = "host",
    processor: Any = None,
    results: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    figures: bool | str | os.PathLike[str] = True,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    max_shard_size: int | str | None = None,
    tags: Sequence[str] | str | None = None,
    dry_run: bool = False,
    api: HfApi | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> CommitInfo | UploadPlan:
    """Push weights, tokenizer, `modeling_gravity.py`, config, figures and card in one commit.

    A push that fails leaves the repository as it was (a new one stays, empty), and can be
    repeated: large files that the Hub has already are not sent again. Weights, tokenizer files and
    settings of an earlier model, which a loader could pick up, are deleted in the same commit.
    A README.md in a folder goes up if its tags are those of our cards; else a card is made.

    Args:
        model: a patched model, a `gravity_lora` model (its adapter and masses), or the folder of
            either.
        repo_id: `name` or `namespace/name`; created if it is not there.
        tokenizer: `"host"` takes what is in the folder, or else the tokenizer or processor of the
            host, where it can be found; a tokenizer, instead of that; None leaves it out.
        processor: a processor to push, instead of what is in the folder.
        results: what was measured, as `gravity-hf convert` writes it to results.json, or such a
            file.
        figures: True draws them (with matplotlib); a folder with figures; False.
        private: for a new repository. True refuses one that is there and public.
        token: as in huggingface_hub; None takes HF_TOKEN or that of `hf auth login`.
        revision: branch, created if it is not there, or `refs/pr/N`. None: main.
        create_pr: open a pull request.
        commit_message, commit_description: of the commit.
        max_shard_size: largest weight file of a model in memory. None: 5GB.
        tags: more tags for the card.
        dry_run: send nothing, ask nothing; return the plan.
        api: an `HfApi`, for another endpoint.
        folder: where `model` has been saved already; it is not saved again.

    Returns:
        huggingface_hub's `CommitInfo`; with `dry_run` an `UploadPlan`, which prints as a table.

    Raises:
        ValueError: the export is not whole or not safe, or an argument does not fit.
        TypeError: `model` is no gravity model.
        PermissionError: the token may not write there.
        ConnectionError: the Hub cannot be reached, or goes on failing.
        RuntimeError: somebody else has committed meanwhile, or `model` is compiled or wrapped.
    """
    validate_repo_id(repo_id)
    if create_pr and revision is not None and revision.startswith(PULL_REQUESTS):
        raise ValueError(
            f"push_gravity_model: expected create_pr or revision={revision!r}, got both. Leave out "
            "create_pr to add to that pull request"
        )
    hub = api or HfApi()

    def name() -> str:
        whole = dry_run or "/" in repo_id
        return repo_id if whole else own_repository(hub, repo_id, token)

    more_tags = (tags,) if isinstance(tags, str) else tuple(tags or ())
    extras = Extras(tokenizer, processor, results, figures, more_tags)
    with staged(
        model,
        name,
        extras,
        max_shard_size=max_shard_size,
        online=not dry_run,
        folder=folder,
        token=hub.token if token is None else token,
        endpoint=hub.endpoint,
    ) as stage:
        if dry_run:
            return _plan(stage, revision, create_pr, private)
        for notice in stage.notices:
            logger.warning(f"{stage.name}: {notice}")
        repository = open_repository(hub, stage.name, private=private, token=token)
        return commit_files(
            repository,
            stage.files,
            revision=revision,
            create_pr=create_pr,
            message=commit_message or _MESSAGE,
            description=commit_description,
        )


def _plan(stage: Staged, revision: str | None, create_pr: bool, private: bool | None) -> UploadPlan:
    notices = stage.notices
    if "/" not in stage.name:
        notices += (
            "a push puts your own namespace before the name; the card, which names it, grows by as "
            "many characters each time",
        )
    files = (PlannedFile(p, f.stat().st_size, what_is(p)) for p, f in stage.files.items())
    return UploadPlan(
        stage.name, revision, create_pr, private, tuple(files), deletions=None, notices=notices
    )
