"""What the experiments on beliefs share: options, the base, facts by bank, and one file of results
that grows unit by unit, so that a command that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from knowledge_base import train_base

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (0, 1, 2)
# Paraphrases 0 and unrelated prompts 0 are trained on, paraphrases 1 set thresholds, with the
# unrelated prompts of a third of the facts; the others are measured on.
TRAINED_PARAPHRASES, HELD_PARAPHRASES = 1, 2
_DIGITS = 5


def parser_of(description: str, name: str, banks: Sequence[str]) -> argparse.ArgumentParser:
    """Options that every one of these experiments has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, help="folder of a causal language model [one is trained]")
    add("--banks", nargs="+", default=list(banks), help="of facts, or .jsonl files")
    add("--per-bank", type=int, help="facts of each bank, drawn by the seed [all]")
    add("--seeds", type=int, nargs="+", default=list(SEEDS))
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    add("--tf32", action="store_true", help="products of float32 in TF32, on GPUs that have it")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of EncodingConfig")
    add("--text", type=Path, nargs="+", help="files of running text [Python's standard library]")
    add("--out", type=Path, metavar="FILE.json", help=f"[results/{name}.json; --quick: needed]")
    add("--commit", help="of the source, where the tree is a copy without history")
    add("--quick", action="store_true", help="few facts, few steps: to try, not to keep")
    return parser


def parsed(parser: argparse.ArgumentParser, name: str, given: list[str] | None) -> Any:
    """The options, checked, with the command that says them."""
    import torch

    arguments = sys.argv[1:] if given is None else given
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none; use --device cpu")
    if options.quick and options.out is None:
        parser.error("--quick: expected --out too: what is measured then is not to be kept")
    if options.base is not None and not (options.base / "config.json").is_file():
        parser.error(f"--base: expected a folder with config.json, got {str(options.base)!r}")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    if options.quick:
        options.seeds = options.seeds[:1]
        options.per_bank = min(options.per_bank or 4, 4)
        options.banks = options.banks[:2]
    options.out = options.out or RESULTS / f"{name}.json"
    options.name = name
    options.command = shlex.join(["python", f"scripts/experiments/{name}.py", *arguments])
    return options


def config_of(options: Any, seed: int) -> Any:
    """The encoder's settings for a seed."""
    from gravity_hf.knowledge.encoding_config import EncodingConfig

    changes: dict[str, Any] = {"batch_facts": 32 if options.device == "cuda" else 8}
    if options.quick:
        # A tiny base has room for nothing within the usual budget.
        changes |= {"steps": 3, "rank": 1, "budget_fraction": 1.0}
    for text in options.set:
        name, _, value = text.partition("=")
        changes[name] = json.loads(value) if value[:1] in "[-0123456789" else value
    return EncodingConfig().with_changes(**changes, seed=seed)


