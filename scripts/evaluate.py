"""Measure a model: loss with a stride, samples, contrast and KL of its attention. JSON and a table.

    python scripts/evaluate.py --model out --against Qwen/Qwen2.5-0.5B --out evaluation.json
    python scripts/evaluate.py evaluation.yaml

The second form reads the same names from a YAML or JSON file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gravity_hf.training.evaluation_run import EvaluationArguments, run_evaluation  # noqa: E402


def parse(arguments: list[str]) -> EvaluationArguments:
    parser = HfArgumentParser(EvaluationArguments, description=__doc__)
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml", ".json")):
        (settings,) = parser.parse_yaml_file(arguments[0])
        return settings
    (settings,) = parser.parse_args_into_dataclasses(arguments)
    return settings


def main() -> None:
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        run = run_evaluation(parse(sys.argv[1:]))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")
    print(run.table())


if __name__ == "__main__":
    main()
