"""A language model with LGT's attention, against counts of tokens and against softmax attention.

    python scripts/experiments/lgt_language_model.py --device cuda --workers 4
    python scripts/experiments/lgt_language_model.py --size small        # two CPU cores
    python scripts/experiments/lgt_language_model.py --quick             # to try

Bytes of the Python standard library's source; what is held out are other files. All models see the
same windows in the same order for as many steps. Each arm gets the best of the same learning rates,
chosen in short runs on a seed that is not used again; one that does worse in its full runs than in
its short one gets the next lower rate, and what it did before stays in the file. Softmax attention
is GPT-2 of the same width, layers, heads and feed-forward width; it then has more parameters,
because its attention has three more square matrices, so there is one with as many parameters, too.
The published law is LGT with softening 0: it sees little but the token itself.

Runs are kept in --out and not done again when the command is. There, too: the trained LGT with its
tokenizer, results and figures, from which a model card is made.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from lgt_report import complete_folders, summary, table
from pool import run_all, training_arguments

HERE = Path(__file__).resolve().parent
SUMMARY = HERE / "results" / "lgt_language_model.json"
TUNING_SEED = 100
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
PROMPTS = ("def read(", "class Error", "import ")
SAMPLE_TOKENS = 96

SIZES: dict[str, dict[str, Any]] = {
    "large": {
        **{"width": 256, "layers": 6, "heads": 8, "length": 256, "rows": 64},
        **{"steps": 3000, "tuning_steps": 600, "validation_windows": 1024, "rates": RATES},
        "sample_tokens": SAMPLE_TOKENS,
    },
    "small": {
        **{"width": 96, "layers": 3, "heads": 4, "length": 128, "rows": 16},
        **{"steps": 600, "tuning_steps": 150, "validation_windows": 256, "rates": RATES},
        "sample_tokens": SAMPLE_TOKENS,
    },
    "quick": {
        **{"width": 16, "layers": 1, "heads": 2, "length": 32, "rows": 4},
        **{"steps": 4, "tuning_steps": 1, "validation_windows": 8, "rates": (4e-3,)},
        "sample_tokens": 8,
    },
}
SOFTMAX, SOFTMAX_SMALL = "softmax", "softmax, parameters of LGT"
LGT, LGT_OPTIONS, LGT_PUBLISHED = "LGT", "LGT with options", "LGT, published law"
# Options of LGT over its defaults, and the share of the width that GPT-2's feed-forward has.
ARMS: dict[str, dict[str, Any]] = {
    SOFTMAX: {"feed_forward": 2.0},
    SOFTMAX_SMALL: {"feed_forward": 0.5},
    LGT: {},
    LGT_OPTIONS: {"value_projection": True, "exclude_self": True},
    LGT_PUBLISHED: {"softening": 0.0},
}


def overrides(arm: str, size: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model type of an arm, and the sizes and options of its config. Nobody gets dropout."""
    shape = {
        "hidden_size": size["width"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "max_position_embeddings": max(size["length"], size["sample_tokens"] + 32),
        "tie_word_embeddings": False,
    }
    if arm not in (SOFTMAX, SOFTMAX_SMALL):
        return "lgt", {**shape, "dropout": 0.0, **ARMS[arm]}
    inner = round(ARMS[arm]["feed_forward"] * size["width"])
    return "gpt2", {**shape, "n_inner": inner, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


def run_of(
    arm: str, rate: float, seed: int, size: str, steps: int, model: Path | None = None
) -> dict[str, Any]:
    return {
        "id": f"{size} {arm} rate={rate:g} steps={steps} seed={seed}",
        **{"arm": arm, "rate": rate, "seed": seed, "size": size, "steps": steps},
        "model": None if model is None else str(model),
    }


def tuning(size: str, scale: float) -> list[dict[str, Any]]:
    steps = max(1, round(SIZES[size]["tuning_steps"] * scale))
    return [
        run_of(arm, rate, TUNING_SEED, size, steps) for arm in ARMS for rate in SIZES[size]["rates"]
    ]


def best_rates(results: list[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each arm that has the lowest loss on held-out text."""
    best: dict[str, dict[str, Any]] = {}
    for result in results:
        arm = result["run"]["arm"]
        if math.isfinite(result["loss"]) and (
            arm not in best or result["loss"] < best[arm]["loss"]
        ):
            best[arm] = result
    return {arm: result["run"]["rate"] for arm, result in best.items()}


def lowered_rates(
    rates: dict[str, float], tuned: list[dict[str, Any]], compared: list[dict[str, Any]]
) -> dict[str, float]:
    """Of the arms whose full runs are worse, in the mean, than their short run at the same rate:
    the next lower rate. More steps can only hurt where the rate was too high to last."""
    short = {(x["run"]["arm"], x["run"]["rate"]): x["loss"] for x in tuned}
    tried = sorted({rate for _, rate in short})
    lowered = {}
    for arm, rate in rates.items():
        full = [x["loss"] for x in compared if x["run"]["arm"] == arm]
        if full and not statistics.fmean(full) <= short[arm, rate] and rate > tried[0]:
            lowered[arm] = tried[tried.index(rate) - 1]
    return lowered


def comparison(
    rates: dict[str, float], seeds: list[int], size: str, scale: float, out: Path
) -> list[dict[str, Any]]:
    """Every arm on every seed; the models of the first seed are kept."""
    steps = max(1, round(SIZES[size]["steps"] * scale))
    return [
        run_of(arm, rates[arm], seed, size, steps, out / _name(arm) if seed == seeds[0] else None)
        for seed in seeds
        for arm in ARMS
        if arm in rates
    ]


def _name(arm: str) -> str:
    return arm.lower().replace(",", "").replace(" ", "-")


@functools.cache
def stream() -> Any:
    from gravity_hf.training.streams import load_stream

    return load_stream("byte")


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train one model; keep it where the run says so."""
    import torch
    from transformers.utils import logging

    from gravity_hf.training.pretraining import PretrainArguments, pretrain
    from gravity_hf.training.samples import generation_samples

    logging.set_verbosity_error()
    size = SIZES[run["size"]]
    architecture, changes = overrides(run["arm"], size)
    arguments = PretrainArguments(
        architecture=architecture,
        overrides=json.dumps(changes),
        attention="dot_product",  # as the model has it: nothing is patched
        length=size["length"],
        validation_windows=size["validation_windows"],
    )
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(
            folder,
            run["steps"],
            run["rate"],
            run["seed"],
            per_device_train_batch_size=size["rows"],
            weight_decay=0.0,
            torch_compile=False,
            eval_strategy="steps",
            eval_steps=max(2, run["steps"] // 20),
            logging_steps=max(1, run["steps"] // 100),
        )
        model, record = pretrain(arguments, training, stream())
    found = {key: record[key] for key in ("loss", "parameters", "tokens", "seconds", "conditions")}
    found |= {key: record[key] for key in ("evaluations", "training_losses", "training", "text")}
    if run["model"]:
        tokenizer = stream().tokenizer
        model.save_pretrained(run["model"])
        tokenizer.save_pretrained(run["model"])
        found["samples"] = generation_samples(
            model, tokenizer, PROMPTS, max_new_tokens=size["sample_tokens"], temperature=0.0
        )
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if training.bf16 else 0.0
    return found


def baselines(size: str, digest: str, kept: Path) -> list[dict[str, Any]]:
    """Unigram and bigram counts of the text with this digest, on the same held-out windows; kept in
    a file, because another Python has another standard library."""
    from gravity_hf.training.files import write_json

    if kept.exists():
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["digest"] == digest:
            return known["rows"]
    if stream().digest != digest:
        raise SystemExit(
            f"error: {kept}: expected counts of the text that the models saw ({digest}), and this "
            f"Python's library is another ({stream().digest}). Run this where they were trained"
        )
    rows = count(size)
    write_json(kept, {"digest": digest, "rows": rows})
    return rows


def count(size: str) -> list[dict[str, Any]]:
    from gravity_hf.training.counting import ORDERS, fit_counts
    from gravity_hf.training.streams import ConsecutiveWindows

    shape, text = SIZES[size], stream()
    held_out = ConsecutiveWindows(text.validation, shape["validation_windows"], shape["length"])
    windows = held_out.__getitems__(list(range(len(held_out))))
    rows = []
    for order, name in ORDERS.items():
        counted = fit_counts(text.train, text.vocabulary, order)
        parameters = counted.log_probabilities.numel()
        rows.append({"arm": name, "loss": counted.loss([windows]), "parameters": parameters})
        rows[-1]["constant"] = counted.constant
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lgt"), help="models, runs, figures")
    parser.add_argument("--summary", type=Path, help=f"JSON file [{SUMMARY.name} of the results]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=("large", "small"), default="large")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes; 0: this one")
    parser.add_argument("--minutes", type=float, default=60, help="start no run later than this")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--quick", action="store_true", help="tiny models, 4 steps: to try")
    options = parser.parse_args()
    size = "quick" if options.quick else options.size
    pooled = {
        "workers": options.workers,
        "gpus": 1 if options.device == "cuda" else 0,
        "minutes": options.minutes,
    }
    tuned = run_all(
        tuning(size, options.scale), work, options.out / f"tuning-{size}.jsonl", **pooled
    )
    rates, replaced = best_rates(tuned), []
    while True:
        runs = comparison(rates, options.seeds, size, options.scale, options.out)
        compared = run_all(runs, work, options.out / f"runs-{size}.jsonl", **pooled)
        if len(compared) < len(ARMS) * len(options.seeds):
            raise SystemExit("error: some runs failed or were left for later: see above, run again")
        lowered = lowered_rates(rates, tuned, compared)
        if not lowered:
            break
        print(f"worse than in their short runs, so with the next lower rate: {lowered}", flush=True)
        replaced += [run for run in compared if run["run"]["arm"] in lowered]
        rates |= lowered
    settings = {**SIZES[size], "scale": options.scale}
    command = shlex.join(["python", f"scripts/experiments/{Path(__file__).name}", *sys.argv[1:]])
    digest = compared[0]["text"]["digest"]
    counted = baselines(size, digest, options.out / f"counts-{size}.json")
    content = summary(compared, tuned, counted, settings, command, replaced)
    complete_folders(content, compared)
    write_summary(content, options)
    print(table(content))


def write_summary(content: dict[str, Any], options: argparse.Namespace) -> None:
    from gravity_hf.training.files import write_json

    # A trial is not what the committed file holds.
    trial = options.quick or options.scale != 1.0 or options.size != "large"
    file = options.summary or (options.out / SUMMARY.name if trial else SUMMARY)
    print(f"written to {write_json(file, content)}")


if __name__ == "__main__":
    main()
