"""A Gradio Space: one prompt, host and gravity side by side, with a dial for the softness.

    python scripts/space/app.py                        all-MiniLM-L6-v2
    python scripts/space/app.py --model FOLDER         a language model or encoder of your own, too
    GRAVITY_SPACE_MODEL=FOLDER python scripts/space/app.py --port 7861

Everything runs on the CPU of the machine, and the page asks no other server for anything.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# Read when gradio is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import page
from answers import Answer, answer
from figures import attention_figures
from pair import MOST_TOKENS, SOFTNESSES, Dial, Pair, Unanswerable

from gravity_hf.cli.demo.minilm import HOW_TO_GET, minilm_folder
from gravity_hf.config import DISTANCES, LAWS

MINILM = "all-MiniLM-L6-v2"
FIRST = "The moon is held in its orbit by the pull of the earth."
SECOND = "Gravity keeps the moon circling our planet."
# Models of prose and of code both have something to say after it.
PROMPT = 'def gravity(mass, distance):\n    """Return the force between'
_START = SOFTNESSES.index(Dial().softness)
_MOST_WAITING = 32


def load_pairs(extra: str | None) -> dict[str, Pair]:
    """MiniLM where its package is installed, then the folder that was asked for.

    Raises:
        ValueError: neither is there, or the folder holds no host that can be shown.
    """
    folder = minilm_folder()
    pairs = {MINILM: Pair(MINILM, folder)} if folder else {}
    if extra:
        where = Path(extra).expanduser().resolve()
        pairs[where.name] = Pair(where.name, where)
    if not pairs:
        raise ValueError(f"model: expected {MINILM} or --model FOLDER, got neither. {HOW_TO_GET}")
    return pairs


