"""`gravity-hf evaluate`: measure a model, alone or beside another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import make_console, quiet_libraries


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Gravity model, adapter or plain model.", show_default=False
        ),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to measure on; repeatable (default: Python's help text)"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Second model: shows the difference to it."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens that the model sees at once.")] = 1024,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens between windows; less: more context (default: half)"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to read.")] = 65536,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Let the model continue this; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a continuation.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of continuations; 0 takes the likeliest token.")
    ] = 0.7,
    attention: Annotated[
        bool, typer.Option(help="Measure contrast and KL of the gravity attention.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Same seed, same continuations.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="JSON", help="File for everything that was measured.")
    ] = None,
) -> None:
    """Measure MODEL: loss per token and byte, continuations, and how gravitational it is.

    Every token of the text is predicted once, from at least length - stride tokens before it. The
    contrast says how much distance matters (1: not at all), the KL how far attention is from the
    dot product of the same queries and keys. An encoder has no loss: it is compared with --against.

    Examples:

        gravity-hf evaluate out --text held_out.txt --against Qwen/Qwen2.5-0.5B

        gravity-hf evaluate out --stride 64 --prompt "Gravity is" --out out/evaluation.json
    """
    from .hosts import require_causal

    for name in (model, against):
        if name is not None:
            require_causal(Path(name).expanduser(), "evaluate")
    from ..training.evaluation_run import EvaluationArguments, run_evaluation

    arguments = EvaluationArguments(
        model=model,
        against=against,
        text=[str(file) for file in text] if text else None,
        length=length,
        stride=stride,
        max_tokens=max_tokens,
        prompts=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        attention=attention,
        dtype=dtype,
        device=device,
        seed=seed,
        out=None if out is None else str(out),
    )
    quiet_libraries()
    run = run_evaluation(arguments)
    console = make_console()
    console.print(run.table(), markup=False)
    if out is not None:
        console.print(f"Written to {out}", markup=False)
