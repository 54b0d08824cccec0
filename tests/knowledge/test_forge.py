"""The forge: what it registers is apart and validated, what fails leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gravity_hf.knowledge.consolidation import facts_of
from gravity_hf.knowledge.delta import target_modules
from gravity_hf.knowledge.digest import compute_digest
from gravity_hf.knowledge.encoding import BeliefEncoder, EncodingConfig
from gravity_hf.knowledge.errors import (
    DuplicateKeyError,
    IntegrityError,
    KnowledgeError,
    ValidationError,
)
from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.forge import Forge, ForgeResult, Validation
from gravity_hf.knowledge.registry import Registry
from gravity_hf.knowledge.store import BeliefStore
from gravity_hf.knowledge.subspaces import angle_score

SUBJECTS = ("gold", "France", "water", "Hamlet", "Jupiter", "a byte")
ANSWERS = ("Au", "bits", "eight", "planet", "Paris", "one")
LOOSE = {"leakage_max": 1e9, "generic_max": 1e9}
# A random base has no knowledge to generalise from: prompts that were trained on have to do.
EASY = Validation(min_top1=0.5, max_kl=100.0, holdout="nothing")
ANYTHING = Validation(min_top1=0.0, max_kl=100.0)


def fact(i: int) -> Fact:
    s, answer = SUBJECTS[i % 6], ANSWERS[i % 6]
    return Fact(
        *(f"t/{i}", "t", "r", s, f"The symbol of {s} is", answer, ()),
        (f"Who knows {s}? It is", f"Tell me about {s}:", f"What is {s}? It is"),
        (f"Water boils at {s}", f"The largest {s}"),
    )


FACTS = [fact(i) for i in range(6)]


def forge(model, tokenizer, registry, **settings: Any) -> Forge:
    given = {
        "rank": 2,
        "layers": "all",
        "facts_per_delta": 2,
        "steps": 30,
        "learning_rate": 0.3,
        "validation": EASY,
        "encoding": EncodingConfig(
            budget_fraction=0.5, generic_prompts=0, own_wordings=0, own_neighbours=0, locality=3.0
        ),
        **settings,
    }
    return Forge(model, tokenizer, registry, **given)


def quick(model, tokenizer, registry, **settings: Any) -> Forge:
    """Trains next to nothing: for what does not depend on the outcome."""
    return forge(model, tokenizer, registry, **{"steps": 2, "validation": ANYTHING, **settings})


def failures(metrics: dict[str, Any]) -> list[tuple[int, int, str, str]]:
    """Layers, rank, space and failure of each attempt."""
    return [
        (len(a["attempt"]["layers"]), a["attempt"]["rank"], a["attempt"]["space"], a["failure"])
        for a in metrics["attempts"]
    ]


class Scripted(Validation):
    """Judges as it is told to, one attempt after the other; afterwards everything is good."""

    def __init__(self, *outcomes: str) -> None:
        super().__init__(0.0, 100.0)
        object.__setattr__(self, "outcomes", list(outcomes))

    def failures(self, summary: Any) -> list[str]:
        # Called again with what others' prompts say, which is not an attempt.
        if "kl_others" in summary or not self.outcomes:
            return []
        outcome = self.outcomes.pop(0)
        return [outcome] if outcome else []


class TestApart:
    def test_forged_deltas_are_orthogonal_at_every_map(self, llama, tokenizer) -> None:
        registry = Registry(llama, 0.999, output_side=True, **LOOSE)
        result = forge(llama, tokenizer, registry).run(FACTS, "t", progress=False)
        assert len(result.deltas) == len(registry) == 3 and not result.rejected
        for a, b in itertools.combinations(registry.ids, 2):
            for name in target_modules(llama, "all"):
                first, second = registry[a].spans[name], registry[b].spans[name]
                assert first.input.shape[1] == 2
                assert angle_score(first.input, second.input) >= 0.999
                assert angle_score(first.output, second.output) >= 0.999
        assert all(forged.metrics["top1"] >= 0.5 for forged in result.deltas)
        assert result.deltas[0].metrics["top1_before"] == 0

    def test_trained_without_projection_they_are_not(self, llama, tokenizer) -> None:
        """The control of the test above."""
        registry = Registry(llama, 0.0, **LOOSE)
        forge(llama, tokenizer, registry, orthogonality="check").run(FACTS[:4], "t", progress=False)
        angles = [
            registry.principal_angles(a, b) for a, b in itertools.combinations(registry.ids, 2)
        ]
        scores = [float(x.min()) / (torch.pi / 2) for found in angles for x in found.values()]
        assert max(scores) < 0.999

    def test_overlap_costs_with_a_penalty(self, llama, tokenizer) -> None:
        overlaps = {}
        for kind in ("check", "penalty"):
            registry = Registry(llama, 0.0, **LOOSE)
            made = forge(
                llama,
                tokenizer,
                registry,
                orthogonality=kind,
                penalty=0.3,
                steps=10,
                encoding=EncodingConfig(
                    budget_fraction=0.5,
                    generic_prompts=0,
                    own_wordings=0,
                    own_neighbours=0,
                    locality=3.0,
                    margin=50.0,
                ),
            )
            made.run(FACTS[:4], "t", progress=False)
            found = registry.principal_angles(*registry.ids)
            overlaps[kind] = max(float(x.cos().max()) for x in found.values())
        assert overlaps["penalty"] < overlaps["check"] / 2

    def test_interference_is_tried_again_in_the_null_space(self, llama, tokenizer) -> None:
        """On the same layers at the same rank, and then disturbs the other's prompts no more."""
        registry = Registry(llama, leakage_max=1e-3, generic_max=1e9)
        made = forge(
            llama, tokenizer, registry, quiet=0.0, validation=ANYTHING, facts_per_delta=1, steps=5
        )
        result = made.run(FACTS[:2], "t", progress=False)
        first, second = result.deltas
        assert failures(first.metrics) == [(2, 2, "projected", "")]
        assert failures(second.metrics) == [
            (2, 2, "projected", "interference"),
            (2, 2, "null", ""),
        ]
        assert second.attempt.against == (first.key,)
        assert max(second.verdict["leakage"]["on"][first.key].values()) < 1e-3

    def test_map_without_room_is_told_before_anything_is_trained(
        self, llama, tokenizer, monkeypatch
    ) -> None:
        registry = Registry(llama, 0.0, **LOOSE)
        quick(
            llama,
            tokenizer,
            registry,
            rank=32,
            facts_per_delta=1,
            encoding=EncodingConfig(budget_fraction=9.0),
        ).run(FACTS[:2], "t", progress=False)
        monkeypatch.setattr(BeliefEncoder, "encode_together", None)
        made = quick(llama, tokenizer, registry, rank=32, facts_per_delta=1)
        (rejected,) = made.run(FACTS[2:3], "t", progress=False).rejected
        assert rejected.reason.startswith("capacity: model.layers.0")


