"""The registry: who may join, why not, and that what it counts is what is taken."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from gravity_hf.knowledge.delta import LowRankDelta, target_modules
from gravity_hf.knowledge.errors import (
    CapacityError,
    DuplicateKeyError,
    IncompatibleBaseError,
    InterferenceError,
    UnknownKeyError,
    ValidationError,
)
from gravity_hf.knowledge.moments import prompt_moments
from gravity_hf.knowledge.registry import Registry
from gravity_hf.knowledge.subspaces import angle_score

IN, OUT = 64, 32
LOOSE = {"leakage_max": 1e9, "generic_max": 1e9}


@pytest.fixture(scope="module")
def names(llama) -> list[str]:
    return target_modules(llama, "all")


def axes(names: list[str], *into: int, out: tuple[int, ...] | None = None) -> LowRankDelta:
    """One row for each input axis; writes the output axes `out`."""
    out = out or tuple(range(len(into)))
    pair = (torch.eye(IN)[list(into)], torch.eye(OUT)[:, list(out)])
    return LowRankDelta(dict.fromkeys(names, pair))


def projected(delta: LowRankDelta, registry: Registry) -> LowRankDelta:
    """As an encoder leaves it that trains against the registry's projector."""
    factors = {}
    for name, (A, B) in delta.factors.items():
        into, out = registry.projector(name)
        A = A if into is None else A - (A @ into) @ into.T
        B = B if out is None else B - out @ (out.T @ B)
        factors[name] = (A, B)
    return LowRankDelta(factors)


class TestProjection:
    @pytest.mark.parametrize("output_side", [False, True])
    def test_projected_deltas_are_orthogonal_to_every_accepted_one_at_every_map(
        self, llama, random_delta, output_side
    ) -> None:
        registry = Registry(llama, 0.999, output_side=output_side, **LOOSE)
        for seed in range(12):
            delta = random_delta(llama, seed, rank=2, layers="all")
            registry.register(str(seed), projected(delta, registry))
        for a, b in itertools.combinations(registry.ids, 2):
            for name in target_modules(llama, "all"):
                first, second = registry[a].spans[name], registry[b].spans[name]
                assert angle_score(first.input, second.input) >= 0.999
                if output_side:
                    assert angle_score(first.output, second.output) >= 0.999

    def test_without_projection_some_share_directions(self, llama, random_delta) -> None:
        """The control of the test above: its bound is not met by chance."""
        registry = Registry(llama, 0.0, **LOOSE)
        for seed in range(12):
            registry.register(str(seed), random_delta(llama, seed, rank=2, layers="all"))
        pairs = itertools.combinations(registry.ids, 2)
        angles = [registry.principal_angles(a, b) for a, b in pairs]
        scores = [float(own.min()) / (torch.pi / 2) for found in angles for own in found.values()]
        assert max(scores) < 0.999

    def test_projector_is_none_where_nothing_is_taken(self, llama, names) -> None:
        registry = Registry(llama, **LOOSE)
        registry.register("a", axes(names[:1], 0))
        into, out = registry.projector(names[0])
        assert into is not None and into.shape == (IN, 1) and out is None
        assert registry.projector(names[1]) == (None, None)

    def test_projector_keeps_what_it_was_made_for(self, llama, names) -> None:
        registry = Registry(llama, **LOOSE)
        before = registry.projector
        registry.register("a", axes(names, 0))
        assert before(names[0]) == (None, None)

    def test_null_space_avoids_inputs_of_others_too(self, llama, names, tokenizer) -> None:
        registry = Registry(llama, 0.3, 0.05)
        moments = prompt_moments(llama, tokenizer, names, ["The capital of France is"])
        registry.register("a", axes(names, 0), moments)
        delta = axes(names, 5)
        assert "leakage" in registry.check(delta).kinds
        into, _ = registry.null_space_projector(0.0, against=["a"])(names[0])
        plain, _ = registry.projector(names[0])
        assert into.shape[1] > plain.shape[1]
        project = registry.null_space_projector(0.0, against=["a"])
        quiet = LowRankDelta(
            {n: (A - A @ project(n)[0] @ project(n)[0].T, B) for n, (A, B) in delta.factors.items()}
        )
        verdict = registry.check(quiet)
        assert verdict.accepted and verdict.score > 0.999
        assert max(verdict.leakage["on"]["a"].values()) < 1e-4


