"""Effects of sources against plain forward passes, step by step."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.knowledge.attribution import Attribution
from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.errors import ValidationError

TOKENS = [5, 17, 42, 99, 7, 250]


@pytest.fixture(params=["llama", "gpt2", "gravity_llama"])
def host(request, random_delta):
    model = request.getfixturevalue(request.param)
    bank = DeltaBank(model)
    for seed, name in enumerate("abc"):
        bank.add(name, random_delta(model, seed, scale=0.5))
    return model, bank


@torch.no_grad()
def _log_p(model, bank, tokens, ids):
    with bank.routed([ids]):
        return model(input_ids=torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)


def _kl(p, q):
    return float((p.exp() * (p - q)).sum())


def test_effects_are_those_of_leaving_sources_out(host):
    model, bank = host
    effect = Attribution(model, bank, ["c", "a", "b"]).effect(TOKENS, 0)
    whole = _log_p(model, bank, TOKENS, ["a", "b", "c"])
    without = _log_p(model, bank, TOKENS, [])
    assert effect.kl == pytest.approx(_kl(whole, without), rel=1e-3)
    assert (effect.token, effect.token_without) == (int(whole.argmax()), int(without.argmax()))
    assert [source.id for source in effect.sources] == ["a", "b", "c"]
    for source, rest in zip(effect.sources, (["b", "c"], ["a", "c"], ["a", "b"]), strict=True):
        left = _log_p(model, bank, TOKENS, rest)
        assert source.kl == pytest.approx(_kl(whole, left), rel=1e-3)
        assert source.changes_token == bool(left.argmax() != whole.argmax())
    assert len({round(source.kl, 6) for source in effect.sources}) == 3


def test_the_only_source_is_what_makes_the_difference(host):
    model, bank = host
    effect = Attribution(model, bank, ["b"]).effect(TOKENS, 2)
    assert effect.step == 2
    assert effect.kl > 0
    assert [(source.id, source.kl) for source in effect.sources] == [("b", effect.kl)]
    assert effect.sources[0].changes_token == (effect.token != effect.token_without)


def test_a_source_without_effect_has_none(llama, random_delta):
    bank = DeltaBank(llama)
    bank.add("real", random_delta(llama, 0, scale=0.5))
    bank.add("idle", random_delta(llama, 1, scale=0.5).scaled(0.0))
    effect = Attribution(llama, bank, ["real", "idle"]).effect(TOKENS, 0)
    idle, real = effect.sources
    assert idle.kl < 1e-9 < real.kl
    assert not idle.changes_token


def test_its_cache_keeps_in_step_with_the_tokens(host):
    model, bank = host
    stepping = Attribution(model, bank, ["a", "b"])
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for end in (2, 3, 6):
        found = stepping.logits(TOKENS[:end])
        seen_now = seen.pop()
        fresh = Attribution(model, bank, ["a", "b"]).logits(TOKENS[:end])
        torch.testing.assert_close(found, fresh, atol=1e-5, rtol=0)
        assert seen_now == {2: 2, 3: 1, 6: 3}[end]
    hook.remove()


def test_another_sequence_is_read_from_its_start(host):
    model, bank = host
    stepping = Attribution(model, bank, ["a"])
    stepping.logits(TOKENS[:4])
    for other in ([5, 18, 42, 99, 7], TOKENS[:4], TOKENS[:2], TOKENS[:2]):
        fresh = Attribution(model, bank, ["a"]).logits(other)
        torch.testing.assert_close(stepping.logits(other), fresh, atol=0, rtol=0)


def test_the_base_is_left_alone(host):
    model, bank = host
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with bank.routed([["c"]]):
            routed = model(input_ids=ids).logits
            Attribution(model, bank, ["a", "b"]).effect(TOKENS, 0)
            # The caller's own rows are back.
            assert torch.equal(model(input_ids=ids).logits, routed)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_without_sources_there_is_nothing_to_run(llama):
    with pytest.raises(ValidationError, match="at least one source"):
        Attribution(llama, DeltaBank(llama), [])