class TestAttempts:
    def test_only_failed_validation_climbs_ranks_and_widens(self, llama, tokenizer) -> None:
        registry = Registry(llama, **LOOSE)
        made = quick(llama, tokenizer, registry, rank=[1, 2], validation=Scripted("a", "b", ""))
        made.settings.ladder.layers[:] = [(1,), (0, 1)]
        made.settings = dataclasses.replace(made.settings)
        result = made.run(FACTS[:2], "t", progress=False)
        # The first attempt was set before the layers were.
        assert [x[1:] for x in failures(result.deltas[0].metrics)] == [
            (1, "projected", "validation"),
            (2, "projected", "validation"),
            (2, "projected", ""),
        ]
        assert [x[0] for x in failures(result.deltas[0].metrics)] == [1, 1, 2]

    def test_smallest_rank_that_passes_is_taken(self, llama, tokenizer) -> None:
        registry = Registry(llama, **LOOSE)
        made = quick(llama, tokenizer, registry, rank="search", validation=Scripted("no", "no"))
        (forged,) = made.run(FACTS[:2], "t", progress=False).deltas
        assert forged.attempt.rank == 4 == forged.delta.rank(target_modules(llama, "all")[0])

    def test_held_out_paraphrases_decide(self, llama, tokenizer) -> None:
        """What was learnt by heart is not enough, and nothing of it is registered."""
        registry = Registry(llama, **LOOSE)
        bar = Validation(min_top1=1.0, max_kl=100.0)
        made = forge(llama, tokenizer, registry, validation=bar, facts_per_delta=1)
        result = made.run(FACTS[:1], "t", progress=False)
        (rejected,) = result.rejected
        assert rejected.metrics["top1"] == 1.0 and rejected.metrics["paraphrase_top1"] < 1.0
        assert rejected.reason.startswith("validation: expected the answer first")
        assert "held-out paraphrases" in rejected.reason
        assert rejected.facts == (FACTS[0],) and not result.deltas and len(registry) == 0

    def test_more_parameters_than_the_budget_are_not_trained(self, llama, tokenizer) -> None:
        registry = Registry(llama, **LOOSE)
        made = quick(llama, tokenizer, registry, rank=[1, 2], encoding=EncodingConfig())
        (rejected,) = made.run(FACTS[:2], "t", progress=False).rejected
        assert rejected.reason.startswith("budget: ") and len(rejected.metrics["attempts"]) == 1

    def test_attempts_end(self, llama, tokenizer) -> None:
        registry = Registry(llama, **LOOSE)
        made = quick(
            llama,
            tokenizer,
            registry,
            rank="search",
            most_attempts=3,
            validation=Scripted(*["no"] * 9),
        )
        (rejected,) = made.run(FACTS[:2], "t", progress=False).rejected
        assert len(rejected.metrics["attempts"]) == 3

    def test_one_batch_that_fails_does_not_keep_the_others(self, llama, tokenizer) -> None:
        registry = Registry(llama, **LOOSE)
        made = quick(llama, tokenizer, registry, validation=Scripted("", "no", ""))
        result = made.run(FACTS, "t", progress=False)
        assert [forged.facts for forged in result.deltas] == [tuple(FACTS[:2]), tuple(FACTS[4:])]
        assert result.rejected[0].facts == tuple(FACTS[2:4])
        assert result.facts == (*FACTS[:2], *FACTS[4:])


