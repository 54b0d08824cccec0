"""`gravity-hf push`: a gravity model or adapter to the Hub, in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import make_console, quiet_libraries


def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder of a model or adapter.", show_default=False),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="name or namespace/name.", show_default=False)
    ],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="For a new repository. Default: the Hub's."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded; send nothing.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if it is not there, or refs/pr/N.")
    ] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Push the gravity model or adapter in FOLDER to REPO on the Hub.

    Weights, tokenizer, modeling_gravity.py, figures and card go up in one commit, so that nobody
    ever loads half of them. A push that was interrupted can be repeated: large files that are
    there are not sent again. The token is HF_TOKEN, or that of: hf auth login

    Example:

        gravity-hf push out me/my-gravity-model --dry-run

        gravity-hf push out me/my-gravity-model --private
    """
    from ..hub.plan import UploadPlan
    from ..hub.push import push_gravity_model

    quiet_libraries()
    console = make_console()
    done = push_gravity_model(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=pr,
        commit_message=message,
        dry_run=dry_run,
    )
    if isinstance(done, UploadPlan):
        console.print(str(done), markup=False)
        console.print("  nothing was sent; leave out --dry-run to push")
        return
    console.print(f"pushed to {done.pr_url or done.repo_url}", markup=False)
    console.print(f"  commit {done.oid}")
