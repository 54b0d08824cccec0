"""The cache's benchmark and experiment: quick runs, continued ones, and what their numbers mean."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = ("pool", "timing", "results", "gate", "lean_hosts", "kv_cache", "kv_needles")
MODULES += ("window_losses", "paired_changes", "pretrained_host")


def _loaded(folder: str):
    """The module `kv_cache` of this folder of scripts; there are two of the name."""
    with pytest.MonkeyPatch.context() as patch:
        for room in ("experiments", "benchmark"):
            patch.syspath_prepend(str(SCRIPTS / room))
        patch.syspath_prepend(str(SCRIPTS / folder))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("kv_cache")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def benchmark():
    yield from _loaded("benchmark")


@pytest.fixture(scope="module")
def experiment():
    yield from _loaded("experiments")


def test_a_quick_benchmark_counts_the_bytes_of_every_cache(benchmark, tmp_path):
    file = tmp_path / "kv.json"
    given = ["--quick", "--lengths", "1024", "--caches", "dynamic", "rotated 4", "published"]
    benchmark.main([*given, "--out", str(file), "--commit", "abc"])
    content = file.read_text(encoding="utf-8")
    report = json.loads(content)
    assert str(tmp_path) not in content and report["conditions"]["commit"] == "abc"
    rows = {row["cache"]: row for row in report["rows"]}
    assert list(rows) == ["dynamic", "rotated 4", "published"]
    # float32 keys and values of two layers, one head of 32.
    assert rows["dynamic"]["cache_bytes"] == 2 * 2 * 1024 * 32 * 4
    assert rows["dynamic"]["ratio"] == 0.5 and rows["dynamic"]["decode_speed"] == 1.0
    assert rows["rotated 4"]["ratio"] > 2.5 > rows["published"]["ratio"] > 1
    for row in rows.values():
        times = row["decode_ms"]
        assert 0 < times["p20"] <= times["p50"] <= times["p80"] <= row["decode_most_ms"]


def test_a_benchmark_that_was_cut_short_is_continued(benchmark, tmp_path):
    file = tmp_path / "kv.json"
    given = ["--quick", "--lengths", "64", "--out", str(file), "--commit", "abc", "--caches"]
    benchmark.main([*given, "dynamic"])
    before = json.loads(file.read_text(encoding="utf-8"))["rows"]
    benchmark.main([*given, "dynamic", "rotated 8"])
    after = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert after[0] == before[0] and after[1]["cache"] == "rotated 8"
    benchmark.main([*given, "published"])
    caches = [row["cache"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    assert caches == ["dynamic", "rotated 8", "published"]


def test_a_cache_that_fails_is_a_row_with_its_error(benchmark, tmp_path, monkeypatch):
    def broken(config):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(benchmark.CACHES, "hqq 4", broken)
    file = tmp_path / "kv.json"
    benchmark.main(["--quick", "--lengths", "64", "--caches", "hqq 4", "--out", str(file)])
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert "no such kernel" in row["note"]


@pytest.fixture(scope="module")
def rows(experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv")
    file = folder / "kv.json"
    given = ["--quick", "--seeds", "0", "--windows", "1", "--needles", "1", "--hosts"]
    with pytest.MonkeyPatch.context() as patch:
        arms = ("dynamic", "newest 128 only", "8 bits", "2 bits", "published codec, 4 bits")
        patch.setattr(experiment, "ARMS", {name: experiment.ARMS[name] for name in arms})
        patch.setattr(experiment, "GRAVITY_ARMS", arms[:3])
        experiment.main([*given, str(folder / "hosts"), "--out", str(file)])
    content = file.read_text(encoding="utf-8")
    assert str(folder) not in content
    return json.loads(content)["rows"]


def test_the_experiment_sets_every_arm_beside_its_control(rows):
    found = {(row["attention"], row["arm"]): row for row in rows}
    assert len(found) == 5 + 3
    for (attention, _), row in found.items():
        control = found[attention, "dynamic"]
        assert row["change"] == pytest.approx(row["loss"] - control["loss"], abs=1e-6)
        # Of one window nobody knows how much others differ.
        assert row["change_error"] is None
        assert control["key_error"] == control["value_error"] == control["change"] == 0
    patched, host = found["gravity", "dynamic"], found["dot_product", "dynamic"]
    assert patched["conversion"] == pytest.approx(patched["loss"] - host["loss"], abs=1e-6)
    assert patched["conversion"] != 0 and "conversion" not in host
    host = {arm: row for (attention, arm), row in found.items() if attention == "dot_product"}
    assert 0 < host["8 bits"]["key_error"] < 0.01 < host["2 bits"]["key_error"]
    assert abs(host["8 bits"]["change"]) < 0.01
    # What is not there is not read: another loss, and no error to speak of.
    assert host["newest 128 only"]["key_error"] is None and host["newest 128 only"]["change"] != 0
    assert host["2 bits"]["ratio"] > host["8 bits"]["ratio"] > host["dynamic"]["ratio"] == 0.5


def test_a_filled_cache_is_one_that_the_model_read_the_prompt_into(experiment):
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=16,
        )  # fmt: skip
    ).eval()
    ids = torch.randint(0, 64, (1, 150))
    exact, own = DynamicCache(config=model.config), experiment.ARMS["4 bits"](model.config)
    experiment.read_prompt(model, ids, exact)
    experiment.read_prompt(model, ids, own)
    given = experiment.filled("4 bits", model.config, exact)
    for ours, theirs in zip(own.layers, given.layers, strict=True):
        assert ours.packed_length == 64
        for x, y in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(x, y)


def test_a_needle_is_in_the_middle_and_asked_for_at_the_end(experiment):
    window = torch.full((120,), ord("x"))
    ids_of = lambda text: list(text.encode())  # noqa: E731
    ids, asked, letters = experiment.with_needle(window, ids_of, random.Random(3))
    text = bytes(ids.tolist()).decode()
    assert len(text) == 120 and letters == 12
    opening, name = text[-asked:-12], text[-12:]
    assert opening.startswith("\n") and opening.endswith("'") and name.isalpha()
    assert text[:-asked].strip("x") == f"{opening}{name}'\n"
    assert abs(text.index(opening) + asked // 2 - 60) < asked


def test_a_needle_has_the_same_tokens_at_both_places_whatever_the_tokenizer_joins(experiment):
    def ids_of(text: str) -> list[int]:
        """Pairs of characters: where a text begins decides how all of it is cut."""
        return [1 + int.from_bytes(text[i : i + 2].encode()) for i in range(0, len(text), 2)]

    ids, asked, letters = experiment.with_needle(torch.zeros(90), ids_of, random.Random(3))
    assert letters == 6 and len(ids) == 90
    question = ids[-asked:].tolist()
    line = [number for number in ids[:-asked].tolist() if number]
    assert line[:asked] == question and len(line) == asked + 1


def test_letters_count_as_copied_where_they_are_likeliest(experiment):
    question = torch.tensor(list(b"\nNAME = 'abcdefghijkl"))
    logits = torch.nn.functional.one_hot(question[1:], 256).float()
    assert experiment.copied(logits, question, 12) == 12
    # The one that the opening predicts, and the last.
    for place in (-12, -1):
        logits[place] = 0
    assert experiment.copied(logits, question, 12) == 10
    assert experiment.copied(logits, question, 11) == 10
