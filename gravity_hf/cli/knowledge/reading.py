"""`gravity-hf beliefs list | history | verify`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..console import make_console
from .arguments import Device, Dtype, Key, ModelDir, StoreDir
from .opening import open_store
from .tables import measure, show_table, statement

EXIT_BROKEN = 1


def list_beliefs(
    beliefs: StoreDir,
    as_json: Annotated[
        bool, typer.Option("--json", help="One object a line, with everything that is known.")
    ] = False,
) -> None:
    """List what is in force in KB. Needs no model.

    Example:

        gravity-hf beliefs list kb
    """
    from ...knowledge.belief import Belief
    from ...knowledge.store_changes import read_manifest

    root = beliefs.resolve()
    manifest = read_manifest(root)
    found = [Belief(root, entry) for entry in manifest.active.values()]
    console = make_console()
    if as_json:
        for belief in found:
            console.out(json.dumps(_content(belief)), highlight=False)
        return
    rows = [
        (b.key, b.version, statement(b), *(measure(b.metrics, x) for x in _MEASURES)) for b in found
    ]
    if rows:
        titles = ("key", "version", "fact", "exact", "paraphrases", "KL elsewhere")
        show_table(console, titles, rows, numbers=3)
    console.print(
        f"{len(found)} beliefs of the base {manifest.base_digest[:12]}, revision "
        f"{manifest.revision}",
        markup=False,
    )


_MEASURES = ("exact", "paraphrase_top1", "kl_unrelated")


def _content(belief: Any) -> dict[str, Any]:
    return {
        "key": belief.key,
        "version": belief.version,
        "id": belief.id,
        "fact": None if belief.fact is None else belief.fact.to_row(),
        "metadata": belief.metadata,
        "report": belief.report,
    }


def history(beliefs: StoreDir, key: Key) -> None:
    """List every version that KEY had, oldest first. Needs no model.

    Example:

        gravity-hf beliefs history kb geo/varnholt
    """
    from ...knowledge.belief import Belief
    from ...knowledge.history import history_of
    from ...knowledge.store_changes import read_manifest

    root = beliefs.resolve()
    manifest = read_manifest(root)
    rows = []
    for version in history_of(manifest, key):
        is_there = version.state != "purged"
        said = statement(Belief(root, manifest.entries[version.id])) if is_there else ""
        rows.append((version.version, version.state, version.created, said, version.id[:12]))
    show_table(make_console(), ("version", "state", "made", "fact", "id"), rows)


def verify(
    directory: ModelDir, beliefs: StoreDir, device: Device = "auto", dtype: Dtype = "auto"
) -> None:
    """Compare the model in DIR, tensor by tensor, and every file in KB with their digests.

    Changes nothing. Exit code 0 where all is as it was written, 1 where something differs.

    Example:

        gravity-hf beliefs verify model kb
    """
    from ...knowledge.errors import IncompatibleBaseError, IntegrityError

    console = make_console()
    try:
        checked = open_store(directory, beliefs, device, dtype).verify()
    except (IncompatibleBaseError, IntegrityError) as error:
        console.print(f"differs: {error}", markup=False)
        raise typer.Exit(EXIT_BROKEN) from error
    console.print(
        f"as it was: {checked.leaves} tensors and settings of the base, {checked.files} files of "
        "beliefs",
        markup=False,
    )
