"""Images from codes: what a small prior over the frames of a geolip makes, and what it does not.

    python scripts/experiments/geolip_generation.py --workers 2     # an hour on two CPU cores
    python scripts/experiments/geolip_generation.py --only waves --seeds 0 --figure rows.png
    python scripts/experiments/geolip_generation.py --device cuda --size large
    python scripts/experiments/geolip_generation.py --quick         # to try

A geolip learns synthetic images; a prior, a rectified flow, learns the frames of the training
images; its samples are decoded to images. They are compared with as many training images by sliced
Wasserstein distances of pixels and of logarithms of power spectra, beside

    held out        real images that nobody trained on: the floor of every distance
    reconstructed   the same through the geolip: what no prior of it can be better than
    gaussian        codes of the normal distribution that the training codes have
    mixed           at each place a code of some training image: real patches, no whole
    uniform         rows uniform on the sphere: no prior at all

Whether a sample is a copy is seen by its distance to the nearest training image, beside that of
other held-out images: nearer_than_held_out is 0.5 where they are alike, and near 1 for copies.
Results of single runs are in --out and not made again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from geolip_runs import add_options, finish, named, over_seeds

NAME = "geolip_generation"
KINDS = ("waves", "shapes")
SEEDS = (0, 1, 2)
SETS = ("held out", "reconstructed", "prior", "gaussian", "mixed", "uniform")
MEASURES = ("pixel_distance", "spectrum_distance", "nearest_ratio", "nearer_than_held_out")
SHOWN = 8
# Held-out images come from seeds that no training has.
_HELD_OUT_SEED = 10_000

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        **{"image": 16, "patch": 4, "rows": 16, "hidden": 96, "images": 4096, "compared": 512},
        **{"steps": 2000, "batch": 32, "width": 128, "layers": 4},
        **{"prior_steps": 4000, "prior_batch": 64, "prior_rate": 2e-3, "flow_steps": 50},
    },
    "large": {
        **{"image": 32, "patch": 4, "rows": 16, "hidden": 96, "images": 16384, "compared": 1024},
        **{"steps": 4000, "batch": 32, "width": 256, "layers": 6},
        **{"prior_steps": 20000, "prior_batch": 128, "prior_rate": 1e-3, "flow_steps": 50},
    },
    "quick": {
        **{"image": 8, "patch": 4, "rows": 4, "hidden": 8, "images": 16, "compared": 8},
        **{"steps": 2, "batch": 8, "width": 8, "layers": 1},
        **{"prior_steps": 2, "prior_batch": 8, "prior_rate": 1e-3, "flow_steps": 2},
    },
}


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    size = "quick" if options.quick else options.size
    return [
        named(
            f"{kind} {size}",
            seed,
            {
                **{"kind": kind, "size": size, "sizes": SIZES[size], "device": options.device},
                "pictures": str(options.out / f"{kind}-{size}-{seed}.safetensors"),
            },
        )
        for kind in KINDS
        for seed in options.seeds or SEEDS
    ]


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train a geolip and its prior; measure what is generated."""
    import torch
    from safetensors.torch import save_file

    from gravity_hf.models.geolip.prior_measures import compare_images
    from gravity_hf.training.conditions import run_conditions
    from gravity_hf.training.geolip.synthetic import synthetic_images

    # One process is one core's; more of them would wait for each other.
    torch.set_num_threads(1)
    sizes, seed, kind = run["sizes"], run["seed"], run["kind"]
    shape = (sizes["image"], sizes["patch"])
    training = synthetic_images(kind, sizes["images"], *shape, seed)
    count = sizes["compared"]
    real = synthetic_images(kind, 2 * count, *shape, _HELD_OUT_SEED + seed)
    held_out, reference = real[:count], real[count:]
    started = time.perf_counter()
    geolip = trained_geolip(run, training)
    between = time.perf_counter()
    found, prior_facts = generated_sets(run, geolip, training, held_out)
    rows = {name: compare_images(x, training, reference) for name, x in found.items()}
    # Next to each other what was not chosen: the first of each.
    kept = {name: x[:SHOWN].contiguous() for name, x in {"training": training, **found}.items()}
    Path(run["pictures"]).parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, run["pictures"])
    return {
        **{"kind": kind, "seed": seed, "sets": rows, **prior_facts},
        "relative_error": _relative_error(held_out, found["reconstructed"]),
        "parameters": {"geolip": geolip.num_parameters(), "prior": prior_facts["parameters"]},
        "seconds": {
            "geolip": round(between - started, 1),
            "prior and measures": round(time.perf_counter() - between, 1),
        },
        "conditions": run_conditions(run["device"]),
    }


def trained_geolip(run: dict[str, Any], training: Any) -> Any:
    from transformers import set_seed

    from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction
    from gravity_hf.training.geolip.fitting import fit

    sizes = run["sizes"]
    set_seed(run["seed"])
    config = GeolipConfig(
        image_size=sizes["image"],
        patch_size=sizes["patch"],
        num_rows=sizes["rows"],
        hidden_size=sizes["hidden"],
    )
    geolip = GeolipForReconstruction(config).to(run["device"])
    fit(geolip, training, steps=sizes["steps"], batch_size=sizes["batch"], seed=run["seed"])
    return geolip.eval()