def load_base(options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and what a result says of them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from gravity_hf.knowledge.digest import compute_digest

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = options.base
    if folder is None:
        preset = "quick" if options.quick else "gpu" if options.device == "cuda" else "cpu"
        folder = options.out.parent / f"base-{preset}"
        train_base(folder, preset, options.device)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = {
        "name": folder.resolve().name,
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": options.dtype,
        "digest": compute_digest(model, tokenizer).root,
    }
    return model, tokenizer, said


def drawn_facts(options: Any, bank: str, seed: int) -> list[Any]:
    """Facts of a bank with paraphrases enough to measure on: all in their order, or a draw."""
    from gravity_hf.knowledge.facts import load_facts

    facts = [x for x in load_facts(bank) if len(x.paraphrases) > HELD_PARAPHRASES]
    count = options.per_bank
    if count is None or count >= len(facts):
        return facts
    return random.Random(seed).sample(facts, count)


def foreign_prompts(facts: Sequence[Any], count: int, seed: int) -> list[str]:
    """Prompts that none of `facts` is about: unrelated ones of all banks and everyday text."""
    from gravity_hf.knowledge.facts import BANKS, load_facts
    from gravity_hf.knowledge.generic_prompts import GENERIC_PROMPTS

    own = {text for fact in facts for text in (*fact.prompts, *fact.unrelated)}
    known = {x for name in BANKS for fact in load_facts(name) for x in fact.unrelated}
    others = sorted(known.union(GENERIC_PROMPTS) - own)
    return random.Random(seed).sample(others, min(count, len(others)))


def running_text(options: Any, tokenizer: Any, count: int, length: int) -> Any:
    """Windows of text, `[count, length]` ids, evenly spread; the same for all seeds."""
    import torch

    from gravity_hf.training.sources import load_text

    if options.text:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in options.text)
    else:
        text = load_text(None, None, None, "text", 100_000, 2_000_000).validation
    text = text[: 12 * count * length]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = [i * (len(ids) - length) // count for i in range(count)]
    return torch.tensor([ids[start : start + length] for start in starts])


def run_units(
    options: Any,
    base: dict[str, Any],
    units: Sequence[str],
    work: Callable[[str], dict[str, Any]],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
    controls: dict[str, str],
) -> dict[str, Any]:
    """Do the units that are not done, and write all after each.

    Args:
        work: from a unit's name to what was measured, with lists `per_item` or without.
        summary: of what all units measured.
        controls: what each control is, in words.
    """
    from gravity_hf.hub.card_public import public
    from gravity_hf.training.conditions import run_conditions

    conditions = run_conditions(options.device) | {"command": options.command}
    if options.commit:
        conditions["commit"] = options.commit
    head = {
        "schema": f"gravity-{options.name.replace('_', '-')}/1",
        **conditions,
        "seeds": options.seeds,
        "base": base,
        "config": config_of(options, 0).to_dict() | {"seed": "the run's"},
        "settings": settings_of(options),
        "controls": controls,
    }
    done = _finished(options.out, public(head))
    for unit in units:
        if unit in done:
            continue
        started = time.perf_counter()
        done[unit] = {"unit": unit, **work(unit)}
        done[unit]["seconds"] = round(time.perf_counter() - started, 1)
        print(f"{unit}: {done[unit]['seconds']} s", flush=True)
        _write(options.out, public(head), [done[name] for name in units if name in done], summary)
    found = [done[name] for name in units]
    return _write(options.out, public(head), found, summary)


def settings_of(options: Any) -> dict[str, Any]:
    """Options that change what is measured."""
    left_out = {"base", "seeds", "out", "commit", "name", "command", "device", "text"}
    kept = {name: value for name, value in vars(options).items() if name not in left_out}
    named = None if options.text is None else [file.name for file in options.text]
    return kept | {"text": named}


def _finished(file: Path, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Units of an earlier run of the same under the same conditions."""
    if not file.is_file():
        return {}
    before = json.loads(file.read_text(encoding="utf-8"))
    same = ("schema", "device", "versions", "commit", "base", "config", "settings")
    if any(before.get(name) != json.loads(json.dumps(head.get(name))) for name in same):
        return {}
    return {row["unit"]: row for row in _units(before)}


def _units(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Units with their items, which the file has in one list."""
    items: dict[str, list[Any]] = {}
    for item in content["per_item"]:
        items.setdefault(item["unit"], []).append(
            {name: value for name, value in item.items() if name != "unit"}
        )
    return [{**row, "per_item": items.get(row["unit"], [])} for row in content["units"]]


def _write(
    file: Path,
    head: dict[str, Any],
    found: list[dict[str, Any]],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    from gravity_hf.training.files import write_text

    content = {
        **head,
        "summary": rounded(summary(found)),
        "units": [rounded({k: v for k, v in row.items() if k != "per_item"}) for row in found],
        "per_item": [
            rounded({"unit": row["unit"], **item}) for row in found for item in row["per_item"]
        ],
    }
    write_text(file, _as_lines(content))
    return content


def _as_lines(content: dict[str, Any]) -> str:
    """JSON with one line for each entry, and for each item of a list."""
    parts = []
    for name, value in content.items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n  ".join(json.dumps(x, ensure_ascii=False, allow_nan=False) for x in value)
            text = f"[\n  {lines}\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def rounded(value: Any) -> Any:
    """Floats to five digits that count, NaN and the infinities as None."""
    if isinstance(value, dict):
        return {str(name): rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if abs(value) < float("inf") else None
    return value
