"""What a companion reads of hosts of every kind, and which it refuses."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AlbertConfig, AlbertModel, GPT2LMHeadModel

from gravity_hf import GeolipCompanion, GeolipConfig, GeolipModel
from gravity_hf.models.geolip.companion_hosts import (
    blocks_of,
    encoder_of,
    is_causal_host,
    special_ids_of,
)

from .companion_cases import (
    CAUSAL,
    CONTENT,
    HOSTS,
    IDS,
    INNER,
    LAST,
    LAYERS,
    MASK,
    SPECIAL,
    WIDTH,
    companion_of,
    host_named,
    inputs_of,
    word_tokenizer,
)


@pytest.mark.parametrize("layer", [0, INNER, LAST])
@pytest.mark.parametrize("name", HOSTS)
def test_the_asked_layer_is_read(name: str, layer: int) -> None:
    companion = companion_of(name, read_layer=layer)
    inputs = inputs_of(name)
    found, _ = companion.read(**inputs)
    with torch.no_grad():
        whole = companion.host(**inputs, output_hidden_states=True)
    expected = whole.last_hidden_state if layer == LAST else whole.hidden_states[layer]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", HOSTS)
def test_host_outputs_are_unchanged(name: str) -> None:
    companion, inputs = companion_of(name, read_layer=INNER), inputs_of(name)
    before = companion.host(**inputs, use_cache=False) if name in CAUSAL else None
    before = companion.host(**inputs) if before is None else before
    after = companion(**inputs).host_outputs
    assert list(after) == list(before)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)


@pytest.mark.parametrize("name", HOSTS)
def test_causal_hosts_are_known(name: str) -> None:
    assert is_causal_host(host_named(name)) == (name in CAUSAL)


def test_a_decoder_made_of_bert_is_causal() -> None:
    assert is_causal_host(host_named("bert", is_decoder=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_host_is_refused_without_causal(name: str) -> None:
    with pytest.raises(ValueError, match="causal=True"):
        companion_of(name, causal=False)


def test_causal_beside_a_geolip_that_sees_both_ways_is_refused() -> None:
    with pytest.raises(StrictDataclassError, match="is_causal"):
        companion_of("gpt2", geolip=GeolipConfig(patch_dim=WIDTH))


def test_preset_beside_a_causal_host_is_causal() -> None:
    companion = GeolipCompanion.from_host(host_named("gpt2"), "tiny", causal=True)
    assert companion.geolip.config.is_causal


def test_of_an_encoder_decoder_the_encoder_is_the_host() -> None:
    host = host_named("t5")
    assert companion_of(host).host is host.get_encoder()


@pytest.mark.parametrize("name", HOSTS)
def test_blocks_are_found(name: str) -> None:
    assert len(blocks_of(encoder_of(host_named(name)))) == LAYERS


def test_special_tokens_and_padding_are_no_content() -> None:
    found = companion_of("bert")(input_ids=IDS, attention_mask=MASK).feature_mask
    assert torch.equal(found, CONTENT)


def test_what_the_mask_hides_is_no_content() -> None:
    hidden = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    found = companion_of("bert")(input_ids=IDS, attention_mask=hidden).feature_mask
    assert torch.equal(found, CONTENT & hidden.bool())


def test_class_token_of_images_is_no_content() -> None:
    found = companion_of("vit")(**inputs_of("vit")).feature_mask
    assert found.tolist() == [[False, True, True, True, True]] * 2


def test_padding_changes_nothing() -> None:
    companion = companion_of("bert", write="residual", read_layer=INNER, gate=1.0)
    length = int(MASK[1].sum())
    padded = companion(input_ids=IDS[1:], attention_mask=MASK[1:])
    alone = companion(input_ids=IDS[1:, :length])
    for name in ("omega_attended", "reconstruction", "last_hidden_state"):
        torch.testing.assert_close(padded[name][:, :length], alone[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded.loss, alone.loss)


def test_loss_is_that_of_the_content() -> None:
    companion = companion_of("bert")
    out = companion(input_ids=IDS, attention_mask=MASK)
    wrong = out.reconstruction - out.last_hidden_state
    torch.testing.assert_close(out.loss, wrong[CONTENT].square().mean())


def test_host_with_a_head_adds_its_loss() -> None:
    host = GPT2LMHeadModel(host_named("gpt2").config)
    companion = companion_of(host, causal=True, read_layer=INNER)
    out = companion(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.loss, out.reconstruction_loss + out.host_outputs.loss)
    assert out.logits.shape == (*IDS.shape, host.config.vocab_size)


def test_unknown_words_are_content() -> None:
    assert special_ids_of(word_tokenizer(["a"])) == SPECIAL


def test_trained_geolip_is_copied() -> None:
    trained = GeolipModel(GeolipConfig(patch_dim=WIDTH))
    trained.set_feature_statistics(torch.full((WIDTH,), 0.5), torch.full((WIDTH,), 2.0))
    companion = companion_of("bert", geolip=trained)
    for name, value in trained.state_dict().items():
        assert torch.equal(companion.geolip.state_dict()[name], value), name


def test_mechanism_is_measured_beside_a_host() -> None:
    companion = companion_of("bert")
    verdict = companion.verdict([{"input_ids": IDS, "attention_mask": MASK}])
    assert verdict.tokens == CONTENT.sum()


def test_companion_without_a_host_says_so() -> None:
    config = companion_of("bert").config
    with pytest.raises(RuntimeError, match="attach_host"):
        GeolipCompanion(config)(input_ids=IDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"past_key_values": ()}, "past_key_values"),
        ({"use_cache": True}, "use_cache"),
        ({"labels": IDS}, "no head"),
        ({"attention_mask": MASK[:, None, None]}, "attention_mask"),
    ],
)
def test_what_a_companion_cannot_take_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        companion_of("gpt2")(**{"input_ids": IDS, **given})


def test_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="from -3 to 2"):
        companion_of("bert", read_layer=3)


def test_host_without_a_list_of_blocks_cannot_be_written_inside() -> None:
    # Its layers are one block, which runs several times.
    sizes = {"embedding_size": 8, "hidden_size": WIDTH, "num_attention_heads": 2}
    more = {"vocab_size": 40, "num_hidden_layers": 3, "intermediate_size": 32}
    host = AlbertModel(AlbertConfig(**sizes, **more))
    with pytest.raises(ValueError, match="one list of 3 blocks"):
        companion_of(host, read_layer=1, write="residual")
