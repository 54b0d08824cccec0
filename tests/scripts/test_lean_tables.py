"""README's tables of LeanFormer are made of the files that benchmarks and experiments write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (str(ROOT / "scripts"), str(ROOT / "scripts" / "experiments"))
MODULES = ("lean_tables", "lean_loss_tables", "governed_report", "governed_arms", "table_text")
MODULES += ("paired_changes",)
BENCHMARK = {
    "device": "a card", "versions": {"torch": "2.1", "triton": None, "cudnn": None},
    "commit": "0123456789abc", "date": "2026-01-02T03:04",
}  # fmt: skip
EXPERIMENT = {**BENCHMARK, "versions": {"torch": "2.1", "transformers": "5.1"}}


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def three(middle: float) -> dict[str, float]:
    return {"median": middle, "lowest": middle - 0.01, "highest": middle + 0.01}


def spread(mean: float) -> dict[str, float]:
    return {"mean": mean, "min": mean - 0.01, "max": mean + 0.01}


def layer(kind: str, ms: float, **others: Any) -> dict[str, Any]:
    shape = {"level": "layer", "work": "prefill", "law": "dot", "length": 8192}
    keys = {"top_k": 0, "block_size": 0, "screen": None, "kind": kind, "median_ms": ms}
    return {**shape, **keys, **others}


CONTENTS: dict[str, dict[str, Any]] = {
    "benchmark/sparse_attention_cuda": {
        "conditions": BENCHMARK,
        "rows": [
            layer("dense", 4.0),
            layer("sparse", 2.0, top_k=512, block_size=32, screen="keys"),
            layer("sparse", 8.0, top_k=512, block_size=32, screen="keys"),
            layer("sparse", 1.0, top_k=512, block_size=32, screen="projected"),
            layer("dense", 3.0, launch="graph"),
            layer("sparse", 1.0, top_k=512, block_size=32, screen="keys", launch="graph"),
            {
                "level": "layer", "work": "prefill", "law": "dot", "length": 8192, "top_k": 64,
                "block_size": 32, "screen": "keys", "kind": "sparse", "note": "failed",
            },
        ],
    },
    "experiments/sparse_attention_cuda": {
        "conditions": EXPERIMENT,
        "rows": [
            {
                "top_k": 512, "block_size": 32, "screening": "keys", "seeds": [0, 1, 2],
                "loss": three(1.5), "change": three(0.02), "recall_screening": three(0.9),
                "seconds": three(0.1), "dense_seconds": three(0.2),
            },
        ],
        "kept": [
            {
                "screening": "keys", "tolerance": 0.01, "budget": [512, 32], "over_dense": 2.0,
                "change": 0.008,
            },
        ],
        "native": [
            {
                "attention": "gravity", "trained": "sparse", "budget": [96, 8], "seeds": [0, 1, 2],
                "losses": {"8192": {"dense": three(1.4), "sparse": three(1.45)}},
            },
        ],
    },
    "benchmark/feed_forward_cuda": {
        "conditions": BENCHMARK,
        "rows": [
            {"shape": "512/2048", "maps": "full", "tokens": 1, "way": "dense", "ms": {"p50": 2.0}},
            *(
                {
                    "shape": "512/2048", "maps": "full", "tokens": 1, "way": f"block:{way}",
                    "block_size": 64, "sparsity": 0.8, "ms": {"p50": 2 / speed}, "speed": speed,
                }
                for way, speed in (("gathered", 2.5), ("grouped", 0.5))
            ),
        ],
    },
    "experiments/sparse_feed_forward": {
        "conditions": EXPERIMENT,
        "summary": {
            "hosts": [
                {
                    "block_size": 32, "sparsity": 0.8, "reordered": True, "arm": "oracle",
                    "seeds": 3, "loss": spread(1.5), "excess": spread(0.1),
                    "energy_recall": spread(0.8),
                },
            ],
            "native": [
                {
                    "arm": "masked at the end", "seeds": 3, "loss": spread(1.2),
                    "excess": spread(0.03), "energy_recall": spread(0.7),
                },
            ],
        },
    },
    "experiments/compression_cuda": {
        "conditions": EXPERIMENT, "unit": "nats per byte of held-out text",
        "heal": [60, 16, 1024, 5e-4],
        "rows": [
            {
                "arm": "weighted", "energy": 0.95, "seeds": [0, 1, 2], "loss": three(1.9),
                "layer_parameters": three(5e6), "parameters": three(6e6), "change": three(0.3),
                "healed_loss": three(1.6), "healed_change": three(0.07),
                "seconds": three(0.1), "dense_seconds": three(0.15),
            },
        ],
    },
    "benchmark/kv_cache_cuda": {
        "conditions": BENCHMARK,
        "rows": [
            {
                "shape": "1B", "length": 8192, "cache": "rotated 4", "note": "", "ratio": 3.56,
                "cache_bytes": 2**20, "prefill_ms": {"p50": 30.0}, "decode_ms": {"p50": 9.0},
            },
            {"shape": "1B", "length": 8192, "cache": "hqq 4", "note": "failed: not there"},
        ],
    },
    "experiments/kv_cache": {
        "conditions": EXPERIMENT,
        "rows": [
            {
                "seed": seed, "attention": "gravity", "arm": "4 bits", "length": 8192,
                "ratio": 3.5, "change": change, "key_error": 0.09, "copied": 0.5, "tail": 1024,
            }
            for seed, change in ((0, 0.001), (1, 0.003))
        ],
    },
    "experiments/governed_cpu": {
        "conditions": EXPERIMENT,
        "rows": [{"steps": 200}],
        "summary": [
            {
                "model": "llama", "arm": "governed", "seeds": [0, 1, 2], "loss": 2.1,
                "loss_deviation": 0.01, "differences": [0.02, -0.01, 0.03],
                "backward_saved": 0.12, "flops_share": 0.93, "time_share": 1.08,
                "mean_multiplier": 0.9,
            },
        ],
    },
}  # fmt: skip
SHOWN = {
    "lean-sparse-speed": [
        "layer, prefill, dot, 8192 | 4 ms | 2 ms (2.00x) |",
        "layer, prefill, dot, 8192, graph | 3 ms | 1 ms (3.00x) |",
        "commit 0123456789",
    ],
    "lean-sparse-loss": [
        "512 keys, blocks of 32, by keys | 1.5000 | +0.0200",
        "keys 512/32 (+0.0080, 2.00x)",
        "medians over 3 seeds",
    ],
    "lean-sparse-native": ["gravity, trained sparse, 8192 tokens | 1.4000 (1.3900 to 1.4100)"],
    "lean-feed-forward-speed": ["whole | 2 ms", "blocks of 64 | 0.8 ms (2.50x, gathered)"],
    "lean-feed-forward-loss": ["80% left out, reordered, oracle | 1.5000", "masked at the end"],
    "lean-compression": [
        "weighted, energy 0.95 | 5.00 M | 6.00 M | 1.9000 | +0.3000",
        "| 1.6000 | +0.0700",
        "60 steps of 16",
    ],
    "lean-kv-speed": ["1B, 8192, rotated 4 | 1.0 | 3.56x | 30 ms | 9 ms"],
    "lean-kv-loss": ["gravity, 4 bits | 3.50x | +0.00200 (+0.00100 to +0.00300) | 0.0900 | 50%"],
    "lean-governed": ["llama, governed | 2.1000 ± 0.0100 | +0.0133 | 1 of 3 | 12.0% | 0.93 x"],
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, content in CONTENTS.items():
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return tmp_path / "benchmark", tmp_path / "experiments"


@pytest.mark.parametrize("name", SHOWN)
def test_a_table_says_what_its_file_says(name: str, folders: tuple[Path, Path]) -> None:
    import lean_tables

    text = lean_tables.tables(*folders)[name]()
    for part in SHOWN[name]:
        assert part in text
    # What failed is not shown as if it had been measured.
    assert "failed" not in text and "hqq" not in text and "64 keys" not in text
    heads = next(line for line in text.splitlines() if line.startswith("|"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.count(" | ") == heads.count(" | ") for row in rows)


def test_every_table_is_tried_and_names_the_command_that_is_missing(tmp_path: Path) -> None:
    import lean_tables

    makers = lean_tables.tables(tmp_path, tmp_path)
    assert set(makers) == set(SHOWN)
    for maker in makers.values():
        with pytest.raises(FileNotFoundError, match="make it with `python scripts/"):
            maker()


HOST = {
    "name": "a small model", "parameters": 134_500_000, "digest": "0123456789abcdef",
    "length": 8192, "text": "two texts", "bytes_per_token": 3.65, "apart": True,
}  # fmt: skip


def pretrained(name: str, error: str) -> dict[str, Any]:
    """That content of one of a pretrained host, with standard errors under the name `error`."""
    content = json.loads(json.dumps(CONTENTS[name]))
    content |= {"host": HOST, "unit": "nats per token of held-out text"}
    rows = content["summary"]["hosts"] if "summary" in content else content["rows"]
    for row in rows:
        row |= {error: 0.003, "windows": 24}
    if "summary" in content:
        content["rows"] = {
            "hosts": [{"seed": seed, "windows": 8, "length": 8192} for seed in range(3)]
        }
    return content


@pytest.mark.parametrize(
    ("table", "name", "error", "shown"),
    [
        ("lean-sparse-loss", "sparse_attention_cuda", "change_error", "+0.0200 ± 0.0030 (+0.0100"),
        ("lean-compression", "compression_cuda", "healed_change_error", "+0.0700 ± 0.0030"),
        ("lean-feed-forward-loss", "sparse_feed_forward", "excess_error", "+0.1000 ± 0.0030"),
        # Two seeds of 24 windows each: more windows, a smaller error.
        ("lean-kv-loss", "kv_cache", "change_error", "+0.00200 ± 0.00212 (+0.00100"),
    ],
)
def test_a_pretrained_host_is_named_with_its_windows_and_errors(
    table: str, name: str, error: str, shown: str, tmp_path: Path
) -> None:
    import lean_tables

    stem = name.removesuffix("_cuda")
    content = pretrained(f"experiments/{name}", error)
    (tmp_path / f"{stem}_pretrained.json").write_text(json.dumps(content))
    text = lean_tables.tables(tmp_path, tmp_path)[table]()
    assert shown in text
    windows = 48 if table == "lean-kv-loss" else 24
    assert "a small model, 134.5 M parameters, weights 01234567" in text
    assert f"{windows} windows of 8192 tokens; nats per token (3.65 bytes) of held-out text" in text


def test_what_was_not_healed_has_dashes(tmp_path: Path) -> None:
    import lean_tables

    content = pretrained("experiments/compression_cuda", "change_error")
    content["heal"][0] = 0
    for row in content["rows"]:
        for name in ("healed_loss", "healed_change"):
            del row[name]
    (tmp_path / "compression_pretrained.json").write_text(json.dumps(content))
    text = lean_tables.tables(tmp_path, tmp_path)["lean-compression"]()
    assert "| +0.3000 ± 0.0030 (+0.2900 to +0.3100) | – | – | 1.50x |" in text
    assert "Nothing was healed." in text and "steps of" not in text


def test_one_seed_is_no_mean_of_seeds(tmp_path: Path) -> None:
    import lean_tables

    content = pretrained("experiments/kv_cache", "change_error")
    content["rows"] = [row for row in content["rows"] if row["seed"] == 0]
    (tmp_path / "kv_cache_pretrained.json").write_text(json.dumps(content))
    text = lean_tables.tables(tmp_path, tmp_path)["lean-kv-loss"]()
    assert "of held-out text; one seed, ± the standard error over windows." in text


def test_what_the_conversion_to_gravity_costs_stands_below(tmp_path: Path) -> None:
    import lean_tables

    content = pretrained("experiments/kv_cache", "change_error")
    for row in content["rows"]:
        row |= {"conversion": 0.02, "conversion_error": 0.004}
    (tmp_path / "kv_cache_pretrained.json").write_text(json.dumps(content))
    text = lean_tables.tables(tmp_path, tmp_path)["lean-kv-loss"]()
    assert "is +0.02000 ± 0.00283 above the host" in text


def test_both_devices_are_shown_where_both_were_measured(folders: tuple[Path, Path]) -> None:
    import lean_tables

    file = folders[0] / "kv_cache_cuda.json"
    other = json.loads(file.read_text())
    other["conditions"]["device"] = "a processor, 2 cores"
    (folders[0] / "kv_cache_cpu.json").write_text(json.dumps(other))
    text = lean_tables.tables(*folders)["lean-kv-speed"]()
    assert "a card" in text and "a processor" in text
