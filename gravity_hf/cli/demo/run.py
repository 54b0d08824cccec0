"""The demonstration from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ...training.corpus import Corpus, even_windows, load_corpus
from ...training.files import write_text
from ...training.folders import require_free, whole_folder
from ...training.text import disjoint_samples, prose_paragraphs, read_texts
from ...training.tokenizers import byte_tokenizer
from ..console import progress_bar, quiet_libraries
from .heal import CALIBRATED, TITLES, Laboratory, Outcome
from .host import TrainedHost, obtain_host
from .minilm import HOW_TO_GET, minilm_folder, minilm_rows
from .reload import check_in_new_process
from .report import report_html, table_markdown
from .results import DemoResults, run_conditions
from .settings import DemoSettings
from .tables import encoder_cells, loss_cells, to_rich

_PROMPT = "class Test:\n    def __init__(self, "
_CHECKED_WINDOWS = 2


def run_demo(
    out: Path,
    settings: DemoSettings,
    console: Console,
    *,
    files: list[Path] | None = None,
    fresh: bool = False,
    command: str = "gravity-hf demo",
) -> DemoResults:
    """Train, convert, heal, save, reload, report. Everything is written under `out`."""
    _prepare(out)
    quiet_libraries()
    seconds: dict[str, float] = {}
    corpus = load_corpus(files, settings.train_bytes, settings.validation_bytes)

    console.print("[bold]1/4  A host: a small language model with dot-product attention[/bold]")
    console.print(f"  {corpus.description}", markup=False)
    with _threads(settings.threads):
        host = obtain_host(settings, corpus, out / "host", fresh, console)
    seconds["host"] = host.seconds

    console.print("[bold]2/4  Its attention replaced by gravity, and the same heal for all[/bold]")
    with _timed(seconds, "conversions"), _threads(settings.threads):
        outcomes, healed = _convert(host, corpus, settings, console)
    console.print(to_rich(loss_cells(outcomes), without="constants"))
    console.print("  validation loss in nats per byte; lower is better", style="dim")

    console.print("[bold]3/4  A real encoder, all-MiniLM-L6-v2, converted without training[/bold]")
    with _timed(seconds, "encoder"):
        encoder = _encoder(files, settings, console)

    console.print("[bold]4/4  Saved, and loaded again in a new process[/bold]")
    with _timed(seconds, "reload"), _threads(settings.threads):
        reload = _save_and_reload(healed, outcomes[CALIBRATED], corpus, settings, out)
    _say_reload(reload, console)

    parameters = sum(p.numel() for p in host.model.parameters())
    results = DemoResults(
        conditions=run_conditions(settings, corpus, command, parameters),
        host_losses=host.losses,
        outcomes=outcomes,
        encoder=encoder,
        reload=reload,
        seconds=seconds,
    )
    _write(out, results)
    return results


def _prepare(out: Path) -> None:
    if out.is_file():
        raise ValueError(f"--out: expected a folder, {str(out)!r} is a file. Choose another name")
    require_free(out / "model", force=True)
    (out / "host").mkdir(parents=True, exist_ok=True)


def _convert(
    host: TrainedHost, corpus: Corpus, settings: DemoSettings, console: Console
) -> tuple[dict[str, Outcome], nn.Module]:
    """Every row of the table, and the calibrated and healed model."""
    laboratory = Laboratory(host.model, corpus, settings, console)
    rows = {key: laboratory.run(key) for key in TITLES}
    outcomes = {key: outcome for key, (outcome, _) in rows.items()}
    return outcomes, rows[CALIBRATED][1]


def _encoder(
    files: list[Path] | None, settings: DemoSettings, console: Console
) -> list[dict[str, Any]] | None:
    if minilm_folder() is None:
        console.print(f"  left out: {HOW_TO_GET}", markup=False)
        return None
    paragraphs = prose_paragraphs(read_texts(files))
    if len(paragraphs) < 2 * settings.encoder_paragraphs:
        console.print(
            f"  left out: {len(paragraphs)} paragraphs of prose in --text, "
            f"{2 * settings.encoder_paragraphs} are needed"
        )
        return None
    texts = disjoint_samples(paragraphs, settings.encoder_paragraphs, settings.seed)
    total = 1 + len(settings.encoder_softnesses)
    with progress_bar(console, "Converting the encoder", total) as advance:
        rows = minilm_rows(
            *texts, settings.encoder_softnesses, tokens=settings.encoder_tokens, advance=advance
        )
    console.print(to_rich(encoder_cells(rows)))
    console.print("  embeddings of held-out paragraphs against the original's", style="dim")
    return rows


def _save_and_reload(
    model: nn.Module, outcome: Outcome, corpus: Corpus, settings: DemoSettings, out: Path
) -> dict[str, Any]:
    with whole_folder(out / "model") as folder:
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        if outcome.report is not None:
            (folder / "calibration.json").write_text(outcome.report.to_json() + "\n", "utf-8")
    ids = even_windows(corpus.validation, _CHECKED_WINDOWS, settings.length)
    return check_in_new_process(
        model, out / "model", ids, _PROMPT, settings.sample_bytes, settings.seed
    )


def _say_reload(reload: dict[str, Any], console: Console) -> None:
    equal = (
        "identical to" if reload["identical"] else (f"within {reload['logits_difference']:.1e} of")
    )
    console.print(f"  logits of a fixed input: {equal} those before saving; it writes:")
    text = (reload["prompt"] + reload["sample"]).rstrip()
    for line in text.splitlines()[:12]:
        console.print("    " + line[:100], style="dim", markup=False)


def _write(out: Path, results: DemoResults) -> None:
    files = {
        "results.json": results.to_json(),
        "table.md": table_markdown(results),
        "report.html": report_html(results),
    }
    for name, content in files.items():
        write_text(out / name, content)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
