"""`gravity-hf beliefs remove | rollback | quantize | consolidate | calibrate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import make_console
from .arguments import Device, Dtype, Key, Keys, ModelDir, NewKey, StoreDir
from .opening import forget_strangers, kept_registry, open_store
from .tables import show_table


def remove(
    directory: ModelDir,
    beliefs: StoreDir,
    keys: Keys,
    purge: Annotated[
        bool,
        typer.Option("--purge", help="Delete the files of all their versions: no way back."),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Take beliefs out of force: all of KEY..., or none where one is not there.

    Their versions stay for rollback, unless --purge.

    Example:

        gravity-hf beliefs remove model kb geo/varnholt
    """
    store = open_store(directory, beliefs, device, dtype)
    with store.transaction():
        for key in dict.fromkeys(keys):
            store.remove(key, purge=purge)
    forget_strangers(store)
    done = "purged" if purge else "removed"
    make_console().print(f"{done} {len(set(keys))}; {len(store)} beliefs left", markup=False)


def rollback(
    directory: ModelDir,
    beliefs: StoreDir,
    key: Key,
    version: Annotated[int, typer.Argument(min=1, help="As `beliefs history` lists it.")],
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Put an earlier VERSION of KEY in force again, with the same bytes.

    Example:

        gravity-hf beliefs rollback model kb geo/varnholt 1
    """
    store = open_store(directory, beliefs, device, dtype)
    belief = store.rollback(key, version)
    forget_strangers(store)
    make_console().print(
        f"{key}: version {version} is in force again, as version {belief.version}", markup=False
    )


def quantize(
    directory: ModelDir,
    beliefs: StoreDir,
    keys: Keys,
    tier: Annotated[
        int, typer.Option(min=1, max=3, help="1: error at most .05; 2: .10; 3: .20.")
    ] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Store the deltas of KEY... in as few bits as the tier allows, each as its next version.

    What misses the tier, or would lose its answer, is refused and stays as it is.

    Example:

        gravity-hf beliefs quantize model kb geo/varnholt --tier 2
    """
    from ...knowledge.errors import QuantizationError, ValidationError
    from ...knowledge.quantized_beliefs import quantize_belief

    store = open_store(directory, beliefs, device, dtype)
    registry = kept_registry(store)
    chosen = list(dict.fromkeys(keys))
    for key in chosen:
        store.get(key)
    done, refused = [], []
    for key in chosen:
        try:
            report = quantize_belief(store, key, tier, registry=registry)
        except (QuantizationError, ValidationError) as error:
            refused.append(f"{key}: {error}")
        else:
            done.append((key, report.bits, f"{report.rel_frobenius:.4f}", report.bytes))
    console = make_console()
    if done:
        show_table(console, ("key", "bits", "error", "bytes"), done, numbers=3)
    if refused:
        raise QuantizationError(
            f"{len(refused)} of {len(chosen)} beliefs stay as they are. " + " ".join(refused)
        )


def consolidate(
    directory: ModelDir,
    beliefs: StoreDir,
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY...]")] = None,
    domain: Annotated[str | None, typer.Option(help="Instead of keys: all of a domain.")] = None,
    energy: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the sum's squared norm to keep.")
    ] = 0.99,
    key: NewKey = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure; change nothing.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Merge beliefs into one, if that frees room and every fact survives it. Rollback undoes it.

    Example:

        gravity-hf beliefs consolidate model kb --domain invented --energy 0.9 --dry-run
    """
    from ...knowledge.consolidation import consolidate as merge

    store = open_store(directory, beliefs, device, dtype)
    report = merge(
        store,
        kept_registry(store),
        keys or None,
        domain=domain,
        energy=energy,
        key=key,
        dry_run=dry_run,
    )
    console = make_console()
    did = "merged" if report.replaced else "not merged"
    reason = f": {report.reason}" if report.reason else ""
    console.print(f"{did} {len(report.sources)} beliefs as {report.key}{reason}", markup=False)
    console.print(
        f"  parameters {report.parameters_before} -> {report.parameters_after}; facts answered "
        f"exactly {report.exact_before} -> {report.exact_after} of {report.facts}",
        markup=False,
    )


def calibrate(
    directory: ModelDir,
    beliefs: StoreDir,
    precision: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="Share of what is used that is to be right.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure from which similarity on beliefs are used, and how sure answers are.

    It asks the held-out paraphrases and the unrelated prompts of the beliefs' own facts. What it
    finds is kept in KB; `beliefs ask` and `serve` use it.

    Example:

        gravity-hf beliefs calibrate model kb
    """
    from contextlib import closing

    from ...knowledge.server.calibrating import FILE_NAME
    from ...knowledge.server.confidence_fit import calibrate_store
    from ...knowledge.server.knowledge_base import KnowledgeBase

    store = open_store(directory, beliefs, device, dtype)
    with closing(KnowledgeBase(store)) as base:
        found = calibrate_store(base, precision=precision, seed=seed)
    found.save(beliefs / FILE_NAME)
    console = make_console()
    if found.router is not None:
        point = found.router.point
        console.print(
            f"beliefs are used from a similarity of {point.threshold:.3f} on: precision "
            f"{point.precision:.2f}, recall {point.recall:.2f}",
            markup=False,
        )
    if found.confidence is None:
        console.print("  no confidence: all answers were right, or all wrong", markup=False)
