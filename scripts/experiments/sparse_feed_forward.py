"""What it costs a language model that each token uses a share of its feed-forward neurons.

    python scripts/experiments/sparse_feed_forward.py --device cuda
    python scripts/experiments/sparse_feed_forward.py --preset cpu --seeds 0
    python scripts/experiments/sparse_feed_forward.py --parts hosts --pretrained MODEL --text A B
    python scripts/experiments/sparse_feed_forward.py --quick --out trial.json  # seconds, to try

Part "hosts": the hosts of `lean_hosts.py`, or with --pretrained a causal model from any folder,
whose weights stay as they are. Held-out loss, in nats, of the dense model, and of the model that
keeps a share of the blocks of neurons of each layer, chosen for each token by

    predictor   `fit_predictors`, on other text
    oracle      the blocks of most energy, which only the dense layer knows: no predictor can
                choose better by that measure
    static      the same blocks for all tokens: those of most energy on other text
    random      blocks at random

and the first three again after `calibrate_blocks`, which puts neurons that are active together into
one block. `excess` is the loss above that of the dense model on the same text, `excess_error` the
standard error of its mean over windows.

Part "native": LeanFormers trained from scratch on the same text, steps and seeds: dense throughout,
with the mask over the last fifth of the steps, and with the mask over all of them; each is then
measured dense and masked, and `reordered` once more masked, after `calibrate_blocks` and
`fit_predictors`. A file that is there is continued.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from feed_forward_hosts import host_rows, measured  # noqa: E402
from lean_hosts import (  # noqa: E402
    Host,
    add_host_options,
    hosts_of,
    result_name,
    stream,
    text_of,
)
from paired_changes import pooled_error  # noqa: E402
from pool import training_arguments  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import set_seed  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402
from transformers.utils import logging  # noqa: E402

from gravity_hf import LeanFormerConfig, LeanFormerForCausalLM, sparsity  # noqa: E402
from gravity_hf.hub.card_public import public  # noqa: E402
from gravity_hf.integration.predictor_fit import calibrate_blocks, fit_predictors  # noqa: E402
from gravity_hf.training.conditions import run_conditions  # noqa: E402
from gravity_hf.training.files import write_json  # noqa: E402
from gravity_hf.training.mask_aware import MaskAwarePhase  # noqa: E402
from gravity_hf.training.measures import mean_loss  # noqa: E402
from gravity_hf.training.optim import GravityTrainer  # noqa: E402
from gravity_hf.training.streams import ConsecutiveWindows, RandomWindows, collate  # noqa: E402

RESULTS = HERE / "results"
# Block size and sparsity, of hosts; and to try, of small layers and of a pretrained host's.
CHOICES = ((32, 0.5), (32, 0.8), (32, 0.9), (64, 0.8))
QUICK_CHOICE, QUICK_PRETRAINED = (8, 0.5), (64, 0.8)
# A host that was trained for long needs more of its neurons.
PRETRAINED_CHOICES = ((32, 0.1), (32, 0.25), (32, 0.5), (32, 0.8))
# Share of the steps under the mask, by arm of the native part.
PHASES = {"dense": 0.0, "masked at the end": 0.2, "masked throughout": 1.0}


class Scale(NamedTuple):
    """Windows and steps. A window is of `length` tokens; `rows` of them are run at once."""

    length: int
    held_out: int
    rows: int
    fit_batches: int
    fit_rate: float
    native: dict[str, Any]
    native_steps: int
    native_rows: int


def _native(hidden: int, layers: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "intermediate_size": inner,
        "attention_rank": 0,
        "feed_forward_rank": 0,
        "screening": "none",
        "exit_heads": False,
        "min_depth": 1,
        "feed_forward_block": 32 if inner > 64 else 8,
        "feed_forward_sparsity": 0.8,
    }


SCALES = {
    "gpu": Scale(1024, 64, 8, 100, 2e-2, _native(256, 6, 1024), 300, 32),
    "cpu": Scale(256, 16, 4, 100, 2e-2, _native(128, 3, 512), 300, 4),
    "quick": Scale(64, 2, 2, 2, 1e-2, _native(32, 1, 64), 5, 2),
}
# Of a pretrained host: its own length, one window at once.
PRETRAINED = SCALES["gpu"]._replace(length=8192, held_out=8, rows=1, fit_batches=64)


def native_row(seed: int, arm: str, scale: Scale, files: Any, device: str) -> dict[str, Any]:
    """One LeanFormer, trained, then measured dense and masked."""
    text, share = stream(files), PHASES[arm]
    set_seed(seed)
    config = LeanFormerConfig(vocab_size=text.vocabulary, **scale.native)
    model = LeanFormerForCausalLM(config)
    steps, rows, length = scale.native_steps, scale.native_rows, min(scale.length, 256)
    with tempfile.TemporaryDirectory() as folder:
        cuda = device != "cpu"
        training = training_arguments(
            *(folder, steps, 1.5e-3, seed),
            per_device_train_batch_size=rows,
            logging_steps=max(1, steps // 10),
            disable_tqdm=not sys.stderr.isatty(),
            use_cpu=not cuda,
            bf16=cuda,
            torch_compile=False,
        )
        trainer = GravityTrainer(
            model=model,
            args=training,
            train_dataset=RandomWindows(text.train, steps * rows, length, seed=seed),
            data_collator=collate,
            callbacks=[MaskAwarePhase(share)] if share else [],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = {str(e["step"]): e["loss"] for e in trainer.state.log_history if "loss" in e}
    held_out = ConsecutiveWindows(text.validation, scale.held_out, length)
    windows = list(held_out.__getitems__(list(range(len(held_out)))).split(scale.rows))
    with sparsity(model, feed_forward="dense"):
        row = {"seed": seed, "arm": arm, "dense_loss": mean_loss(model, windows)}
    row |= {**measured(model, windows), "training_losses": losses}
    sample = RandomWindows(text.train, scale.fit_batches * scale.rows, length, seed=10_000 + seed)
    ids = sample.__getitems__(list(range(len(sample))))
    batches = [{"input_ids": part} for part in ids.split(scale.rows)]
    calibrate_blocks(model, batches)
    fit_predictors(model, batches, learning_rate=scale.fit_rate)
    return {**row, "reordered": measured(model, windows), "parameters": model.num_parameters()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_host_options(parser)
    parts = ("hosts", "native")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--out", type=Path, help="JSON [results/sparse_feed_forward.json]")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick: expected --out too: what is measured then is not to be kept")
    options.out = options.out or RESULTS / result_name("sparse_feed_forward", options)
    return options


class Results:
    """Rows by part, written whenever there are new ones; those of an equal run are kept."""

    def __init__(self, file: Path, conditions: dict[str, Any], host: Host) -> None:
        self.file, self.conditions = file, public(conditions)
        self.head = {"unit": host.unit, "host": host.described()}
        self.parts: dict[str, list[dict[str, Any]]] = {"hosts": [], "native": []}
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            same = ("device", "versions", "commit", "settings")
            if all(before["conditions"].get(n) == self.conditions.get(n) for n in same):
                self.parts = before["rows"]

    def has(self, part: str, **names: Any) -> bool:
        return any(all(row[n] == v for n, v in names.items()) for row in self.parts[part])

    def add(self, part: str, rows: list[dict[str, Any]]) -> None:
        self.parts[part] += rows
        report = {**self.head, "conditions": self.conditions, "rows": self.parts}
        report["summary"] = summary(self.parts, self.head["host"]["apart"])
        write_json(self.file, public(report))


def summary(
    parts: dict[str, list[dict[str, Any]]], apart: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Mean, least and most of the excess over seeds, of every arm; `apart`: see `pooled_error`."""
    found: dict[str, list[dict[str, Any]]] = {}
    names = {"hosts": ("block_size", "sparsity", "reordered", "arm"), "native": ("arm",)}
    for part, rows in parts.items():
        arms: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            arms.setdefault(tuple(row[n] for n in names[part]), []).append(row)
        found[part] = [
            {**dict(zip(names[part], key, strict=True)), "seeds": len(of), **_spread(of)}
            for key, of in arms.items()
        ]
        for line, of in zip(found[part], arms.values(), strict=True):
            error = pooled_error([row.get("excess_error") for row in of], apart)
            line |= {} if error is None else {"excess_error": error}
            if "windows" in of[0]:
                line["windows"] = sum(row["windows"] for row in of) if apart else of[0]["windows"]
    return found


