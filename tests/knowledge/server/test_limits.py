"""Oversize, slow and malformed requests are refused; nobody holds the server for long."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from knowledge.server.served import ADMIN, Running, running, solo, until

from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase


@pytest.fixture(scope="module")
def strict(base: KnowledgeBase) -> Iterator[Running]:
    """Everything small."""
    with running(
        base,
        max_body_bytes=2000,
        max_prompt_chars=200,
        max_prompt_tokens=40,
        max_new_tokens=60,
        max_beliefs=2,
        max_choices=2,
        active_rows=1,
        queue=1,
        timeout_s=20.0,
        header_timeout_s=0.3,
        body_timeout_s=0.3,
        send_timeout_s=0.3,
    ) as server:
        yield server


def code(response: Any) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) >= {"code", "message", "type", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return response.status_code, error["code"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "x" * 201}, (413, "too_large")),
        ({"prompt": "é" * 50}, (413, "too_large")),
        ({"prompt": "a", "max_new_tokens": 61}, (422, "invalid_request")),
        ({"prompt": "a", "max_new_tokens": 0}, (422, "invalid_request")),
        ({"prompt": "a", "max_new_tokens": -1}, (422, "invalid_request")),
        ({"prompt": "a", "max_new_tokens": "9"}, None),
        ({"prompt": "a", "temperature": 2.5}, (422, "invalid_request")),
        ({"prompt": "a", "temperature": -0.1}, (422, "invalid_request")),
        ({"prompt": "a", "top_p": 0}, (422, "invalid_request")),
        ({"prompt": "a", "top_k": 1001}, (422, "invalid_request")),
        ({"prompt": "a", "seed": -1}, (422, "invalid_request")),
        ({"prompt": "a", "unknown": 1}, (422, "invalid_request")),
        ({"prompt": ""}, (422, "invalid_request")),
        ({"prompt": None}, (422, "invalid_request")),
        ({}, (422, "invalid_request")),
        ([], (422, "invalid_request")),
        ({"prompt": "a", "beliefs": ["geo/1", "geo/2", "geo/3"]}, (422, "invalid_request")),
        ({"prompt": "a", "beliefs": ["geo/1"], "use_knowledge": False}, (422, "invalid_request")),
        ({"prompt": "a", "beliefs": ["nobody"]}, (404, "unknown_belief")),
        ({"prompt": "a", "beliefs": ["../../etc/passwd"]}, (422, "invalid_request")),
        ({"prompt": "a", "min_confidence": 0.5}, (409, "not_calibrated")),
    ],
)
def test_what_is_out_of_bounds_is_refused(
    strict: Running, body: Any, expected: tuple[int, str] | None
) -> None:
    response = strict.ask("POST", "/infer", body)
    if expected is None:
        assert response.status_code in (200, 422)
    else:
        assert code(response) == expected


def test_more_than_the_model_reads_is_refused(served: Running) -> None:
    response = served.ask("POST", "/infer", {"prompt": "a" * 100, "max_new_tokens": 120})
    assert code(response) == (422, "context_length_exceeded")


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b'{"prompt": NaN}', b'{"prompt": "a", "temperature": NaN}', b"\xff\xfe", b'"a"',
     b'{"prompt": "\\ud800"}', b"[" * 1500, b'{"prompt": 1e999}'],
)  # fmt: skip
def test_what_is_no_request_is_refused(strict: Running, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = strict.ask("POST", "/infer", content=content, headers=headers)
    assert response.status_code in (400, 422)
    assert code(response)[1] in ("bad_request", "invalid_request")


def test_a_body_that_is_too_long_is_refused_before_it_is_read(strict: Running) -> None:
    assert code(strict.ask("POST", "/infer", {"prompt": "x" * 3000})) == (413, "too_large")
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as client:
        client.sendall(head("Content-Length: 10000000000"))
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_without_a_length_is_counted(strict: Running) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 100

    response = strict.ask("POST", "/infer", content=pieces())
    assert code(response) == (413, "too_large")


def head(*lines: str) -> bytes:
    first = ["POST /infer HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    return "\r\n".join([*first, *lines, "", ""]).encode()


def test_a_slow_body_is_answered_408(strict: Running) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as client:
        client.sendall(head("Content-Length: 100") + b'{"prompt"')
        answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()


def closed_within(client: socket.socket, seconds: float, drip: Callable[[], None]) -> bool:
    """Whether the server ends the connection while a client goes on sending."""
    deadline = time.monotonic() + seconds
    client.settimeout(0.05)
    while time.monotonic() < deadline:
        try:
            drip()
            if client.recv(1000) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


@pytest.mark.parametrize("begun", [b"", b"POST /infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_slow_headers_end_the_connection(strict: Running, begun: bytes) -> None:
    """One byte after the other does not start the clock anew."""
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as client:
        client.sendall(begun)

        def drip() -> None:
            if begun:
                client.sendall(b"X")

        assert closed_within(client, 10, drip)


def test_a_second_request_on_a_connection_has_the_same_time(strict: Running) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as client:
        client.sendall(b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /live HTTP/1.1\r\n")
        assert closed_within(client, 10, lambda: client.sendall(b"X"))


def test_headers_without_end_are_refused(strict: Running) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as client:
        client.sendall(b"GET /live HTTP/1.1\r\nX: " + b"y" * 100_000)
        assert b"400" in client.recv(100)


class Stalled:
    """Texts wait as long as this is open."""

    def __init__(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        decoder = server.state.worker._decoder
        step = decoder.step

        def slow() -> Any:
            if not self.gate.is_set():
                time.sleep(0.01)
                return []
            return step()

        monkeypatch.setattr(decoder, "step", slow)


@pytest.fixture
def stalled(strict: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stalled]:
    found = Stalled(strict, monkeypatch)
    yield found
    found.gate.set()
    until(lambda: strict.state.worker.load == (0, 0), "the server is idle")


def test_more_than_the_queue_holds_is_answered_429(strict: Running, stalled: Stalled) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = []
        for load in ((0, 1), (1, 1)):
            asked.append(pool.submit(strict.infer, "a"))
            until(lambda load=load: strict.state.worker.load == load, f"load {load}")
        refused = strict.ask("POST", "/infer", {"prompt": "a"})
        assert code(refused) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        removal = strict.ask("DELETE", "/beliefs/geo/1", token=ADMIN)
        assert code(removal) == (429, "queue_full")
        stalled.gate.set()
        assert [len(future.result()["text"]) > 0 for future in asked] == [True, True]


@pytest.mark.parametrize("when", ["whole", "stream", "stream-before-its-first-piece"])
def test_a_client_that_leaves_frees_its_row(
    strict: Running, stalled: Stalled, base: KnowledgeBase, when: str
) -> None:
    prompt = next(p for p in "abcdefgh" if begins_with_text(base, p))
    body = {"prompt": prompt, "temperature": 0, "use_knowledge": False}
    if when == "whole":
        path, body = "/infer", body | {"max_new_tokens": 60}
    else:
        path, body = "/v1/completions", body | {"stream": True, "max_tokens": 60}
    if when == "stream-before-its-first-piece":
        # What could be the beginning of a stop string is held back.
        first = base.tokenizer.decode(solo(base, prompt, None, 1))
        body["stop"] = [first + "never"]
    sent = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as client:
        request = head(f"Content-Length: {len(sent)}").replace(b"/infer", path.encode())
        client.sendall(request + sent)
        until(lambda: strict.state.worker.load == (0, 1), "the text is begun")
        if when == "stream":
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
    until(lambda: strict.state.worker.load == (0, 0), "the row is free", 10)
    (entry,) = strict.state.log.latest(1)
    assert entry["payload"]["finish_reason"] == "cancelled"


def begins_with_text(base: KnowledgeBase, prompt: str) -> bool:
    """Whether the first token is a whole character."""
    first = base.tokenizer.decode(solo(base, prompt, None, 1), skip_special_tokens=True)
    return first.isascii() and bool(first)


def test_a_text_past_its_time_is_answered_504_and_stopped(
    base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(base, timeout_s=0.3, active_rows=1) as server:
        stalled = Stalled(server, monkeypatch)
        first = server.ask("POST", "/infer", {"prompt": "a"})
        assert code(first) == (504, "timeout")
        until(lambda: server.state.worker.load == (0, 0), "the row is free")
        prompt = next(p for p in "abcdefgh" if begins_with_text(base, p))
        stream = {"prompt": prompt, "stream": True, "max_tokens": 60, "temperature": 0}
        stream["use_knowledge"] = False
        found = server.ask("POST", "/v1/completions", stream)
        # Its first token was written before the others took too long.
        assert found.status_code == 200 and '"code": "timeout"' in found.text
        stalled.gate.set()
        assert server.ask("POST", "/infer", {"prompt": "a", "max_new_tokens": 2}).status_code == 200


def test_refusals_do_not_repeat_what_was_sent(strict: Running) -> None:
    response = strict.ask("POST", "/infer", {"prompt": ["my secret"], "other secret": 1})
    assert response.status_code == 422 and "my secret" not in response.text


def test_an_unforeseen_error_says_nothing_of_itself(
    strict: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: Any) -> Any:
        raise RuntimeError("a path: /home/somebody")

    monkeypatch.setattr(strict.state.base.selector, "select", breaks)
    response = strict.ask("POST", "/infer", {"prompt": "a"})
    assert code(response) == (500, "internal_error") and "somebody" not in response.text


def test_what_is_not_there_is_said_in_the_same_form(strict: Running) -> None:
    assert code(strict.ask("GET", "/nowhere")) == (404, "not_found")
    assert code(strict.ask("PUT", "/infer", {})) == (405, "method_not_allowed")


def test_a_clients_own_request_id_is_kept_if_it_is_plain(strict: Running) -> None:
    kept = strict.ask("GET", "/live", headers={"X-Request-ID": "abc-1.2"})
    assert kept.headers["x-request-id"] == "abc-1.2"
    odd = strict.ask("GET", "/live", headers={"X-Request-ID": "a b\t<c>"})
    assert odd.headers["x-request-id"] != "a b\t<c>"


@pytest.mark.parametrize("name", ["queue", "timeout_s", "max_body_bytes", "batch_rows"])
def test_bounds_have_a_least(name: str) -> None:
    from gravity_hf.knowledge.server.settings import ServerSettings

    with pytest.raises(ValueError, match=rf"ServerSettings\.{name}: expected at least"):
        ServerSettings(**{name: 0})


def test_a_client_that_takes_nothing_is_given_up() -> None:
    """Sending waits for the client; not for ever."""
    anyio = pytest.importorskip("anyio")
    from starlette.responses import StreamingResponse

    from gravity_hf.knowledge.server.limits import Limits
    from gravity_hf.knowledge.server.settings import ServerSettings

    ended, seen = [], []

    async def pieces() -> Any:
        try:
            for _ in range(3):
                yield b"piece"
        finally:
            ended.append(True)

    async def receive() -> dict[str, Any]:
        if not seen:
            seen.append(True)
            return {"type": "http.request", "body": b""}
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            await anyio.sleep_forever()

    counted: list[tuple[Any, ...]] = []
    app = Limits(
        StreamingResponse(pieces()),
        ServerSettings(send_timeout_s=0.05),
        None,
        lambda *call: counted.append(call),
    )
    scope = {"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.3"}}
    anyio.run(app, scope, receive, send)
    assert ended == [True] and counted[0][:3] == ("GET", "unknown", 200)
