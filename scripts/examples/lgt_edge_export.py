"""A preset in several formats, loaded back, measured and timed beside the float32 model.

    pip install "gravity_hf[export]"
    python scripts/examples/lgt_edge_export.py
    python scripts/examples/lgt_edge_export.py --preset victorcos --out victorcos-edge

The command line does the same: gravity-hf export --preset edge_150k OUT
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gravity_hf.cli.console import make_console, quiet_libraries
from gravity_hf.cli.edge import show
from gravity_hf.hub.edge import EDGE_FORMATS, export_edge_model, preset_model
from gravity_hf.models.lgt import LGT_PRESETS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(LGT_PRESETS), default="edge_150k")
    parser.add_argument("--format", action="append", help=f"repeatable (default: {EDGE_FORMATS})")
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="a new folder (default: a temporary one)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    quiet_libraries()
    formats = options.format or EDGE_FORMATS
    model = preset_model(options.preset, vocab_size=options.vocab_size, seed=options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch, "edge")
        report = export_edge_model(
            model, out, formats=formats, preset=options.preset, seconds=options.seconds
        )
        show(make_console(), report)
        ids = torch.randint(options.vocab_size, (1, 8))
        for name in ("fp32", *formats):
            if (out / name / "model.safetensors").is_file():
                loaded = AutoModelForCausalLM.from_pretrained(out / name).eval()
                with torch.no_grad():
                    best = loaded(input_ids=ids).logits[0, -1].argmax().item()
                print(f"{name}, loaded with AutoModelForCausalLM: next token {best}")


if __name__ == "__main__":
    main()
