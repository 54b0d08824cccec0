"""What the published models were tested for holds of ours, loaded from published files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gravity_hf.models.ngt import NGTForCausalLM
from gravity_hf.models.ngt.convert_ngt import convert_reference_state_dict
from gravity_hf.training.repulsion import repulsion_loss

from .ngt_cases import tiny
from .published_files import BLOCK, outputs, state

SIZE = 39
PROMPT = outputs()["prompt"]
IDS = torch.arange(2 * BLOCK).view(2, BLOCK) * 5 % SIZE


def loaded(kind: str, **settings: Any) -> NGTForCausalLM:
    return convert_reference_state_dict(state(kind), num_heads=2, **settings)


@pytest.fixture(params=["ngt", "vanilla"])
def model(request: pytest.FixtureRequest) -> NGTForCausalLM:
    return loaded(request.param)


def everything(length: int) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool)


@pytest.mark.parametrize("shape", [(2, BLOCK), (1, BLOCK), (2, 1), (1, 1)])
def test_forward_shapes(model: NGTForCausalLM, shape: tuple[int, int]) -> None:
    """Batches and sequences of one, too."""
    ids = IDS[: shape[0], : shape[1]]
    asked = {} if model.config.is_twin else {"output_coordinates": True}
    output = model(ids, **asked)
    assert output.logits.shape == (*shape, SIZE) and output.logits.isfinite().all()
    if asked:
        assert output.coordinates.shape == (*shape, 6) and output.masses.shape == shape
        assert (output.masses > 0).all()


def test_causal_mask_is_the_default_and_a_full_one_is_not(model: NGTForCausalLM) -> None:
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SIZE
    tril = everything(BLOCK).tril()
    assert torch.equal(model(IDS).logits[:, :-1], model(changed).logits[:, :-1])
    torch.testing.assert_close(
        model(IDS, attention_mask=tril).logits, model(IDS).logits, atol=1e-5, rtol=0.0
    )
    seen = [model(x, attention_mask=everything(BLOCK)).logits[:, :-1] for x in (IDS, changed)]
    assert not torch.allclose(*seen, atol=1e-3)


def test_masked_keys_have_no_influence(model: NGTForCausalLM) -> None:
    """A mask with holes in it, in rows that see others."""
    mask = everything(BLOCK).tril()
    mask[..., 4] = False
    mask[..., 4, 4] = True
    changed = IDS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % SIZE
    others = [i for i in range(BLOCK) if i != 4]
    before, after = (model(x, attention_mask=mask).logits[:, others] for x in (IDS, changed))
    assert torch.equal(before, after)


def test_weights_of_hidden_and_far_tokens_are_0() -> None:
    """Those of each row sum to 1, whatever the mask and the radius leave of it."""
    model = loaded("ngt")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attn.gravity.radius.fill_(1.0)
    for weights in model(IDS, output_attentions=True).attentions:
        assert (weights.triu(1) == 0).all() and (weights.tril(-1) == 0).any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


SWITCHES: dict[str, dict[str, Any]] = {
    "mass_in_value": {"mass_in_value": True},
    "no_cutoff": {"use_radius_cutoff": False},
    "soft_cutoff": {"use_soft_cutoff": True},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_change_what_is_computed(name: str) -> None:
    with torch.no_grad():
        plain, switched = loaded("ngt"), loaded("ngt", **SWITCHES[name])
        for one in (plain, switched):
            for layer in one.model.layers:
                if one.config.cutoff != "none":
                    layer.attn.gravity.radius.fill_(2.0)
        assert (plain(IDS).logits - switched(IDS).logits).abs().max() > 1e-3
        assert switched(IDS).logits.isfinite().all()


def test_reciprocal_root_changes_nothing_but_the_record() -> None:
    model = loaded("ngt", use_rsqrt=True)
    assert model.config.use_rsqrt
    assert torch.equal(model(IDS).logits, loaded("ngt")(IDS).logits)


def test_masses_may_be_left_out() -> None:
    """A model without masses is one whose masses are 1."""
    plain = tiny(preset="reference", token_masses=False, vocab_size=SIZE)
    with_masses = tiny(preset="reference", vocab_size=SIZE)
    weights = {**with_masses.state_dict(), **plain.state_dict()}
    weights["model.mass_emb.weight"] = torch.full((SIZE, 1), 0.5413248546129181)
    with_masses.load_state_dict(weights)
    torch.testing.assert_close(plain(IDS).logits, with_masses(IDS).logits, atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient(model: NGTForCausalLM) -> None:
    """The radius, too, which has none as published; through the last coordinates, which nothing
    else reads, by repulsion."""
    model.train()
    twin = model.config.is_twin
    output = model(IDS, labels=IDS, **({} if twin else {"output_coordinates": True}))
    loss = output.loss
    if not twin:
        loss = loss + 0.05 * repulsion_loss(output.coordinates, output.masses)
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.any(), name
    assert twin == (not any(name.endswith("radius") for name, _ in model.named_parameters()))


def test_long_inputs_are_cropped_in_evaluation_and_refused_in_training(
    model: NGTForCausalLM,
) -> None:
    long = torch.arange(2 * BLOCK).view(1, -1) * 7 % SIZE
    assert torch.equal(model(long).logits, model(long[:, -BLOCK:]).logits)
    with pytest.raises(ValueError, match=str(BLOCK)):
        model.train()(long)


def test_head_and_embedding_are_one_tensor(model: NGTForCausalLM) -> None:
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.bias is not None


def test_bias_of_gravity_reaches_the_scores() -> None:
    model = loaded("ngt")
    before = model(IDS).logits
    with torch.no_grad():
        model.model.layers[0].attn.gravity.bias += 2.0
    assert (model(IDS).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["gravity", "dot_product"])
def test_vocabulary_of_gpt2_fits(attention: str) -> None:
    model = tiny(preset="reference", attention=attention, vocab_size=50257, hidden_size=8)
    ids = torch.tensor([[0, 50256, 198]])
    assert model(ids).logits.shape == (1, 3, 50257)


@pytest.mark.parametrize("spread", [0.0, 1e-8, 1.0, 1e6])
def test_repulsion_of_coordinates_is_finite(spread: float) -> None:
    """Where all are at one place, too."""
    torch.manual_seed(0)
    coordinates = (spread * torch.randn(2, 8, 6)).requires_grad_()
    loss = repulsion_loss(coordinates, torch.ones(2, 8))
    loss.backward()
    assert 0.0 <= loss <= 1e6 * (1 + 1e-6)
    assert coordinates.grad.isfinite().all()


def test_outputs_have_names_and_only_what_is_asked_for() -> None:
    output = loaded("ngt")(PROMPT)
    assert output.coordinates is None and output.masses is None and output.attentions is None
    assert torch.equal(output.logits, output[0])
