"""Losses of single windows are the model's own, in float32; errors are those of paired windows."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in ("window_losses", "paired_changes"):
        sys.modules.pop(name, None)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5)).eval()


IDS = torch.randint(0, 96, (3, 37), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1024, 7])
def test_every_window_has_the_models_own_loss(model, rows):
    from window_losses import window_losses

    found = window_losses(model, [IDS[:2], IDS[2:]], rows)
    with torch.no_grad():
        own = [model(ids[None], labels=ids[None]).loss.item() for ids in IDS]
    assert found == pytest.approx(own, rel=1e-5)


def test_logits_of_a_narrow_model_are_products_in_float32(model):
    from window_losses import wide_head, window_losses

    narrow = model.to(torch.bfloat16)
    with torch.no_grad():
        states = narrow.model(IDS).last_hidden_state.float()
    logits = states @ narrow.lm_head.weight.float().T
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    found = statistics.fmean(window_losses(narrow, [IDS]))
    assert found == pytest.approx(wanted.item(), rel=1e-6)
    own = narrow(IDS, labels=IDS).loss.item()
    assert abs(own - wanted.item()) > 10 * abs(found - wanted.item())
    with wide_head(narrow):
        assert narrow(IDS).logits.dtype == torch.float32
    assert narrow(IDS).logits.dtype == torch.bfloat16


def test_a_model_that_scales_its_logits_is_refused():
    from window_losses import window_losses

    config = CohereConfig(**SIZES, logit_scale=0.25, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    with pytest.raises(ValueError, match="CohereForCausalLM, which scales or caps them"):
        window_losses(CohereForCausalLM(config), [IDS])


def test_changes_are_those_of_the_same_windows():
    from paired_changes import paired

    control = [1.0, 5.0, 3.0]
    found = paired([1.1, 5.1, 3.4], control)
    assert found["change"] == pytest.approx(0.2)
    # Far less than the windows themselves differ.
    assert found["change_error"] == pytest.approx(0.1)
    assert paired([2.0], [1.0]) == {"change": 1.0, "change_error": None}


def test_more_windows_make_the_error_smaller_and_the_same_ones_do_not():
    from paired_changes import paired, pooled_error

    parts = [([1.0, 1.2, 0.8, 1.1], [0.0] * 4), ([1.0, 1.3, 0.8, 1.0], [0.0] * 4)]
    errors = [paired(*part)["change_error"] for part in parts]
    assert pooled_error(errors, apart=False) == pytest.approx(
        statistics.fmean(e**2 for e in errors) ** 0.5
    )
    # As of all eight at once, but for one mean of each part.
    whole = paired(parts[0][0] + parts[1][0], [0.0] * 8)["change_error"]
    assert pooled_error(errors, apart=True) == pytest.approx(whole, rel=0.1)
    assert pooled_error([0.1, None], apart=True) is None
    assert pooled_error([], apart=True) is None
