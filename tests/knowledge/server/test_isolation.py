"""Many clients at once: each gets the answer it would get alone, of one state of the store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from knowledge.server.served import ADMIN, Running, fact, running, solo

from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase
from gravity_hf.knowledge.server.worker import Operation
from gravity_hf.knowledge.store import BeliefStore

CLIENTS, TOKENS = 16, 6


def belief_of(client: int) -> str:
    return f"geo/{client}"


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_sixteen_clients_with_different_beliefs_get_their_solo_answers(
    base: KnowledgeBase, batch_rows: int
) -> None:
    prompts = [f"The capital of {'far ' * client}France is" for client in range(CLIENTS)]
    alone = [solo(base, p, belief_of(n), TOKENS) for n, p in enumerate(prompts)]
    text = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]
    assert len(set(text)) == CLIENTS, "beliefs change nothing"
    with running(base, batch_rows=batch_rows, active_rows=8) as server:

        def ask(client: int) -> str:
            found = server.infer(
                prompts[client], beliefs=[belief_of(client)], max_new_tokens=TOKENS
            )
            assert [s["key"] for s in found["provenance"]["sources"]] == [belief_of(client)]
            return found["text"]

        with ThreadPoolExecutor(CLIENTS) as pool:
            assert list(pool.map(ask, range(CLIENTS))) == text


def test_clients_without_beliefs_get_the_base_beside_those_with(
    served: Running, base: KnowledgeBase
) -> None:
    alone = base.tokenizer.decode(solo(base, "Who wrote", None, TOKENS), skip_special_tokens=True)

    def ask(client: int) -> dict[str, Any]:
        more = {"beliefs": [belief_of(client)]} if client % 2 else {"use_knowledge": False}
        return served.infer("Who wrote", max_new_tokens=TOKENS, **more)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    for client, answer in enumerate(found):
        assert answer["base_only"] == (client % 2 == 0)
        assert (answer["text"] == alone) == (client % 2 == 0)


def test_a_change_waits_for_texts_and_texts_wait_for_it(
    make_base: Callable[..., KnowledgeBase], random_delta: Callable[..., Any]
) -> None:
    """Texts that are written while beliefs come and go are those of one revision each."""
    base = make_base(count=1)
    belief, prompt = "geo/0", "The capital of France is"
    texts = {}
    with running(base, active_rows=4) as server, ThreadPoolExecutor(8) as pool:

        def decoded(name: str | None) -> str:
            return base.tokenizer.decode(solo(base, prompt, name, TOKENS), skip_special_tokens=True)

        texts[base.snapshot.find(belief).version] = decoded(belief)

        def change(number: int) -> None:
            def update(store: Any) -> None:
                store.update_delta(belief, random_delta(base.model, 100 + number), fact=fact(0))

            operation = Operation(lambda: base.change(update), float("inf"))
            server.state.worker.operate(operation)
            operation.future.result(60)

        asked = []
        for number in range(3):
            asked += [
                pool.submit(server.infer, prompt, beliefs=[belief], max_new_tokens=TOKENS)
                for _ in range(4)
            ]
            change(number)
            # The worker is idle for it: nobody else is being written to.
            for future in asked:
                future.result()
            version = base.snapshot.find(belief).version
            texts[version] = decoded(belief)
        answers = [future.result() for future in asked]
    seen = set()
    for answer in answers:
        (source,) = answer["provenance"]["sources"]
        assert answer["text"] == texts[source["version"]]
        assert answer["store_revision"] >= source["version"]
        seen.add(source["version"])
    assert len(texts) == 4 and len(seen) > 1


def test_what_another_process_writes_is_seen_by_the_next_text(
    make_base: Callable[..., KnowledgeBase], random_delta: Callable[..., Any]
) -> None:
    base = make_base(count=1)
    with running(base) as server:
        server.infer("France", beliefs=["geo/0"])
        other = BeliefStore.open(base.store.path, base.model, base.tokenizer)
        other.add_delta("geo/new", random_delta(base.model, 55), fact=fact(3))
        server.infer("France")
        found = server.infer("France", beliefs=["geo/new"])
        assert [s["key"] for s in found["provenance"]["sources"]] == ["geo/new"]
        other.remove("geo/0")
        server.infer("France")
        gone = server.ask("POST", "/infer", {"prompt": "France", "beliefs": ["geo/0"]})
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "unknown_belief"
        assert server.ask("GET", "/beliefs", token=ADMIN).json()["count"] == 1


def test_told_to_stop_the_server_writes_what_is_in_work_to_its_end(base: KnowledgeBase) -> None:
    with running(base, active_rows=1, shutdown_timeout_s=30.0) as server:
        body = {"prompt": "Who", "max_tokens": 100, "temperature": 0, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.server.should_exit = True
            rest = list(lines)
        assert "data: [DONE]" in rest
        server.thread.join(30)
        assert not server.thread.is_alive() and not base.bank._handles
        events = [entry["event"] for entry in server.state.log.latest(2)]
        assert events == ["answer", "stopped"]
