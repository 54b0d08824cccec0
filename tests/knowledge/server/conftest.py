"""One small knowledge base for all tests of the server, which leave it as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs gravity_hf[serve]")
pytest.importorskip("prometheus_client", reason="needs gravity_hf[serve]")

from knowledge.conftest import make_llama  # noqa: E402
from knowledge.server.served import Running, filled_store, running  # noqa: E402

from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase  # noqa: E402

BELIEFS = 16


@pytest.fixture(scope="session")
def make_base(
    tokenizer: Any, random_delta: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., KnowledgeBase]:
    """`make_base(count=16, **KnowledgeBase's arguments)`: a store of its own, on a model of its
    own."""

    def make(count: int = BELIEFS, **arguments: Any) -> KnowledgeBase:
        folder = tmp_path_factory.mktemp("knowledge") / "kb"
        store = filled_store(folder, make_llama(), tokenizer, random_delta, count)
        return KnowledgeBase(store, **{"route_threshold": 0.5, **arguments})

    return make


@pytest.fixture(scope="session")
def base(make_base: Callable[..., KnowledgeBase]) -> KnowledgeBase:
    return make_base()


@pytest.fixture(scope="session")
def served(base: KnowledgeBase) -> Iterator[Running]:
    """A server that tests only ask."""
    with running(base) as server:
        yield server
