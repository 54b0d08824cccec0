"""The sweep's inputs: what they reach, what is compared, what is sent backwards."""

from __future__ import annotations

import pytest
import torch
from hosts import tiny_host
from integration.sweep.configs import tiny_model
from integration.sweep.inputs import (
    NoInputs,
    count_reached,
    gradient_target,
    main_output,
    tiny_inputs_of,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from gravity_hf.integration.sites import find_attention_sites

EVERY_TOWER = [
    *("llama", "bert", "bart", "whisper", "clip", "qwen2_vl", "blip-2", "idefics3", "vit"),
    *("aria", "llava_next", "mistral3", "mllama", "vipllava", "voxtral"),
]


@pytest.mark.parametrize("model_type", EVERY_TOWER)
def test_every_routed_module_is_reached(model_type: str) -> None:
    model = tiny_model(model_type)
    assert count_reached(model, tiny_inputs_of(model)) == len(find_attention_sites(model))


@pytest.mark.parametrize(("family", "hidden"), [("llama", [0, 1]), ("bert", [7, 8])])
def test_decoders_are_padded_on_the_left_and_encoders_on_the_right(
    family: str, hidden: list[int]
) -> None:
    mask = tiny_inputs_of(tiny_host(family))["attention_mask"]
    assert mask[0].all()
    assert (mask[1] == 0).nonzero().flatten().tolist() == hidden


def test_one_seed_gives_the_same_inputs_again_and_another_gives_others() -> None:
    model = tiny_host("llama")
    first, again, other = (tiny_inputs_of(model, seed)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_placeholders_are_as_many_as_the_rows_of_the_picture() -> None:
    model = tiny_model("qwen2_vl")
    inputs = tiny_inputs_of(model)
    merge = model.config.vision_config.spatial_merge_size
    rows = inputs["image_grid_thw"].prod(-1) // merge**2
    assert (inputs["input_ids"] == model.config.image_token_id).sum(-1).tolist() == rows.tolist()


class _Asks(PreTrainedModel):
    """A host with an input that nobody has heard of."""

    _supports_sdpa = True

    def forward(self, incantation: Tensor) -> Tensor:
        return incantation


def test_an_unknown_required_input_is_named() -> None:
    model = _Asks(tiny_host("vit").config)
    with pytest.raises(NoInputs, match="requires incantation"):
        tiny_inputs_of(model)


def test_what_the_mask_hides_is_not_compared() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    output = BaseModelOutput(last_hidden_state=torch.ones(2, 3, 4))
    found = main_output(output, {"attention_mask": mask})
    assert found[0].eq(1).all()
    assert found[1].sum(-1).tolist() == [0, 4, 4]


def test_hidden_states_of_every_part_are_compared() -> None:
    model = tiny_model("clip")
    output = model(**tiny_inputs_of(model))
    parts = (output.text_model_output, output.vision_model_output)
    width = sum(part.last_hidden_state[0].numel() for part in parts)
    assert main_output(output).shape == (2, width)


def test_a_score_that_a_head_rules_out_is_no_number() -> None:
    logits = torch.tensor([[[1.0, float("-inf")]]])
    assert main_output(CausalLMOutput(logits=logits)).tolist() == [[[1.0, 0.0]]]


def test_normalised_states_send_a_gradient_back() -> None:
    """The plain sum of squares of a layer norm's output is a constant."""
    state = torch.randn(2, 5, 8, requires_grad=True)
    normed = nn.functional.layer_norm(state, (8,))
    gradient_target(BaseModelOutput(last_hidden_state=normed)).backward()
    assert state.grad is not None
    assert state.grad.abs().mean() > 1e-2