def _spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    values = {name: [row[name] for row in rows] for name in ("loss", "dense_loss", "energy_recall")}
    values["excess"] = [row["loss"] - row["dense_loss"] for row in rows]
    return {
        n: {"mean": statistics.mean(v), "min": min(v), "max": max(v)} for n, v in values.items()
    }


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        hosts = hosts_of(options)
        files = text_of(options.data)[1]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    preset = hosts[0].record["settings"]["preset"]
    full = options.pretrained and preset != "quick"
    scale = PRETRAINED if full else SCALES[preset]
    settings = {"preset": preset, "scale": scale._asdict(), "data": text_of(options.data)[0]}
    settings["host"] = hosts[0].described()
    conditions = run_conditions(options.device) | {
        "command": shlex.join(["python", "scripts/experiments/sparse_feed_forward.py", *given]),
        "settings": settings,
    }
    # As JSON has them, so that a file's can be compared.
    results = Results(options.out, json.loads(json.dumps(conditions)), hosts[0])
    jobs = _jobs(options, hosts, scale, files, results)
    for part, name, work in tqdm(jobs, desc="sparse_feed_forward", disable=not sys.stderr.isatty()):
        rows = work()
        results.add(part, rows)
        for row in rows:
            how = f"{row['arm']}{', reordered' if row.get('reordered') is True else ''}"
            print(
                f"{part:<7} {name:<30} {how:<22} loss {row['loss']:.4f} dense "
                f"{row['dense_loss']:.4f} energy {row['energy_recall']:.3f}",
                flush=True,
            )


def _jobs(
    options: argparse.Namespace, hosts: list[Host], scale: Scale, files: Any, results: Results
) -> list[tuple[str, str, Callable[[], list[dict[str, Any]]]]]:
    """What has no rows yet: part, name, and what gives its rows."""
    jobs: list[tuple[str, str, Callable[[], list[dict[str, Any]]]]] = []
    device = options.device
    choices = PRETRAINED_CHOICES if options.pretrained else CHOICES
    if hosts[0].record["settings"]["preset"] == "quick":
        choices = (QUICK_PRETRAINED if options.pretrained else QUICK_CHOICE,)
    for host in hosts if "hosts" in options.parts else []:
        for block, share in choices:
            if not results.has("hosts", seed=host.seed, block_size=block, sparsity=share):
                name = f"seed {host.seed} block {block} sparsity {share}"

                def work(host: Host = host, choice: Any = (block, share)) -> list[dict[str, Any]]:
                    return list(host_rows(host, choice, scale, device))

                jobs.append(("hosts", name, work))
    for seed in options.seeds if "native" in options.parts else []:
        for arm in PHASES:
            if not results.has("native", seed=seed, arm=arm):

                def train(seed: int = seed, arm: str = arm) -> list[dict[str, Any]]:
                    return [native_row(seed, arm, scale, files, device)]

                jobs.append(("native", f"seed {seed}", train))
    return jobs


if __name__ == "__main__":
    main()