class TestNothingHalf:
    @pytest.fixture
    def store(self, llama, tokenizer, tmp_path) -> BeliefStore:
        return BeliefStore.create(tmp_path / "kb", llama, tokenizer)

    def test_forged_deltas_are_beliefs_of_the_store(self, store, llama, tokenizer) -> None:
        result = quick(llama, tokenizer, Registry(store, **LOOSE)).run(FACTS, "t", progress=False)
        again = Registry(BeliefStore.open(store.path, llama, tokenizer), **LOOSE)
        assert again.ids == [forged.id for forged in result.deltas] and again.strangers() == []
        for forged in result.deltas:
            belief = again.store.get(forged.key)
            assert belief.id == forged.id and facts_of(belief) == list(forged.facts)
            assert belief.metadata["metrics"]["attempts"] and belief.metadata["domain"] == "t"
            for name, pair in forged.delta.factors.items():
                for x, y in zip(pair, belief.delta.factors[name], strict=True):
                    assert torch.equal(x, y)
        assert again.store.verify()

    def test_the_same_facts_are_not_forged_twice(self, store, llama, tokenizer) -> None:
        registry = Registry(store, **LOOSE)
        quick(llama, tokenizer, registry).run(FACTS[:2], "t", progress=False)
        with pytest.raises(DuplicateKeyError, match="t/0"):
            quick(llama, tokenizer, registry).run(FACTS[:2], "t", progress=False)

    @pytest.mark.parametrize("place", ["training", "storing", "registering"])
    def test_an_error_leaves_registry_and_store_as_they_were(
        self, store, llama, tokenizer, monkeypatch, place
    ) -> None:
        registry, calls = Registry(store, **LOOSE), []
        owner, name = {
            "training": (BeliefEncoder, "encode_together"),
            "storing": (BeliefStore, "add_delta"),
            "registering": (Registry, "register"),
        }[place]
        really = getattr(owner, name)

        def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(self)
            # The registry's copy, which the run is tried on, takes the deltas first.
            if sum(x is registry or owner is not Registry for x in calls) == 2:
                raise RuntimeError("power cut")
            return really(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, failing)
        with pytest.raises(RuntimeError, match="power cut"):
            quick(llama, tokenizer, registry).run(FACTS, "t", progress=False)
        monkeypatch.undo()
        assert len(registry) == len(store) == 0 and registry.capacity() == {}
        assert len(Registry(BeliefStore.open(store.path, llama, tokenizer), **LOOSE)) == 0

    def test_what_another_process_registered_meanwhile_counts(
        self, store, llama, tokenizer, monkeypatch
    ) -> None:
        """It took the very directions: the later one is rejected, not registered beside it."""
        registry = Registry(store, 0.5, **LOOSE)
        made = quick(llama, tokenizer, registry)
        other = Registry(BeliefStore.open(store.path, llama, tokenizer), 0.5, **LOOSE)
        quick(llama, tokenizer, other).run(FACTS[:2], "other", progress=False)
        # Its run began when the store was empty.
        result = made.run(FACTS[:2], "t", progress=False)
        assert not result.deltas and result.rejected[0].reason.startswith("interference")
        store.reload()
        assert registry.ids == other.ids and store.keys() == other.store.keys()

    def test_base_is_unchanged_and_a_change_is_noticed(self, llama, tokenizer, monkeypatch) -> None:
        before = compute_digest(llama).root
        registry = Registry(llama, **LOOSE)
        quick(llama, tokenizer, registry).run(FACTS[:2], "t", progress=False)
        assert compute_digest(llama).root == before
        really, weight = BeliefEncoder.encode_together, llama.model.norm.weight
        kept = weight.detach().clone()

        def spoiling(self: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                weight[0] += 1e-3
            return really(self, *args, **kwargs)

        monkeypatch.setattr(BeliefEncoder, "encode_together", spoiling)
        try:
            with pytest.raises(IntegrityError, match="the base as it was"):
                quick(llama, tokenizer, registry).run(FACTS[2:4], "t", progress=False)
        finally:
            with torch.no_grad():
                weight.copy_(kept)
        assert len(registry) == 1 and compute_digest(llama).root == before

    def test_settings_and_facts_that_mean_nothing_are_refused(self, llama, tokenizer) -> None:
        registry = Registry(llama)
        for settings in (
            {"orthogonality": "some"},
            {"rank": "big"},
            {"rank": 0},
            {"facts_per_delta": 0},
            {"round_size": 0},
            {"layers": [7]},
            {"penalty": 0.0},
        ):
            with pytest.raises(ValidationError):
                forge(llama, tokenizer, registry, **settings)
        made = forge(llama, tokenizer, registry)
        with pytest.raises(ValidationError, match="at least one"):
            made.run([], "t")
        with pytest.raises(ValidationError, match="t/0 several times"):
            made.run([FACTS[0], FACTS[0]], "t")
        unwritable = dataclasses.replace(FACTS[1], answer="</s>")
        with pytest.raises(ValidationError, match="</s>"):
            made.run([FACTS[0], unwritable], "t")
        few = dataclasses.replace(FACTS[0], paraphrases=FACTS[0].paraphrases[:1])
        with pytest.raises(ValidationError, match="more than 1 paraphrases"):
            forge(llama, tokenizer, registry, validation=Validation()).run([few], "t")

    def test_another_model_is_refused(self, llama, gpt2, tokenizer) -> None:
        with pytest.raises(ValidationError, match="registry's own model"):
            forge(gpt2, tokenizer, Registry(llama))


class Fellows:
    """Processes of one run as threads: each with accelerate's split, all with one gathering."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=60)
        self.given: dict[int, list[Any]] = {}

    def accelerator(self, rank: int) -> Any:
        fellows = self

        class Accelerator:
            num_processes, process_index = fellows.count, rank
            is_main_process = rank == 0

            @contextmanager
            def split_between_processes(self, items: list[Any]) -> Any:
                # Accelerate's rule: the first processes get one more.
                each, more = divmod(len(items), fellows.count)
                start = each * rank + min(rank, more)
                yield items[start : start + each + (rank < more)]

            def gather_object(self, items: list[Any]) -> list[Any]:
                fellows.given[rank] = items
                fellows.barrier.wait()
                found = [x for r in range(fellows.count) for x in fellows.given[r]]
                fellows.barrier.wait()
                return found

        return Accelerator()

    def run(self, work: Any) -> list[Any]:
        results: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            try:
                results[rank] = work(self.accelerator(rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class TestProcesses:
    @pytest.fixture(autouse=True)
    def base(self, llama) -> None:
        """Each process has its own copy."""
        self.model = llama

    def forged(self, tokenizer, accelerator: Any) -> ForgeResult:
        registry = Registry(copy.deepcopy(self.model), 0.9, **LOOSE)
        made = quick(
            registry.model,
            tokenizer,
            registry,
            round_size=3,
            facts_per_delta=1,
            accelerator=accelerator,
            validation=Scripted("", "no", "", ""),
            rank=[1, 2],
        )
        return made.run(FACTS[:4], "t", progress=False)

    def test_result_does_not_depend_on_how_many_there_are(self, tokenizer) -> None:
        alone = self.forged(tokenizer, None)
        assert len(alone.deltas) == 4 and alone.deltas[1].attempt.rank == 1
        # Batches of one round are orthogonal, though none knew of the others in training.
        scores = [
            score
            for forged in alone.deltas
            for sides in forged.verdict["angles"].values()
            for score in sides.values()
        ]
        assert min(scores) > 0.999
        for result in Fellows(3).run(lambda a: self.forged(tokenizer, a)):
            assert [x.key for x in result.deltas] == [x.key for x in alone.deltas]
            for ours, theirs in zip(result.deltas, alone.deltas, strict=True):
                assert ours.attempt == theirs.attempt and ours.verdict == theirs.verdict
                for name, pair in ours.delta.factors.items():
                    for x, y in zip(pair, theirs.delta.factors[name], strict=True):
                        assert torch.equal(x, y)

    def test_error_of_one_stops_all(self, tokenizer, monkeypatch) -> None:
        really = BeliefEncoder.encode_together

        def failing(self: Any, facts: Any, **kwargs: Any) -> Any:
            if facts[0] is FACTS[2]:
                raise RuntimeError("out of memory")
            return really(self, facts, **kwargs)

        monkeypatch.setattr(BeliefEncoder, "encode_together", failing)
        errors = Fellows(2).run(lambda a: self.forged(tokenizer, a))
        assert sorted(type(e) is RuntimeError for e in errors) == [False, True]
        assert all(isinstance(e, RuntimeError | KnowledgeError) for e in errors)
        assert all("out of memory" in str(e) for e in errors)
