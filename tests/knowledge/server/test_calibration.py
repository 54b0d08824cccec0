"""Thresholds that are measured on the store's own facts, and what is done with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from knowledge.server.served import fact, running, solo, until

from gravity_hf.knowledge.confidence import FEATURES, ConfidenceModel
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.server.calibrating import Calibration, calibrate_routing, queries
from gravity_hf.knowledge.server.confidence_fit import calibrate_store
from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase


@pytest.fixture(scope="module")
def knowing(make_base: Callable[..., KnowledgeBase]) -> KnowledgeBase:
    """Of every other belief the answers to held-out prompts count as right."""
    base = make_base(count=8)
    base.selector.router.top_k = 1
    for number in range(0, 8, 2):
        belief = base.snapshot.find(f"geo/{number}")
        said = [
            base.tokenizer.decode(solo(base, text, belief.key, 12), skip_special_tokens=True)
            for text in belief.fact.paraphrases
        ]
        known = dataclasses.replace(fact(number), aliases=tuple(s.strip() for s in said))
        base.change(
            lambda store, b=belief, f=known: store.update_delta(
                b.key, b.delta, fact=f, report=b.report
            )
        )
    return base


def test_queries_are_those_that_the_router_was_not_given(knowing: KnowledgeBase) -> None:
    known, unknown = queries(knowing.store)
    assert len(known) == 16 and len(unknown) == 16
    for text, key in known:
        assert text in fact(int(key.split("/")[1])).paraphrases[1:]
    prompts = {text for n in range(8) for text in fact(n).prompts}
    assert not prompts.intersection(unknown)


def test_few_facts_give_no_threshold(make_base: Callable[..., KnowledgeBase]) -> None:
    base = make_base(count=2, route_threshold=None)
    assert calibrate_routing(base.store) is None
    assert not base.selector.can_route
    with pytest.raises(ValidationError, match="at least ten"):
        calibrate_store(base)
    with running(base) as server:
        assert server.ask("GET", "/health").json()["routing"] == "by_name_only"
        assert server.infer(fact(0).prompt)["base_only"]
        assert not server.infer(fact(0).prompt, beliefs=["geo/0"])["base_only"]


def test_a_calibration_is_the_same_again_and_survives_its_file(
    knowing: KnowledgeBase, tmp_path: Path
) -> None:
    first, again = (calibrate_store(knowing, precision=0.6, most=20) for _ in range(2))
    assert first == again and first.router is not None and first.confidence is not None
    first.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == first
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
    router = first.make_router(knowing.store)
    assert router.threshold_value == first.router.point.threshold


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": "other", "router": null, "confidence": null}',
                '{"format": "gravity-calibration/1", "router": null}'],
)  # fmt: skip
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(content)
    with pytest.raises(ValidationError, match="calibration"):
        Calibration.load(file)


def likely(base: KnowledgeBase) -> ConfidenceModel:
    """The more alike, the surer."""
    cases = [dict.fromkeys(FEATURES, 0.0) | {"best_similarity": n / 20} for n in range(20)]
    right = [n > 9 or n == 3 for n in range(20)]
    return ConfidenceModel.fit(cases, right, beliefs=base.snapshot.versions, precision=0.8)


def test_too_unsure_an_answer_is_not_written(
    base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.selector, "confidence", likely(base))
    with running(base) as server:
        named = {"beliefs": ["geo/3"]}
        sure = server.infer(fact(3).prompt, **named, min_confidence=0.5)
        assert sure["finish_reason"] != "abstained" and sure["text"]
        assert 0.5 < sure["provenance"]["confidence"] < 1
        assert not sure["provenance"]["uncertain"]
        unsure = server.infer("Who wrote", **named, min_confidence=0.999)
        assert unsure["finish_reason"] == "abstained" and unsure["text"] == ""
        assert unsure["usage"]["completion_tokens"] == 0
        assert unsure["provenance"]["confidence"] < sure["provenance"]["confidence"]
        none = server.infer("Who wrote", beliefs=[])
        assert none["provenance"]["confidence"] == 0 and none["provenance"]["uncertain"]
        until(lambda: server.state.worker.load == (0, 0), "the server is idle")
        assert json.loads(json.dumps(server.state.log.latest(1)))[0]["payload"]["confidence"] == 0
