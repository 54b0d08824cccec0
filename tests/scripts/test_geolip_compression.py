"""The experiment on bytes: what is compared is comparable, what was measured is kept and shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "scripts" / "experiments"
FOLDERS = (str(ROOT / "scripts"), str(EXPERIMENTS))
MODULES = (
    *("pool", "geolip_arms", "geolip_runs", "geolip_report", "geolip_features"),
    *("geolip_compression", "geolip_compression_report"),
)
RESULT = EXPERIMENTS / "results" / "geolip_compression.json"
METHODS = ("geolip", "autoencoder", "PCA", "PCA, bits by variance", "features")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def tiny_encoder(folder: Path) -> Path:
    """A BERT of 24 numbers a token that reads bytes' letters, with its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=24, **sizes)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole experiment with tiny models: its command and its summary."""
    out = tmp_path_factory.mktemp("compression")
    host = tiny_encoder(out / "host")
    command = ["--quick", "--workers", "0", "--out", str(out), "--host", str(host)]
    command += ["--seeds", "0", "1", "--texts", "8"]
    with pytest.MonkeyPatch.context() as patch:
        for folder in FOLDERS:
            patch.syspath_prepend(folder)
        import geolip_compression

        geolip_compression.main(command)
    content = json.loads((out / "geolip_compression.json").read_text())
    return {"out": out, "command": command, "content": content}


def test_every_method_is_measured_on_the_same_tokens(quick: dict[str, Any]) -> None:
    rows = quick["content"]["rows"]
    assert {row["method"] for row in rows} == set(METHODS)
    for method in ("geolip", "autoencoder"):
        sizes = {(row["size"], row["seed"]) for row in rows if row["method"] == method}
        numbers = {(size * (3 if method == "geolip" else 1), seed) for size, seed in sizes}
        assert numbers == {(6, 0), (6, 1), (12, 0), (12, 1)}
    assert quick["content"]["data"]["held_out_tokens"] > 0
    assert str(quick["out"]) not in json.dumps(quick["content"])


def test_bytes_are_those_of_the_degrees_of_freedom(quick: dict[str, Any]) -> None:
    """As many bits for frames and for the autoencoder; PCA may have as many as frames need."""
    trained = [row for row in quick["content"]["rows"] if row["method"] in METHODS[:2]]
    for row in (row for row in trained if row["is_quantised"]):
        numbers = row["size"] * (3 if row["method"] == "geolip" else 1)
        assert row["bytes_per_token"] == -(-numbers * row["bits"] // 8)
    assert sum(not row["is_quantised"] for row in trained) == 2 * 2 * 2
    sizes = {row["bytes_per_token"] for row in trained if row["is_quantised"]}
    assert [at["bytes"] for at in quick["content"]["at_bytes"]] == sorted(sizes)


def test_the_table_holds_the_best_code_that_fits(quick: dict[str, Any]) -> None:
    from geolip_compression_report import compression_table, mean_rows

    content = quick["content"]
    means = [row for row in mean_rows(content["rows"]) if row["is_quantised"]]
    for at in content["at_bytes"]:
        for method, best in at["methods"].items():
            own = [r for r in means if r["method"] == method]
            fitting = [r["cosine"] for r in own if r["bytes_per_token"] <= at["bytes"]]
            assert (best["cosine"] if best else None) == max(fitting, default=None)
        assert at["methods"]["geolip"]["seeds"] == 2
    headers, lines = compression_table(content)
    assert headers[1:] == list(METHODS) and all(line[1:].count("–") <= 1 for line in lines)
    assert all(sum("**" in cell for cell in line) == 1 for line in lines)


def test_who_wins_where_and_who_never_does_is_said(quick: dict[str, Any]) -> None:
    from geolip_compression_report import winners

    said = dict(line.split(": ") for line in winners(quick["content"]))
    for at in quick["content"]["at_bytes"]:
        sizes = said[at["best"]].removeprefix("best at ").removesuffix(" bytes").split(", ")
        assert str(at["bytes"]) in sizes
    # In two steps nobody learns a code: what needs no training is better.
    assert said["geolip"] == said["autoencoder"] == "never best"


def test_what_is_done_is_not_done_again(quick: dict[str, Any]) -> None:
    import geolip_compression

    file = quick["out"] / "runs.jsonl"
    before = file.read_text()
    geolip_compression.main(quick["command"])
    assert file.read_text() == before and before.count("\n") == 1 + 2 * 2 * 2


def test_the_picture_is_one(quick: dict[str, Any]) -> None:
    from PIL import Image

    with Image.open(quick["out"] / "geolip_compression.png") as picture:
        assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.skipif(not RESULT.is_file(), reason="has not been measured yet")
def test_committed_result_is_of_one_commit_and_of_several_seeds() -> None:
    content = json.loads(RESULT.read_text())
    rows = content["rows"]
    assert len({row["commit"] for row in rows}) == 1
    for rows_of_preset in (32, 128):
        own = [r for r in rows if r["method"] == "geolip" and r["size"] == rows_of_preset]
        assert len({row["seed"] for row in own}) >= 3
    assert {row["method"] for row in rows} == set(METHODS)
