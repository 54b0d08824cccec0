"""Published models compute here what they always did: outputs, what is inside, and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gravity_hf.models.ngt.coordinates import Geometry
from gravity_hf.models.visibility import Visibility

from .ngt_cases import CASES, ROWS, our_name, per_head, published, published_model

# Logits are about 50 in size: 1e-5 are two units in the last place.
CLOSE = {"atol": 1e-5, "rtol": 0.0}
OF_NGT = [case for case in CASES if case != "vanilla"]


def close(case: str, name: str, actual: Tensor) -> None:
    kind = "layer" if name.startswith("layer") else name
    expected = published(case).tensors[name]
    torch.testing.assert_close(actual[ROWS[kind]].float(), expected, **CLOSE, msg=name)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@torch.no_grad()
def test_logits_are_those_of_published_models(case: str, implementation: str) -> None:
    """Causal; with a mask that lets all see all; and of an input that is too long."""
    known, model = published(case), published_model(case, implementation=implementation)
    batch, length = known.tensors["ids"].shape
    everything = torch.ones(batch, 1, length, length, dtype=torch.bool)
    ids, own = known.tensors["ids"], dict(model.named_parameters())
    assert sum(x.numel() for x in own.values()) == known.parameters - model_lacks(case)
    close(case, "logits_causal", model(ids).logits)
    close(case, "logits_nomask", model(ids, attention_mask=everything).logits)
    long = model(known.tensors["long_ids"]).logits
    assert long.shape[1] == model.config.max_position_embeddings
    close(case, "logits_long", long)


def model_lacks(case: str) -> int:
    """Without a cutoff a published model has radii that nothing reads, one a layer."""
    return 3 if case == "no_cutoff" else 0


@pytest.mark.parametrize("case", OF_NGT)
@torch.no_grad()
def test_particles_move_as_in_published_models(case: str) -> None:
    """Coordinates, hidden states and masses of every layer."""
    known, model = published(case), published_model(case)
    asked: dict[str, Any] = {"output_hidden_states": True, "output_coordinates": True}
    output = model(known.tensors["ids"], **asked)
    close(case, "z_last", output.coordinates)
    close(case, "mass", output.masses.unsqueeze(-1))
    for layer in range(3):
        close(case, f"layer{layer}.z_out", output.layer_coordinates[layer + 1])
        if layer < 2:
            close(case, f"layer{layer}.h_out", output.hidden_states[layer + 1])


@pytest.mark.parametrize("case", ["default", "no_cutoff", "soft_cutoff", "w3_best"])
@torch.no_grad()
def test_one_attention_is_that_of_published_models(case: str) -> None:
    """Weights and output, and the output where nothing has a mass and all see all."""
    known, attention = published(case).tensors, published_model(case).model.layers[1].attn
    hidden, z = (known[f"attn1.in_{name}"][None] for name in "hz")
    mass = known["attn1.in_mass"].view(1, -1)
    geometry = Geometry(z, None, mass, None, None, implementation="auto")
    output, weights = attention(hidden, geometry, Visibility(causal=True), output_attentions=True)
    torch.testing.assert_close(weights[0, :, -2:], known["attn1.weights"], **CLOSE)
    torch.testing.assert_close(output[0, -3:], known["attn1.out_h"], **CLOSE)
    plain = attention(hidden, geometry._replace(masses=None), Visibility()).output
    torch.testing.assert_close(plain[0, -3:], known["attn1.nomass_nomask.out_h"], **CLOSE)


def test_gradients_are_those_of_published_models(case: str) -> None:
    """A published hard cutoff gives nobody a gradient; ours fades with its width."""
    settings = {} if case == "vanilla" else {"cutoff_width": 1e-6}
    known, model = published(case), published_model(case, **settings)
    ids = known.tensors["ids"]
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, known.tensors["loss.ce"].squeeze(), atol=1e-5, rtol=0.0)
    loss.backward()
    own = {name: weight.grad for name, weight in model.named_parameters()}
    checked = [name for name in known.tensors if name.startswith("grad_ce.")]
    for name in checked:
        expected = per_head(name, known.tensors[name])
        actual = own[our_name(name.removeprefix("grad_ce."))]
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-4, msg=name)
    assert len(checked) > 5


def test_double_precision_agrees() -> None:
    """What differs is the published models' own rounding."""
    known, model = published("w3_best"), published_model("w3_best").double()
    output = model(known.tensors["ids"], output_coordinates=True)
    assert output.logits.dtype == output.coordinates.dtype == torch.float64
    close("w3_best", "logits_causal", output.logits)
