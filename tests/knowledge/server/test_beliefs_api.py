"""Beliefs over HTTP: added, changed, removed, looked at; noted in the log."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from knowledge.server.served import ADMIN, Running, fact, running

from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase
from gravity_hf.knowledge.store import BeliefStore
from gravity_hf.runtime import verify

FACT = {
    "key": "cities/Ruritania",
    "prompt": "The capital of Ruritania is",
    "answer": "Strelsau",
    "paraphrases": ["Ruritania is governed from", "The main city of Ruritania is", "Ruritania:"],
    "unrelated": ["The capital of France is", "The symbol of gold is"],
    "source": "a novel",
}


@pytest.fixture(scope="module")
def changed(
    make_base: Callable[..., KnowledgeBase], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("log") / "log.jsonl"
    with running(make_base(count=4), log=log, token=None) as server:
        yield server


def test_a_belief_from_its_addition_to_its_removal(changed: Running) -> None:
    base = changed.state.base
    before = changed.infer(FACT["prompt"], use_knowledge=False)["text"]
    added = changed.ask("POST", "/beliefs", FACT, ADMIN)
    assert added.status_code == 201, added.text
    belief = added.json()
    assert belief["key"] == FACT["key"] and belief["version"] == 1
    assert belief["category"] == "cities" and belief["answer"] == FACT["answer"]
    assert changed.ask("GET", f"/beliefs/{FACT['key']}").json() == belief
    assert changed.ask("GET", f"/beliefs/{belief['id']}").json() == belief
    assert FACT["key"] in base.store and belief["id"] in base.bank

    used = changed.infer(FACT["prompt"], beliefs=[FACT["key"]], max_new_tokens=20)
    assert used["provenance"]["sources"][0]["id"] == belief["id"]
    assert used["provenance"]["sources"][0]["effect"] > 0
    assert used["layers"] == belief["target_layers"]

    patched = changed.ask("PATCH", f"/beliefs/{FACT['key']}", {"answer": "Zenda"}, ADMIN)
    assert patched.status_code == 200, patched.text
    newer = patched.json()
    assert (newer["version"], newer["answer"]) == (2, "Zenda") and newer["id"] != belief["id"]
    assert changed.ask("GET", f"/beliefs/{belief['id']}").status_code == 404

    removed = changed.ask("DELETE", f"/beliefs/{newer['id']}", token=ADMIN)
    assert removed.status_code == 200 and removed.json()["key"] == FACT["key"]
    assert changed.ask("GET", f"/beliefs/{FACT['key']}").status_code == 404
    assert newer["id"] not in base.bank and FACT["key"] not in base.store
    assert changed.infer(FACT["prompt"], use_knowledge=False)["text"] == before
    assert base.verify()
    events = [e["event"] for e in changed.state.log.latest(100)]
    assert [e for e in events if e.startswith("belief")] == [
        "belief_added", "belief_updated", "belief_removed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("POST", "/beliefs", {**FACT, "key": "geo/1"}, (409, "duplicate_belief")),
        ("POST", "/beliefs", {**FACT, "key": "../up"}, (422, "invalid_request")),
        ("POST", "/beliefs", {**FACT, "answer": ""}, (422, "invalid_request")),
        ("POST", "/beliefs", {**FACT, "prompt": "a\x00b"}, (422, "invalid_request")),
        ("POST", "/beliefs", {**FACT, "more": 1}, (422, "invalid_request")),
        ("PATCH", "/beliefs/nobody", {"answer": "x"}, (404, "unknown_belief")),
        ("PATCH", "/beliefs/geo/1", {}, (422, "invalid_request")),
        ("DELETE", "/beliefs/nobody", None, (404, "unknown_belief")),
        ("POST", "/consolidate", {}, (422, "invalid_request")),
        ("POST", "/consolidate", {"keys": ["geo/0", "nobody"]}, (404, "unknown_belief")),
        ("POST", "/consolidate", {"category": "alone"}, (400, "bad_request")),
    ],
)
def test_changes_that_are_refused_change_nothing(
    changed: Running, method: str, path: str, body: Any, expected: tuple[int, str]
) -> None:
    base = changed.state.base
    revision, ids = base.store.revision, base.bank.ids()
    response = changed.ask(method, path, body, ADMIN)
    assert (response.status_code, response.json()["error"]["code"]) == expected
    assert (base.store.revision, base.bank.ids()) == (revision, ids)


def test_lists_say_what_there_is(changed: Running) -> None:
    listed = changed.ask("GET", "/beliefs", params={"limit": 2}).json()
    assert listed["count"] == 4 and [b["key"] for b in listed["beliefs"]] == ["geo/0", "geo/1"]
    rest = changed.ask("GET", "/beliefs", params={"offset": 2, "category": "geo"}).json()
    assert [b["key"] for b in rest["beliefs"]] == ["geo/2", "geo/3"]
    assert changed.ask("GET", "/beliefs", params={"category": "x"}).json()["count"] == 0
    deltas = changed.ask("GET", "/deltas").json()
    assert deltas["count"] == 4 and deltas["deltas"][0]["confidence"] == 1.0
    delta = changed.ask("GET", "/deltas/geo/0").json()
    assert delta["delta_rank"] == 1 and delta["orthogonality_score"] == 1.0
    capacity = changed.ask("GET", "/capacity").json()
    assert set(capacity["per_layer_remaining"]) == set(delta["target_layers"])
    assert capacity["total_remaining"] == 64 * len(delta["target_layers"])


def test_merging_is_all_or_nothing(changed: Running) -> None:
    base, keys = changed.state.base, ["geo/0", "geo/1"]
    tried = changed.ask("POST", "/consolidate", {"keys": keys, "dry_run": True}, ADMIN)
    assert tried.status_code == 200, tried.text
    assert tried.json()["dry_run"] and tried.json()["registry_count"] == 4
    revision = base.store.revision
    done = changed.ask("POST", "/consolidate", {"keys": keys}, ADMIN)
    assert done.status_code == 200, done.text
    # Random deltas of one rank share nothing: merging them frees nothing, and says so.
    report = done.json()["report"]
    assert not report["replaced"] and report["reason"]
    assert base.store.revision == revision and set(keys) <= set(base.store.keys())
    assert set(base.bank.ids()) == {belief.id for belief in base.snapshot.beliefs}


def test_beliefs_that_say_the_same_become_one(
    make_base: Callable[..., KnowledgeBase], random_delta: Callable[..., Any]
) -> None:
    base = make_base(count=0)
    # So small that twice of it still changes no answer.
    delta = random_delta(base.model, 0, scale=0.003)
    for number in range(2):
        base.change(lambda store, n=number: store.add_delta(f"geo/{n}", delta, fact=fact(n)))
    with running(base) as server:
        done = server.ask("POST", "/consolidate", {"category": "geo"}, ADMIN)
        assert done.status_code == 200, done.text
        assert done.json()["report"]["replaced"] and done.json()["registry_count"] == 1
        (belief,) = base.snapshot.beliefs
        assert base.bank.ids() == [belief.id] == [done.json()["report"]["belief_id"]]
        assert server.ask("GET", f"/beliefs/{belief.key}").json()["answer"] is None
        events = [e["event"] for e in server.state.log.latest(2)]
        assert events == ["change_requested", "consolidated"]


def test_the_registry_has_a_say_where_it_is_told_to(
    make_base: Callable[..., KnowledgeBase],
) -> None:
    base = make_base(count=1, enforce_registry=True)
    twin = {**FACT, "key": "cities/twin"}
    with running(base) as server:
        assert server.ask("POST", "/beliefs", FACT, ADMIN).status_code == 201
        assert len(base.registry) == 1
        # The same fact wants the same directions.
        refused = server.ask("POST", "/beliefs", twin, ADMIN)
        assert refused.status_code == 409, refused.text
        assert refused.json()["error"]["code"] == "interference"
        assert twin["key"] not in base.store and len(base.registry) == 1
        assert server.ask("DELETE", f"/beliefs/{FACT['key']}", token=ADMIN).status_code == 200
        assert len(base.registry) == 0


def test_the_log_is_a_chain_without_prompts(changed: Running) -> None:
    secret = "my own words"
    answer = changed.infer(secret, beliefs=["geo/2"])
    page = changed.ask("GET", "/provenance", token=ADMIN, params={"limit": 1}).json()
    (entry,) = page["log"]
    payload = entry["payload"]
    assert payload["request_id"] == answer["request_id"]
    assert payload["prompt_sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert [source[1] for source in payload["sources"]] == ["geo/2"]
    file = changed.state.settings.log
    assert secret not in file.read_text()
    assert verify(file).ok and page["head"]["count"] == len(file.read_text().splitlines())
    file.with_suffix(".copy").write_text(file.read_text().replace("geo/2", "geo/3"))
    changed_copy = file.with_suffix(".copy")
    changed_copy.with_name(changed_copy.name + ".head").write_bytes(
        file.with_name(file.name + ".head").read_bytes()
    )
    assert not verify(changed_copy).ok


def test_prompts_are_logged_where_that_is_asked_for(base: KnowledgeBase) -> None:
    with running(base, log_prompts=True) as server:
        server.infer("my own words")
        assert server.state.log.latest(1)[0]["payload"]["prompt"] == "my own words"


def test_with_a_key_nobody_finds_a_prompt_by_trying(base: KnowledgeBase, tmp_path: Path) -> None:
    key = b"a key of the log, long enough"
    with running(base, log=tmp_path / "log.jsonl", log_key=key) as server:
        server.infer("my own words")
        payload = server.state.log.latest(1)[0]["payload"]
    expected = hmac.new(key, b"my own words", "sha256").hexdigest()
    assert payload["prompt_hmac_sha256"] == expected and "prompt_sha256" not in payload
    assert verify(tmp_path / "log.jsonl", key=key).ok


def test_an_answer_that_leaves_no_trace_is_not_given(
    changed: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(changed.state.log._ledger, "log", full)
        for path in ("/infer", "/v1/completions"):
            response = changed.ask("POST", path, {"prompt": "a"})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "log_unavailable"
            assert "device" not in response.text
        removal = changed.ask("DELETE", "/beliefs/geo/3", token=ADMIN)
        assert removal.status_code == 503 and "geo/3" in changed.state.base.store
        assert changed.ask("GET", "/ready").status_code == 503
    changed.infer("a")
    assert changed.ask("GET", "/ready").status_code == 200


def test_a_changed_base_is_noticed_and_answers_end(
    make_base: Callable[..., KnowledgeBase],
) -> None:
    base = make_base(count=1)
    with running(base) as server:
        assert server.ask("GET", "/health").json()["status"] == "ok"
        weight = base.model.model.layers[0].mlp.down_proj.weight.data
        weight[0, 0] += 1e-3
        assert not base.verify()
        assert server.ask("GET", "/health").json()["status"] == "damaged"
        assert server.ask("GET", "/ready").status_code == 503
        assert server.ask("POST", "/infer", {"prompt": "a"}).status_code == 503
        assert "gravity_base_verified 0.0" in server.ask("GET", "/metrics").text


def test_the_base_is_verified_again_and_again(
    make_base: Callable[..., KnowledgeBase],
) -> None:
    from knowledge.server.served import until

    base = make_base(count=0)
    with running(base, verify_every_s=0.05):
        first = base.verified_at
        until(lambda: base.verified_at > first, "a verification")
        base.model.model.norm.weight.data[0] += 1
        until(lambda: not base.is_verified, "the change is noticed")


def test_metrics_count(changed: Running) -> None:
    changed.infer("a", max_new_tokens=3)
    text = changed.ask("GET", "/metrics").text
    assert 'gravity_http_requests_total{method="POST",route="/infer",status="200"}' in text
    assert "gravity_http_seconds_bucket" in text and 'gravity_tokens_total{kind="prompt"}' in text
    assert "gravity_beliefs 4.0" in text and "gravity_base_verified 1.0" in text
    # What clients make up gets no label of its own.
    changed.ask("BREW", "/teapot/1")
    text = changed.ask("GET", "/metrics").text
    assert "teapot" not in text and "BREW" not in text
    assert changed.ask("GET", "/metrics").headers["content-type"].startswith("text/plain")


def test_the_store_is_as_the_server_left_it(changed: Running) -> None:
    base = changed.state.base
    again = BeliefStore.open(base.store.path, base.model, base.tokenizer)
    assert again.keys() == [belief.key for belief in base.snapshot.beliefs]
