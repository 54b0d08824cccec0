"""`gravity-hf lm-eval`: lm-evaluation-harness's own command, with gravity models."""

from __future__ import annotations

import importlib.util
import sys

import typer

# The harness reads its options itself: it has many, and other ones each version.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
_COMMANDS = ("run", "ls", "validate")


def lm_eval(context: typer.Context) -> None:
    """Measure a gravity model on the tasks of lm-evaluation-harness. All options are those of its
    command, lm_eval (its help: gravity-hf lm-eval -h); the model is gravity-hf unless --model or
    --config says otherwise, and refuses plain hosts. --model hf measures the host to compare with.

    Examples:

        gravity-hf lm-eval --model_args pretrained=out --tasks hellaswag --device cpu

        gravity-hf lm-eval --model_args pretrained=out --tasks mine --include_path my_tasks
    """
    for package in ("lm_eval", "requests"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"lm-eval: expected lm-evaluation-harness, the package {package} is not installed. "
                "Install it with: pip install lm-eval requests"
            )
    from lm_eval.__main__ import cli_evaluate

    from ..training.lm_evaluation import MODEL_NAME

    # The harness reads the process's own arguments.
    before = sys.argv
    sys.argv = ["gravity-hf lm-eval", *_with_model(context.args, MODEL_NAME)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _with_model(arguments: list[str], name: str) -> list[str]:
    """The arguments with `--model` where a run has none. A run is what is not another command."""
    asks_for_run = bool(arguments) and arguments[0] not in (*_COMMANDS[1:], "-h", "--help")
    says = {argument.split("=")[0] for argument in arguments}
    if not asks_for_run or says & {"--model", "-M", "--config", "-C", "-h"}:
        return list(arguments)
    rest = arguments[1:] if arguments[0] == _COMMANDS[0] else arguments
    return [_COMMANDS[0], "--model", name, *rest]
