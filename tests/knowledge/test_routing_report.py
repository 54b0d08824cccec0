"""Measures of routing against counts by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from knowledge.routed_stores import FACTS, HELD_OUT, UNKNOWN, make_store

from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.routing import Hit, Router
from gravity_hf.knowledge.routing_report import routing_report
from gravity_hf.knowledge.statistics import wilson_interval

_KEYS = {"a/x/1": "a/x", "a/x/2": "a/x", "a/y/3": "a/y", "b/z/4": "b/z"}
# Scores of every belief, in the order of the keys.
_SCORES = {
    "first": [0.9, 0.8, 0.2, 0.1],
    "second": [0.9, 0.8, 0.2, 0.1],
    "third": [0.1, 0.2, 0.3, 0.45],
    "far": [0.4, 0.3, 0.2, 0.1],
    "near": [0.1, 0.2, 0.7, 0.3],
}


def _router():
    def rank(texts):
        pairs = [zip(_KEYS, _SCORES[text], strict=True) for text in texts]
        return [sorted((Hit(*p) for p in pair), key=lambda h: -h.score) for pair in pairs]

    beliefs = [SimpleNamespace(key=k, category=c, texts=("x",)) for k, c in _KEYS.items()]
    return SimpleNamespace(
        rank=rank,
        top_k=2,
        threshold_value=0.5,
        encoder="by hand",
        index=SimpleNamespace(beliefs=beliefs),
    )


def test_every_measure_is_what_counting_gives():
    known = [("first", "a/x/1"), ("second", "a/x/2"), ("third", "a/y/3")]
    report = routing_report(_router(), known, ["far", "near"])
    assert [item.rank for item in report.items] == [1, 2, 2, None, None]
    assert report.top1[:3] == (1, 3, 1 / 3)
    assert report.top1[3:] == wilson_interval(1, 3)
    assert {k: v.successes for k, v in report.recall.items()} == {1: 1, 5: 3, 10: 3}
    assert report.mrr == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    # At 0.5 the first two queries are routed to both beliefs of a/x, the third to none.
    assert report.activated[:2] == (2, 3)
    assert report.first_right[:2] == (1, 3)
    assert report.relation_precision[:2] == (4, 4)
    assert report.domain_precision[:2] == (4, 4)
    assert report.relation_chance == pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)
    assert report.domain_chance == pytest.approx(3 / 4)
    assert report.false_activation[:2] == (1, 2)
    # Routed are first, second and near; only first has its own belief in front.
    assert report.precision[:2] == (1, 3)
    assert report.items[1].routed == ("a/x/1", "a/x/2")


def test_relations_of_other_domains_count_against_both():
    report = routing_report(_router(), [("near", "b/z/4")])
    assert report.relation_precision[:2] == (0, 1)
    assert report.domain_precision[:2] == (0, 1)
    assert report.false_activation.trials == 0


def test_the_report_is_strict_json():
    report = routing_report(_router(), [("third", "a/y/3")])
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["precision"]["rate"] is None
    assert values["recall"]["5"]["successes"] == 1
    assert values["items"][0] == {
        "text": "third",
        "key": "a/y/3",
        "rank": 2,
        "score": 0.45,
        "routed": [],
    }


def test_baselines_run_through_the_same_code(tmp_path, llama, tokenizer, random_delta):
    store = make_store(tmp_path / "kb", llama, tokenizer, random_delta)
    reports = {
        name: routing_report(Router(store, name, threshold=0.3), HELD_OUT, UNKNOWN)
        for name in ("hidden:quarter", "untrained", "tfidf", "majority")
    }
    for name, report in reports.items():
        assert (report.encoder, report.beliefs) == (name, len(FACTS))
        assert report.top1.trials == len(HELD_OUT)
        assert report.false_activation.trials == len(UNKNOWN)
    # Three categories, the largest of two beliefs: always the first of those.
    assert reports["majority"].top1.successes == 2
    assert reports["tfidf"].top1.rate > reports["majority"].top1.rate


def test_keys_that_nobody_can_find_are_refused():
    with pytest.raises(ValidationError, match="nobody"):
        routing_report(_router(), [("first", "nobody")])
    with pytest.raises(ValidationError, match="none"):
        routing_report(_router(), [])
