"""Tokens that leave early: each by itself, at the same depth however they are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gravity_hf import LeanFormerForCausalLM
from gravity_hf.models.leanformer import fit_exit_threshold, measure_exits

from .lean_cases import IDS, OPTIONS, logits, padded, tiny


def leaving(option: str = "single_keys", **settings: object) -> LeanFormerForCausalLM:
    """Of whose tokens some leave after one layer, some after two, and some not at all."""
    return tiny(option, exit_threshold=0.5, num_hidden_layers=3, **settings)


def exit_layers(model: LeanFormerForCausalLM, ids: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).exit_layer


def calls_of(model: LeanFormerForCausalLM) -> list[int]:
    """Grows by a layer's number whenever it attends."""
    calls: list[int] = []
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_hook(lambda *_, n=n: calls.append(n))
    return calls


@pytest.mark.parametrize("option", OPTIONS)
def test_a_model_whose_tokens_do_not_leave_is_the_model_without_a_head(option: str) -> None:
    model = tiny(option, exit_threshold=None)
    whole = logits(model, IDS)
    assert model(IDS).exit_layer is None
    # Nobody is as sure as that.
    model.config.exit_threshold = 1.0
    assert torch.equal(logits(model, IDS), whole)
    assert (exit_layers(model, IDS) == 3).all()
    model.model.exit_head, model.config.exit_threshold = None, 0.5
    assert torch.equal(logits(model, IDS), whole)


def test_tokens_leave_at_depths_of_their_own() -> None:
    assert exit_layers(leaving(), IDS).unique().tolist() == [1, 2, 3]
    assert exit_layers(leaving(min_depth=2), IDS).unique().tolist() == [2, 3]


@pytest.mark.parametrize("option", ["blocks", "gravity", "published"])
def test_a_token_leaves_where_it_would_behind_a_cache(option: str) -> None:
    model = leaving(option)
    whole, depths = logits(model, IDS), exit_layers(model, IDS)
    cache, found = DynamicCache(config=model.config), []
    for part in IDS.split([14, *[1] * 16], 1):
        with torch.no_grad():
            found.append(model(part, past_key_values=cache))
    assert torch.equal(torch.cat([x.exit_layer for x in found], 1), depths)
    joined = torch.cat([x.logits for x in found], 1)
    torch.testing.assert_close(joined, whole, rtol=0, atol=2e-5)


def test_a_row_leaves_where_it_would_alone() -> None:
    model, given = leaving(), padded("left")
    batch = exit_layers(model, given.ids, attention_mask=given.mask)
    for row, place in enumerate(given.rows):
        alone = exit_layers(model, given.ids[row : row + 1, place])
        assert torch.equal(batch[row, place], alone[0])


def test_layers_that_all_have_left_are_skipped_and_remember() -> None:
    model = leaving()
    model.config.exit_threshold = 0.0
    calls, cache = calls_of(model), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in IDS[:1, :20].split([12, *[1] * 8], 1):
            model(part, past_key_values=cache)
    assert calls == [0] * 9
    assert [cache.get_seq_length(n) for n in range(3)] == [20] * 3
    # Whoever stays reads in every layer what they left there.
    model.config.exit_threshold = 1.0
    after = logits(model, IDS[:1, 20:21], past_key_values=cache)
    assert after.isfinite().all() and calls == [0] * 9 + [0, 1, 2]


def test_generate_calls_the_layers_that_its_tokens_need_and_no_others() -> None:
    model = leaving()
    ids = model.generate(IDS[:1, :8], max_new_tokens=16, do_sample=False, pad_token_id=0)
    depths = exit_layers(model, ids[:, :-1])[0, 8:]
    calls = calls_of(model)
    again = model.generate(IDS[:1, :8], max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(again, ids)
    in_prefill = int(exit_layers(model, IDS[:1, :8]).max())
    del calls[-in_prefill:]
    assert len(calls) == in_prefill + int(depths.sum()) < 3 * 16


def test_the_head_learns_which_tokens_agree() -> None:
    torch.manual_seed(0)
    model = tiny(exit_weight=1.0, gate_weight=0.0, screening_weight=0.0, screening_rows=30)
    model.train()
    optimizer = torch.optim.Adam(model.model.exit_head.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = model(IDS, labels=IDS).exit_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_fitted_threshold_agrees_as_often_as_asked_and_lets_tokens_leave() -> None:
    model, batches = leaving(), [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]
    strict = fit_exit_threshold(model, batches, 0.9, progress=False)
    assert strict.agreement >= 0.9 and model.config.exit_threshold == strict.threshold
    lax = fit_exit_threshold(model, batches, 0.3, progress=False)
    assert 0.3 <= lax.agreement < 1 and lax.mean_depth < strict.mean_depth <= 3
    assert measure_exits(model, batches, progress=False) == lax
    assert lax.full_loss == strict.full_loss and lax.loss != lax.full_loss
    assert lax.tokens == 120 and lax.layers == 3


def test_agreement_is_what_is_counted_by_hand() -> None:
    model, given = leaving(), padded("right")
    batch = {"input_ids": given.ids, "attention_mask": given.mask}
    report = measure_exits(model, [batch], progress=False)
    early, depths = logits(model, **_as_call(batch)), exit_layers(model, **_as_call(batch))
    model.config.exit_threshold = None
    real = given.mask.bool()
    same = (early.argmax(-1) == logits(model, **_as_call(batch)).argmax(-1))[real]
    assert report.agreement == float(same.double().mean())
    assert report.mean_depth == float(depths[real].double().mean())


def _as_call(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model with an exit head"):
        fit_exit_threshold(tiny(exit_heads=False), [IDS])
    with pytest.raises(ValueError, match="at least one batch"):
        fit_exit_threshold(tiny(), [])
    with pytest.raises(ValueError, match="agreement in"):
        fit_exit_threshold(tiny(), [IDS], agreement=99)