def generated_sets(
    run: dict[str, Any], geolip: Any, training: Any, held_out: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Images of every set by its name, on the CPU; and what is known of the prior."""
    from transformers import set_seed

    from gravity_hf.models.geolip.modeling_prior import GeolipPrior
    from gravity_hf.models.geolip.prior_controls import gaussian_codes, mixed_codes, uniform_codes
    from gravity_hf.models.geolip.prior_decoding import decode_images, generate_images
    from gravity_hf.training.geolip.prior import frames_of, train_prior

    sizes, seed, count = run["sizes"], run["seed"], len(held_out)
    frames, real = frames_of(geolip, training), frames_of(geolip, held_out)
    set_seed(seed)
    prior = GeolipPrior.for_geolip(
        geolip, frames.shape[1], hidden_size=sizes["width"], num_hidden_layers=sizes["layers"]
    )
    losses = train_prior(
        prior,
        frames,
        steps=sizes["prior_steps"],
        batch_size=sizes["prior_batch"],
        lr=sizes["prior_rate"],
        seed=seed,
    )
    codes = {
        "gaussian": gaussian_codes(frames, count, seed),
        "mixed": mixed_codes(frames, count, seed),
        "uniform": uniform_codes(frames, count, seed),
        "reconstructed": real,
    }
    size = (sizes["image"], sizes["image"])
    decoded = {name: decode_images(geolip, code, *size).cpu() for name, code in codes.items()}
    drawn = generate_images(prior, geolip, count, seed, steps=sizes["flow_steps"]).cpu()
    found = {"held out": held_out, "prior": drawn, **decoded}
    last = statistics.fmean(losses[-100:])
    facts = {"prior_loss": last, "parameters": prior.num_parameters()}
    return {name: found[name] for name in SETS}, facts


def _relative_error(held_out: Any, reconstructed: Any) -> float:
    """Of reconstruction: mean squared error over the variance of the pixels."""
    error = (held_out - reconstructed).square().mean()
    return (error / held_out.var(correction=0)).item()


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of the seeds for every kind of images, set and measure."""
    kinds = {kind: [row for row in results if row["kind"] == kind] for kind in KINDS}
    return {
        "sizes": results[0]["run"]["sizes"],
        "rows": [
            {
                **{"kind": kind, "set": name, "seeds": len(rows)},
                **{m: over_seeds([row["sets"][name][m] for row in rows]) for m in MEASURES},
            }
            for kind, rows in kinds.items()
            if rows
            for name in SETS
        ],
        "relative_error": {
            kind: over_seeds([row["relative_error"] for row in rows])
            for kind, rows in kinds.items()
            if rows
        },
        "runs": [{k: v for k, v in row.items() if k not in ("run", "id")} for row in results],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: median over the seeds, lowest and highest in brackets."""
    lines = [
        "| images | set | pixels | spectra | nearest, of held-out | nearer than held-out |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            f"{x['median']:.3f} [{x['lowest']:.3f}, {x['highest']:.3f}]"
            for x in (row[name] for name in MEASURES)
        ]
        lines.append(f"| {row['kind']} | {row['set']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(file: Path, pictures: Path) -> None:
    """The first images of every set, a row each, as PNG."""
    from matplotlib.figure import Figure
    from safetensors.torch import load_file

    rows = load_file(pictures)
    names = ["training", *SETS]
    figure = Figure(figsize=(SHOWN + 1.5, len(names) + 0.5))
    axes = figure.subplots(len(names), SHOWN)
    for line, name in zip(axes, names, strict=True):
        for axis, image in zip(line, rows[name], strict=True):
            shown = (image.clamp(-1, 1) + 1) / 2
            axis.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.subplots_adjust(left=0.16, right=0.99, top=0.99, bottom=0.01, wspace=0.06, hspace=0.06)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.tmp")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(file)


def main(arguments: list[str] | None = None) -> None:
    from gravity_hf.viz.style import require_matplotlib

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, NAME)
    parser.add_argument("--size", choices=("small", "large"), default="small", help="large: a GPU")
    parser.add_argument("--only", help="only runs whose id contains this")
    parser.add_argument("--figure", type=Path, help="PNG: the first images of the first run")
    options = parser.parse_args(arguments)
    if options.figure is not None:
        require_matplotlib()
    runs = [run for run in plan(options) if (options.only or "") in run["id"]]
    if not runs:
        raise SystemExit(f"error: --only: no run's id contains {options.only!r}")
    content = finish(options, runs, work, summary, NAME, arguments)
    print(table(content["rows"]))
    if options.figure is not None:
        draw(options.figure, Path(runs[0]["pictures"]))
        print(f"written to {options.figure}")


if __name__ == "__main__":
    main()
