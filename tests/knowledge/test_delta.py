"""Factor pairs: their algebra, what they refuse, and which maps of a model they are for."""

from __future__ import annotations

import pytest
import torch
from hosts import tiny_host
from torch import nn

from gravity_hf.knowledge.delta import LowRankDelta, in_out_features, target_modules
from gravity_hf.knowledge.errors import (
    IncompatibleBaseError,
    UnknownKeyError,
    UnsafeFileError,
    ValidationError,
)
from gravity_hf.knowledge.targets import base_model, decoder_layers
from gravity_hf.layers.low_rank import LowRankLinear


def test_norm_is_that_of_the_dense_updates(llama, random_delta):
    delta = random_delta(llama, 1, rank=3)
    dense = torch.cat([delta.update(name).flatten() for name in delta.factors])
    assert delta.norm() == pytest.approx(float(dense.norm()), rel=1e-5)


def test_sum_does_what_all_do_together(llama, random_delta):
    deltas = [random_delta(llama, seed, rank=rank) for seed, rank in ((1, 1), (2, 3))]
    total = LowRankDelta.sum(deltas)
    for name in total.factors:
        assert total.rank(name) == 4
        expected = sum(delta.update(name) for delta in deltas)
        torch.testing.assert_close(total.update(name), expected)


def test_sum_of_deltas_on_different_maps(llama, random_delta):
    first, second = (random_delta(llama, 0, layers=[i]) for i in (0, 1))
    total = LowRankDelta.sum([second, first])
    assert list(total.factors) == sorted([*first.factors, *second.factors])


def test_scaled_scales_updates_and_counts_count(llama, random_delta):
    delta = random_delta(llama, 1, rank=2)
    for name in delta.factors:
        torch.testing.assert_close(delta.scaled(0.5).update(name), delta.update(name) / 2)
    assert delta.parameters() == 2 * 2 * (64 + 32)
    assert delta.nbytes() == 4 * delta.parameters()
    assert delta.to(dtype=torch.bfloat16).nbytes() == 2 * delta.parameters()


def test_tensors_give_the_same_bits_back(llama, random_delta):
    delta = random_delta(llama, 1, rank=2)
    again = LowRankDelta.from_tensors(delta.to_tensors())
    assert list(again.factors) == list(delta.factors)
    for name, pair in delta.factors.items():
        assert all(map(torch.equal, pair, again.factors[name]))


@pytest.mark.parametrize(
    ("A", "B"),
    [
        (torch.zeros(2, 4), torch.zeros(5, 3)),
        (torch.zeros(0, 4), torch.zeros(5, 0)),
        (torch.zeros(4), torch.zeros(5, 1)),
        (torch.zeros(1, 4), torch.zeros(5, 1, dtype=torch.bfloat16)),
        (torch.zeros(1, 4, dtype=torch.int8), torch.zeros(5, 1, dtype=torch.int8)),
    ],
    ids=["ranks", "rank 0", "vector", "dtypes", "integers"],
)
def test_factors_that_do_not_fit_are_refused(A, B):
    with pytest.raises(ValidationError, match="some.map"):
        LowRankDelta({"some.map": (A, B)})


def test_no_factors_and_foreign_tensors_are_refused():
    with pytest.raises(ValidationError, match="at least one"):
        LowRankDelta({})
    with pytest.raises(UnsafeFileError, match="missing"):
        LowRankDelta.from_tensors({"a.lora_A": torch.zeros(1, 2)})
    with pytest.raises(UnsafeFileError, match="'bias' alone"):
        LowRankDelta.from_tensors({"bias": torch.zeros(1, 2)})


