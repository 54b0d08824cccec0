"""What a token gives depends on its own text only, wherever that stands in a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gravity_hf.models.ngt import NGTForCausalLM

from .every_case import EVERY, any_model
from .ngt_cases import IDS, padded

CLOSE = {"atol": 3e-6, "rtol": 1e-5}


def logits(model: NGTForCausalLM, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", EVERY)
def test_padding_changes_nothing(name: str) -> None:
    model = any_model(name)
    plain = logits(model, input_ids=IDS)
    for side, real in (("left", slice(3, None)), ("right", slice(None, -3))):
        found = logits(model, **padded(side))
        torch.testing.assert_close(found[:, real], plain, **CLOSE, msg=side)
        assert found.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    """Told apart by positions that start again, with a mask of ones beside them or without."""
    model = any_model(name)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    inputs = {"input_ids": IDS, "position_ids": places.expand(2, -1)}
    apart = [logits(model, input_ids=ids) for ids in (IDS[:, :4], IDS[:, 4:])]
    for beside in ({}, {"attention_mask": torch.ones_like(IDS)}):
        found = logits(model, **inputs, **beside)
        torch.testing.assert_close(found, torch.cat(apart, 1), **CLOSE)


@pytest.mark.parametrize("name", EVERY)
def test_masks_of_four_dimensions_decide_alone(name: str) -> None:
    """As bool and as what is added to scores; all ones is a model that sees both ways."""
    model = any_model(name)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    added = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    plain = logits(model, input_ids=IDS)
    for mask in (causal, added):
        found = logits(model, input_ids=IDS, attention_mask=mask)
        torch.testing.assert_close(found, plain, **CLOSE)
    both_ways = logits(model, input_ids=IDS, attention_mask=torch.ones_like(causal))
    assert (both_ways - plain)[:, 0].abs().max() > 1e-4


@pytest.mark.parametrize("name", EVERY)
def test_rows_that_see_nothing_are_finite(name: str) -> None:
    model = any_model(name)
    nothing = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    for mask in (nothing, torch.zeros_like(IDS)):
        assert logits(model, input_ids=IDS, attention_mask=mask).isfinite().all()
    loss = model(IDS, labels=IDS, attention_mask=nothing).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