class TestCapacity:
    def test_free_directions_are_features_less_the_rank_of_the_basis(
        self, llama, random_delta, names
    ) -> None:
        registry = Registry(llama, 0.0, **LOOSE)
        for seed in range(6):
            registry.register(str(seed), random_delta(llama, seed, rank=3, layers="all"))
            for name, free in registry.capacity().items():
                rank = int(torch.linalg.matrix_rank(registry.basis(name).double()))
                stacked = torch.cat([registry[i].delta.factors[name][0] for i in registry.ids])
                assert free == IN - rank == IN - int(torch.linalg.matrix_rank(stacked.double()))
        assert list(registry.capacity()) == sorted(names)

    def test_shared_directions_are_counted_once(self, llama, names) -> None:
        registry = Registry(llama, 0.0, **LOOSE)
        registry.register("a", axes(names, 0, 1))
        registry.register("b", axes(names, 1, 2))
        report = registry.capacity_report()[names[0]]
        assert (report.used, report.free, report.deltas) == (3, IN - 3, 2)
        assert report.fits(4) == 15 and report.fits(16, output_side=True) == 1

    def test_maps_without_deltas_are_free_and_unknown_ones_refused(self, llama, names) -> None:
        registry = Registry(llama)
        assert registry.capacity() == {}
        assert registry.capacity(names[:1]) == {names[0]: IN}
        with pytest.raises(ValidationError, match="linear map of the model"):
            registry.capacity(["no.such.map"])

    def test_full_map_takes_no_more(self, llama, names) -> None:
        registry = Registry(llama, 0.0, **LOOSE)
        for start in range(0, IN, 16):
            registry.register(str(start), axes(names[:1], *range(start, start + 16)))
        assert registry.capacity() == {names[0]: 0}
        with pytest.raises(CapacityError, match="at most 0 input directions"):
            registry.register("more", axes(names[:1], 3))
        assert len(registry) == 4


class TestRefusals:
    def test_shared_directions_name_whose_they_are(self, llama, names) -> None:
        registry = Registry(llama, **LOOSE)
        for i in range(3):
            registry.register(f"id{i}", axes(names, 2 * i, 2 * i + 1))
        delta = axes(names, 3, 9)
        verdict = registry.check(delta)
        assert verdict.kinds == {"angle"} and verdict.conflicts == ("id1",)
        assert registry.conflicts(delta) == ["id1"]
        with pytest.raises(InterferenceError, match="id1") as caught:
            registry.register("new", delta)
        assert caught.value.conflicts == ["id1"]
        assert "new" not in registry

    def test_conflicts_are_named_where_only_several_together_are_too_near(self, llama, names):
        """A direction halfway between two others is far enough from each, not from both."""
        registry = Registry(llama, 0.45, **LOOSE)
        registry.register("a", axes(names, 0))
        registry.register("b", axes(names, 1))
        registry.register("far", axes(names, 7))
        between = (torch.eye(IN)[:1] + torch.eye(IN)[1:2], torch.eye(OUT)[:, :1])
        verdict = registry.check(LowRankDelta(dict.fromkeys(names, between)))
        assert not verdict.accepted and set(verdict.conflicts) == {"a", "b"}

    def test_output_side_counts_where_asked_for(self, llama, names) -> None:
        first, second = axes(names, 0, out=(4,)), axes(names, 1, out=(4,))
        for output_side, accepted in ((False, True), (True, False)):
            registry = Registry(llama, output_side=output_side, **LOOSE)
            registry.register("a", first)
            verdict = registry.check(second)
            assert verdict.accepted is accepted
        assert "output side" in str(verdict.reasons[0])
        assert verdict.angles[names[0]] == {"input": 1.0, "output": pytest.approx(0, abs=1e-6)}

    def test_only_the_later_layer_is_shared(self, llama, names) -> None:
        """Every map is compared, not the first of a delta."""
        registry = Registry(llama, **LOOSE)
        registry.register("a", axes(names, 0))
        clash = LowRankDelta(
            {**axes(names[:1], 1).factors, **axes(names[1:], 0).factors},
        )
        verdict = registry.check(clash)
        assert verdict.angles[names[0]]["input"] == 1.0
        assert [names[1] in str(reason) for reason in verdict.reasons] == [True]

    def test_leakage_on_others_and_from_others(self, llama, names, tokenizer) -> None:
        registry = Registry(llama)
        first = prompt_moments(llama, tokenizer, names, ["The capital of France is"])
        registry.register("a", axes(names, 0), first)
        second = prompt_moments(llama, tokenizer, names, ["The symbol of gold is"])
        delta = axes(names, 1).scaled(3)
        verdict = registry.check(delta, second)
        assert verdict.score == 1.0 and verdict.kinds == {"leakage"}
        assert verdict.conflicts == ("a",)
        for name in names:
            on = first[name].leakage(*delta.factors[name])
            back = second[name].leakage(*axes(names, 0).factors[name])
            assert verdict.leakage["on"]["a"][name] == on
            assert verdict.leakage["from"]["a"][name] == back > 0
        assert "on the inputs of a" in str(verdict.reasons[0])
        # What others add to it is told, and is no fault of the new one.
        assert registry.check(axes(names, 1).scaled(1e-4), second).accepted

    def test_leakage_on_unrelated_text(self, llama, names, tokenizer) -> None:
        registry = Registry(llama)
        assert "unrelated text" in registry.check(axes(names, 1)).unmeasured[0]
        text = ["The capital of France is Paris. Water boils. " * 20]
        registry.measure_generic(tokenizer, text, names, tokens=100, progress=False)
        verdict = registry.check(axes(names, 1))
        assert verdict.unmeasured == () and verdict.kinds == {"leakage"}
        assert verdict.conflicts == () and "unrelated text" in str(verdict.reasons[0])
        assert registry.check(axes(names, 1).scaled(1e-4)).accepted

    def test_another_base_and_other_shapes(self, llama, names) -> None:
        registry = Registry(llama)
        with pytest.raises(IncompatibleBaseError, match="one for abc"):
            registry.register("a", axes(names, 0), base="abc")
        assert registry.check(axes(names, 0), base=registry.base).accepted
        wide = LowRankDelta({names[0]: (torch.ones(1, IN + 1), torch.ones(OUT, 1))})
        assert registry.check(wide).kinds == {"shape"}
        broken = LowRankDelta({names[0]: (torch.full((1, IN), torch.nan), torch.ones(OUT, 1))})
        with pytest.raises(IncompatibleBaseError, match="finite"):
            registry.register("b", broken)
        with pytest.raises(IncompatibleBaseError, match="no.such"):
            registry.register("c", LowRankDelta({"no.such": (torch.ones(1, 3), torch.ones(3, 1))}))
        assert len(registry) == 0

    def test_failed_validation_refuses_what_geometry_would_take(self, llama, names) -> None:
        registry = Registry(llama)
        with pytest.raises(ValidationError, match="top-1 is 0.2"):
            registry.register("a", axes(names, 0), validation=["top-1 is 0.2"])
        assert len(registry) == 0

    def test_all_reasons_are_told_at_once(self, llama, names) -> None:
        registry = Registry(llama, 0.3, **LOOSE)
        registry.register("a", axes(names, 0))
        with pytest.raises(InterferenceError, match=r"(?s)angle score.*does not answer"):
            registry.register("b", axes(names, 0), validation=["it does not answer"])

    def test_verdict_goes_into_json(self, llama, names) -> None:
        registry = Registry(llama)
        registry.register("a", axes(names, 0))
        told = json.loads(json.dumps(registry.check(axes(names, 0)).to_dict()))
        assert told["accepted"] is False and told["reasons"][0]["kind"] == "angle"

    @pytest.mark.parametrize("limits", [{"angle_min": 1.5}, {"leakage_max": -1.0}])
    def test_limits_that_mean_nothing_are_refused(self, llama, limits) -> None:
        with pytest.raises(ValidationError, match=next(iter(limits))):
            Registry(llama, **limits)


