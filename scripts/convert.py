"""Convert a pretrained model to gravity attention: calibrate, transfer, heal, measure, save.

    python scripts/convert.py scripts/recipes/qwen2.5-0.5b.yaml
    python scripts/convert.py --model Qwen/Qwen2.5-0.5B --out out --lora_steps 300 --bf16
    python scripts/convert.py recipe.yaml --softness 0.25        flags win over the file
    accelerate launch scripts/convert.py recipe.yaml             several GPUs or machines

Stop it at any moment and call it again: finished steps are not repeated, training goes on from its
last checkpoint. With other settings only the steps that depend on them run again.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from gravity_hf.cli.console import make_console
from gravity_hf.cli.convert.command import convert_and_report, require_packages
from gravity_hf.cli.main import EXIT_EXPECTED, EXPECTED_ERRORS


def main(arguments: list[str]) -> None:
    """Run one conversion; expected errors end in one line and exit code 2."""
    try:
        require_packages("convert")
        from gravity_hf.cli.convert.settings import parse_conversion

        settings = parse_conversion(
            arguments,
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command = shlex.join(["python", "scripts/convert.py", *arguments])
        convert_and_report(settings, make_console(), command)
    except EXPECTED_ERRORS as error:
        make_console(stderr=True).print(f"error: {' '.join(str(error).split())}", markup=False)
        raise SystemExit(EXIT_EXPECTED) from error


if __name__ == "__main__":
    main(sys.argv[1:])
