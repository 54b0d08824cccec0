"""`gravity-hf serve-model`: transformers' server answers with the text that `generate` gives."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.commands import run
from hosts import VOCABULARY, tiny_host
from transformers import AutoModelForMaskedLM, PreTrainedModel, Qwen2Tokenizer
from transformers.utils import import_utils

from gravity_hf import LGTConfig, LGTForCausalLM, load_gravity_model, patch_with_gravity
from gravity_hf.integration.serving import servable

serve = pytest.importorskip("transformers.cli.serve")
pytestmark = pytest.mark.skipif(
    not import_utils.is_serve_available(), reason="needs gravity_hf[serve]"
)

MESSAGES = [{"role": "user", "content": "What falls?"}]
PROMPT = "Gravity is"
TOKENS = 10
SMALL = ["--cb-num-blocks", "16", "--cb-max-batch-tokens", "32"]


def ascii_tokenizer() -> Qwen2Tokenizer:
    """One token for each printable character: every text that a model writes says which it took."""
    letters = ["Ā", "Ġ", *map(chr, range(33, 127))]  # the end, the blank, and the rest
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=None, eos_token="Ā", pad_token="Ā"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<reply>"
    )
    return tokenizer


def small_host() -> PreTrainedModel:
    model = tiny_host("qwen2", num_hidden_layers=2, vocab_size=VOCABULARY - 1, eos_token_id=0)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    return model


def written(model: PreTrainedModel, text: str) -> str:
    """What the model writes after `text`, always taking the likeliest token."""
    tokenizer = ascii_tokenizer()
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    patch_with_gravity(small_host()).save_pretrained(folder)
    ascii_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """By path: the text that `generate` gives. None of it is what dot products would write."""
    model, host = load_gravity_model(folder).eval(), small_host()
    chat = ascii_tokenizer().apply_chat_template(MESSAGES, tokenize=False)
    prompts = {"/v1/completions": PROMPT, "/v1/chat/completions": chat}
    texts = {path: written(model, prompt) for path, prompt in prompts.items()}
    for path, prompt in prompts.items():
        assert texts[path] not in ("", written(host, prompt))
    return texts


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def post(url: str, body: dict[str, Any]) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def answers(url: str, folder: Path) -> dict[str, str]:
    greedy = {"model": str(folder), "temperature": 0, "max_tokens": TOKENS}
    completion = json.loads(post(f"{url}/v1/completions", {**greedy, "prompt": PROMPT}))
    chat = json.loads(post(f"{url}/v1/chat/completions", {**greedy, "messages": MESSAGES}))
    return {
        "/v1/completions": completion["choices"][0]["text"],
        "/v1/chat/completions": chat["choices"][0]["message"]["content"],
    }


def streamed(url: str, folder: Path) -> str:
    body = {"model": str(folder), "temperature": 0, "max_tokens": TOKENS, "stream": True}
    events = post(f"{url}/v1/chat/completions", {**body, "messages": MESSAGES}).split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if "{" in event]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


@contextmanager
def server(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """`gravity-hf serve-model` in a process of its own; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "gravity_hf.cli.main", "serve-model", str(folder)]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(f"http://localhost:{port}", process, log)
            yield f"http://localhost:{port}"
        finally:
            process.terminate()
            process.wait(60)


def test_the_server_writes_what_generate_writes_batching_continuously(
    folder: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """The command in its own process, with options that it passes on."""
    log = tmp_path / "server.log"
    with server(folder, log, "--continuous-batching", *SMALL) as url:
        assert answers(url, folder) == expected
        assert streamed(url, folder) == expected["/v1/chat/completions"]
    assert "CB: True" in log.read_text()


@contextmanager
def server_in_this_process(folder: Path) -> Iterator[str]:
    """As the command line calls it; yields its address."""
    port = free_port()
    with servable(folder, continuous_batching=False):
        started = serve.Serve(str(folder), device="cpu", port=port, non_blocking=True)
        try:
            while not started.server.started:
                assert started._thread.is_alive()
                time.sleep(0.05)
            yield f"http://localhost:{port}"
        finally:
            started.kill_server()


def test_the_server_writes_what_generate_writes_one_by_one(
    folder: Path, expected: dict[str, str]
) -> None:
    """Also after it has unloaded the model and loaded it again."""
    with server_in_this_process(folder) as url:
        assert answers(url, folder) == expected
        post(f"{url}/reset", {})
        assert answers(url, folder) == expected
    from transformers.cli.serving import model_manager

    assert not hasattr(model_manager.transformers, "GravityQwen2ForCausalLM")


@pytest.fixture(scope="module")
def lgt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LGT of the same vocabulary, in the folder that its tokenizer is in."""
    folder = tmp_path_factory.mktemp("lgt")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": 0, "pad_token_id": 0}
    LGTForCausalLM(LGTConfig(vocab_size=96, dim_position=4, **sizes, **ends)).save_pretrained(
        folder
    )
    ascii_tokenizer().save_pretrained(folder)
    return folder


def test_an_lgt_is_served_with_the_text_that_it_generates(lgt: Path) -> None:
    model = LGTForCausalLM.from_pretrained(lgt).eval()
    chat = ascii_tokenizer().apply_chat_template(MESSAGES, tokenize=False)
    with server_in_this_process(lgt) as url:
        found = answers(url, lgt)
    assert found["/v1/completions"] == written(model, PROMPT) != ""
    assert found["/v1/chat/completions"] == written(model, chat) != ""


def test_what_cannot_be_served_of_own_models_is_one_plain_error(lgt: Path, tmp_path: Path) -> None:
    result = run("serve-model", lgt, "--continuous-batching")
    assert result.exit_code == 2 and "Leave out --continuous-batching" in result.output
    ahead = Path(shutil.copytree(lgt, tmp_path / "ahead"))
    config = json.loads((lgt / "config.json").read_text())
    (ahead / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    result = run("serve-model", ahead)
    assert result.exit_code == 2 and "is_causal=False" in result.output


def test_a_plain_model_is_sent_to_transformers_serve(decoder: Path) -> None:
    result = run("serve-model", decoder)
    assert result.exit_code == 2
    assert "transformers serve" in result.output and "plain qwen2" in result.output


def test_a_folder_that_cannot_be_served_is_refused(encoder: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    shutil.copytree(encoder, converted)
    patch_with_gravity(AutoModelForMaskedLM.from_pretrained(encoder)).save_pretrained(converted)
    result = run("serve-model", converted)
    assert result.exit_code == 2
    assert "GravityBertForMaskedLM" in result.output
    result = run("serve-model", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "config.json" in result.output


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    for file in bare.glob("*token*"):
        file.unlink()
    result = run("serve-model", bare)
    assert result.exit_code == 2
    assert "tokenizer_config.json" in result.output


def test_another_attention_is_refused(folder: Path) -> None:
    result = run("serve-model", folder, "--attn-implementation", "sdpa")
    assert result.exit_code == 2
    assert "--attn-implementation" in result.output


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    result = run("serve-model", folder)
    assert result.exit_code == 2
    assert "gravity_hf[serve]" in result.output
