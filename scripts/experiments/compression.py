"""What maps of low rank cost: loss of trained hosts made smaller, and then trained on a little.

    python scripts/experiments/compression.py                        # CPU, hosts of 3 M
    python scripts/experiments/compression.py --device cuda          # hosts of 13 M
    python scripts/experiments/compression.py --device cuda --energies 0.9 0.95 0.99 0.999
    python scripts/experiments/compression.py --pretrained MODEL --text one.txt --device cuda
    python scripts/experiments/compression.py --pretrained MODEL --text one.txt --heal 0
    python scripts/experiments/compression.py --quick --out try.json

Hosts are those of lean_hosts.py, or with --pretrained a causal model from any folder. Arms:

    weighted   factorize(host, "energy:E", calibration=...): the ranks that keep a share E of the
               energy of each map's outputs, on inputs from the training text
    plain      the same ranks, by the singular values of the weights alone
    control    a dense Llama of as many parameters, trained from scratch on as many tokens as the
               host: what else one could have with that size
    layers     of a pretrained host in the place of that: itself, dense, without so many of its
               later layers that about as many parameters are left
    dense      the host itself

Every arm is trained on for the same number of steps on the same windows ("healed"), the host and
the control too; with --heal 0 none is. A pretrained host is calibrated and made smaller once for
all seeds, which have held-out windows of their own. Losses are of held-out text, in windows of the
host's length, and their changes are those of the same windows.
Parameters are those of the layers alone and of the whole model, where tied tensors count once.
Seconds are of a forward of one such window, called in turns with the host's.

What is done is kept in --runs and not done again; no run is started after --minutes, and the same
command does what is left.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from geolip_runs import named, over_seeds, show
from lean_hosts import add_host_options, place_of, result_name
from paired_changes import paired, pooled_error
from pool import run_all

RESULTS = Path(__file__).resolve().parent / "results"
ENERGIES = (0.9, 0.95, 0.99)
# The control costs a training from scratch each.
CONTROLS = (0.99,)
_NUMBERS = ("parameters", "layer_parameters", "loss", "healed_loss", "seconds", "dense_seconds")


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    usual = "cpu" if options.device == "cpu" else "gpu"
    size = "quick" if options.quick else usual
    control = "layers" if options.pretrained else "control"
    place = {**place_of(options), "size": size}
    if options.heal is not None:
        place["heal"] = options.heal
    arms: list[tuple[str, float | None]] = [("dense", None)]
    arms += [(arm, e) for e in options.energies for arm in ("weighted", "plain")]
    arms += [(control, e) for e in options.controls]
    wanted = [(seed, *arm) for seed in options.seeds for arm in arms]
    if options.pretrained:
        # What seeds share is made once. `layers` follows the weighted arm whose size it takes;
        # plain, which is only to compare with, comes last.
        arms.sort(key=lambda arm: (arm[0] == "plain", arm[1] or 0))
        wanted = [(seed, *arm) for arm in arms for seed in options.seeds]
    runs = []
    for seed, arm, energy in wanted:
        settings = {"arm": arm, "energy": energy, **place}
        runs.append(named(arm if energy is None else f"{arm} {energy}", seed, settings))
    # What costs most comes last.
    return sorted(runs, key=lambda run: run["arm"] == "control")


def work(run: dict[str, Any]) -> dict[str, Any]:
    from compression_arms import one_run
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return one_run(run)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows over seeds. `change`, `healed_change`: above the host's own loss, healed or not."""
    dense = {run["seed"]: run for run in runs if run["arm"] == "dense"}
    rows = []
    for arm, energy in dict.fromkeys((run["arm"], run["energy"]) for run in runs):
        mine = [run for run in runs if (run["arm"], run["energy"]) == (arm, energy)]
        row: dict[str, Any] = {"arm": arm, "energy": energy, "seeds": [r["seed"] for r in mine]}
        known = [name for name in _NUMBERS if name in mine[0]]
        row |= {name: over_seeds([run[name] for run in mine]) for name in known}
        row["change"] = over_seeds([run["change"] for run in mine])
        row |= _errors(mine, dense)
        beside = [run for run in mine if run["seed"] in dense]
        if beside:
            wanted: dict[str, Any] = {
                "smaller": lambda run, host: host["parameters"] / run["parameters"],
                "layers_smaller": lambda r, h: h["layer_parameters"] / r["layer_parameters"],
            }
            if "healed_loss" in row:
                wanted["healed_change"] = lambda r, h: r["healed_loss"] - h["healed_loss"]
            for name, number in wanted.items():
                row[name] = over_seeds([number(run, dense[run["seed"]]) for run in beside])
        rows.append(row)
    return {
        "host": runs[0]["host"],
        "unit": runs[0]["unit"],
        "heal": runs[0]["heal"],
        "rows": rows,
        "runs": [brief(run) for run in runs],
    }


