"""Two open questions: how many masses does a layer want, and does gravity want an exponential?

    python scripts/experiments/mass_granularity.py --gpus 2 --workers 8

1. One mass per query head, per KV head, or per layer: each raw (Gravity-2's constants, where all
   masses are equal and the granularity shows only after training), calibrated, and healed.
2. The force law (a softmax over inverse squares) against the power law (inverse powers of distance,
   no exponential): raw, calibrated, healed. From scratch: `from_scratch.py bytes`.

The host healed with the same budget is the control. Rows with one mass per query head are those of
`conversion.py` and share its file of results, so that nothing is computed twice.
"""

from __future__ import annotations

import argparse
from typing import Any

from laboratory import CONTROL, add_options, heal_run, run_experiment

GRANULARITIES = ("query_head", "kv_head", "layer")
LAWS = ("force", "power")


def plan(seeds: list[int]) -> list[dict[str, Any]]:
    arms: dict[str, dict[str, Any]] = {"host": CONTROL}
    for law in LAWS:
        for mass_per in GRANULARITIES:
            shared = {"law": law, "mass_per": mass_per}
            label = "" if mass_per == "query_head" else f" {mass_per}"
            published = "published" if law == "force" else "published power"
            arms[published + label] = {"constants": "published", **shared}
            for softness in (0.0, 1.0):
                arms[f"{law} lifted f={softness:g}{label}"] = {
                    "constants": "calibrated",
                    "softness": softness,
                    **shared,
                }
    return [heal_run(arm, seed, how) for arm, how in arms.items() for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, seeds=[0, 1, 2])
    options = parser.parse_args()
    run_experiment(options, plan(options.seeds))


if __name__ == "__main__":
    main()
