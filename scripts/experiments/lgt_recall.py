"""Does the attention of LGT mix tokens? Two recall tasks, with every option of its law.

    python scripts/experiments/lgt_recall.py
    python scripts/experiments/lgt_recall.py --only "defaults" --seeds 0

"previous" wants the token before each place, "first" the first token of the row; sequences are
random and never repeat, so that a model which sees only the token itself is right by chance
(0.0615). Every variant has 64 channels, 2 layers, 2 heads, and gets 400 steps of AdamW. The control
is GPT-2 of that shape: ordinary softmax attention. Results are JSON lines; runs that are there
already are not done again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from pool import run_all

RESULT = Path(__file__).resolve().parent / "results" / "lgt_recall.jsonl"
LENGTH = VOCABULARY = 32
CONTROL = "softmax attention (GPT-2)"
SHAPE = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# Names that GPT-2 has of its own for what LGT's config calls otherwise.
CONTROL_SHAPE = {**SHAPE, "n_inner": 2 * SHAPE["hidden_size"], "tie_word_embeddings": False}

PUBLISHED: dict[str, Any] = {"softening": 0.0}
FRACTAL: dict[str, Any] = {"position_type": "fractal"}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "published law, made causal": PUBLISHED,
    "softening 0.05": {"softening": 0.05},
    "softening 1": {"softening": 1.0},
    "flat (curvature 0)": {"curvature": 0.0},
    "no cap": {"max_force": None},
    "smooth cap (tanh)": {"force_cap": "tanh"},
    "without itself": {"exclude_self": True},
    "power law": {"force_law": "power"},
    "value projection": {"value_projection": True},
    "fractal positions": FRACTAL,
    CONTROL: {},
}


def plan(seeds: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{variant} {task} seed={seed}",
            "variant": variant,
            "task": task,
            "seed": seed,
            "changes": changes,
        }
        for variant, changes in VARIANTS.items()
        for task in ("previous", "first")
        for seed in seeds
    ]


def new_model(run: dict[str, Any]) -> Any:
    """The model of a run, made from its seed."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    import gravity_hf  # noqa: F401  registers LGT with the Auto classes

    set_seed(run["seed"])
    if run["variant"] == CONTROL:
        config = AutoConfig.for_model("gpt2", **CONTROL_SHAPE, bos_token_id=0, eos_token_id=0)
    else:
        config = AutoConfig.for_model("lgt", **SHAPE, **run["changes"])
    return AutoModelForCausalLM.from_config(config)


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train and measure one model."""
    import torch

    from gravity_hf.training.conditions import run_conditions
    from gravity_hf.training.recall import RecallSettings, change_before, train_recall

    model = new_model(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = RecallSettings(LENGTH, VOCABULARY, steps=run.get("steps", 400))
    result = train_recall(model.to(device), run["task"], settings, seed=run["seed"])
    ids = torch.arange(LENGTH, device=device)[None] % VOCABULARY
    before, after = change_before(model, ids, LENGTH // 2)
    return {
        **{name: run[name] for name in ("variant", "task", "seed")},
        "accuracy": result.accuracy,
        "chance": settings.chance,
        "last_loss": statistics.fmean(result.losses[-20:]),
        "change_of_earlier_logits": before,
        "change_of_later_logits": after,
        "parameters": model.num_parameters(),
        "settings": vars(settings),
        "conditions": run_conditions(device),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: accuracies of every seed, lowest first."""
    lines = ["| variant | previous | first | earlier logits change by |", "|---|---|---|---|"]
    for variant in VARIANTS:
        rows = [row for row in results if row["variant"] == variant]
        cells = [
            ", ".join(f"{a:.3f}" for a in sorted(r["accuracy"] for r in rows if r["task"] == task))
            for task in ("previous", "first")
        ]
        if rows:
            leak = max(row["change_of_earlier_logits"] for row in rows)
            lines.append(f"| {variant} | {cells[0]} | {cells[1]} | {leak:g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULT, help="JSON lines to add to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes; 0: this one")
    parser.add_argument("--minutes", type=float, default=60, help="start no run later than this")
    parser.add_argument("--only", help="only runs whose id contains this")
    parser.add_argument("--quick", action="store_true", help="4 steps each: to try, not to keep")
    options = parser.parse_args()
    runs = [run for run in plan(options.seeds) if (options.only or "") in run["id"]]
    for run in runs:
        run.update({"steps": 4} if options.quick else {})
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