def brief(run: dict[str, Any]) -> dict[str, Any]:
    """Without what is the same for all, and stands above them."""
    return {name: x for name, x in run.items() if name not in ("run", "host", "conditions")}


def _errors(runs: list[dict[str, Any]], dense: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Windows in all, and standard errors of the mean changes, healed or not."""
    apart = runs[0]["host"]["apart"]
    counts = [run["windows"] for run in runs]
    healed = [
        paired(run["healed_losses"], dense[run["seed"]]["healed_losses"])["change_error"]
        for run in runs
        if run["seed"] in dense and "healed_losses" in run
    ]
    errors = {
        "windows": sum(counts) if apart else max(counts),
        "change_error": pooled_error([run["change_error"] for run in runs], apart),
    }
    return {**errors, "healed_change_error": pooled_error(healed, apart)} if healed else errors


def table(content: dict[str, Any]) -> None:
    lines = []
    for row in content["rows"]:
        middle = {name: x["median"] for name, x in row.items() if isinstance(x, dict)}
        lines.append(
            [
                row["arm"] if row["energy"] is None else f"{row['arm']} {row['energy']}",
                f"{middle['layer_parameters'] / 1e6:.2f} M",
                f"{middle['parameters'] / 1e6:.2f} M",
                f"{middle['loss']:.4f}",
                f"{middle['change']:+.4f}",
                f"{middle['healed_loss']:.4f}" if "healed_loss" in middle else "–",
                f"{middle['healed_change']:+.4f}" if "healed_change" in middle else "–",
                f"{middle['seconds'] * 1e3:.1f}",
                f"{middle['dense_seconds'] * 1e3:.1f}",
            ]
        )
    headers = [
        "arm",
        "layers",
        "model",
        "loss",
        "above host",
        "healed",
        "above host",
        "ms",
        "host's ms",
    ]
    show(headers, lines)


def main(arguments: list[str] | None = None) -> None:
    from gravity_hf.hub.card_public import public
    from gravity_hf.training.files import write_json

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_host_options(parser)
    add = parser.add_argument
    add("--energies", nargs="+", type=float, default=list(ENERGIES), help="[0.9 0.95 0.99]")
    add("--controls", nargs="*", type=float, default=list(CONTROLS), help="of energies [0.99]")
    add("--heal", type=int, metavar="STEPS", help="of training every arm on; 0: none [2, 40, 60]")
    add("--minutes", type=float, default=60, help="start no run later than this")
    add("--runs", type=Path, default=Path("runs/compression"), help="what is kept of runs")
    add("--out", type=Path, help="JSON [results/compression_DEVICE.json, _pretrained.json]")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if options.quick and options.out is None:
        parser.error("--quick: expected --out too: what is measured then is not to be kept")
    if any(not 0 < energy < 1 for energy in [*options.energies, *options.controls]):
        parser.error("--energies, --controls: expected numbers between 0 and 1")
    if options.heal is not None and options.heal < 0:
        parser.error(f"--heal: expected 0 or more steps, got {options.heal}")
    if options.commit:
        os.environ["GRAVITY_HF_COMMIT"] = options.commit
    try:
        runs = plan(options)
    except ValueError as error:
        parser.error(str(error))
    # One process has the whole machine: times are measured.
    gpus = 1 if options.device == "cuda" else 0
    file = options.runs / "runs.jsonl"
    done = run_all(runs, work, file, workers=0, gpus=gpus, minutes=options.minutes)
    if not done:
        raise SystemExit("error: all runs failed or were left for later: see above")
    command = shlex.join(["python", "scripts/experiments/compression.py", *given])
    content = {"conditions": {**done[-1]["conditions"], "command": command}, **summary(done)}
    content = public(content)
    out = options.out or RESULTS / result_name("compression", options, options.device)
    print(f"written to {write_json(out, content)}")
    table(content)
    if len(done) < len(runs):
        raise SystemExit(f"error: {len(runs) - len(done)} runs are left: run it again")


if __name__ == "__main__":
    main()
