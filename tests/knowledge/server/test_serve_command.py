"""`gravity-hf serve` in a process of its own: what it refuses, what it says, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli.commands import run
from knowledge.conftest import make_llama
from knowledge.server.served import ADMIN, TOKEN, filled_store

from gravity_hf.runtime import verify


@pytest.fixture(scope="module")
def folders(
    tokenizer: Any, random_delta: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model and its beliefs, on disk."""
    home = tmp_path_factory.mktemp("serve")
    model = make_llama()
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    from transformers import AutoTokenizer

    # As it is read back, which the digest is of.
    read = AutoTokenizer.from_pretrained(home / "model")
    filled_store(home / "kb", model, read, random_delta, 3)
    return home / "model", home / "kb"


def refused(*arguments: Any) -> str:
    """What is said, in one line."""
    result = run("serve", *arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_another_base_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-4
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders[0] / name).read_bytes())
    said = refused(tmp_path, folders[1])
    assert "model.layers.1.mlp.up_proj.weight" in said


@pytest.mark.parametrize("token", ["", TOKEN])
def test_an_address_for_others_needs_tokens(
    folders: tuple[Path, Path], token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAVITY_HF_TOKEN", token)
    assert "GRAVITY_HF_ADMIN_TOKEN" in refused(*folders, "--host", "0.0.0.0")


def test_what_is_no_model_or_no_store_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    assert "expected a model" in refused(tmp_path, folders[1])
    assert "manifest.json" in refused(folders[0], tmp_path)


def test_both_helps_say_which_server_is_which() -> None:
    assert "gravity-hf serve-model" in " ".join(run("serve", "--help").output.split())
    assert "gravity-hf serve." in " ".join(run("serve-model", "--help").output.split())


@pytest.mark.slow
def test_it_serves_and_ends_gracefully(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A text in work when it is told to stop is written to its end; the log is whole."""
    port, log, out = free_port(), tmp_path / "log.jsonl", tmp_path / "out"
    command = [sys.executable, "-m", "gravity_hf.cli.main", "serve", *map(str, folders)]
    command += ["--port", str(port), "--log", str(log), "--device", "cpu"]
    environment = {**os.environ, "GRAVITY_HF_ADMIN_TOKEN": ADMIN, "OMP_NUM_THREADS": "1"}
    with out.open("w") as sink:
        server = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server, out)
        assert ADMIN not in out.read_text()
        health = httpx.get(f"{url}/health").json()
        assert health["base_hash_verified"] and health["model"] == "model"
        assert health["routing"] == "by_name_only"
        admin = {"Authorization": f"Bearer {ADMIN}"}
        assert httpx.delete(f"{url}/beliefs/geo/0", headers=admin).status_code == 200
        body = {"prompt": "a", "max_tokens": 100, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "data: [DONE]" in rest
        assert server.wait(30) in (0, -signal.SIGTERM)
    finally:
        if server.poll() is None:
            server.kill()
    assert verify(log).ok
    assert '"stopped"' in log.read_text().splitlines()[-1]


def test_an_admin_token_that_nobody_gave_is_shown_once(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from gravity_hf.cli.serve import _say
    from gravity_hf.knowledge.server.opening import open_knowledge
    from gravity_hf.knowledge.server.settings import ServerSettings

    base = open_knowledge(*folders, device="cpu")
    settings = ServerSettings().with_admin_token()
    _say(base, settings, is_made=True)
    said = capsys.readouterr().out
    assert said.count(settings.admin_token) == 1 and "by name only" in said
    _say(base, settings, is_made=False)
    assert settings.admin_token not in capsys.readouterr().out
    base.close()


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(url: str, process: subprocess.Popen, out: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail(f"the server did not start:\n{out.read_text()[-3000:]}")
