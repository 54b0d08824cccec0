"""Every option of an NGT changes what it says: its weights, and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gravity_hf.models.ngt import NGTModel

from .ngt_cases import IDS, tiny

_LAYER = "layers.0."
_BIAS = "attn.gravity.bias"

# Preset, option, and the weights that come and go with it: of the model, or of the first layer.
SWITCHES: list[tuple[str, dict[str, Any], set[str], set[str]]] = [
    ("v2", {"softening": 0.5}, set(), set()),
    ("v2", {"learn_softening": False}, set(), {"attn.gravity.softening_log"}),
    ("v2", {"initial_strength": 1.0}, set(), set()),
    ("v2", {"token_masses": False}, set(), {"mass_emb.weight", "attn.gravity.mass_exponent"}),
    ("v2", {"mass_in_value": True}, set(), {"attn.gravity.mass_exponent"}),
    ("v2", {"mass_exponent": False}, set(), {"attn.gravity.mass_exponent"}),
    ("v2", {"exclude_self": False}, set(), set()),
    ("v2", {"coordinate_positions": "learned"}, {"coord_emb.weight"}, set()),
    ("v2", {"coordinate_positions": "learned_sinusoidal"}, {"coord_emb.weight"}, set()),
    ("v2", {"position_base": 1e4}, set(), set()),
    ("v2", {"content_coordinates": False}, set(), {"content.weight"}),
    ("v2", {"anchor_coordinates": True}, {"attn.anchor_proj.weight"}, set()),
    ("v2", {"hidden_head_coordinates": False}, set(), {"attn.hidden_coord_proj.weight"}),
    ("v2", {"asymmetric": False}, set(), set()),
    ("v2", {"symmetric_heads": 0}, set(), set()),
    ("v2", {"mass_fading": 0.0}, set(), {"attn.gravity.fading"}),
    ("v2", {"coordinate_source": "hidden"}, {"coord_proj_hidden.weight"}, set()),
    ("v2", {"coordinate_source": "pre_attention"}, set(), set()),
    (
        "v2",
        {"coordinate_source": "none"},
        set(),
        {
            *("coord_proj_next.weight", "coord_proj_next.bias"),
            *("coord_norm.weight", "coord_norm.bias"),
        },
    ),
    ("v2", {"cutoff": "hard", "initial_radius": 1.0}, {"attn.gravity.radius"}, set()),
    ("v2", {"cutoff": "log"}, {"attn.gravity.radius"}, set()),
    ("v2", {"head_coord_dim": 8}, set(), set()),
    (
        "fixed",
        {"law": "power", "repulsive": False, "head_bias": False},
        set(),
        {"attn.gravity.bias"},
    ),
    ("fixed", {"repulsive": False}, set(), set()),
    ("fixed", {"head_bias": False}, set(), {_BIAS}),
    ("fixed", {"learn_softening": True, "softening": 0.1}, {"attn.gravity.softening_log"}, set()),
    ("fixed", {"cutoff": "none"}, set(), {"attn.gravity.radius"}),
    ("fixed", {"cutoff": "soft"}, set(), set()),
]


def weights(model: Any) -> dict[str, torch.Size]:
    """Of the model itself and its first layer, by name."""
    own = {n: x.shape for n, x in model.named_parameters() if not n.startswith("layers.")}
    first = {n: x.shape for n, x in model.named_parameters() if n.startswith(_LAYER)}
    return own | {n.removeprefix(_LAYER): x for n, x in first.items()}


@pytest.mark.parametrize(
    "preset, settings, more, fewer", SWITCHES, ids=[f"{p}-{next(iter(s))}" for p, s, *_ in SWITCHES]
)
@torch.no_grad()
def test_an_option_changes_what_it_says(
    preset: str, settings: dict[str, Any], more: set[str], fewer: set[str]
) -> None:
    plain, switched = tiny(NGTModel, preset), tiny(NGTModel, preset, **settings)
    before, after = weights(plain), weights(switched)
    assert after.keys() - before.keys() == more and before.keys() - after.keys() == fewer
    # The same weights wherever both have them, and constants that moved from their start.
    generator = torch.Generator().manual_seed(5)
    drawn = {
        n: 0.5 * torch.randn(x.shape, generator=generator)
        for n, x in plain.named_parameters()
        if any(part in n for part in ("coord", "anchor", "_emb", "out_proj"))
    }
    for model in (plain, switched):
        for name, weight in model.named_parameters():
            if name in drawn and drawn[name].shape == weight.shape:
                weight.copy_(drawn[name])
            if "gravity" in name:
                weight.add_(1.0)
    assert (plain(IDS)[0] - switched(IDS)[0]).abs().max() > 1e-4


@torch.no_grad()
def test_published_arithmetic_is_recorded_and_changes_nothing() -> None:
    plain, recorded = tiny(NGTModel, "reference"), tiny(NGTModel, "reference", use_rsqrt=True)
    assert recorded.config.use_rsqrt and torch.equal(plain(IDS)[0], recorded(IDS)[0])


@torch.no_grad()
def test_new_token_types_have_the_mass_of_one() -> None:
    model = tiny()
    before = model(IDS).logits
    model.resize_token_embeddings(53, mean_resizing=False)
    masses = F.softplus(model.model.mass_emb.weight)
    assert masses.shape == (53, 1) and model.lm_head.bias.shape == (53,)
    torch.testing.assert_close(masses[50:], torch.ones(3, 1))
    torch.testing.assert_close(model(IDS).logits[..., :50], before)
    model.resize_token_embeddings(48)
    assert model.model.mass_emb.weight.shape == (48, 1)
    assert model.lm_head.weight is model.model.token_emb.weight
    # A model without masses, and a twin, have nothing more to resize.
    for other in (tiny(token_masses=False), tiny(attention="dot_product")):
        other.resize_token_embeddings(53, mean_resizing=False)
        assert other(IDS).logits.shape[-1] == 53


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "alibi", "none"])
@torch.no_grad()
def test_positions_of_a_twin(positions: str) -> None:
    """Without any, a row does not know the order of what stands before its last token."""
    twin = tiny(NGTModel, attention="dot_product", positions=positions)
    swapped = IDS[:, [1, 0, *range(2, 9)]]
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    moved = (twin(IDS)[0] - twin(swapped)[0])[:, 8].abs().max()
    one_layer = tiny(NGTModel, attention="dot_product", positions=positions, num_hidden_layers=1)
    first = (one_layer(IDS)[0] - one_layer(swapped)[0])[:, 8].abs().max()
    assert (first < 1e-5) == (positions == "none") and moved > 1e-5
    assert twin(IDS, attention_mask=mask)[0].isfinite().all()
    assert (twin.pos_emb is not None) == (positions == "learned")


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="as all layers share the masses"):
        tiny().gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "expected exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(2, 3)}, "input_ids: expected integers .* got torch.float32"),
        ({"inputs_embeds": torch.ones(2, 3, 31)}, r"expected \[B, T, 32\], got \(2, 3, 31\)"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 10)},
            "attention_mask: expected 9 keys in its last dimension, got 10",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(NGTModel)(**inputs)
