"""Can a token be found by what stands beside it? Associative recall, by NGT and by its twins.

    python scripts/experiments/ngt_recall.py                          # minutes on a CPU core
    python scripts/experiments/ngt_recall.py --only "NGT v2" --seeds 0
    python scripts/experiments/ngt_recall.py --device cuda --workers 4

Six keys with a value beside each, then the keys once more in another order: what was the value?
Which one it was depends on the token that asks, so a model whose queries know nothing of their own
token guesses among the values that are left, and is right in about half of all cases. All models
have 3 layers, 64 channels, 4 heads, 32 coordinates and no dropout, and are trained on the answers
alone, at each of two learning rates. Results are JSON lines; runs that are there already are not
done again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from ngt_arms import ALIBI, ARMS, V2, VANILLA
from pool import run_all

RESULT = Path(__file__).resolve().parent / "results" / "ngt_recall.jsonl"
VARIANTS = (
    V2,
    "plain geometry",
    "32 head coordinates",
    "symmetric",
    "no symmetric heads",
    "one symmetric head",
    "no content",
    "NGT reference",
    "NGT fixed",
    VANILLA,
    ALIBI,
)
RATES = (1e-3, 3e-3)
SHAPE = {
    "hidden_size": 64,
    "coord_dim": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "dropout": 0.0,
}


def plan(seeds: list[int], steps: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{variant} rate={rate:g} steps={steps} seed={seed}",
            **{"variant": variant, "rate": rate, "seed": seed, "steps": steps},
        }
        for variant in VARIANTS
        for rate in RATES
        for seed in seeds
    ]


def new_model(run: dict[str, Any], settings: Any) -> Any:
    """The model of a run, made from its seed, as large as the task wants it."""
    from transformers import set_seed

    from gravity_hf.models.ngt import NGTConfig, NGTForCausalLM

    arm = ARMS[run["variant"]]
    sizes = {"vocab_size": settings.vocabulary, "max_position_embeddings": settings.length}
    set_seed(run["seed"])
    return NGTForCausalLM(NGTConfig.from_preset(arm.preset, **SHAPE, **sizes, **arm.changes))


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train and measure one model."""
    import torch

    from gravity_hf.training.conditions import run_conditions
    from gravity_hf.training.recall import AssociativeSettings, train_associative

    # One process is one core's; more of them would wait for each other.
    torch.set_num_threads(1)
    settings = AssociativeSettings(steps=run["steps"], learning_rate=run["rate"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(run, settings).to(device)
    result = train_associative(model, settings, seed=run["seed"])
    return {
        **{name: run[name] for name in ("variant", "rate", "seed")},
        "accuracy": result.accuracy,
        "steps_to_recall": result.steps_to_recall,
        "curve": result.curve,
        "last_loss": statistics.fmean(result.losses[-20:]),
        "parameters": model.num_parameters(),
        "settings": {**vars(settings), **SHAPE},
        "conditions": run_conditions(device),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: for each learning rate accuracies of all seeds, lowest first, and the steps after
    which 95 % were right."""
    headers = ["model", "parameters"]
    for rate in RATES:
        headers += [f"accuracy at {rate:g}", "steps to 95 %"]
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    for variant in VARIANTS:
        mine = [row for row in results if row["variant"] == variant]
        if mine:
            cells = [cell for rate in RATES for cell in _cells(mine, rate)]
            lines.append(f"| {variant} | {mine[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(rows: list[dict[str, Any]], rate: float) -> list[str]:
    rows = sorted((x for x in rows if x["rate"] == rate), key=lambda row: row["accuracy"])
    steps = [row["steps_to_recall"] for row in rows]
    return [
        ", ".join(f"{row['accuracy']:.3f}" for row in rows) or "–",
        ", ".join("never" if step is None else str(step) for step in steps) or "–",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULT, help="JSON lines to add to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="of training (1500)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes; 0: this one")
    parser.add_argument("--minutes", type=float, default=60, help="start no run later than this")
    parser.add_argument("--only", help="only runs whose id contains this")
    parser.add_argument("--quick", action="store_true", help="4 steps each: to try, not to keep")
    options = parser.parse_args(arguments)
    steps = 4 if options.quick else options.steps
    runs = [run for run in plan(options.seeds, steps) if (options.only or "") in run["id"]]
    results = run_all(
        runs,
        work,
        options.results,
        workers=options.workers,
        gpus=1 if options.device == "cuda" else 0,
        minutes=options.minutes,
    )
    print(table(results))
    if len(results) < len(runs):
        raise SystemExit("error: some runs failed or were left for later: see above, and run again")


if __name__ == "__main__":
    main()
