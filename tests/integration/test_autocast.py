"""Patched models under autocast, which is what Trainer's bf16=True is."""

from __future__ import annotations

import pytest
import torch
from hosts import DECODERS, tiny_host, tiny_inputs

from gravity_hf import GravityConfig, calibrate, patch_with_gravity


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("family", DECODERS)
def test_float32_weights_train_under_bfloat16_autocast(family, implementation):
    """Rotary embedding leaves q and k in float32 beside a bfloat16 v: once an error."""
    model = patch_with_gravity(tiny_host(family), GravityConfig(implementation=implementation))
    inputs = tiny_inputs(family)
    calibrate(model, [inputs])
    with torch.no_grad():
        exact = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    # bfloat16 keeps 8 bits: the projections round, the distances must not add to it much.
    scale = exact.abs().max()
    assert (output.logits.float() - exact).abs().max() < 0.1 * scale
    for name, parameter in model.named_parameters():
        if ".gravity." in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
