"""Vectors of texts: their own alone, of content tokens, from the first layers."""

from __future__ import annotations

import pytest
import torch
from knowledge.conftest import make_llama

from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.embeddings import HiddenStates, layer_number, untrained_copy
from gravity_hf.knowledge.errors import KnowledgeError, ValidationError
from gravity_hf.knowledge.fact_tokens import prompt_ids
from gravity_hf.knowledge.first_layers import FirstLayers, hidden_state


@pytest.mark.parametrize("host", ["llama", "gpt2", "gravity_llama"])
@pytest.mark.parametrize("pooling", ["content", "all", "last"])
def test_a_vector_depends_on_its_text_alone(host, pooling, tokenizer, request, prompts):
    states = HiddenStates(request.getfixturevalue(host), tokenizer, layer=1, pooling=pooling)
    texts = [*prompts[:6], "A much longer text that would pad all others on the left"]
    together = states(texts)
    for row, text in zip(together, texts, strict=True):
        assert torch.equal(row, states([text])[0])
    assert together.dtype == torch.float32


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_all_pooling_is_the_mean_of_the_models_own_hidden_states(layer, llama, tokenizer):
    text = "The symbol of gold is"
    ids = torch.tensor([prompt_ids(tokenizer, text)])
    with torch.no_grad():
        whole = llama(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
    found = HiddenStates(llama, tokenizer, layer=layer, pooling="all")([text])[0]
    assert torch.equal(found, whole.mean(0))


def test_content_leaves_out_punctuation_and_special_tokens(llama, tokenizer):
    states = HiddenStates(llama, tokenizer, layer=0)
    plain = states(["gold"])
    # At layer 0 no token sees another: what is left out leaves no trace.
    assert torch.equal(states(["<s>gold...!?"]), plain)
    assert not torch.equal(HiddenStates(llama, tokenizer, layer=0, pooling="all")(["gold!"]), plain)
    # Where nothing has content, everything counts.
    assert states(["!?"]).isfinite().all()


def test_tokens_of_enormous_norm_are_left_out_of_the_mean(llama, tokenizer):
    states = HiddenStates(llama, tokenizer, layer=1)
    ids = prompt_ids(tokenizer, "goldtin")
    rows = torch.ones(len(ids), 32)
    assert states._pooled(ids, rows).all()
    rows[0] *= 50
    assert states._pooled(ids, rows).tolist() == [False] + [True] * (len(ids) - 1)


def test_an_empty_text_has_a_vector(llama, tokenizer):
    assert HiddenStates(llama, tokenizer)(["", "  "]).isfinite().all()
    assert HiddenStates(llama, tokenizer)([]).shape == (0, 32)


def test_of_a_long_text_the_last_tokens_are_read(llama, tokenizer):
    states = HiddenStates(llama, tokenizer, max_tokens=4)
    end = tokenizer.decode(prompt_ids(tokenizer, "one gold two tin")[-4:])
    assert torch.equal(states(["one gold two tin"]), states([end]))


def test_deltas_active_in_a_bank_do_not_reach_it(llama, tokenizer, random_delta):
    bank = DeltaBank(llama)
    bank.add("a", random_delta(llama, 0, scale=3.0))
    states = HiddenStates(llama, tokenizer, layer=2)
    before = states(["gold"])
    with bank.routed([["a"]]):
        assert torch.equal(states(["gold"]), before)
        ids = torch.tensor([prompt_ids(tokenizer, "gold")])
        assert not torch.equal(hidden_state(llama.model, ids, 2).mean(0), before[0])


def test_training_mode_is_left_as_it_was_and_does_not_matter(tokenizer):
    model = make_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = HiddenStates(model, tokenizer, layer=2)
    assert torch.equal(states(["gold"]), states(["gold"]))
    assert [module.training for module in model.modules()] == modes


def test_the_first_layers_give_the_bits_of_all_and_leave_the_model_whole(tokenizer):
    model = make_llama(num_hidden_layers=5)
    names = [name for name, _ in model.named_modules()]
    ids = torch.tensor([prompt_ids(tokenizer, "The capital of France is")])
    with torch.no_grad():
        whole = [x[0] for x in model(input_ids=ids, output_hidden_states=True).hidden_states]
        for layer in range(6):
            part = FirstLayers(model, layer, ids[:, :2])
            ran = []
            hooks = [
                block.register_forward_hook(lambda *_, i=i, ran=ran: ran.append(i))
                for i, block in enumerate(model.model.layers)
            ]
            assert torch.equal(part(ids), whole[layer])
            assert ran == list(range(min(layer + 1, 5)))
            for hook in hooks:
                hook.remove()
        again = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(model.model.layers) == 5
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(a[0], b) for a, b in zip(again, whole, strict=True))


def test_a_model_that_cannot_be_cut_is_run_whole(tokenizer, monkeypatch):
    model = make_llama(num_hidden_layers=4)
    ids = torch.tensor([prompt_ids(tokenizer, "gold")])
    expected = hidden_state(model.model, ids, 1)
    inner = type(model.model).forward

    def picky(self, *args, **kwargs):
        if len(self.layers) != 4:
            raise IndexError("all layers, please")
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", picky)
    assert torch.equal(FirstLayers(model, 1, ids)(ids), expected)


def test_a_model_without_hidden_states_is_named(tokenizer, llama):
    class Silent(torch.nn.Module):
        def forward(self, **_):
            return type("Output", (), {"hidden_states": None})

    with pytest.raises(KnowledgeError, match="Silent"):
        hidden_state(Silent(), torch.tensor([[1]]), 1)


def test_layers_have_names_and_numbers(llama):
    model = make_llama(num_hidden_layers=8, intermediate_size=16)
    assert [layer_number(model, x) for x in ("quarter", "mid", "last", 3, "5")] == [2, 4, 8, 3, 5]
    for wrong in ("9", -1, "middle", 9):
        with pytest.raises(ValidationError, match="from 0 to 8"):
            layer_number(model, wrong)
    with pytest.raises(ValidationError, match="content, all, last"):
        HiddenStates(llama, None, pooling="max")


@pytest.mark.parametrize("host", ["llama", "gpt2", "gravity_llama"])
def test_the_untrained_copy_is_the_same_class_with_other_weights(host, request):
    model = request.getfixturevalue(host)
    state = torch.random.get_rng_state()
    fresh = untrained_copy(model, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(fresh) is type(model)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in fresh.state_dict().items()} == shapes
    mine, theirs = fresh.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert not torch.equal(mine, theirs)
    again = untrained_copy(model, seed=3).get_input_embeddings().weight
    assert torch.equal(again, mine)
