"""A pretrained folder as host of the experiments: its tokens, its windows, all four experiments."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gravity_hf.training.tokenizers import train_bpe

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
MODULES = ("pool", "lean_hosts", "lean_training", "pretrained_host", "window_losses", "kv_cache")
MODULES += ("paired_changes", "kv_needles", "sparse_attention", "sparse_arms", "geolip_runs")
MODULES += ("compression", "compression_arms", "sparse_feed_forward", "feed_forward_hosts")
# Parts that letters tell apart: what comes first of each text, and what is held out.
LETTERS = {"one": ("abcdef", "ghijkl"), "two": ("mnopqr", "stuvwx")}


def _forget() -> None:
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module", autouse=True)
def _on_the_path():
    _forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield
    _forget()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, `model`, and two texts."""
    place, draw = tmp_path_factory.mktemp("pretrained"), random.Random(0)
    for name, parts in LETTERS.items():
        halves = ["".join(draw.choices(f"{part} ", k=6000)) for part in parts]
        (place / f"{name}.txt").write_text("".join(halves))
    everything = "".join((place / f"{name}.txt").read_text() for name in LETTERS)
    tokenizer = train_bpe(everything, 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


def hosts(folder: Path, **changes: Any) -> list[Any]:
    from pretrained_host import pretrained_at

    texts = [str(folder / f"{name}.txt") for name in LETTERS]
    how = {"files": texts, "kept": folder / "kept", "length": 32, **changes}
    return pretrained_at(folder / "model", **how)


def test_the_last_part_of_each_text_is_held_out_and_the_rest_is_for_calibration(folder):
    host = hosts(folder)[0]
    decode = host.text.tokenizer.decode
    held_out, known = (
        set(decode(ids.flatten().tolist())) - set(" \n")
        for ids in (host.held_out(100), host.calibration(200))
    )
    assert held_out == {letter for parts in LETTERS.values() for letter in parts[1]}
    assert known == {letter for parts in LETTERS.values() for letter in parts[0]}
    assert "one.txt, two.txt" in host.record["text"] and str(folder) not in str(host.described())


def test_seeds_have_windows_apart(folder):
    text = hosts(folder)[0].text.validation
    places = []
    for host in hosts(folder):
        windows = host.held_out(4)
        assert windows.shape == (4, 32)
        rows = text.unfold(0, 32, 1)
        places += [int((rows == window).all(1).nonzero()[0]) for window in windows]
    places.sort()
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert len(gaps) == 11 and min(gaps) >= 32


def test_what_is_measured_is_named_by_its_weights(folder, tmp_path):
    host = hosts(folder)[0]
    known = host.described()
    model = host.load()
    assert known["name"] == "model" and known["parameters"] == model.num_parameters()
    assert known["unit"] == "nats per token of held-out text" and known["bytes_per_token"] > 1
    other = tmp_path / "other"
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.to(torch.bfloat16).save_pretrained(other)
    host.text.tokenizer.save_pretrained(other)
    from pretrained_host import pretrained_at

    again = pretrained_at(other, host.files, tmp_path, length=32)[0]
    assert again.record["digest"] != known["digest"] != ""
    # The same text in the same tokens, wherever it lies.
    assert again.record["settings"]["text"] == host.record["settings"]["text"]
    assert again.shelf != host.shelf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ["nowhere.txt"]}, "--text: expected text files"),
        ({"files": []}, "--text: expected text files"),
        ({"share": 1.0}, "--held-out: expected a share"),
        ({"length": 512}, "--length: expected at most 256"),
    ],
)
def test_what_does_not_fit_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        hosts(folder, **changes)


def test_too_little_held_out_text_is_refused(folder):
    with pytest.raises(ValueError, match="expected at least 3 windows of 256"):
        hosts(folder, length=256, share=0.02)[2].held_out(1)


def test_options_of_the_other_kind_of_host_are_refused(folder):
    from lean_hosts import add_host_options, place_of

    parser = importlib.import_module("argparse").ArgumentParser()
    add_host_options(parser)
    for given, message in ((["--text", "a"], "--pretrained"), (["--pretrained", "m"], "--text")):
        with pytest.raises(ValueError, match=message):
            place_of(parser.parse_args(given))


def run(script: str, folder: Path, *more: str) -> dict[str, Any]:
    """What the script writes of a quick run on the folder's model."""
    out = folder / f"{script}.json"
    texts = [str(folder / f"{name}.txt") for name in LETTERS]
    command = ["--quick", "--length", "64", "--out", str(out), *more]
    command += ["--pretrained", str(folder / "model"), "--hosts", str(folder), "--text", *texts]
    before = sorted(file.name for file in (folder / "model").iterdir())
    importlib.import_module(script).main(command)
    assert sorted(file.name for file in (folder / "model").iterdir()) == before
    text = out.read_text(encoding="utf-8")
    assert str(folder) not in text and "/tmp" not in text
    content = json.loads(text)
    assert content["host"]["name"] == "model" and content["host"]["apart"] is True
    assert content["unit"] == "nats per token of held-out text"
    return content


