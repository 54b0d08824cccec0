"""A Hub on this machine for one test, and one tiny export that many tests push."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import transformers
from ecosystem.folders import saved_decoder
from hub.loopback import WRITER, LoopbackHub, loopback_hub
from huggingface_hub import constants


@dataclass
class Waits:
    """Seconds that were waited for, without the waiting."""

    seconds: list[float] = field(default_factory=list)


@contextmanager
def connected_hub() -> Iterator[LoopbackHub]:
    """The Hub that huggingface_hub speaks to in this process; the user may write.

    What is downloaded is forgotten: commits of another run may have the same ids and other content.
    """
    with (
        loopback_hub() as started,
        tempfile.TemporaryDirectory() as cache,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        template = started.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", started.url)
        # transformers keeps its client, and with it the address.
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", WRITER)
        yield started


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with connected_hub() as started:
        yield started


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Makes waiting for the Hub take no time."""
    waited = Waits()
    monkeypatch.setattr(time, "sleep", waited.seconds.append)
    return waited


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level Qwen2 under gravity with its tokenizer. Not to be written to."""
    return saved_decoder(tmp_path_factory.mktemp("exports") / "decoder")
