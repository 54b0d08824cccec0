"""A base model for the experiments on beliefs, where no pretrained one is at hand.

    python scripts/experiments/knowledge_base.py --out base --device cuda
    python scripts/experiments/knowledge_base.py --out base --preset cpu
    python scripts/experiments/knowledge_base.py --out base --quick          # seconds, to try

A small Qwen2 is trained on the source of Python's standard library and on prose about the world of
the fact banks (`gravity_hf.knowledge.background`), which tells of the banks' neighbours and states
none of their facts. What it knows of facts is little: a pretrained base, given to the experiments
with --base, says more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pool import training_arguments

RECORD = "base.json"
PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {
        "tokenizer": "bpe:8192",
        "sizes": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8},
        "heads": (6, 2),
        "steps": 6000,
        "rows": 64,
        "passes": 60,
        "code": 30_000_000,
    },
    "cpu": {
        "tokenizer": "bpe:2048",
        "sizes": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
        "heads": (4, 2),
        "steps": 400,
        "rows": 8,
        "passes": 10,
        "code": 2_000_000,
    },
    "quick": {
        "tokenizer": "bpe:600",
        "sizes": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4},
        "heads": (4, 2),
        "steps": 3,
        "rows": 2,
        "passes": 1,
        "code": 200_000,
    },
}
RATE, LENGTH = 1.5e-3, 256


def stream_of(preset: dict[str, Any]) -> Any:
    """The text in tokens of a BPE that was made on it."""
    from gravity_hf.knowledge.background import background_text
    from gravity_hf.training.sources import load_text
    from gravity_hf.training.streams import make_stream

    code = load_text(None, None, None, "text", preset["code"], max(50_000, preset["code"] // 20))
    prose = background_text(seed=0, passes=preset["passes"])
    other = background_text(seed=1, passes=1)
    return make_stream(
        preset["tokenizer"],
        f"{code.train}\n\n{prose}",
        f"{code.validation}\n\n{other}",
        "the standard library's source and background of the fact banks",
    )


def train_base(folder: Path, preset_name: str, device: str, seed: int = 0) -> dict[str, Any]:
    """Train it into `folder`, unless it is there; what is known about it."""
    from gravity_hf.training.conditions import run_conditions
    from gravity_hf.training.files import write_json
    from gravity_hf.training.pretraining import PretrainArguments, pretrain

    settings = {"preset": preset_name, "seed": seed}
    kept = folder / RECORD
    if kept.is_file():
        record = json.loads(kept.read_text(encoding="utf-8"))
        if record["settings"] == settings:
            return record
        raise ValueError(f"--out: {folder} holds another base, {record['settings']}")
    preset = PRESETS[preset_name]
    heads, kv_heads = preset["heads"]
    sizes = {
        **preset["sizes"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
    }
    text = stream_of(preset)
    arguments = PretrainArguments(
        attention="dot_product",
        overrides=json.dumps(sizes),
        length=LENGTH if preset_name != "quick" else 32,
        validation_windows=64 if preset_name != "quick" else 2,
    )
    with tempfile.TemporaryDirectory() as work:
        training = training_arguments(
            work,
            preset["steps"],
            RATE,
            seed,
            per_device_train_batch_size=preset["rows"],
            torch_compile=False,
            use_cpu=device == "cpu",
            bf16=device == "cuda",
            logging_steps=100,
        )
        result = pretrain(arguments, training, text)
    result.model.to("cpu").save_pretrained(folder)
    text.tokenizer.save_pretrained(folder)
    record = {
        "settings": settings,
        "loss": result.record["loss"],
        "parameters": result.record["parameters"],
        "text": text.description,
        "conditions": run_conditions(device),
    }
    write_json(kept, record)
    return record


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the base")
    parser.add_argument("--preset", choices=list(PRESETS), help="[gpu; cpu with --device cpu]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the preset quick")
    options = parser.parse_args(sys.argv[1:] if given is None else given)
    usual = "gpu" if options.device == "cuda" else "cpu"
    preset = "quick" if options.quick else options.preset or usual
    try:
        record = train_base(options.out, preset, options.device, options.seed)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{options.out}: {record['parameters']:,} parameters, loss {record['loss']:.3f}")


if __name__ == "__main__":
    main()
