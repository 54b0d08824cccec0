"""`gravity-hf profile`: what each way to run a model costs, and what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import make_console, quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table


def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="LeanFormer, gravity or plain causal model.", show_default=False
        ),
    ],
    tiers: Annotated[
        str | None,
        typer.Option(help="Names with commas between (default: all that change something)."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to measure on; repeatable (default: Python's help text)"),
    ] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens read at once.")] = 512,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that follow one by one.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Timed repetitions.")] = 5,
    windows: Annotated[int, typer.Option(min=1, help="Texts that quality is measured on.")] = 4,
    top_k: Annotated[
        int, typer.Option(min=1, help="Keys of a token where a host is sparse.")
    ] = 256,
    exit_threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Where tokens leave early (default: the model's)."),
    ] = None,
    max_latency: Annotated[
        float | None, typer.Option(metavar="MS", help="Choose a tier: most time of a token.")
    ] = None,
    min_quality: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Choose a tier: least agreement with full."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(metavar="JSON", help="File for the manifest.")] = None,
) -> None:
    """Measure every tier of FOLDER: time, memory, loss, agreement with the full model.

    A tier is a way to run the model: chosen keys only (sparse-attention), chosen neurons only
    (sparse-feed-forward), tokens that leave early (early-exit), bfloat16 (half), a cache of 4 bits
    (packed-cache), or all of these (lean). What a model has not got, or what changes none of its
    logits, is not listed. All tiers read the same text; loss and agreement are of the tokens after
    the prompt, computed in that tier.

    Examples:

        gravity-hf profile out --text held_out.txt --out out/profile.json

        gravity-hf profile out --tiers packed-cache --prompt-length 4096 --max-latency 20
    """
    from .hosts import require_causal

    require_causal(Path(model).expanduser(), "profile")
    quiet_libraries()
    from ..training.profiling_run import ProfileSettings, profile_folder

    settings = ProfileSettings(prompt_length, tokens, runs, windows, top_k, exit_threshold)
    manifest = profile_folder(
        model,
        settings,
        tiers=None if tiers is None else [x.strip() for x in tiers.split(",") if x.strip()],
        text=text,
        dtype=dtype,
        device=device,
        out=out,
    )
    console = make_console()
    console.print(_table(manifest))
    for tier in manifest["left_out"]:
        console.print(f"  {tier['name']}: left out, {tier['reason']}", markup=False)
    if max_latency is not None or min_quality is not None:
        _choose(manifest, max_latency, min_quality)
    if out is not None:
        console.print(f"Written to {out}", markup=False)


def _choose(manifest: dict[str, Any], latency: float | None, quality: float | None) -> None:
    from ..training.profiling_manifest import select_tier

    chosen = select_tier(manifest, latency, quality)
    words = "none is within these bounds" if chosen is None else chosen["name"]
    make_console().print(f"Tier to run: {words}", markup=False)


def _table(manifest: dict[str, Any]) -> Table:
    from rich.table import Table

    read = manifest["settings"]
    title = (
        f"{manifest['model']}: a prompt of {read['prompt_length']}, then {read['tokens']} tokens"
    )
    table = Table(title=title, title_justify="left")
    for name in ("tier", "prompt ms", "token ms", "p95", "token/s", "cache MiB", "peak MiB"):
        table.add_column(name, justify="left" if name == "tier" else "right", no_wrap=True)
    for name in ("loss", "agreement"):
        table.add_column(name, justify="right", no_wrap=True)
    for tier in manifest["tiers"]:
        table.add_row(
            tier["name"],
            f"{tier['prefill_ms']['p50']:.1f}",
            f"{tier['decode_ms']['p50']:.2f}",
            f"{tier['decode_ms']['p95']:.2f}",
            f"{tier['decode_tokens_per_s']:.0f}",
            f"{tier['cache_bytes'] / 2**20:.2f}",
            "-" if tier["peak_bytes"] is None else f"{tier['peak_bytes'] / 2**20:.0f}",
            f"{tier['loss']:.4f}",
            f"{100 * tier['agreement']:.1f} %",
        )
    return table
