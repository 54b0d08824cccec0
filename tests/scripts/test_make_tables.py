"""README's tables of results say what the result files say."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from gravity_hf.integration.support_table import SupportRecord, SupportTable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts/make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(arm, seed, raw, healed, rate=1e-3, contrast=2.0):
    attention = {"contrast_median": contrast, "softness_median": 1.0}
    row = {
        "run": {"arm": arm, "seed": seed, "learning_rate": rate},
        "raw": raw,
        "healed": healed,
        "attention_converted": {} if arm == "host" else attention,
    }
    return row if arm == "host" else {**row, "attention_healed": attention}


def test_readme_is_what_the_result_files_say(tables):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: conversion -->" in text
    assert tables.with_tables(text) == text, "run: python scripts/make_tables.py"


def test_rows_are_compared_with_the_control_at_its_own_best_rate(tables):
    rows = [
        run("host", s, 1.0, healed, rate) for s in (0, 1) for rate, healed in ((1, 0.9), (2, 0.8))
    ]
    rows += [run("force", 0, 1.5, 0.81), run("force", 1, 1.7, 0.83)]
    rate, control = tables.best_control(rows)
    assert rate == 2
    host, force = tables.conversion_rows(rows, {"force": "gravity", "absent": "never run"})
    assert host[3] == "–" and host[2] == "0.8000 ± 0.0000"
    # Paired by seed: +0.01 and +0.03.
    assert force[:4] == ["gravity", "1.6000 ± 0.1414", "0.8200 ± 0.0141", "+0.0200 ± 0.0141"]
    assert force[-1] == "2"


def test_one_seed_has_no_spread(tables):
    assert tables.mean_and_spread([0.5]) == "0.5000"
    assert tables.mean_and_spread([-0.5], signed=True) == "-0.5000"


def test_an_unknown_table_is_an_error(tables):
    with pytest.raises(ValueError, match="got 'nothing'"):
        tables.with_tables("<!-- table: nothing -->\n<!-- end of table -->")


KNOWN = {
    "device": "NVIDIA H200",
    "versions": {"torch": "2.11", "triton": "3.6", "cudnn": 91002},
    "commit": "0123456789abcdef",
    "date": "2026-11-26T00:00:00+00:00",
}


def bench_row(provider, law, work, time, memory, **changes):
    row = {"provider": provider, "law": law, "distance": "euclidean", "pass": work}
    row |= {"launch": "eager", "batch": 4, "heads": 16, "kv_heads": 2, "keys": 4096, "width": 128}
    return {**row, "dtype": "bfloat16", "p50_ms": time, "extra_mib": memory, "note": "", **changes}


def target(name, subject, measured, verdict, aim="<= 1.1"):
    bounds = {"at_least": "<= 1.45", "aim": aim}
    return {"name": name, "subject": subject, "measured": measured, "verdict": verdict, **bounds}


def write_benchmarks(folder, rows):
    with (folder / "kernels_table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        target("forward / SDPA", "force", 1.2345, "met"),
        target("forward / SDPA", "power", None, "not measured"),
    ]
    attention = {"conditions": KNOWN, "targets": lines}
    training = {"conditions": KNOWN, "targets": [target("step", "force", 1.2, "met", aim="")]}
    (folder / "kernels_table.json").write_text(json.dumps(attention), encoding="utf-8")
    (folder / "training_step.json").write_text(json.dumps(training), encoding="utf-8")


def test_kernels_show_times_targets_and_where_they_were_measured(tables, tmp_path):
    rows = [
        bench_row("sdpa", "dot", "forward", 0.511234, 0.5, distance="-"),
        bench_row("sdpa", "dot", "backward", 1.53, 128.2, distance="-"),
        bench_row("gravity_triton", "force", "forward", 0.7, 1.0),
        bench_row("gravity_triton", "power", "backward", "", "", note="gate, backward: dq"),
        bench_row("gravity_triton", "force", "forward", 9.9, 1.0, keys=2048, width=64),
        bench_row("gravity_triton", "force", "forward", 8.8, 1.0, launch="graph"),
    ]
    write_benchmarks(tmp_path, rows)
    lines = tables.kernels(tmp_path).splitlines()
    assert "bfloat16, batch 4, 16 heads (2 KV) of 128, 4096 tokens" in lines[0]
    assert "| SDPA, torch's choice | 0.511 ms | 0 MiB | 1.53 ms | 128 MiB |" in lines
    assert "| gravity, triton, force | 0.7 ms | 1 MiB | – | – |" in lines
    # A row that failed stays, and a target that was not measured is the verdict.
    assert "| gravity, triton, power | – | – | – | – |" in lines
    assert "| forward / SDPA | <= 1.45 | <= 1.1 | force: 1.23; power: – | not measured |" in lines
    assert "| step | <= 1.45 | – | force: 1.2 | met |" in lines
    assert lines[-1].startswith("NVIDIA H200, torch 2.11, Triton 3.6, cuDNN 91002, commit 01234")
    assert sum(line.startswith("NVIDIA") for line in lines) == 1


def test_a_table_without_its_file_is_an_error(tables, tmp_path):
    with pytest.raises(FileNotFoundError, match="kernels_table.csv"):
        tables.kernels(tmp_path)


def test_cpu_cost_reads_the_benchmark_of_a_cpu(tables, tmp_path):
    rows = [bench_row("gravity_chunked", "force", "forward", 196.4, 15.2, keys=8192)]
    write_benchmarks(tmp_path, rows)
    (tmp_path / "kernels_table.csv").rename(tmp_path / "cpu_float32.csv")
    (tmp_path / "kernels_table.json").rename(tmp_path / "cpu_float32.json")
    assert "| gravity, chunked, force | 196 ms | 15 MiB | – | – |" in tables.cpu_cost(tmp_path)


def test_support_shows_every_category_and_where_it_was_examined(tables):
    versions = {"transformers": "5.24.0", "torch": "2.13.0", "python": "3.11.7"}
    record = SupportRecord("qwen2", "causal LM", "Qwen2ForCausalLM", "refused", "a reason")
    lines = tables.support(SupportTable(versions, "2026-11-26", "012", {"qwen2": record}))
    lines = lines.splitlines()
    assert lines[0].startswith("| kind of model | model types | built |")
    assert lines[2] == "| causal LM | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 1 | 0 | 0 |"
    assert lines[-1] == "transformers 5.24.0, torch 2.13.0, commit 012, 2026-11-26."


def recall_row(variant, task, seed, accuracy):
    settings = {"length": 32, "vocabulary": 32, "steps": 400}
    row = {"variant": variant, "task": task, "seed": seed, "accuracy": accuracy}
    conditions = {**KNOWN, "versions": {"torch": "2.11", "transformers": "5.17"}}
    row |= {"chance": 0.0615234375, "change_of_earlier_logits": 0.0}
    return {**row, "settings": settings, "conditions": conditions}


def test_recall_shows_the_range_over_seeds_and_chance(tables, tmp_path):
    rows = [recall_row("defaults", "first", seed, 0.99 + seed / 1000) for seed in (0, 1, 2)]
    rows += [recall_row("no cap", "previous", 0, 1.0), recall_row("no cap", "first", 0, 0.9)]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "lgt_recall.jsonl").write_text(text, encoding="utf-8")
    lines = tables.lgt_experiment_tables.recall_text(tmp_path).splitlines()
    assert "| LGT at its defaults | – | 0.9900 – 0.9920 | 3 |" in lines
    assert "| no cap, smooth cap | 1.0000 | 0.9000 | 1 |" in lines
    assert "Chance is 0.0615: rows of 32 tokens of 32, 400 steps." in lines[-3]
    assert lines[-1] == "NVIDIA H200, torch 2.11, transformers 5.17, 2026-11-26."


def test_every_variant_of_the_recall_experiment_has_its_line(tables):
    import lgt_recall

    shown = [name for names in tables.lgt_experiment_tables.VARIANTS.values() for name in names]
    assert sorted(shown) == sorted(lgt_recall.VARIANTS)


def test_language_models_stand_beside_counting_under_their_conditions(tables, tmp_path):
    trained = {"arm": "LGT", "parameters": 5000, "learning_rate": 1e-3, "seconds": 8.0}
    settings = {"width": 96, "layers": 3, "heads": 4, "rows": 16, "length": 128, "rates": [1, 2]}
    content = {
        "settings": settings,
        "text": {"description": "the standard library"},
        "rows": [
            {"arm": "bigram", "parameters": 65536, "seed": None, "bits_per_byte": 3.5},
            *({**trained, "seed": s, "steps": 600, "bits_per_byte": 2.0 + s} for s in (0, 1)),
        ],
        "conditions": {**KNOWN, "versions": {"torch": "2.11", "transformers": "5.17"}},
    }
    (tmp_path / "lgt_language_model.json").write_text(json.dumps(content), encoding="utf-8")
    lines = tables.lgt_experiment_tables.language_model_text(tmp_path).splitlines()
    assert "| bigram | 65,536 | 3.5000 | – | – | – |" in lines
    assert "| LGT | 5,000 | 2.5000 ± 0.7071 | 0.001 | 8 | 2 |" in lines
    assert lines[-3].startswith("the standard library. Width 96, 3 layers, 4 heads; 600 steps of")
    assert lines[-1] == "NVIDIA H200, torch 2.11, transformers 5.17, 2026-11-26."


@pytest.mark.parametrize("name", ["recall", "language_model"])
def test_an_experiment_without_its_file_names_the_command_that_makes_it(tables, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"python scripts/experiments/lgt_{name}.py"):
        getattr(tables.lgt_experiment_tables, f"{name}_text")(tmp_path)
