"""`gravity-hf beliefs ask`: an answer, and what it rests on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..console import make_console
from ..terminal import terminal_safe
from .arguments import Device, Dtype, ModelDir, StoreDir
from .opening import open_store

if TYPE_CHECKING:
    from ...knowledge.provenance import Provenance
    from ...knowledge.store import BeliefStore


def ask(
    directory: ModelDir,
    beliefs: StoreDir,
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="To continue.", show_default=False)
    ],
    use: Annotated[
        list[str] | None,
        typer.Option("--use", metavar="KEY", help="Use this belief; may be given again."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Similarity from which a belief is used; the calibrated one by default."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 16,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show what the model says without beliefs, too.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Let the model in DIR continue each PROMPT with the beliefs in KB that are about it.

    Which these are is found by similarity, from the calibrated threshold on (`beliefs calibrate`,
    or measured now where the beliefs have facts enough), or said by --use. Shown are the answer,
    its sources with their similarity and effect, and how far to trust it.

    Example:

        gravity-hf beliefs ask model kb "The capital of Varnholt is" --compare
    """
    store = open_store(directory, beliefs, device, dtype)
    recorder = _recorder(store, beliefs, threshold, routes=not use)
    rows = [[store.get(key).id for key in use] for _ in prompts] if use else None
    console = make_console()
    for i, prompt in enumerate(prompts):
        routed = recorder.routed([prompt] if rows is None else None, rows=rows and rows[i : i + 1])
        with routed:
            text = _continuation(store, prompt, max_new_tokens, [recorder.processor()])
        _show(console, prompt, text, recorder.result)
        if compare:
            plain = _continuation(store, prompt, max_new_tokens, [])
            console.print(f"  without beliefs:{_safe(console, plain)}", markup=False)


def _recorder(store: BeliefStore, folder: Path, threshold: float | None, *, routes: bool) -> Any:
    """Of provenance: with a router where beliefs are to be found, and a confidence if there is one.

    Raises:
        ValueError: no threshold, none kept, and too few facts to measure one.
    """
    from ...knowledge.provenance import ProvenanceRecorder
    from ...knowledge.server.calibrating import FILE_NAME, Calibration, calibrate_routing

    file = folder / FILE_NAME
    kept = Calibration.load(file) if file.is_file() else Calibration.empty()
    if not routes:
        return ProvenanceRecorder(store, calibration=kept.confidence)
    if kept.router is None and threshold is None:
        kept = Calibration(calibrate_routing(store), None)
        if kept.router is None:
            raise ValueError(
                "ask: expected a calibrated threshold, got none: the beliefs have too few "
                "paraphrases and unrelated prompts to measure one. Name beliefs with --use KEY, "
                "or pass --threshold"
            )
    router = kept.make_router(store, threshold)
    return ProvenanceRecorder(store, router=router, calibration=kept.confidence)


def _continuation(store: BeliefStore, prompt: str, length: int, processors: list[Any]) -> str:
    """What greedy decoding writes after `prompt`."""
    import torch

    from ...knowledge.fact_tokens import prompt_ids

    model: Any = store.model
    ids = torch.tensor([prompt_ids(store.tokenizer, prompt)], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
            pad_token_id=store.tokenizer.pad_token_id or 0,
            logits_processor=processors,
        )
    return store.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _show(console: Console, prompt: str, text: str, found: Provenance) -> None:
    console.out(f"{_safe(console, prompt)}{_safe(console, text)}", highlight=False)
    if not found.sources:
        console.print("  no belief is about this: the model's own words", markup=False)
        return
    for source in found.sources:
        effect = "decided the first token" if source.changes_token else "left the first token"
        console.print(
            f"  from {source.key} v{source.version}: similarity {source.score:.2f}, {effect} "
            f"(KL {source.kl:.2f})",
            markup=False,
        )
    sure = f"confidence {found.confidence:.2f}" + ("" if found.calibrated else ", not calibrated")
    doubts = ", uncertain" if found.uncertain else ""
    stale = "; the store has changed since: calibrate again" if found.stale else ""
    console.print(f"  {sure}{doubts}{stale}", markup=False)


def _safe(console: Console, text: str) -> str:
    return terminal_safe(text, console.encoding)
