"""When does a geolip's attention across patches do anything? Tasks with a known answer.

    python scripts/experiments/geolip_mechanisms.py --workers 2      # minutes on two CPU cores
    python scripts/experiments/geolip_mechanisms.py --only "shared colour" --seeds 0
    python scripts/experiments/geolip_mechanisms.py --quick          # to try

Mechanism A: the attention found something in other patches that the task needs. B: it did not. A is
right where other patches know what the own one does not: under noise, a colour that all patches
share. Where each patch has all that it needs, or no other has it, B is right. Noisy waves are open:
their patches share colours, but without positions not much more. Where the alphas learn ten times
as fast as the weights they may rise though nothing can be gained: drift, which has to be seen.

The verdict swaps the context: keys and values of all other patches come from another image. Beside
it stand three simpler criteria on the same models: the alphas alone; the loss without other patches
(each attends to itself); the loss without spectral attention. A gain counts from 0.01 on, and the
alphas must have risen by a tenth, as in the verdict.

Every task is learned with dot-product and with gravity attention over the spectra, from as many
seeds: other weights, other images, other noise. Results of single runs are in --out and not made
again.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import asdict, dataclass
from typing import Any

from geolip_report import OPEN, criteria_table, mechanisms_summary, mechanisms_table
from geolip_runs import add_options, finish, named, show

NAME = "geolip_mechanisms"
ATTENTIONS = ("dot_product", "gravity")
SEEDS = (0, 1, 2)
TEXT = "text"
# Held-out data and its noise come from seeds that no training has.
_HELD_OUT_SEED = 10_000


@dataclass(frozen=True)
class Task:
    """What is learned, and which mechanism that calls for.

    Attributes:
        data: a kind of `synthetic_images`, or `text`: shuffled words as byte trigrams.
        expected: "A", "B" or "open".
        denoise: standard deviation of the noise, in units of that of each number of the patches; 0:
            reconstruction.
        alpha_rate: how much faster the alphas learn than weights.
        steps: of training.
    """

    name: str
    data: str
    expected: str
    denoise: float = 0.0
    alpha_rate: float = 1.0
    steps: int = 800


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("shared colour, denoised", "shared_colour", "A", denoise=2.0),
        Task("shared colour, alphas x3", "shared_colour", "A", denoise=2.0, alpha_rate=3.0),
        Task("shared colour, alphas x10", "shared_colour", "A", denoise=2.0, alpha_rate=10.0),
        Task("own colours, denoised", "independent_colour", "B", denoise=2.0),
        Task("own colours, alphas x10", "independent_colour", "B", denoise=2.0, alpha_rate=10.0),
        Task("noise, reconstructed", "noise", "B"),
        Task("noise, alphas x10", "noise", "B", alpha_rate=10.0),
        Task("waves, reconstructed", "waves", "B"),
        Task("waves, denoised", "waves", OPEN, denoise=1.5),
        Task("shuffled words, reconstructed", TEXT, "B"),
    )
}

SIZES: dict[str, dict[str, int]] = {
    "full": {
        **{"image": 16, "patch": 4, "hidden": 64, "rows": 32, "batch": 16},
        **{"images": 4096, "held_out": 256},
    },
    "quick": {
        **{"image": 8, "patch": 4, "hidden": 16, "rows": 4, "batch": 4},
        **{"images": 8, "held_out": 8},
    },
}


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, tasks first: what a cut-off run leaves can be compared."""
    size = "quick" if options.quick else "full"
    return [
        named(
            f"{task.name} {attention}",
            seed,
            {
                **{"task": task.name, "attention": attention, "size": size},
                **{"sizes": SIZES[size], "settings": asdict(task), "device": options.device},
                "steps": 2 if options.quick else task.steps,
            },
        )
        for task in TASKS.values()
        for attention in options.attention
        for seed in options.seeds or SEEDS
    ]


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train one model and find out what it does."""
    import torch
    from transformers import set_seed

    from gravity_hf.models.geolip.verdict import compute_verdict
    from gravity_hf.training.conditions import run_conditions
    from gravity_hf.training.geolip.fitting import batches_of, fit, rows_of
    from gravity_hf.training.geolip.noise import noisy_rows

    # One process is one core's; more of them would wait for each other.
    torch.set_num_threads(1)
    task, sizes, seed = Task(**run["settings"]), run["sizes"], run["seed"]
    train = patches_of(task.data, sizes, sizes["images"], seed)
    held_out = patches_of(task.data, sizes, sizes["held_out"], _HELD_OUT_SEED + seed)
    set_seed(seed)
    model = new_model(task, run["attention"], sizes, train).to(run["device"])
    start = time.perf_counter()
    losses = fit(
        model,
        train,
        steps=run["steps"],
        batch_size=sizes["batch"],
        seed=seed,
        denoise=task.denoise,
    )
    seconds = time.perf_counter() - start
    rows = noisy_rows(model, rows_of(held_out), task.denoise, _HELD_OUT_SEED + seed)
    batches = list(batches_of(rows, sizes["batch"]))
    verdict = compute_verdict(model, batches, steps=run["steps"], seed=seed)
    return {
        **{name: run[name] for name in ("task", "attention", "seed", "steps")},
        **{"gain": verdict.coordination_gain, "alpha": verdict.mean_alpha},
        "verdict": verdict.to_dict(),
        "without": ablated_gains(model, batches),
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": seconds,
        "conditions": run_conditions(run["device"]),
    }


def new_model(task: Task, attention: str, sizes: dict[str, int], patches: Any) -> Any:
    """A new model that has the statistics of `patches`."""
    from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction
    from gravity_hf.models.geolip.features import feature_statistics

    config = GeolipConfig(
        patch_dim=patches.shape[-1],
        num_rows=sizes["rows"],
        hidden_size=sizes["hidden"],
        spectral_attention=attention,
        alpha_lr_multiplier=task.alpha_rate,
    )
    model = GeolipForReconstruction(config)
    statistics = feature_statistics(patches)
    model.set_feature_statistics(statistics.mean, statistics.std)
    return model


def patches_of(data: str, sizes: dict[str, int], count: int, seed: int) -> Any:
    """`[count, N, P]` float32."""
    from gravity_hf.models.geolip.patches import patchify
    from gravity_hf.training.geolip.synthetic import synthetic_images

    if data == TEXT:
        return text_patches(count, sizes["image"], sizes["patch"], seed)
    images = synthetic_images(data, count, sizes["image"], sizes["patch"], seed)
    return patchify(images, sizes["patch"])


def ablated_gains(model: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
    """By how much the loss is larger, of what it is: `context` where each token attends to itself
    alone, `attention` where spectra stay as they are."""
    still = copy.deepcopy(model)
    for name, parameter in still.named_parameters():
        if name.endswith("alpha_logits"):
            parameter.data.fill_(float("-inf"))
    whole = _loss(model, batches)
    alone = _loss(model, [_each_alone(batch) for batch in batches])
    return {"context": alone / whole - 1, "attention": _loss(still, batches) / whole - 1}


def _each_alone(batch: dict[str, Any]) -> dict[str, Any]:
    """Every token as a sample of its own; the tokens of these experiments are all valid."""
    tensors = {name: batch[name] for name in ("patches", "labels")}
    return {name: x.reshape(-1, 1, x.shape[-1]) for name, x in tensors.items()}


def _loss(model: Any, batches: list[dict[str, Any]]) -> float:
    import torch

    model.eval()
    device, total, tokens = model.device, 0.0, 0
    with torch.no_grad():
        for batch in batches:
            moved = {name: value.to(device) for name, value in batch.items()}
            count = moved["patches"].shape[:2].numel()
            total += float(model(**moved).loss) * count
            tokens += count
    return total / tokens


def text_patches(count: int, size: int, patch: int, seed: int) -> Any:
    """`[count, N, P]`: words of Python's help, shuffled, as images of byte trigrams; training and
    held-out texts share words, and nothing else."""
    import random

    from gravity_hf.models.geolip.trigrams import GeolipByteTrigramProcessor
    from gravity_hf.training.text import embedded_english

    processor = GeolipByteTrigramProcessor(image_size=size, patch_size=patch)
    words, draw = embedded_english().split(), random.Random(seed)
    pieces = []
    while len(pieces) < count:
        # A byte or more a word; the rest is cut.
        text = " ".join(draw.choices(words, k=processor.bytes_per_image)).encode()
        pieces.append(text[: processor.bytes_per_image])
    return processor(pieces)["patches"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    add("--only", help="only tasks whose name contains this")
    add_options(parser, NAME)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    runs = [run for run in plan(options) if (options.only or "") in run["task"]]
    if not runs:
        raise SystemExit(f"error: --only: no task's name contains {options.only!r}: {list(TASKS)}")
    content = finish(options, runs, work, mechanisms_summary, NAME, arguments)
    show(*mechanisms_table(content))
    show(*criteria_table(content))


if __name__ == "__main__":
    main()
