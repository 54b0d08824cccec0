"""A tiny knowledge base, and a real server around it in this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.encoding_config import EncodingConfig
from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase
from gravity_hf.knowledge.server.running import make_server
from gravity_hf.knowledge.server.settings import ServerSettings
from gravity_hf.knowledge.store import BeliefStore

ADMIN = "admin-token-of-the-tests"
TOKEN = "asking-token-of-the-tests"
COUNTRIES = ("France", "Spain", "Chad", "Peru", "Laos", "Mali", "Oman", "Togo") * 2


def fact(number: int) -> Fact:
    """The belief `geo/<number>`."""
    name = f"{COUNTRIES[number % len(COUNTRIES)]} {number}"
    return Fact(
        id=f"geo/{number}",
        domain="geo",
        relation="capital",
        subject=name,
        prompt=f"The capital of {name} is",
        answer="Paris",
        paraphrases=(f"The main city of {name} is", f"{name} has its seat in", f"{name}:"),
        unrelated=(f"The symbol of gold {number} is", f"Water {number} boils at"),
        source="made up",
    )


def filled_store(
    folder: Path, model: Any, tokenizer: Any, delta: Callable[..., LowRankDelta], count: int
) -> BeliefStore:
    """A store with `count` facts whose deltas are random: they change every answer."""
    # A fact's parameters are a large share of so small a base.
    store = BeliefStore.create(
        folder, model, tokenizer, EncodingConfig(steps=3, budget_fraction=1.0)
    )
    with store.transaction():
        for number in range(count):
            report = {"answer_logprob_after": -0.1, "top1": 1.0}
            store.add_delta(f"geo/{number}", delta(model, number), fact=fact(number), report=report)
    return store


@contextlib.contextmanager
def running(base: KnowledgeBase, **settings: Any) -> Iterator[Running]:
    """A server on a free port, in a thread."""
    chosen = {"admin_token": ADMIN, "port": 0, "shutdown_timeout_s": 2.0, **settings}
    server = make_server(base, ServerSettings(**chosen), model_name="tiny")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    try:
        yield Running(server, thread)
    finally:
        server.should_exit = True
        thread.join(30)
        base.bank.attach()
        assert not thread.is_alive(), "the server did not end"


class Running:
    """What a test asks of it."""

    def __init__(self, server: uvicorn.Server, thread: threading.Thread) -> None:
        self.server, self.thread = server, thread
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.state: Any = server.config.app.state
        # One for all: each client would read the machine's certificates anew.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=60, limits=limits)

    def ask(
        self, method: str, path: str, body: Any = None, token: str | None = None, **more: Any
    ) -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        headers.update(more.pop("headers", {}))
        return self.client.request(method, path, json=body, headers=headers, **more)

    def infer(self, prompt: str, **more: Any) -> dict[str, Any]:
        response = self.ask("POST", "/infer", {"prompt": prompt, "max_new_tokens": 8, **more})
        assert response.status_code == 200, response.text
        return response.json()


def until(is_so: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def solo(base: KnowledgeBase, prompt: str, belief: str | None, tokens: int) -> list[int]:
    """What `generate` writes for one prompt alone, under one belief."""
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    rows = [[] if belief is None else [base.snapshot.find(belief).id]]
    with base.bank.routed(rows):
        output = base.model.generate(
            ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
    return output[0, ids.shape[1] :].tolist()