def test_caches_of_a_pretrained_host(folder, monkeypatch):
    kv_cache = importlib.import_module("kv_cache")
    arms = {name: kv_cache.ARMS[name] for name in ("dynamic", "4 bits")}
    monkeypatch.setattr(kv_cache, "ARMS", arms)
    monkeypatch.setattr(kv_cache, "GRAVITY_ARMS", tuple(arms))
    rows = run("kv_cache", folder, "--seeds", "0", "1", "--length", "192")["rows"]
    assert len(rows) == 2 * 2 * 2 and {row["windows"] for row in rows} == {2}
    assert all(row["change_error"] > 0 for row in rows if row["arm"] == "4 bits")
    # The seeds read other windows.
    assert len({row["loss"] for row in rows if row["arm"] == "dynamic"}) == 4


def test_sparse_attention_of_a_pretrained_host(folder):
    runs = str(folder / "runs-sparse")
    content = run(
        *("sparse_attention", folder, "--parts", "hosts", "--runs", runs, "--seeds", "0", "1")
    )
    assert [row["screening"] for row in content["rows"]][-2:] == ["window", "random"]
    for row in content["rows"]:
        assert row["windows"] == 4 and row["change_error"] > 0 and row["seeds"] == [0, 1]
    assert len(list(folder.glob("model-*/screening-learned-*.safetensors"))) == 2


def test_seeds_of_a_pretrained_host_share_what_was_made_smaller(folder, monkeypatch):
    arms, made = importlib.import_module("compression_arms"), []
    usual = arms.factorize
    monkeypatch.setattr(arms, "factorize", lambda *a, **b: made.append(b) or usual(*a, **b))
    more = ["--energies", "0.9", "--controls", "0.9", "--runs", str(folder / "runs-shared")]
    content = run("compression", folder, "--seeds", "0", "1", "--heal", "0", *more)
    assert [row["arm"] for row in content["rows"]] == ["dense", "weighted", "layers", "plain"]
    assert len(made) == 2 and made[0]["calibration"] and made[1]["calibration"] is None
    for arm in ("weighted", "layers", "plain"):
        one, two = (x for x in content["runs"] if x["arm"] == arm)
        assert one["parameters"] == two["parameters"] and one["loss"] != two["loss"]


def test_a_host_is_named_as_its_folder_is_also_where_that_is_a_link(folder, tmp_path):
    from pretrained_host import pretrained_at

    (tmp_path / "a-name").symlink_to(folder / "model")
    host = hosts(folder)[0]
    linked = pretrained_at(tmp_path / "a-name", host.files, tmp_path, length=32)[0]
    assert linked.described() == {**host.described(), "name": "a-name"}


def test_compression_of_a_pretrained_host(folder):
    more = ["--energies", "0.9", "--controls", "0.9", "--runs", str(folder / "runs-compression")]
    content = run("compression", folder, "--seeds", "0", *more)
    rows = {row["arm"]: row for row in content["rows"]}
    assert list(rows) == ["dense", "weighted", "layers", "plain"]
    ranks = content["runs"][1]["ranks"]
    assert set(ranks) <= {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    shorter = rows["layers"]["layer_parameters"]["median"]
    assert shorter < rows["dense"]["layer_parameters"]["median"]
    assert rows["weighted"]["healed_change_error"] > 0 and rows["dense"]["change_error"] == 0


def test_blocks_of_neurons_of_a_pretrained_host(folder, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("sparse_feed_forward"), "QUICK_PRETRAINED", (8, 0.5)
    )
    content = run("sparse_feed_forward", folder, "--parts", "hosts", "--seeds", "1")
    lines = {(x["arm"], x["reordered"]): x for x in content["summary"]["hosts"]}
    assert len(lines) == 7 and all(line["seeds"] == 1 for line in lines.values())
    for line in lines.values():
        assert line["windows"] == 2 and line["excess_error"] > 0


def test_layers_are_taken_out_from_behind_but_for_the_last(folder):
    from compression_arms import _fewer_layers

    model = hosts(folder)[0].load()
    each = sum(p.numel() for p in model.model.layers[0].parameters())
    shorter, known = _fewer_layers(model, model.num_parameters() - each)
    assert known == {"layers": 2} and model.config.num_hidden_layers == 3
    assert shorter.num_parameters() == model.num_parameters() - each
    for kept, number in zip(shorter.model.layers, (0, 2), strict=True):
        weight = model.model.layers[number].mlp.up_proj.weight
        assert torch.equal(kept.mlp.up_proj.weight, weight)
    ids = hosts(folder)[0].held_out(1)
    # With a cache, which counts its layers.
    assert shorter.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 34)