def test_check_names_what_does_not_fit(llama, gpt2, random_delta):
    delta = random_delta(llama, 1)
    delta.check(llama)
    with pytest.raises(IncompatibleBaseError, match=r"down_proj in GPT2LMHeadModel, got none"):
        delta.check(gpt2)
    wide = LowRankDelta({next(iter(delta.factors)): (torch.zeros(1, 65), torch.zeros(32, 1))})
    with pytest.raises(IncompatibleBaseError, match="expected 64 features in and 32 out, got 65"):
        wide.check(llama)
    with pytest.raises(IncompatibleBaseError, match="another module"):
        LowRankDelta({"model.layers.0": (torch.zeros(1, 32), torch.zeros(32, 1))}).check(llama)
    for value in (torch.nan, torch.inf):
        broken = delta.scaled(1.0)
        next(iter(broken.factors.values()))[1][0, 0] = value
        with pytest.raises(UnsafeFileError, match="finite numbers in B"):
            broken.check(llama)


@pytest.mark.parametrize(
    ("family", "last"),
    [
        ("llama", "mlp.down_proj"),
        ("qwen3", "mlp.down_proj"),
        ("gpt2", "mlp.c_proj"),
        ("gpt_neox", "mlp.dense_4h_to_h"),
        ("phi3", "mlp.down_proj"),
    ],
)
def test_targets_are_the_way_back_of_the_feed_forward(family, last):
    model = tiny_host(family)
    names = target_modules(model)
    assert len(names) == 3 and all(name.endswith(last) for name in names)
    sizes = {in_out_features(model.get_submodule(name)) for name in names}
    assert len(sizes) == 1 and next(iter(sizes))[0] > next(iter(sizes))[1] == 48


def test_targets_of_patched_and_wrapped_models_have_the_names_of_the_base(llama, gravity_llama):
    peft = pytest.importorskip("peft")
    names = target_modules(llama)
    assert target_modules(gravity_llama) == names
    model = tiny_host("llama")
    plain = target_modules(model, "all", ("down_proj", "q_proj"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert target_modules(wrapped, "all", ("down_proj", "q_proj")) == plain
    assert base_model(wrapped) is model
    assert in_out_features(model.get_submodule(plain[-1])) == (64, 48)


def test_layers_are_chosen_by_word_or_number():
    model = tiny_host("llama", num_hidden_layers=12)
    assert len(decoder_layers(model)) == 12

    def layers(which):
        return [int(name.split(".")[2]) for name in target_modules(model, which)]

    assert layers("middle") == [4, 5, 6, 7, 8]
    assert layers("third") == [2, 3, 4, 5, 6]
    assert layers("all") == list(range(12))
    assert layers([11, 0]) == [0, 11]
    for wrong in ([12], [-1], [], "centre", [True]):
        with pytest.raises(ValidationError, match="numbers from 0 to 11"):
            layers(wrong)


def test_targets_that_are_missing_are_named_with_what_there_is(llama):
    with pytest.raises(ValidationError, match="sequence of names"):
        target_modules(llama, targets="down_proj")
    model = tiny_host("llama", intermediate_size=48)  # nothing leads from more features to fewer
    with pytest.raises(ValidationError, match=r"fc9 in .* found down_proj, gate_proj, k_proj"):
        target_modules(model, targets=("fc9",))
    with pytest.raises(IncompatibleBaseError, match="list of layers"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_experts_are_no_targets():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 4) for _ in range(9)])
            self.shared_expert = nn.ModuleDict({"down_proj": nn.Linear(8, 4)})

    model = nn.Module()
    model.layers = nn.ModuleList([Block() for _ in range(2)])
    assert decoder_layers(model) == ["layers.0", "layers.1"]
    assert target_modules(model) == [f"layers.{i}.shared_expert.down_proj" for i in range(2)]


def test_maps_in_two_factors_are_linear_maps():
    assert in_out_features(LowRankLinear(7, 5, rank=2)) == (7, 5)
    for module in (nn.Bilinear(2, 3, 4), nn.LayerNorm(4), nn.Embedding(4, 2)):
        with pytest.raises(ValidationError, match=type(module).__name__):
            in_out_features(module)


def test_message_of_a_key_error_is_plain_text():
    error = UnknownKeyError("no key 'a'\nsee keys()")
    assert str(error) == "no key 'a'\nsee keys()" and isinstance(error, KeyError)
