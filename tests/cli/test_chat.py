"""`gravity-hf chat`: what is shown, remembered, forgotten, refused; in pipes, at a terminal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cli.chat_cases import TEMPLATE, in_terminal, save_reciter
from cli.commands import run
from cli.conversions import save_decoder
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from gravity_hf import gravity_lora, patch_with_gravity
from gravity_hf.cli.chat_history import ChatHistory, TextHistory
from gravity_hf.cli.main import app
from gravity_hf.cli.terminal import terminal_safe, typed_text
from gravity_hf.training.tokenizers import byte_tokenizer

LIKELIEST = ("--temperature", 0)
# An escape sequence, a bell, a carriage return and an é, of bytes that are all different.
WILD = "\x1b[2Jx\x07\r=é"
TAME = "␛[2Jx␇␍=é"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_reciter(root / "plain", "fal ")
    save_reciter(root / "talks", "yes\0", template=TEMPLATE)
    save_reciter(root / "wild", WILD)
    save_decoder(root / "host")
    return root


def typed(folder: Path, lines: str, *options: object) -> Result:
    return CliRunner().invoke(app, ["chat", str(folder), *map(str, options)], input=lines)


def test_a_prompt_is_answered_and_nothing_else_printed(models: Path) -> None:
    result = run("chat", models / "plain", "--prompt", "?", "--max-new-tokens", 7, *LIKELIEST)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "fal fal\n", "")


def test_every_line_of_a_pipe_is_answered_until_it_says_quit(models: Path) -> None:
    lines = "?\n/reset\n/oops\n\n/quit\n?\n"
    result = typed(models / "plain", lines, "--max-new-tokens", 3, *LIKELIEST)
    assert (result.exit_code, result.stdout) == (0, "fal\nfal\n")
    assert "forgotten" in result.stderr and "/oops" in result.stderr


def test_control_characters_of_a_model_are_shown_not_sent(models: Path) -> None:
    count = len(WILD.encode())
    options = ("--prompt", "?", *LIKELIEST, "--max-new-tokens")
    assert run("chat", models / "wild", *options, count).stdout == f"{TAME}\n"
    # One token less ends within the é.
    assert run("chat", models / "wild", *options, count - 1).stdout == f"{TAME[:-1]}\n"


def test_what_is_shown_is_safe_in_any_encoding() -> None:
    assert terminal_safe("a\r\nb\tc\x7f\x9b\u202e") == "a\nb\tc␡<U+009B><U+202E>"
    assert terminal_safe("é\x1b", "ascii") == "??"
    assert typed_text(b"a\xff".decode("utf-8", "surrogateescape")) == "a\ufffd"


def test_a_chat_is_told_with_its_turns_and_forgets_the_oldest() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    history = ChatHistory(tokenizer, room=len("u:b|a:2|u:c|a:"))

    def told(question: str) -> tuple[str, int]:
        prompt = history.ask(question)
        return tokenizer.decode(list(prompt.ids)), prompt.dropped

    assert told("a") == ("u:a|a:", 0)
    history.answered("1", [49])
    assert told("b") == ("u:a|a:1|u:b|a:", 0)
    with pytest.raises(ValueError, match="at most 14 tokens.*got 24"):
        history.ask("x" * 19)
    history.ask("b")
    history.answered("2", [50])
    assert told("c") == ("u:b|a:2|u:c|a:", 1)
    history.answered("", [])  # stopped before the first word: as if it had not been asked
    assert told("d") == ("u:b|a:2|u:d|a:", 0)
    history.reset()
    assert told("e") == ("u:e|a:", 0)


def test_a_text_goes_on_line_by_line_and_loses_its_beginning() -> None:
    tokenizer = byte_tokenizer()
    history = TextHistory(tokenizer, room=6)

    def told(line: str) -> tuple[str, int]:
        prompt = history.ask(line)
        return tokenizer.decode(list(prompt.ids)), prompt.cut

    assert told("") == ("\n", 0)
    assert told("ab") == ("ab", 0)
    history.answered("cd", list(b"cd"))
    assert told("e") == ("abcd\ne", 0)
    history.answered("f", list(b"f"))
    assert told("") == ("bcd\nef\n"[-6:], 2)
    history.reset()
    assert told("12345678") == ("345678", 2)


def test_what_a_chat_forgets_is_said(models: Path) -> None:
    question = "x" * 20
    result = typed(models / "talks", f"{question}\n" * 3, "--max-new-tokens", 8, *LIKELIEST)
    assert (result.exit_code, result.stdout) == (0, "yes\n" * 3), result.output
    assert result.stderr == "(forgot the oldest turn: the model's window is full)\n"


def test_a_message_that_never_fits_is_refused(models: Path) -> None:
    result = run("chat", models / "talks", "--prompt", "x" * 70)
    assert result.exit_code == 2 and result.stdout == ""
    assert "at most 32 tokens" in result.stderr and "--max-new-tokens" in result.stderr


def test_a_seed_draws_the_same_answers_and_leaves_the_random_state(models: Path) -> None:
    options = ("--max-new-tokens", 12, "--temperature", 2, "--top-k", 100_000)
    state = torch.get_rng_state()
    first = typed(models / "host", "def\n/reset\ndef\n", *options)
    assert first.exit_code == 0, first.output
    again = typed(models / "host", "/seed 1\ndef\n/reset\n/seed 0\ndef\n", *options)
    one, other = first.stdout.splitlines()[0], again.stdout.splitlines()[-1]
    assert one == other and first.stdout != again.stdout
    assert torch.equal(torch.get_rng_state(), state)


def test_a_converted_model_and_its_adapter_answer_as_generate_does(
    models: Path, tmp_path: Path
) -> None:
    model = patch_with_gravity(AutoModelForCausalLM.from_pretrained(models / "host"))
    adapted = gravity_lora(model, r=2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path)
    options = ("--max-new-tokens", 16, *LIKELIEST)
    answers = []
    for folder in (models / "host", tmp_path):
        answers.append(run("chat", folder, "--prompt", "def fall", *options).stdout)
    assert answers[0] != answers[1]
    generated = run("generate", tmp_path, "def fall", *options).stdout
    assert terminal_safe(generated.removeprefix("def fall")).rstrip("�\n") == answers[1].rstrip(
        "�\n"
    )


def test_what_cannot_chat_is_refused_in_one_line(encoder: Path) -> None:
    for where, words in ((encoder, "causal language model"), ("./nowhere", "there is none at")):
        result = run("chat", where, "--prompt", "x")
        assert result.exit_code == 2 and result.stdout == ""
        assert words in result.stderr and "Traceback" not in result.output
    assert "more than 0" in run("chat", encoder, "--top-p", 0).stderr


def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(models: Path) -> None:
    folder = save_reciter(models / "endless", "fal ", window=1_000_000)
    with in_terminal("chat", folder, "--max-new-tokens", 400_000, *LIKELIEST) as (
        terminal,
        process,
    ):
        assert "Qwen2ForCausalLM, 0.2 M parameters" in terminal.until("> ")
        terminal.type("drop\n")
        terminal.until("fal fal fal")
        terminal.type("\x03")
        assert "(stopped)" in terminal.until("\n> ")
        terminal.wait_until_it_reads()
        terminal.type("\x03")
        assert "Ctrl-D leaves" in terminal.until("leaves\x1b[0m\r\n> ")
        terminal.type("/help\n")
        assert "/reset" in terminal.until("\n> ")
        terminal.type("\x04")
        shown = terminal.rest()
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, shown
    assert "Traceback" not in shown and "\ufffd" not in shown
