"""Published checkpoints become folders that compute the same, and what they cannot be is said."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gravity_hf.models.ngt import NGTForCausalLM
from gravity_hf.models.ngt.convert_ngt import (
    convert_ngt_checkpoint,
    convert_reference_state_dict,
    main,
)

from .published_files import BLOCK, FILES, content, outputs, state, tokenizers

CLOSE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module", params=FILES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("converted")
    return {kind: convert_ngt_checkpoint(file, room / kind) for kind, (file, _) in FILES.items()}


@torch.no_grad()
def test_checkpoint_computes_what_it_was_published_to(kind: str, folders: dict[str, Path]) -> None:
    """After a conversion and a load by the Auto classes, with the tokenizer of the file."""
    model = AutoModelForCausalLM.from_pretrained(folders[kind])
    assert type(model) is NGTForCausalLM and not model.training
    assert model.lm_head.weight is model.model.token_emb.weight
    assert model.config.is_twin == (kind == "vanilla")
    expected = outputs()
    logits = model(expected["prompt"]).logits
    torch.testing.assert_close(logits, expected[FILES[kind][1]], **CLOSE)
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    assert tokenizer("It was the").input_ids == expected["prompt"][0].tolist()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("greedyish_k1", {"top_k": 1}),
        ("t09_k20_seed3", {"temperature": 0.9, "top_k": 20}),
        ("t1_nok_seed3", {"top_k": 0}),
    ],
)
def test_sampled_text_is_the_published_one(
    name: str, settings: dict[str, Any], folders: dict[str, Path]
) -> None:
    """Beyond the model's window, which moves along, and with the published random numbers."""
    model = AutoModelForCausalLM.from_pretrained(folders["ngt"])
    expected = outputs()[f"gen.{name}"]
    assert expected.shape[1] > BLOCK == model.config.max_position_embeddings
    torch.manual_seed(3)
    sampled = model.generate(outputs()["prompt"], do_sample=True, max_new_tokens=24, **settings)
    assert torch.equal(sampled, expected)


def test_files_without_masses_and_biases_have_masses_of_one() -> None:
    model = convert_reference_state_dict(state("legacy"))
    masses = model(outputs()["prompt"], output_coordinates=True).masses
    torch.testing.assert_close(masses, torch.ones_like(masses))
    assert all(not layer.attn.gravity.bias.any() for layer in model.model.layers)


def first_version() -> dict[str, Tensor]:
    head = torch.linspace(-1, 1, 39 * 16).view(39, 16)
    return {**state("legacy"), "head.weight": head}


def test_first_version_keeps_its_embedding_beside_its_head() -> None:
    """In published code the head of such a file overwrites the embedding."""
    model = convert_reference_state_dict(first_version())
    assert torch.equal(model.model.token_emb.weight, first_version()["token_emb.weight"])
    assert torch.equal(model.lm_head.weight, first_version()["head.weight"])
    assert not model.config.tie_word_embeddings
    assert model.config.coordinate_source == "pre_attention"


def test_settings_are_those_of_the_file(tmp_path: Path) -> None:
    given = content("ngt")
    switches = {"use_rsqrt": True, "mass_in_value": True, "use_soft_cutoff": True, "dropout": 0.3}
    given["config"].update(switches)
    torch.save(given, tmp_path / "run.pt_last.pt")
    folder = convert_ngt_checkpoint(tmp_path / "run.pt_last.pt", tmp_path / "model")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    read = (config.use_rsqrt, config.mass_in_value, config.cutoff, config.dropout)
    assert read == (True, True, "soft", 0.3)
    uncut = convert_reference_state_dict(state("ngt"), use_radius_cutoff=False)
    assert uncut.config.cutoff == "none"


def edited(kind: str, **weights: Tensor | None) -> dict[str, Tensor]:
    changed: dict[str, Any] = {**state(kind), **weights}
    return {key: tensor for key, tensor in changed.items() if tensor is not None}


