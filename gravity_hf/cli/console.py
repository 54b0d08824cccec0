"""What the verbs share on the screen: one console, quiet libraries, bars on terminals only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[str], None]

_PIPE_WIDTH = 120


def make_console(stderr: bool = False) -> Console:
    """A console on the current stdout or stderr; created late, so that tests can replace them."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # Pipes and logs have no width of their own; 80 would cut the tables.
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def quiet_libraries() -> None:
    """Silence transformers' load reports and bars: the verbs say themselves what happens."""
    import logging as standard_logging
    import warnings

    from transformers.utils import logging

    # Meant for whoever calls the library, not for whoever types the command.
    warnings.filterwarnings("ignore", category=FutureWarning)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Its retries would bury the one line that says what is wrong.
    standard_logging.getLogger("huggingface_hub").setLevel(standard_logging.ERROR)


@contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Advance]:
    """Yield `advance(note)`. A bar on a terminal; elsewhere one line when the work is done."""
    started = time.perf_counter()
    last = ""
    if console.is_terminal:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("[dim]{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total, note="")

            def advance(note: str = "") -> None:
                nonlocal last
                last = note
                bar.update(task, advance=1, note=note)

            yield advance
    else:

        def advance(note: str = "") -> None:
            nonlocal last
            last = note

        yield advance
    seconds = time.perf_counter() - started
    console.print(f"  {label}: {total} steps in {seconds:.0f} s" + (f", {last}" if last else ""))
