"""LoRA on a gravity model: masses and softenings train with it, the adapter carries them.

    python scripts/train_lora.py --model out --out adapter --text_files notes.txt
    python scripts/train_lora.py --model Qwen/Qwen2.5-0.5B --softness 1 --out adapter --bf16
    python scripts/train_lora.py recipe.yaml --qlora             weights in 4 bits
    accelerate launch scripts/train_lora.py recipe.yaml          several GPUs or machines

MODEL is a gravity model (made by `gravity-hf convert`, or a Gravity-2 folder), or a host, which is
converted on the fly. Stop it at any moment and call it again: it goes on from its last checkpoint.
Load the result with gravity_hf.load_gravity_model(OUT).
"""

from __future__ import annotations

import argparse
import shlex
import sys

from gravity_hf.cli.console import make_console, quiet_libraries
from gravity_hf.cli.convert.command import require_packages
from gravity_hf.cli.main import EXIT_EXPECTED, EXPECTED_ERRORS


def main(arguments: list[str]) -> None:
    """Run one training; expected errors end in one line and exit code 2."""
    try:
        require_packages("train_lora", "peft")
        from gravity_hf.cli.lora.run import run_lora
        from gravity_hf.cli.lora.settings import parse_lora

        settings = parse_lora(
            arguments,
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        quiet_libraries()
        console = make_console()
        command = shlex.join(["python", "scripts/train_lora.py", *arguments])
        results = run_lora(settings, console, command)
        measured = results.get("evaluation")
        if measured:
            console.print(
                f"Loss on {measured['examples']} held-out examples: {measured['loss_before']:.4f} "
                f"nats per token before, {measured['loss_after']:.4f} after"
            )
        if results:
            console.print(f"Saved to {settings.run.out}", markup=False)
    except EXPECTED_ERRORS as error:
        make_console(stderr=True).print(f"error: {' '.join(str(error).split())}", markup=False)
        raise SystemExit(EXIT_EXPECTED) from error


if __name__ == "__main__":
    main(sys.argv[1:])
