"""`gravity-hf chat`: talk with a language model, or write a text together with it."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .console import make_console, quiet_libraries
from .hosts import require_causal
from .terminal import terminal_safe, typed_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .chat_answers import Answer, Answerer
    from .chat_history import Prompt

_COMMAND = re.compile(r"/([a-zA-Z]+)(?:\s+(.*))?$")
_HELP = """\
/reset      forget what was said
/seed N     draw other answers, the same ones for the same N
/help       this list
/quit       leave; so do /exit and Ctrl-D
Ctrl-C stops an answer. A line that begins with a space is never a command."""


def chat(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Folder of a language model or adapter, or its name on the Hub.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and leave; only the answer is printed.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 400,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.7,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw from the likeliest K tokens only; 0: from all.")
    ] = 40,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens of this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same answers.")] = 0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Precision of the model; auto: as it was saved."),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="auto (CUDA where there is one), cpu, cuda:1, mps, ...")
    ] = "auto",
) -> None:
    """Talk with the language model in DIR; its answers appear as they are written.

    Any causal model: converted, gravity from the start, or an ordinary one. Where the tokenizer has
    no chat template, both sides write on one text, line by line; an empty line lets the model go
    on by itself. What no longer fits into the model's window is forgotten, and said so. With a file
    or a pipe as input every line gets an answer; only answers go to standard output.

    Examples:

        gravity-hf chat out

        gravity-hf chat out --prompt "Gravity is" --max-new-tokens 50 --temperature 0
    """
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"--top-p: expected more than 0 and at most 1, got {top_p}")
    from ..training.any_model import load_any_model, load_any_tokenizer
    from .chat_answers import Answerer, Sampling

    require_causal(Path(directory).expanduser(), "chat")
    quiet_libraries()
    with make_console(stderr=True).status(f"loading {terminal_safe(directory)}"):
        model = load_any_model(directory, dtype, None if device == "auto" else device)
        _require_writer(model)
        tokenizer = load_any_tokenizer(directory)
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens)
    talk = Talk(Answerer(model, tokenizer, sampling, seed), tokenizer)
    if prompt is not None:
        talk.say(typed_text(prompt))
        return
    if talk.at_terminal:
        _introduce(directory, model, tokenizer)
    talk.run()


def _require_writer(model: PreTrainedModel) -> None:
    is_decoder = model.main_input_name == "input_ids" and not model.config.is_encoder_decoder
    if not (is_decoder and hasattr(model, "generate") and model.can_generate()):
        raise ValueError(
            f"chat: expected a causal language model, got {type(model).__name__}. "
            "Use it in Python, with its transformers class"
        )


def _introduce(directory: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from .chat_answers import window_of

    window = window_of(model)
    seen = "" if window is None else f", {window} tokens at once"
    count = sum(parameter.numel() for parameter in model.parameters())
    console = make_console()
    console.print(terminal_safe(directory), style="bold", markup=False, end="")
    console.print(
        f": {type(model).__name__}, {count / 1e6:,.1f} M parameters on {model.device}{seen}",
        markup=False,
    )
    how = (
        "in its chat template" if tokenizer.chat_template else "no chat template: one text goes on"
    )
    console.print(f"{how}; /help shows what else can be typed", style="dim")


class Talk:
    """Lines in, answers out. Answers go to standard output, what is said about them beside it."""

    def __init__(self, answerer: Answerer, tokenizer: PreTrainedTokenizerBase) -> None:
        from .chat_history import history_of

        self._answerer = answerer
        self._history = history_of(tokenizer, answerer.room)
        self._is_chat = bool(tokenizer.chat_template)
        self._console = make_console()
        self._notes = make_console(stderr=True)
        # Else the `> ` of `input` would go to the file.
        self.at_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Until the input ends, or somebody leaves."""
        if self.at_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  (arrow keys and earlier lines, for `input`)
        while (line := self._next_line()) is not None:
            command = _COMMAND.match(line)
            if command is None:
                self._try(line)
            elif not self._obey(command[1].lower(), command[2]):
                return

    def say(self, text: str) -> None:
        """Answer `text`. ValueError where the model cannot be asked that."""
        asked = self._history.ask(text)
        self._answerer.require_known(asked.ids)
        self._note_what_was_lost(asked)
        answer = self._answerer.answer(asked.ids, self._show)
        self._history.answered(answer.text, answer.ids)
        self._console.out("")
        self._note_the_end(answer)
        if answer.stopped and not self.at_terminal:
            raise KeyboardInterrupt

    def _try(self, text: str) -> None:
        if self._is_chat and not text.strip():
            return
        try:
            self.say(text)
        except ValueError as error:
            if not self.at_terminal:
                raise
            self._note(f"error: {error}")

    def _next_line(self) -> str | None:
        while True:
            try:
                return typed_text(input("> " if self.at_terminal else ""))
            except EOFError:
                if self.at_terminal:
                    self._console.out("")
                return None
            except KeyboardInterrupt:
                if not self.at_terminal:
                    raise
                self._console.out("")
                self._note("/quit or Ctrl-D leaves")

    def _obey(self, name: str, value: str | None) -> bool:
        """Whether the talk goes on."""
        if name in ("quit", "exit"):
            return False
        if name == "reset":
            self._history.reset()
            self._note("forgotten")
        elif name == "seed" and value is not None and value.strip().isdecimal():
            self._answerer.seed = int(value)
            self._note(f"seed {self._answerer.seed}")
        elif name == "help":
            self._note(_HELP)
        else:
            wrong = f"/{name} {value or ''}".strip()
            self._note(f"expected /reset, /seed N, /help or /quit, got {wrong}")
        return True

    def _show(self, text: str) -> None:
        self._console.out(terminal_safe(text, self._console.encoding), end="", highlight=False)

    def _note(self, text: str) -> None:
        safe = terminal_safe(text, self._notes.encoding)
        self._notes.out(safe, style="dim", highlight=False)

    def _note_what_was_lost(self, asked: Prompt) -> None:
        if asked.dropped:
            turns = "turn" if asked.dropped == 1 else f"{asked.dropped} turns"
            self._note(f"(forgot the oldest {turns}: the model's window is full)")
        if asked.cut:
            tokens = "token" if asked.cut == 1 else f"{asked.cut} tokens"
            self._note(f"(forgot the oldest {tokens}: the model's window is full)")

    def _note_the_end(self, answer: Answer) -> None:
        if answer.stopped:
            self._note("(stopped)")
        elif self.at_terminal and not answer.text:
            self._note("(the model wrote nothing)")
        elif self.at_terminal and self._is_chat and not answer.is_whole:
            self._note("(cut off: --max-new-tokens, or the model's window)")