SQUARE = {"layers.1.attn.coord_proj_next.weight": torch.ones(6, 6)}
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "unknown": (edited("ngt", extra=torch.ones(1)), {}, "model.extra: unknown"),
    "missing": (
        edited("ngt", **{"layers.1.norm2.bias": None}),
        {},
        r"model.layers.1.norm2.bias: missing",
    ),
    "a layer": (
        {k: x for k, x in state("ngt").items() if not k.startswith("layers.0.")},
        {},
        "got none of the name layers.0",
    ),
    "square motion": (edited("ngt", **SQUARE), {}, r"expected \[6, 16\].*what the map was meant"),
    "untied": (edited("ngt", **{"head.weight": torch.ones(39, 16)}), {}, "head.weight: expected"),
    "untied twin": (
        edited("vanilla", **{"head.weight": torch.ones(39, 16)}),
        {"num_heads": 2},
        "head.weight: expected the same",
    ),
    "sizes": (state("ngt"), {"num_layers": 3}, "num_layers: expected 2, which the weights say"),
    "kind": (state("ngt"), {"model_type": "vanilla"}, "model_type: expected 'ngt'"),
    "setting": (state("ngt"), {"use_magic": True}, "got use_magic"),
    "value": (state("ngt"), {"use_rsqrt": "yes"}, "use_rsqrt: expected True or False"),
    "dropout": (state("ngt"), {"dropout": 2.0}, r"dropout: expected a number in \[0, 1\)"),
    "no heads": (state("vanilla"), {}, "num_heads: expected the number of heads"),
    "gravity": (
        state("vanilla"),
        {"num_heads": 2, "mass_in_value": False},
        "vanilla transformer.*got mass_in_value",
    ),
    "other": (
        {"weight": torch.ones(2)},
        {},
        "expected the weights of a published NGT",
    ),
    "integers": (edited("ngt", **{"norm.bias": torch.ones(16).int()}), {}, "got torch.int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_checkpoint_leaves_nothing(case: str, tmp_path: Path) -> None:
    weights, settings, message = REFUSED[case]
    torch.save({"model_state": weights}, tmp_path / "ngt.pt")
    with pytest.raises(ValueError, match=message):
        convert_ngt_checkpoint(tmp_path / "ngt.pt", tmp_path / "model", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["ngt.pt"]


def test_settings_that_the_file_contradicts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_rsqrt: expected False, which .*best.pt says"):
        convert_ngt_checkpoint(FILES["ngt"][0], tmp_path / "model", use_rsqrt=True)


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**content("ngt"), "vocab": Code()}, tmp_path / "ngt.pt")
    with pytest.raises(ValueError, match="without running code in it"):
        convert_ngt_checkpoint(tmp_path / "ngt.pt", tmp_path / "model")
    assert "run" not in capsys.readouterr().out


def test_wrong_vocabulary_is_refused(tmp_path: Path) -> None:
    """One that is larger than the model's, or none that is known."""
    file = tmp_path / "ngt.pt"
    for vocabulary, message in (
        (tokenizers()["bpe"]["state"], "at most 39 tokens, as the model has, got 125"),
        ({"type": "words"}, "got the type 'words'"),
        ({"type": "tiktoken", "encoding_name": "o200k"}, "expected the tiktoken encoding 'gpt2'"),
    ):
        torch.save({**content("ngt"), "vocab": vocabulary}, file)
        with pytest.raises(ValueError, match=message):
            convert_ngt_checkpoint(file, tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer: expected none, as .* holds its own"):
        convert_ngt_checkpoint(FILES["ngt"][0], tmp_path / "model", tokenizer="gpt2")


def test_model_without_its_tokenizer_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-2's files are not in a checkpoint made with tiktoken, and there is no network here."""
    torch.save(state("ngt"), tmp_path / "state.pt")
    tiktoken = {**content("ngt"), "vocab": {"type": "tiktoken", "encoding_name": "gpt2"}}
    torch.save(tiktoken, tmp_path / "tiktoken.pt")
    for name, said in (("state", "holds no tokenizer"), ("tiktoken", "GPT-2's tokenizer")):
        caplog.clear()
        folder = convert_ngt_checkpoint(tmp_path / f"{name}.pt", tmp_path / name)
        assert said in caplog.text and "the model alone" in caplog.text
        assert {"config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
        assert not (folder / "tokenizer.json").exists()


def test_command_converts_and_writes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["convert_ngt", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    shutil.copy(FILES["ngt"][0], tmp_path / "run.pt_best.pt")
    assert run(tmp_path / "run.pt", tmp_path / "model") == 1
    assert "run.pt_best.pt" in capsys.readouterr().err.replace("\n", "")
    assert run(tmp_path / "run.pt_best.pt", tmp_path / "model", "--set", "dropout=0.1") == 0
    assert run(tmp_path / "model", tmp_path / "back.pt") == 0
    written = torch.load(tmp_path / "back.pt", weights_only=True)["model_state"]
    assert all(torch.equal(written[key], x) for key, x in state("ngt").items())
    assert run(tmp_path / "run.pt_best.pt", tmp_path / "other", "--set", "num_heads") == 1
    assert "expected NAME=VALUE" in capsys.readouterr().err
