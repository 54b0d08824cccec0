"""Does governed training pay? Against plain training: same data, order, steps and start.

    python scripts/experiments/governed.py              # small models, 20 minutes of a CPU core
    python scripts/experiments/governed.py --arms plain governed --models llama
    python scripts/experiments/governed.py --preset gpu --device cuda   # minutes, fewer arms
    python scripts/experiments/governed.py --quick               # to try

A LeanFormer and a Llama are trained on the Python standard library's source, from three seeds each.
`governed`: groups of weights that have converged are frozen, levels begin one after another, one
budget shares the rates. Ablations leave one of the three out, or all but one; `defaults` has the
library's thresholds in place of those under which groups converge within so short a run. Controls
are plain: `rate_matched` has the average rate of `governed`, `budget_rate_matched` that of
`rates_only`; `random_freezing` saves as much backward arithmetic as `governed` by a schedule drawn
at random; `equal_flops` and `equal_time` have as many steps as its arithmetic, or its time, is
enough for, with a schedule of rates that ends there.

Arithmetic is counted by torch's FlopCounterMode for every set of groups that learned, probes of
frozen groups included; forward and backward. Time is that of training alone, one run after another;
on a CPU that of the process, so that other work there adds little to it.
Results of single runs are in --out and not made again: a command that was stopped, or was given
some --arms, --models or --seeds, is gone on with by the next one, and the summary has them all.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from typing import Any

from geolip_runs import RESULTS, add_options, finish, named, show
from governed_arithmetic import LateFreezing, counter_of
from governed_arms import (
    ARMS,
    FEW_ARMS,
    MATCHED,
    MODELS,
    PLAIN,
    PRESETS,
    Clock,
    settings_of,
)
from governed_report import governed_summary, governed_table
from pool import read_results, run_all, training_arguments

NAME = "governed"
SEEDS = (0, 1, 2)


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs that depend on no other, seeds outermost."""
    matched = [MATCHED[arm] for arm in options.arms if arm in MATCHED]
    needed = [PLAIN, *matched] if matched else []
    asked = [arm for arm in options.arms if arm not in MATCHED]
    free = list(dict.fromkeys([*needed, *asked]))
    return [
        _run(options, model, arm, seed)
        for seed in options.seeds or SEEDS
        for model in options.models
        for arm in free
    ]


