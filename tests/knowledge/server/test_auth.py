"""Who may do what: every endpoint with every kind of token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from knowledge.server.served import ADMIN, TOKEN, Running, running

from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase
from gravity_hf.knowledge.server.settings import ServerSettings

OPEN, ASK, CHANGE = "open", "ask", "admin"
# Every operation of the server, and who may use it.
OPERATIONS = {
    "GET /": OPEN,
    "GET /page/app.js": OPEN,
    "GET /page/style.css": OPEN,
    "GET /live": OPEN,
    "GET /ready": OPEN,
    "GET /health": OPEN,
    "GET /openapi.json": OPEN,
    "GET /metrics": ASK,
    "POST /infer": ASK,
    "POST /infer/base": ASK,
    "GET /beliefs": ASK,
    "GET /beliefs/{name}": ASK,
    "GET /deltas": ASK,
    "GET /deltas/{name}": ASK,
    "GET /capacity": ASK,
    "GET /v1/models": ASK,
    "GET /v1/models/{model}": ASK,
    "POST /v1/completions": ASK,
    "POST /v1/chat/completions": ASK,
    "POST /beliefs": CHANGE,
    "PATCH /beliefs/{name}": CHANGE,
    "DELETE /beliefs/{name}": CHANGE,
    "POST /consolidate": CHANGE,
    "GET /provenance": CHANGE,
}
TOKENS = {"none": None, "wrong": "not-a-token-that-is-known", "asking": TOKEN, "admin": ADMIN}


@pytest.fixture(scope="module")
def guarded(base: KnowledgeBase) -> Iterator[Running]:
    with running(base, token=TOKEN) as server:
        yield server


def refused(may: str, token: str, asks_for_one: bool) -> int | None:
    """The status that a request of the kind gets before anybody looks at what it asks."""
    if may == OPEN or token == "admin" or (may == ASK and not asks_for_one):
        return None
    if token == "asking" and asks_for_one:
        return None if may == ASK else 403
    return 401


def status(server: Running, operation: str, token: str | None) -> int:
    method, path = operation.replace("{name}", "none").replace("{model}", "none").split()
    # Refused for what is in it, if it comes that far.
    body = {"unknown": 1} if method in ("POST", "PATCH") else None
    return server.ask(method, path, body, token).status_code


def test_the_table_has_every_operation(guarded: Running) -> None:
    paths = guarded.ask("GET", "/openapi.json").json()["paths"]
    described = {
        f"{method.upper()} {path.replace(':path', '')}" for path in paths for method in paths[path]
    }
    hidden = {"GET /", "GET /page/app.js", "GET /page/style.css", "GET /openapi.json"}
    assert described == set(OPERATIONS) - hidden


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("asks_for_one", [True, False], ids=["token-set", "no-token-set"])
def test_auth_matrix(guarded: Running, served: Running, token: str, asks_for_one: bool) -> None:
    server = guarded if asks_for_one else served
    for operation, may in OPERATIONS.items():
        found, expected = (
            status(server, operation, TOKENS[token]),
            refused(may, token, asks_for_one),
        )
        if expected is None:
            assert found in (200, 404, 422), (operation, found)
        else:
            assert found == expected, (operation, found)


@pytest.mark.parametrize("header", ["Basic " + TOKEN, TOKEN, "Bearer", "Bearer é"])
def test_other_headers_are_no_token(guarded: Running, header: str) -> None:
    response = guarded.ask("GET", "/beliefs", headers={"Authorization": header.encode()})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in response.text


def test_tokens_are_compared_in_constant_time(
    guarded: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By digests of one length, in the function that is made for it."""
    from gravity_hf.knowledge.server import auth

    compared = []
    real = auth.hmac.compare_digest

    def spy(first: Any, second: Any) -> bool:
        compared.append((len(first), len(second)))
        return real(first, second)

    monkeypatch.setattr(auth.hmac, "compare_digest", spy)
    for token in ("x", TOKEN[:-1] + "?", TOKEN):
        guarded.ask("GET", "/beliefs", token=token)
    assert set(compared) == {(32, 32)} and len(compared) == 6


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", ""])
@pytest.mark.parametrize("tokens", [{}, {"token": TOKEN}, {"admin_token": ADMIN}])
def test_what_others_can_reach_needs_both_tokens(host: str, tokens: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="GRAVITY_HF_TOKEN"):
        ServerSettings(host=host, **tokens).check_bind()
    ServerSettings(host=host, token=TOKEN, admin_token=ADMIN).check_bind()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_makes_an_admin_token_of_its_own(host: str) -> None:
    settings = ServerSettings(host=host)
    settings.check_bind()
    first, second = settings.with_admin_token(), settings.with_admin_token()
    assert first.admin_token != second.admin_token and len(first.admin_token) >= 32
    assert first.admin_token not in repr(first)


@pytest.mark.parametrize("token", ["short", "with a blank in it, though", "é" * 20])
def test_weak_tokens_are_refused(token: str) -> None:
    with pytest.raises(ValueError, match="token_urlsafe"):
        ServerSettings(token=token)


def test_one_token_for_both_is_refused() -> None:
    with pytest.raises(ValueError, match="two different tokens"):
        ServerSettings(token=TOKEN, admin_token=TOKEN)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "[fe80::1]", ""])
def test_another_name_that_points_to_loopback_is_not_answered(served: Running, host: str) -> None:
    response = served.ask("GET", "/beliefs", headers={"Host": host})
    assert response.status_code in (400, 421)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_names_of_loopback_are_answered(served: Running, name: str) -> None:
    host = f"{name}:{served.port}"
    assert served.ask("GET", "/live", headers={"Host": host}).status_code == 200


def test_a_form_of_another_site_cannot_ask(served: Running) -> None:
    """A browser sends it without asking first only as text or as a form."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = served.ask(
            "POST", "/infer", content=b'{"prompt": "x"}', headers={"Content-Type": kind}
        )
        assert response.status_code == 422, kind
    preflight = served.ask("OPTIONS", "/infer", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in preflight.headers