def build(pairs: dict[str, Pair]) -> gr.Blocks:
    """The page. `compare` is its public endpoint; every visitor's answer is theirs alone."""
    first = next(iter(pairs.values()))
    starts = {name: warmed(pair) for name, pair in pairs.items()}

    def compare(
        name: str,
        text: str,
        other: str,
        place: float,
        law: str,
        distance: str,
        layer: float,
        head: float,
    ) -> tuple[Any, ...]:
        try:
            if not 0 <= place < len(SOFTNESSES):
                raise Unanswerable(f"softness: expected a place on the slider, got {place!r}")
            dial = Dial(SOFTNESSES[int(place)], law, distance)
            found = answer(pairs[name], text, other, dial)
        except Unanswerable as error:
            # What was answered before stays, and says for which text.
            alert = gr.HTML(page.message(str(error)), visible=True)
            return (gr.skip(), alert, *[gr.skip()] * 5)
        quiet = gr.HTML("", visible=False)
        return (found, quiet, page.results(found), *look(found, layer, head))

    def look(found: Answer | None, layer: float, head: float) -> tuple[Any, ...]:
        if found is None:
            return (gr.skip(),) * 4
        layers, heads = found.maps.host.shape[:2]
        # The sliders may already be those of a model that has not answered yet.
        at = min(max(int(layer), 0), layers - 1), min(max(int(head), 0), heads - 1)
        return (page.head_note(found, *at), *attention_figures(found.maps, *at))

    def choose(name: str) -> tuple[Any, ...]:
        pair = pairs[name]
        return (
            gr.Textbox(value=_prompt(pair), label=_label(pair)),
            gr.Textbox(visible=not pair.is_causal),
            gr.Slider(maximum=pair.layers - 1, value=starts[name][0]),
            gr.Slider(maximum=pair.heads - 1, value=starts[name][1]),
        )

    with gr.Blocks(title="Gravity attention beside its host", analytics_enabled=False) as blocks:
        gr.HTML(page.HEAD, elem_id="story")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                model = gr.Radio(
                    list(pairs), value=first.name, label="Model", visible=len(pairs) > 1
                )
                text = gr.Textbox(_prompt(first), label=_label(first), lines=2, elem_id="text")
                other = gr.Textbox(
                    SECOND,
                    label="Second sentence, to compare with",
                    visible=not first.is_causal,
                    elem_id="other",
                )
                press = gr.Button("Compare", variant="primary", elem_id="compare")
                with gr.Group():
                    place = gr.Slider(
                        0,
                        len(SOFTNESSES) - 1,
                        _START,
                        step=1,
                        label="Softness",
                        elem_id="dial",
                        buttons=[],
                    )
                    gr.HTML(page.SCALE, elem_id="scale")
            with gr.Column(scale=5, min_width=320):
                note = gr.HTML(elem_id="message", visible=False)
                results = gr.HTML(elem_id="results")
        with gr.Row():
            law = gr.Radio(list(LAWS), value="force", label="Law", min_width=220)
            distance = gr.Radio(list(DISTANCES), value="lifted", label="Distance", min_width=220)
            layer, head = (
                gr.Slider(
                    0, count - 1, start, step=1, label=label, buttons=[], elem_id=label.lower()
                )
                for label, count, start in zip(
                    ("Layer", "Head"),
                    (first.layers, first.heads),
                    starts[first.name],
                    strict=True,
                )
            )
        shown_head = gr.HTML(elem_id="shown-head")
        with gr.Row():
            plots = [
                gr.Plot(show_label=False, min_width=320, elem_id=f"{name}-map")
                for name in ("host", "gravity", "change")
            ]
        gr.HTML(page.DIAL_NOTE)
        found = gr.State()

        dial = [place, law, distance]
        inputs = [model, text, other, *dial, layer, head]
        outputs = [found, note, results, shown_head, *plots]
        # One line for everything: what was asked later is never overwritten by what was asked
        # earlier. `input` events are the visitor's own; `change` would be the page's, too.
        line: dict[str, Any] = {"concurrency_id": "line", "concurrency_limit": 1}
        hidden: dict[str, Any] = {"api_visibility": "private", **line}
        run = {"fn": compare, "inputs": inputs, "outputs": outputs, "show_progress": "minimal"}
        press.click(**run, **line, api_name="compare")
        gr.on([blocks.load, text.submit, other.submit], **run, **hidden)
        # While one answer is under way only the last position of the dial waits for the next.
        gr.on([c.input for c in dial], **run, **hidden, trigger_mode="always_last")
        gr.on(
            [layer.input, head.input],
            look,
            [found, layer, head],
            [shown_head, *plots],
            show_progress="hidden",
            trigger_mode="always_last",
            **hidden,
        )
        chosen = model.input(choose, model, [text, other, layer, head], **hidden)
        chosen.then(**run, **hidden)
    return blocks.queue(max_size=_MOST_WAITING)


def warmed(pair: Pair) -> tuple[int, int]:
    """What the first visitor would wait for: the twin of the dial's first position, and all that
    is imported on first use. Layer and head with most to show, on which the page opens."""
    found = answer(pair, _prompt(pair), SECOND, Dial())
    most = page.most_changed(found)
    for figure in attention_figures(found.maps, *most):
        figure.to_json()
    return most


def _label(pair: Pair) -> str:
    if pair.is_causal:
        return f"Prompt (at most {MOST_TOKENS} tokens)"
    return f"First sentence (at most {MOST_TOKENS} tokens)"


def _prompt(pair: Pair) -> str:
    return PROMPT if pair.is_causal else FIRST


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=os.environ.get("GRAVITY_SPACE_MODEL"),
        help="folder of a causal language model or encoder with its tokenizer; "
        "default: GRAVITY_SPACE_MODEL",
    )
    parser.add_argument("--address", help="default: 127.0.0.1, or GRADIO_SERVER_NAME")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    options = parser.parse_args(arguments)
    try:
        pairs = load_pairs(options.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    build(pairs).launch(
        server_name=options.address,
        server_port=options.port,
        # Its bold face has all letters; the half-bold one that is the default has not.
        theme=gr.themes.Default(font=[gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))]),
        css=page.CSS,
        footer_links=[],
        ssr_mode=False,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
