"""`gravity-hf`: one verb per file, errors in one line, heavy imports only inside the verbs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import (
    chat,
    evaluate,
    export,
    figures,
    generate,
    ledger,
    lm_eval,
    profile,
    push,
    serve,
    serve_model,
    status,
    support,
)
from .console import make_console
from .convert import command as convert
from .demo import command as demo
from .knowledge import fact_verbs, forging
from .knowledge import verbs as belief_verbs

EXPECTED_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError, NotImplementedError)
EXIT_EXPECTED = 2

_HELP = """
Gravity attention for Hugging Face transformers: a token attends to what is near it.

[bold]See it work[/bold] (offline, a few minutes on two CPU cores):

    gravity-hf demo

[bold]Convert a model of your own[/bold], look at the result, let it write:

    gravity-hf convert Qwen/Qwen2.5-0.5B out --text my_text.txt

    gravity-hf status out

    gravity-hf generate out "Gravity is"

    gravity-hf chat out

[bold]Look inside[/bold], and share it once the list of what goes up is right:

    gravity-hf figures out -o pictures

    gravity-hf push out me/my-gravity-model --dry-run

[bold]Run it elsewhere[/bold]: ONNX, torch.export, half precision, 8 bits:

    gravity-hf export out out-onnx --format onnx

Add --debug to any of these to see the traceback of an error.
"""


class PlainErrorGroup(TyperGroup):
    """Turns expected errors into one line and exit code 2; `--debug` may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        options = [a for a in args[:end] if a != "--debug"]
        moved = ["--debug"] if len(options) < end else []
        return super().parse_args(ctx, moved + options + args[end:])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EXPECTED_ERRORS as error:
            # click's own Exit is a RuntimeError: it carries an exit code, not a message.
            if isinstance(error, typer.Exit) or ctx.params.get("debug"):
                raise
            _say(error)
            raise typer.Exit(EXIT_EXPECTED) from error


def _say(error: BaseException) -> None:
    console = make_console(stderr=True)
    message = " ".join(str(error).split()) or type(error).__name__
    console.print("[bold red]error:[/bold red] ", end="")
    console.print(message, markup=False)


app = typer.Typer(
    name="gravity-hf",
    cls=PlainErrorGroup,
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        make_console().print(f"gravity_hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command(name="demo")(demo.demo)
app.command(name="convert")(convert.convert)
app.command(name="status")(status.status)
app.command(name="evaluate")(evaluate.evaluate)
app.command(name="profile")(profile.profile)
app.command(name="generate")(generate.generate)
app.command(name="chat")(chat.chat)
app.command(name="figures")(figures.figures)
app.command(name="export")(export.export)
app.command(name="push")(push.push)
app.command(name="support")(support.support)
app.add_typer(ledger.ledger, name="ledger")
app.command(name="lm-eval", context_settings=lm_eval.PASS_ON)(lm_eval.lm_eval)
app.add_typer(belief_verbs.beliefs, name="beliefs")
app.command(name="forge")(forging.forge)
app.add_typer(fact_verbs.facts, name="facts")
app.command(name="serve")(serve.serve)
app.command(name="serve-model", context_settings=serve_model.PASS_ON)(serve_model.serve_model)


def main() -> None:
    """Entry point of the `gravity-hf` command."""
    app()


if __name__ == "__main__":
    main()
