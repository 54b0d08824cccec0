"""The OpenAPI description is true, and nothing made up from it brings the server down."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from knowledge.server.served import ADMIN, Running, running

from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase

EXAMPLES = 3
FAST = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def fuzzed(make_base: Callable[..., KnowledgeBase]) -> Iterator[Running]:
    """A store that may be changed."""
    with running(make_base(count=3), max_new_tokens=4, timeout_s=20.0) as server:
        yield server


def test_schemathesis_finds_no_5xx_and_no_untold_status(fuzzed: Running) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        every_answer_is_described(schemathesis, operation)
    tried = {f"{operation.method.upper()} {operation.path}" for operation in operations}
    assert "POST /infer" in tried and "DELETE /beliefs/{name}" in tried and len(tried) >= 20
    assert fuzzed.ask("POST", "/infer", {"prompt": "a", "max_new_tokens": 2}).status_code == 200


def every_answer_is_described(schemathesis: Any, operation: Any) -> None:
    """Requests made up from an operation's description, and others."""
    described = schemathesis.specs.openapi.checks
    checks = [
        schemathesis.checks.not_a_server_error,
        described.status_code_conformance,
        described.response_schema_conformance,
        described.content_type_conformance,
    ]

    @given(case=operation.as_strategy())
    @FAST
    def is_described(case: Any) -> None:
        response = case.call(headers={"Authorization": f"Bearer {ADMIN}"})
        assert response.status_code < 500, (operation.path, response.text)
        case.validate_response(response, checks=checks)

    is_described()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = [
    "prompt", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "beliefs", "messages",
    "stop", "n", "stream", "max_tokens", "use_knowledge", "key", "answer", "keys", "category",
]  # fmt: skip


@pytest.mark.parametrize(
    "path", ["/infer", "/v1/completions", "/v1/chat/completions", "/consolidate", "/beliefs"]
)
def test_bodies_of_any_kind_are_answered_below_500(fuzzed: Running, path: str) -> None:
    @given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6) | JSON)
    @settings(FAST, max_examples=15)
    def is_answered(body: Any) -> None:
        with contextlib.suppress(ValueError):  # NaN has no JSON
            response = fuzzed.ask("POST", path, body, ADMIN)
            assert response.status_code < 500, response.text

    is_answered()


@given(path=st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=30))
@settings(FAST, max_examples=20)
def test_names_of_any_kind_are_answered_below_500(fuzzed: Running, path: str) -> None:
    with contextlib.suppress(httpx.InvalidURL):
        for prefix in ("/beliefs/", "/deltas/", "/v1/models/", "/"):
            response = fuzzed.ask("GET", prefix + path)
            assert response.status_code < 500, response.text
