"""Measure a model: loss with a stride, samples, contrast and KL of its attention. JSON and a table.

    python scripts/evaluate.py --model out --against Qwen/Qwen2.5-0.5B --out evaluation.json
    python scripts/evaluate.py evaluation.yaml
    python scripts/evaluate.py evaluation.yaml --stride 256      flags win over the file

Without --out only the table is printed. The same as a verb: gravity-hf evaluate MODEL.
"""

from __future__ import annotations

import argparse
import sys

from transformers.utils import logging

from gravity_hf.cli.console import make_console
from gravity_hf.cli.main import EXIT_EXPECTED, EXPECTED_ERRORS
from gravity_hf.cli.steps.parsing import parse_settings
from gravity_hf.training.evaluation_run import EvaluationArguments, run_evaluation


def parse(arguments: list[str]) -> EvaluationArguments:
    (settings,) = parse_settings(
        (EvaluationArguments,),
        arguments,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return settings


def main(arguments: list[str]) -> None:
    """Measure one model; expected errors end in one line and exit code 2."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        run = run_evaluation(parse(arguments))
    except EXPECTED_ERRORS as error:
        make_console(stderr=True).print(f"error: {' '.join(str(error).split())}", markup=False)
        raise SystemExit(EXIT_EXPECTED) from error
    print(run.table())


if __name__ == "__main__":
    main(sys.argv[1:])