class TestLeaving:
    def test_unregister_frees_exactly_what_was_taken(self, llama, random_delta, names) -> None:
        deltas = {str(i): random_delta(llama, i, rank=2, layers="all") for i in range(8)}
        registry, never = Registry(llama, 0.0, **LOOSE), Registry(llama, 0.0, **LOOSE)
        for key, delta in deltas.items():
            registry.register(key, delta)
            if key not in ("0", "3", "7"):
                never.register(key, delta)
        for key in ("3", "0", "7"):
            registry.unregister(key)
        assert registry.ids == never.ids and registry.capacity() == never.capacity()
        for name in names:
            for side in ("input", "output"):
                assert torch.equal(registry.basis(name, side), never.basis(name, side))
        for key in list(registry.ids):
            registry.unregister(key)
        assert registry.capacity(names) == dict.fromkeys(names, IN)

    def test_unknown_and_duplicate_ids(self, llama, names) -> None:
        registry = Registry(llama)
        registry.register("a", axes(names, 0))
        with pytest.raises(DuplicateKeyError, match="'a'"):
            registry.register("a", axes(names, 1))
        with pytest.raises(UnknownKeyError, match="'b'"):
            registry.unregister("b")

    def test_delta_that_replaces_another_is_not_held_against_it(self, llama, names) -> None:
        registry = Registry(llama)
        registry.register("a", axes(names, 0))
        assert not registry.check(axes(names, 0)).accepted
        assert registry.check(axes(names, 0), without=["a"]).accepted

    def test_registered_delta_is_a_copy(self, llama, names) -> None:
        registry, delta = Registry(llama), axes(names, 0)
        registry.register("a", delta)
        delta.factors[names[0]][0].zero_()
        assert float(registry["a"].delta.factors[names[0]][0].sum()) == 1

    def test_transaction_that_fails_leaves_everything_as_it_was(self, llama, names) -> None:
        registry = Registry(llama)
        registry.register("a", axes(names, 0))
        before = registry.basis(names[0])
        with pytest.raises(InterferenceError), registry.transaction():
            registry.unregister("a")
            registry.register("b", axes(names, 1))
            registry.register("c", axes(names, 1))
        assert registry.ids == ["a"] and torch.equal(registry.basis(names[0]), before)
