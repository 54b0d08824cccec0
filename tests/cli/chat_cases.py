"""Shared by the tests of chats: models whose every next token is known, and a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from gravity_hf.cli.main import app
from gravity_hf.training.tokenizers import BYTES, byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role[0] + ':' + message.content + '|' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
_PATIENCE = 60.0  # seconds


def save_reciter(folder: Path, text: str, *, template: str | None = None, window: int = 64) -> Path:
    """A Qwen2 that writes the bytes of `text`, which are all different, round and round.

    After any other byte it writes the first of them. Its layer adds nothing, so that the next token
    depends on the last one alone.
    """
    config = Qwen2Config(
        vocab_size=BYTES,
        hidden_size=BYTES,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=window,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    written = text.encode()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(BYTES))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[written[0]] = 9.0
        for last, following in zip(written, written[1:] + written[:1], strict=True):
            model.lm_head.weight[:, last] = 0.0
            model.lm_head.weight[following, last] = 9.0
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


class Terminal:
    """What a process shows on a terminal, and what is typed there."""

    def __init__(self, file: int, process: int) -> None:
        self._file = file
        self._process = psutil.Process(process)
        self.shown = b""

    def type(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def wait_until_it_reads(self) -> None:
        """Until the process sleeps. Between its prompt and that, readline loses a Ctrl-C until the
        next key is pressed, which nobody's fingers are fast enough to see."""
        end = time.monotonic() + _PATIENCE
        while self._process.status() != psutil.STATUS_SLEEPING:
            if time.monotonic() > end:
                raise TimeoutError(f"expected a process that reads, got {self._process.status()}")
            time.sleep(0.01)

    def until(self, wanted: str) -> str:
        """What comes from here on, until `wanted` is in it."""
        found, end = b"", time.monotonic() + _PATIENCE
        while wanted.encode() not in found:
            if not select.select([self._file], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"expected {wanted!r} on the terminal, got {found!r}")
            try:
                found += os.read(self._file, 4096)
            except OSError as error:  # how Linux says that the other side is closed
                self.shown += found
                raise EOFError(f"expected {wanted!r} before the end, got {found!r}") from error
        self.shown += found
        return found.decode()

    def rest(self) -> str:
        with contextlib.suppress(EOFError):
            self.until("\0")
        return self.shown.decode()


@contextlib.contextmanager
def in_terminal(*arguments: object) -> Iterator[tuple[Terminal, int]]:
    """The command line in a process of its own at a terminal: there, its id.

    The process is a copy of this one, which has all libraries loaded.
    """
    process, file = pty.fork()
    if not process:
        _run_and_leave([str(argument) for argument in arguments])
    try:
        yield Terminal(file, process), process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)
        os.close(file)


def _run_and_leave(arguments: list[str]) -> None:
    """Never returns to the test whose copy this is."""
    code = 70
    try:
        # OpenMP's threads stayed behind in the process that was copied.
        torch.set_num_threads(1)
        os.environ["TERM"] = "xterm"
        sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, (0, 1, 2), ("r", "w", "w"))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        app(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 70
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
