"""Shared by the tests of cards: the results of a conversion with every step."""

from __future__ import annotations

import copy
from typing import Any

from hub.loopback import WRITER, LoopbackHub
from huggingface_hub import HfApi, ModelCard

from gravity_hf import GravityConfig

ATTENTION = {
    "softness": 1.0,
    "softness_median": 0.987,
    "contrast_min": 1.11,
    "contrast_median": 1.86,
    "contrast_max": 3.21,
    "kl_mean": 0.0123,
    "heads": 12,
    "distance": "lifted",
    "law": "force",
}
ROWS = [
    {"key": "host", "title": "the host", "loss": 2.5},
    {"key": "control", "title": "the control", "loss": 2.4},
    {"key": "calibrated", "title": "calibrated", "loss": 2.75, "attention": ATTENTION},
    {"key": "healed", "title": "after LoRA", "loss": 2.4125, "attention": ATTENTION},
]
# As it was written before there were `gravity`, `layers`, `parameters` and the host's card.
OLD_RESULTS: dict[str, Any] = {
    "format": 1,
    "host": {
        "name": "maker/host",
        "class": "Qwen2ForCausalLM",
        "parameters": 1234567,
        "dtype": "float32",
        "writes": True,
    },
    "saved": "model",
    "law": "force",
    "settings": {
        **{"seed": 3, "length": 256, "samples": 16, "mass_per": "query_head", "fit": False},
        **{"transfer_steps": 0, "transfer_learning_rate": 1e-3, "lora_steps": 300, "lora_rank": 8},
        **{"lora_alpha": 16, "lora_learning_rate": 2e-4, "batch_size": 4, "accumulation": 2},
        "anneal_to": None,
    },
    "left_out": ["transfer"],
    "patch": {"layers": ["a", "b"], "skipped": []},
    "calibration": ATTENTION,
    "training": {"transfer": None, "lora": {"objective": None}, "control": {}},
    "evaluation": {
        "measure": "loss",
        "text": "two files",
        "digest": "0123456789abcdef",
        "tokens": 4096,
        "length": 256,
        "stride": None,
        "attention_batches": 4,
        "rows": ROWS,
        "samples": [{"prompt": "Gravity is", "text": " a word | <b>"}],
    },
    "conditions": {
        "command": "gravity-hf convert maker/host out --lora-steps 300",
        "date": "2026-01-02",
        "device": "a processor",
        "versions": {"torch": "2.13.0"},
        "processes": 1,
    },
}
HOST_CARD: dict[str, Any] = {
    "found": True,
    "license": "apache-2.0",
    "license_name": None,
    "license_link": None,
    "base_model": ["maker/older"],
    "language": ["en"],
    "datasets": ["maker/words"],
    "citation": "@misc{host, title={A host}}",
}


def constant(layer: str, mass: float, softening: float, radius: float) -> dict[str, Any]:
    """A row of `layers`: six heads around these constants, one KV head."""
    row: dict[str, Any] = {"layer": layer}
    for key, value, count in (
        ("mass", mass, 6),
        ("softening", softening, 6),
        ("key_radius", radius, 1),
    ):
        spread = {"lowest": value - 0.5, "median": value, "highest": value + 0.25}
        row[key] = {"count": count, **(dict.fromkeys(spread, value) if count == 1 else spread)}
    return row


RESULTS: dict[str, Any] = {
    **OLD_RESULTS,
    "gravity_hf": "0.1.0",
    "host": {
        **OLD_RESULTS["host"],
        **{"model_type": "qwen2", "max_positions": 1024, "local": False, "card": HOST_CARD},
        "base_model": None,
    },
    "gravity": GravityConfig(distance="lifted", learn_softening=True, softness=1.0).to_dict(),
    "layers": [constant("a", 7.5, 3.125, 4.875), constant("b", 8.75, 2.0, 5.625)],
    "parameters": {"gravity": 26, "others": 1234567},
}


def results(**changes: Any) -> dict[str, Any]:
    """A copy with other top keys."""
    return {**copy.deepcopy(RESULTS), **changes}


def gravity(**changes: Any) -> dict[str, Any]:
    """Other settings of the patch."""
    return {**RESULTS["gravity"], **changes}


def section(card: ModelCard, title: str) -> str:
    """The text under a heading of the card."""
    _, _, rest = card.text.partition(f"\n## {title}\n")
    return rest.partition("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """The cells of the Markdown tables in a text, without their rulers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not all(set(cell) <= set("-: ") for cell in row)]


def upload(card: ModelCard, hub: LoopbackHub) -> None:
    """Commit the card to a repository, which the Hub allows only if it takes the metadata."""
    api = HfApi(endpoint=hub.url, token=WRITER)
    api.create_repo("me/card", exist_ok=True)
    api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="me/card")
