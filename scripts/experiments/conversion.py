"""Converting a trained host: what each recipe loses, healed, against the host healed alike.

    python scripts/experiments/conversion.py --gpus 2 --workers 16

Every row gets the same LoRA budget: raw loss, healed loss, contrast before and after. The control,
the host with dot-product attention, is healed at three learning rates and its best counts, so that
no row is compared with a badly tuned one. Results are JSON lines; runs that are there are not done
again.
"""

from __future__ import annotations

import argparse
from typing import Any

from laboratory import CONTROL, add_options, heal_run, run_experiment

CONTROL_RATES = (2e-3, 8e-3)  # beside the one of all rows
DISTILLED = {"mode": "end_to_end", "outputs": 0.0, "logits": 1.0, "loss": 1.0}
MATCHED = {"mode": "end_to_end", "outputs": 1.0, "logits": 0.0, "loss": 1.0}


def lifted(law: str, softness: float, **more: Any) -> dict[str, Any]:
    return {"constants": "calibrated", "law": law, "softness": softness, **more}


# The rows of the promises first, so that a list that is cut short has them.
ARMS: dict[str, dict[str, Any]] = {
    "host": CONTROL,
    "force lifted f=1": lifted("force", 1.0),
    "force lifted f=0.25": lifted("force", 0.25),
    "power lifted f=1": lifted("power", 1.0),
    "power lifted f=0.25": lifted("power", 0.25),
    "power lifted f=0": lifted("power", 0.0),
    "force lifted f=0": lifted("force", 0.0),
    "published": {"constants": "published"},
    "force euclidean f=1": lifted("force", 1.0, distance="euclidean"),
    "power euclidean f=1": lifted("power", 1.0, distance="euclidean"),
}
MORE: dict[str, dict[str, Any]] = {
    "force euclidean fitted": lifted("force", 4.0, distance="euclidean", fit=True),
    "power euclidean fitted": lifted("power", 4.0, distance="euclidean", fit=True),
    "force lifted f=0.25 fitted": lifted("force", 0.25, fit=True),
    "power lifted f=0.25 fitted": lifted("power", 0.25, fit=True),
    "force lifted KL<=0.01": {"constants": "calibrated", "law": "force", "max_kl": 0.01},
    "power lifted KL<=0.01": {"constants": "calibrated", "law": "power", "max_kl": 0.01},
    "force lifted f=4": lifted("force", 4.0),
    "power lifted f=4": lifted("power", 4.0),
}


def plan(seeds: list[int]) -> list[dict[str, Any]]:
    runs = [heal_run(arm, seed, how) for arm, how in ARMS.items() for seed in seeds]
    runs += [
        heal_run("host", seed, CONTROL, learning_rate=rate)
        for rate in CONTROL_RATES
        for seed in seeds
    ]
    for name, transfer in (("distilled", DISTILLED), ("matched", MATCHED)):
        arm = "force lifted f=0.25"
        runs += [heal_run(f"{arm} {name}", s, ARMS[arm], transfer=transfer) for s in seeds]
    return runs + [heal_run(arm, seed, how) for arm, how in MORE.items() for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, seeds=[0, 1, 2])
    options = parser.parse_args()
    run_experiment(options, plan(options.seeds))


if __name__ == "__main__":
    main()
