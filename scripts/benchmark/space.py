"""Seconds per answer of the Gradio Space, as a visitor of this machine waits for them.

    python scripts/benchmark/space.py
    python scripts/benchmark/space.py --model gravity_demo/host --prompts 20 --output space.json

Starts the app, asks it through gradio's own client, one question at a time. Two lines for each
model: prompts at the dial's first position, and every other position of the dial for the first
time, which calibrates a twin. Times are the client's: they include the queue, the figures and HTTP.
CPU seconds are the app's, over all its threads: on a busy machine they say more.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results import conditions
from rich.progress import track

from gravity_hf.training.files import write_json

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "scripts" / "space" / "app.py"
OTHER = "Gravity keeps the moon circling our planet."
_PLACES, _FIRST_PLACE = 7, 3
_START_SECONDS = 240


class Server(NamedTuple):
    url: str
    process: int


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """The app in a process of its own, once it answers.

    Raises:
        RuntimeError: it ended before that; the message has its last words.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, str(APP), "--address", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen([*command, *arguments], stdout=log, stderr=subprocess.STDOUT)
        try:
            if not _listens(port, process):
                log.seek(0)
                raise RuntimeError(
                    f"space: expected a server on port {port}, it ended or never answered:\n"
                    f"{log.read()[-3000:]}"
                )
            yield Server(f"http://127.0.0.1:{port}/", process.pid)
        finally:
            process.terminate()
            process.wait(30)


def _listens(port: int, process: subprocess.Popen) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def measure(client: Any, app: Any, model: str, prompts: int) -> list[dict[str, Any]]:
    """Two rows: many prompts, and every position of the dial for the first time."""

    def ask(text: str, place: int, law: str) -> tuple[float, float]:
        spent, started = _cpu_seconds(app), time.perf_counter()
        client.predict(model, text, OTHER, place, law, "lifted", 0, 0, api_name="/compare")
        return time.perf_counter() - started, _cpu_seconds(app) - spent

    texts = [f"Question {i}: why does the moon not fall down to the earth?" for i in range(prompts)]
    asked = track(texts, model, disable=not sys.stderr.isatty())
    dial = [(place, law) for law in ("force", "power") for place in range(_PLACES)]
    dial.remove((_FIRST_PLACE, "force"))
    return [
        _row(model, "prompt", [ask(text, _FIRST_PLACE, "force") for text in asked]),
        _row(model, "first use of a dial position", [ask(texts[0], *turn) for turn in dial]),
    ]


def _cpu_seconds(app: Any) -> float:
    times = app.cpu_times()
    return times.user + times.system


def _row(model: str, what: str, asked: list[tuple[float, float]]) -> dict[str, Any]:
    seconds, cpu = zip(*asked, strict=True)
    return {
        "model": model,
        "what": what,
        "answers": len(seconds),
        "median_s": round(statistics.median(seconds), 3),
        "max_s": round(max(seconds), 3),
        "cpu_median_s": round(statistics.median(cpu), 3),
        "cpu_max_s": round(max(cpu), 3),
        "seconds": [round(value, 3) for value in seconds],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a second model, as the app takes it")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args(arguments)
    # Imported here: the server's starter above is of use without them.
    import psutil
    from gradio_client import Client

    known = conditions("cpu")
    extra = ["--model", str(options.model)] if options.model else []
    known["versions"]["gradio"] = importlib.metadata.version("gradio")
    known["torch_threads"] = torch.get_num_threads()  # as in the app, from the same environment
    known["load_average"] = {"before": os.getloadavg()[0]}
    with serving(*extra) as server:
        client, app = Client(server.url, verbose=False), psutil.Process(server.process)
        described = client.view_api(print_info=False, return_format="dict")
        models = described["named_endpoints"]["/compare"]["parameters"][0]["type"]["enum"]
        rows = [row for model in models for row in measure(client, app, model, options.prompts)]
    known["load_average"]["after"] = os.getloadavg()[0]
    for row in rows:
        print(
            f"{row['model']:<20} {row['what']:<30} {row['answers']:3} answers, "
            f"median {row['median_s']:.2f} s, max {row['max_s']:.2f} s; "
            f"CPU {row['cpu_median_s']:.2f} and {row['cpu_max_s']:.2f} s"
        )
    if options.output:
        write_json(options.output, {"conditions": known, "rows": rows})


if __name__ == "__main__":
    main()