def plan_matched(options: argparse.Namespace, done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Controls of those runs that are done, with plain ones of their seed beside."""
    by = {(r["model"], r["arm"], r["seed"]): r for r in done}
    return [
        _run(options, model, arm, seed, **_matched(arm, by[one], by[other]))
        for seed in options.seeds or SEEDS
        for model in options.models
        for arm in options.arms
        if arm in MATCHED
        and (one := (model, PLAIN, seed)) in by
        and (other := (model, MATCHED[arm], seed)) in by
    ]


def everything(
    options: argparse.Namespace, known: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Of all results, those of the same preset and device, with whatever arms, models and seeds
    they were asked for."""
    seeds = sorted({result["seed"] for result in known.values()})
    asked = {"arms": ARMS, "models": MODELS, "seeds": seeds}
    whole = argparse.Namespace(**{**vars(options), **asked})
    free = [known[run["id"]] for run in plan(whole) if run["id"] in known]
    matched = [run["id"] for run in plan_matched(whole, free)]
    return free + [known[name] for name in matched if name in known]


def _run(
    options: argparse.Namespace, model: str, arm: str, seed: int, **how: Any
) -> dict[str, Any]:
    preset = PRESETS[options.preset]
    settings = {
        **{"model": model, "arm": arm, "preset": options.preset, "device": options.device},
        **{name: preset[name] for name in ("rows", "length", "rate", "validation_windows")},
        "steps": preset["steps"],
        "train_bytes": preset["train_bytes"],
        "overrides": preset["overrides"][model],
        "governed": settings_of(arm, preset["steps"]),
        **how,
    }
    return named(f"{model} {arm}", seed, settings)


def _matched(arm: str, plain: dict[str, Any], governed: dict[str, Any]) -> dict[str, Any]:
    """What a control has of a governed run."""
    steps = plain["steps"]
    if arm in ("rate_matched", "budget_rate_matched"):
        return {"rate": round(plain["rate"] * governed["mean_multiplier"], 9)}
    if arm == "random_freezing":
        return {"saved": round(governed["backward_saved"], 4)}
    share = governed["flops" if arm == "equal_flops" else "seconds"]
    whole = plain["flops" if arm == "equal_flops" else "seconds"]
    return {"steps": max(1, round(steps * share / whole))}


def work(run: dict[str, Any]) -> dict[str, Any]:
    """Train one model; its loss, arithmetic and time."""
    import torch
    from transformers.utils import logging

    from gravity_hf.training.pretraining import PretrainArguments, pretrain

    logging.set_verbosity_error()
    # One process is one core's; more of them would wait for each other.
    torch.set_num_threads(1)
    arguments = PretrainArguments(
        architecture=run["model"],
        attention="dot_product",
        overrides=json.dumps(run["overrides"]),
        length=run["length"],
        validation_windows=run["validation_windows"],
        governed=run["governed"] is not None,
        governed_settings="" if run["governed"] is None else json.dumps(run["governed"]),
    )
    clock, text = Clock(run["device"]), _stream(run["train_bytes"])
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(
            folder,
            run["steps"],
            run["rate"],
            run["seed"],
            per_device_train_batch_size=run["rows"],
            logging_steps=max(1, run["steps"] // 4),
            eval_strategy="steps",
            eval_steps=max(1, run["steps"] // 8),
            # A set of groups that is new would be compiled anew.
            torch_compile=False,
            use_cpu=run["device"] == "cpu",
            bf16=run["device"] == "cuda",
        )
        others = [clock]
        if "saved" in run:
            # Its groups are those of the model that `pretrain` is about to make.
            others.append(LateFreezing(run, text))
        result = pretrain(arguments, training, text, others)
    return _answer(run, result, clock, others[1:], text)


def _answer(
    run: dict[str, Any], result: Any, clock: Clock, freezing: list[Any], text: Any
) -> dict[str, Any]:
    from gravity_hf.training.conditions import run_conditions

    record = result.record
    governance = record.get("governance")
    learned, probed = _learned(run, governance, freezing)
    flops = _arithmetic(run, result.model, text, learned, probed)
    return {
        **{name: run[name] for name in ("model", "arm", "seed", "steps", "rate", "preset")},
        "loss": record["loss"],
        "evaluations": record["evaluations"],
        "seconds": clock.seconds,
        **flops,
        "mean_multiplier": 1.0 if governance is None else governance["mean_multiplier"],
        "parameters": record["parameters"],
        # None: all of them.
        "learned": [{"groups": groups, "steps": count} for groups, count in learned],
        "governance": None if governance is None else _brief(governance),
        "settings": run["governed"],
        "text": record["text"],
        "conditions": run_conditions(run["device"]),
    }


def _brief(governance: dict[str, Any]) -> dict[str, Any]:
    """Of the report, what a table or a figure needs; every tenth point of its trace."""
    names = ("groups", "changes", "activations", "probes")
    return {name: governance[name] for name in names} | {"trace": governance["trace"][::10]}


def _learned(
    run: dict[str, Any], governance: dict[str, Any] | None, freezing: list[Any]
) -> tuple[list[tuple[tuple[str, ...] | None, int]], list[tuple[str, ...]]]:
    """Sets of groups that learned, with their steps (None: all), and sets that were probed."""
    if freezing:
        return freezing[0].learned(run["steps"]), []
    if governance is None:
        return [(None, run["steps"])], []
    sets = [(tuple(entry["groups"]), entry["steps"]) for entry in governance["learned"]]
    return sets, [tuple(sorted(probe["gradients"])) for probe in governance["probes"]]


def _arithmetic(
    run: dict[str, Any], model: Any, text: Any, learned: list[Any], probed: list[Any]
) -> dict[str, float]:
    """Operations of the whole run, and the share of the backward's that was not done."""
    count = counter_of(run, model, text)
    forward, whole = count(None)
    backward = sum(count(groups)[1] * steps for groups, steps in learned)
    probes = sum(sum(count(groups)) for groups in probed)
    return {
        "flops": forward * run["steps"] + backward + probes,
        "backward_flops": backward,
        "probe_flops": probes,
        "backward_saved": 1 - backward / (whole * run["steps"]),
    }


@functools.cache
def _stream(train_bytes: int) -> Any:
    from gravity_hf.training.streams import load_stream

    return load_stream("byte", train_bytes=train_bytes, validation_bytes=train_bytes // 10)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=("cpu", "gpu"), default="cpu", help="sizes and steps")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--arms", nargs="+", choices=ARMS, help=f"[all; --preset gpu: {' '.join(FEW_ARMS)}]")
    add("--commit", help="of the source, where it is a copy without git")
    add_options(parser, NAME)
    # A process of its own for each seed takes longer to start than some of the runs.
    parser.set_defaults(workers=0)
    options = parser.parse_args(arguments)
    options.arms = options.arms or list(FEW_ARMS if options.preset == "gpu" else ARMS)
    if options.quick:
        options.preset = "quick"
    elif options.summary is None:
        options.summary = RESULTS / f"{NAME}_{options.device}.json"
    return options


def _done(options: argparse.Namespace, seed: int, deadline: float) -> list[dict[str, Any]]:
    """Do the runs of one seed, controls too before the next seed begins; the runs."""
    one = argparse.Namespace(**{**vars(options), "seeds": [seed]})

    def finished(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return run_all(
            runs,
            work,
            options.out / "runs.jsonl",
            workers=options.workers,
            gpus=1 if options.device == "cuda" else 0,
            minutes=(deadline - time.monotonic()) / 60,
        )

    free = plan(one)
    matched = plan_matched(one, finished(free))
    finished(matched)
    return [*free, *matched]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.commit:
        # Workers read it, too.
        os.environ["GRAVITY_HF_COMMIT"] = options.commit
    deadline, runs = time.monotonic() + 60 * options.minutes, []
    for seed in options.seeds or SEEDS:
        runs += _done(options, seed, deadline)
    options.minutes = (deadline - time.monotonic()) / 60

    def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
        return governed_summary(everything(options, read_results(options.out / "runs.jsonl")))

    content = finish(options, runs, work, summary, NAME, arguments)
    show(*governed_table(content))


if __name__ == "__main__":
    main()
