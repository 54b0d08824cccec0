"""Loss with a stride against a brute force; samples, attention and conditions of an evaluation."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hosts import VOCABULARY, tiny_host, tiny_inputs
from torch import Tensor

from gravity_hf import calibrate, gravity_lora, patch_with_gravity
from gravity_hf.training.evaluation import (
    evaluate_language_model,
    generation_samples,
    strided_loss,
)
from gravity_hf.training.measures import mean_loss
from gravity_hf.training.tokenizers import byte_tokenizer


def some_ids(count: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(5))


def brute_force(model, ids: Tensor, length: int, stride: int) -> list[float]:
    """Loss of every token from the second on, one call a token. The context of a token begins where
    the first window that holds it begins; tokens that begin a window themselves are left out."""
    losses = []
    for place in range(1, len(ids)):
        start = next(s for s in range(0, len(ids), stride) if s + length > place)
        if start == place:
            continue
        with torch.no_grad():
            logits = model(input_ids=ids[start:place][None], use_cache=False).logits[0, -1]
        losses.append(-logits.double().log_softmax(-1)[ids[place]].item())
    return losses


@pytest.mark.parametrize("gravity", [False, True], ids=["host", "gravity"])
@pytest.mark.parametrize(
    ("count", "length", "stride"),
    [(37, 8, 8), (37, 8, 3), (37, 8, 1), (32, 8, 4), (5, 8, 4), (33, 8, 8), (9, 8, 7), (2, 8, 8)],
)
def test_strided_loss_is_the_brute_force(
    gravity: bool, count: int, length: int, stride: int
) -> None:
    model = tiny_host("qwen2")
    if gravity:
        patch_with_gravity(model)
    ids = some_ids(count)
    losses = brute_force(model, ids, length, stride)
    result = strided_loss(model, ids, length, stride, progress=False)
    assert result.tokens == len(losses)
    assert result.nats_per_token == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    if stride < length:
        assert result.tokens == count - 1


def test_disjoint_windows_give_the_block_loss() -> None:
    model, ids = tiny_host("qwen2"), some_ids(64)
    block = mean_loss(model, [ids.view(8, 8)])
    assert strided_loss(model, ids, 8, 8).nats_per_token == pytest.approx(block, rel=1e-6)
    assert strided_loss(model, ids, 8, 2).nats_per_token != pytest.approx(block, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_batch_does_not_change_the_loss(batch_size: int) -> None:
    model, ids = tiny_host("qwen2"), some_ids(61)
    one = strided_loss(model, ids, 16, 5, batch_size=3)
    other = strided_loss(model, ids, 16, 5, batch_size=batch_size)
    assert other.tokens == one.tokens
    assert other.nats_per_token == pytest.approx(one.nats_per_token, rel=1e-6)


def test_measuring_leaves_mode_and_random_state_alone() -> None:
    model = tiny_host("qwen2", attention_dropout=0.5).train()
    state = torch.random.get_rng_state()
    first = strided_loss(model, some_ids(20), 8, 4)
    generation_samples(model, byte_tokenizer(), ["!"], max_new_tokens=3, seed=4)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert strided_loss(model, some_ids(20), 8, 4) == first


@pytest.mark.parametrize(
    ("count", "length", "stride", "message"),
    [
        (1, 8, 4, "at least 2 tokens"),
        (20, 8, 9, "stride from 1 to length"),
        (20, 8, 0, "stride from 1 to length"),
        (20, 1, 1, "length >= 2"),
    ],
)
def test_impossible_windows_are_refused(count: int, length: int, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strided_loss(tiny_host("qwen2"), some_ids(count), length, stride)


def test_bits_per_byte_count_bytes_and_not_tokens() -> None:
    model = tiny_host("qwen2", vocab_size=256)
    text = "Grüße! " * 20
    evaluation = evaluate_language_model(model, byte_tokenizer(), text, length=32, stride=8)
    loss = evaluation.loss
    # One token is one byte here.
    assert loss.tokens == len(text.encode()) - 1
    assert loss.bits_per_byte == pytest.approx(loss.nats_per_token / math.log(2))
    halved = strided_loss(model, some_ids(30), 8, 4, text_bytes=60)
    assert halved.bits_per_byte == pytest.approx(halved.nats_per_token / math.log(2) / 2)
    some = evaluate_language_model(model, byte_tokenizer(), text, length=32, max_tokens=51)
    assert some.loss.tokens == 50
    assert some.loss.bits_per_byte == pytest.approx(some.loss.nats_per_token / math.log(2))
    ids = list(text.encode())
    again = evaluate_language_model(model, byte_tokenizer(), ids, length=32, stride=8)
    assert again.loss.nats_per_token == loss.nats_per_token
    assert again.loss.bits_per_byte is None


def test_samples_follow_their_seed() -> None:
    model = tiny_host("qwen2", vocab_size=256)

    def sample(prompts: list[str], **options: object) -> list[str]:
        made = generation_samples(model, byte_tokenizer(), prompts, max_new_tokens=12, **options)
        return [entry["text"] for entry in made]

    first = sample(["ab", "cd"], seed=1, temperature=2.0)
    assert sample(["ab", "cd"], seed=1, temperature=2.0) == first
    assert sample(["cd"], seed=1, temperature=2.0) == first[1:]
    assert sample(["ab", "cd"], seed=2, temperature=2.0) != first
    greedy = sample(["ab"], temperature=0, seed=1)
    assert sample(["ab"], temperature=0, seed=2) == greedy
    with pytest.raises(ValueError, match="at least one token"):
        sample([""])


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "lora"])
def test_an_evaluation_says_how_gravitational_the_model_is(wrapped: bool) -> None:
    model = patch_with_gravity(tiny_host("qwen2", vocab_size=256))
    calibrate(model, [tiny_inputs("qwen2")], softness=2.0, progress=False)
    model = gravity_lora(model, r=2) if wrapped else model
    evaluation = evaluate_language_model(
        model, byte_tokenizer(), "all bodies fall alike " * 8, length=32, prompts=["a"], seed=3
    )
    content = json.loads(json.dumps(evaluation.to_dict()))
    summary = content["attention"]["summary"]
    assert (summary["law"], summary["softness"], summary["heads"]) == ("force", 2.0, 18)
    assert len(content["attention"]["rows"]) == 18
    assert summary["contrast_median"] > 1
    assert {"device", "dtype", "versions", "date", "length", "stride"} <= set(content["conditions"])
    table = evaluation.table()
    for text in ("loss, nats per token", "contrast, median", "KL to dot product", "force", "> a"):
        assert text in table
    quiet = evaluate_language_model(
        model, byte_tokenizer(), "all bodies fall " * 8, length=32, attention=False
    )
    assert quiet.attention is None
    assert "contrast" not in quiet.table()


def test_a_table_of_two_shows_their_difference() -> None:
    text = "all bodies fall alike " * 8
    host = evaluate_language_model(
        tiny_host("qwen2", vocab_size=256), byte_tokenizer(), text, length=32, name="host"
    )
    model = patch_with_gravity(tiny_host("qwen2", vocab_size=256))
    gravity = evaluate_language_model(model, byte_tokenizer(), text, length=32, name="mine")
    gap = gravity.loss.nats_per_token - host.loss.nats_per_token
    (line,) = [x for x in gravity.table(host).splitlines() if x.startswith("loss")]
    assert line.split()[-3:] == [
        f"{gravity.loss.nats_per_token:.4f}",
        f"{host.loss.nats_per_token:.4f}",
        f"{gap:+.4f}",
    ]


def test_a_foreign_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="token ids below 97, the model's vocabulary, got 121"):
        evaluate_language_model(tiny_host("qwen2"), byte_tokenizer(), "a text y")
