"""What the forge tries, in which order, and what counts as good enough."""

from __future__ import annotations

import pytest

from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.forge_batches import Batch
from gravity_hf.knowledge.forge_strategies import (
    INTERFERES,
    NO_ROOM,
    NOT_VALID,
    NULL,
    PROJECTED,
    TOO_COSTLY,
    Attempt,
    Ladder,
    layer_strategies,
)
from gravity_hf.knowledge.validation import Validation


class TestLayers:
    def test_twelve_layers_widen_from_five_to_seven_to_nine_to_all(self) -> None:
        assert layer_strategies(12) == [
            (4, 5, 6, 7, 8),
            (3, 4, 5, 6, 7, 8, 9),
            (2, 3, 4, 5, 6, 7, 8, 9, 10),
            tuple(range(12)),
        ]

    @pytest.mark.parametrize("count", [*range(1, 9), 30, 80])
    def test_each_choice_contains_the_one_before_and_the_last_is_all(self, count: int) -> None:
        found = layer_strategies(count)
        assert found[-1] == tuple(range(count))
        assert all(set(a) < set(b) for a, b in zip(found, found[1:], strict=False))


class TestLadder:
    ladder = Ladder([(1,), (0, 1, 2)], [4, 1], PROJECTED)

    def test_validation_failures_climb_ranks_then_widen(self) -> None:
        attempt, seen = self.ladder.first(), []
        while attempt is not None:
            seen.append((attempt.layers, attempt.rank))
            attempt = self.ladder.after(attempt, NOT_VALID)
        assert seen == [((1,), 1), ((1,), 4), ((0, 1, 2), 4)]

    def test_interference_goes_to_the_null_space_and_never_wider(self) -> None:
        first = self.ladder.first()
        second = self.ladder.after(first, INTERFERES, ["b", "a"])
        assert second == first._replace(space=NULL, against=("a", "b"))
        assert self.ladder.after(second, INTERFERES, ["a"]) is None
        again = self.ladder.after(second, INTERFERES, ["c"])
        assert again is not None and again.against == ("a", "b", "c")

    def test_validation_failure_in_the_null_space_stays_there(self) -> None:
        second = self.ladder.after(self.ladder.first(), INTERFERES, ["a"])
        third = self.ladder.after(second, NOT_VALID)
        assert third is not None and (third.space, third.against, third.rank) == (NULL, ("a",), 4)

    @pytest.mark.parametrize("failure", [NO_ROOM, TOO_COSTLY])
    def test_nothing_follows_where_more_would_only_need_more(self, failure: str) -> None:
        assert self.ladder.after(self.ladder.first(), failure) is None

    def test_ranks_that_mean_nothing_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="ranks"):
            Ladder([(0,)], [0], PROJECTED)


class TestRejection:
    def rejected(self, *tried: tuple[dict[str, float], str, str]):
        batch = Batch("t", (fact(1, 1),), Attempt((1,), 1, PROJECTED))
        for metrics, failure, reason in tried:
            batch.note(metrics, failure, reason)
        return batch.rejected()

    def test_what_was_judged_says_why_and_what_was_not_made_why_no_more(self) -> None:
        found = self.rejected(
            ({"top1": 0.5}, NOT_VALID, "few right"), ({}, TOO_COSTLY, "too many parameters")
        )
        assert found.reason.startswith("validation: few right. The next attempt was not made: ")
        assert found.reason.endswith("budget: too many parameters")
        assert found.metrics["top1"] == 0.5 and len(found.metrics["attempts"]) == 2

    def test_the_last_that_was_judged_counts(self) -> None:
        found = self.rejected(({"top1": 0.5}, NOT_VALID, "a"), ({"top1": 0.7}, INTERFERES, "b"))
        assert found.reason == "interference: b" and found.metrics["top1"] == 0.7

    def test_where_nothing_was_judged_that_is_said(self) -> None:
        found = self.rejected(({}, TOO_COSTLY, "too many parameters"))
        assert found.reason == "budget: too many parameters"


def measure(**values: float) -> dict[str, float]:
    return {"top1": 1.0, "paraphrase_top1": 1.0, "kl_unrelated": 0.0, "exact": 1.0, **values}


def fact(paraphrases: int, unrelated: int) -> Fact:
    p = tuple(f"paraphrase {i}" for i in range(paraphrases))
    u = tuple(f"unrelated {i}" for i in range(unrelated))
    return Fact("id", "d", "r", "s", "prompt", "answer", (), p, u)


class TestValidation:
    def test_what_is_good_has_no_failures(self) -> None:
        validation = Validation()
        assert validation.failures(validation.summary([measure(), measure()])) == []

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"top1": 0.0}, "80% of prompts, got 50%"),
            ({"paraphrase_top1": 0.0}, "held-out paraphrases, got 50%"),
            ({"kl_unrelated": 1.0}, "0.05 nats at prompts that must not change, got 0.5"),
            ({"kl_unrelated": float("nan")}, "got nan"),
        ],
    )
    def test_each_bar_fails_alone_and_says_what_it_got(self, values, words) -> None:
        validation = Validation()
        (failure,) = validation.failures(validation.summary([measure(), measure(**values)]))
        assert words in failure

    def test_held_out_paraphrases_count_only_where_asked_for(self) -> None:
        validation = Validation(holdout="nothing")
        assert validation.failures(validation.summary([measure(paraphrase_top1=0.0)])) == []

    def test_a_missing_measure_is_a_failure_not_a_pass(self) -> None:
        assert len(Validation().failures({})) == 2

    def test_prompts_of_other_deltas_count_where_a_limit_is_set(self) -> None:
        summary = {**Validation().summary([measure()]), "kl_others": 0.3}
        assert Validation().failures(summary) == []
        assert "other deltas" in Validation(max_kl_others=0.1).failures(summary)[0]

    def test_facts_that_leave_nothing_to_judge_by_are_refused(self) -> None:
        Validation().check_facts([fact(3, 2)], 1, 1)
        with pytest.raises(ValidationError, match="more than 3 paraphrases"):
            Validation().check_facts([fact(3, 2)], 3, 1)
        Validation(holdout="nothing").check_facts([fact(3, 2)], 3, 1)
        with pytest.raises(ValidationError, match="more than 2 unrelated"):
            Validation().check_facts([fact(3, 2)], 1, 2)

    @pytest.mark.parametrize(
        "settings",
        [{"min_top1": 1.1}, {"max_kl": -1.0}, {"holdout": "some"}, {"max_kl_others": -1}],
    )
    def test_settings_that_mean_nothing_are_refused(self, settings) -> None:
        with pytest.raises(ValidationError, match=next(iter(settings))):
            Validation(**settings)
