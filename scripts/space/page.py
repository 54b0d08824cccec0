"""The parts of the page that are plain HTML. All text of visitors and models is escaped."""

from __future__ import annotations

from html import escape

from answers import Answer, Side
from pair import SOFTNESSES

HEAD = """
<h1>The same model twice: attention by dot product, attention by gravity</h1>
<p>Nothing is trained here. Both sides run <b>the same weights</b>. In the host a token attends to
what is <i>aligned</i> with it; under gravity to what is <i>near</i> it. <b>Softness</b> is the
dial between the two: 0 is bare gravity, 64 is almost the host.</p>
"""

DIAL_NOTE = """
<p class="note"><b>How to read the dial.</b> The score is M²/(d²&nbsp;+&nbsp;ε) under the force law,
−M²·ln(d²&nbsp;+&nbsp;ε) under the power law; the softening ε is f times the typical squared
distance of a head. The larger f, the less a near token is favoured over a far one (contrast falls
to 1) and the closer gravity comes to the host. Masses M, softenings and key radii are set in closed
form from a little text, anew for every position of the dial. Lifted keys all lie on one sphere;
euclidean distance also counts how long a key is, which no softness takes out.</p>
"""

# By place on the slider.
SCALE = (
    '<div class="scale" aria-hidden="true">'
    + "".join(f"<span>{label}</span>" for label in ("0", "1/16", "1/4", "1", "4", "16", "64"))
    + '</div><div class="ends"><span>bare gravity</span>'
    + "<span>almost the host (lifted keys)</span></div>"
)

CSS = """
.gradio-container { max-width: 1380px !important; margin: 0 auto !important; }
#story h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .35rem; }
#story p { margin: 0; max-width: 62rem; line-height: 1.45; }
.note { font-size: .82rem; line-height: 1.4; margin: 0; }
.note, .ends, .tile small, .side h3 small, .written s { color: var(--body-text-color);
  opacity: .72; }
#dial .tab-like-container, #dial .min_value, #dial .max_value { display: none; }
#scale { padding: 0 var(--block-padding) .5rem; background: var(--block-background-fill); }
#scale .html-container { padding: 0; }
.scale, .ends { display: flex; justify-content: space-between; font-size: .8rem; }
.scale span { width: 1rem; display: flex; justify-content: center; white-space: nowrap; }
.ends { margin-top: .1rem; }
#message .alert { border: 1px solid #c98a1b; border-left-width: 5px; border-radius: 6px;
  padding: .55rem .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .6rem; }
.tile, .side { border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-primary); padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.tile span { font-size: .82rem; font-weight: 600; }
.tile small { display: block; line-height: 1.3; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr));
  gap: .6rem; margin-top: .6rem; }
.side { border-top: 4px solid var(--hue); min-width: 0; }
.side.host { --hue: #5b7fd6; } .side.gravity { --hue: #d98a1b; }
.side h3 { margin: 0 0 .4rem; font-size: 1rem; }
.side h3 small { font-weight: 400; }
.bar { margin: .3rem 0; font-size: .88rem; }
.bar p { margin: 0; line-height: 1.3; overflow-wrap: anywhere; }
.bar div { display: flex; align-items: center; gap: .5rem; }
.bar i { flex: 1; height: .5rem; border-radius: 4px; background: var(--border-color-primary);
  overflow: hidden; }
.bar i em { display: block; height: 100%; background: var(--hue); }
.bar output { width: 3.6rem; text-align: right; font-variant-numeric: tabular-nums; }
.written { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .6rem;
  font-family: ui-monospace, Consolas, monospace; font-size: .88rem; }
.written u { text-decoration: none; box-shadow: inset 0 -2px var(--border-color-primary); }
.written s { text-decoration: none; }
.written mark { background: color-mix(in srgb, var(--hue) 30%, transparent); color: inherit;
  border-radius: 3px; }
.js-plotly-plot .infolayer text, .js-plotly-plot .xaxislayer-above text,
.js-plotly-plot .yaxislayer-above text { fill: var(--body-text-color) !important; }
footer { display: none !important; }
"""


def message(text: str) -> str:
    return f'<div class="alert" role="alert">{escape(text)}</div>' if text else ""


def results(answer: Answer) -> str:
    """Numbers first, then both sides."""
    host, gravity = answer.host, answer.gravity
    return (
        f'<div class="tiles">{"".join(_tiles(answer))}</div><div class="sides">'
        + _side("host", "Host", "dot product", host, gravity, answer)
        + _side("gravity", "Gravity", _dial(answer), gravity, host, answer)
        + f'</div><p class="note">{_footnote(answer)}</p>'
    )


def head_note(answer: Answer, layer: int, head: int) -> str:
    """What the three maps below show, in numbers."""
    most = most_changed(answer)
    which = (
        "the one that gravity changes most"
        if (layer, head) == most
        else (f"gravity changes layer {most[0]}, head {most[1]} most")
    )
    contrast = answer.maps.contrast[layer, head].item()
    kl = answer.maps.kl[layer, head].item()
    return (
        f"<p>Layer {layer}, head {head} on “{escape(_short(answer.prompt))}”: contrast "
        f'<b id="head-contrast">{contrast:.2f}</b>, KL <b id="head-kl">{kl:.2g}</b> nats; {which}. '
        "Colour is the share of a row's attention, on a root scale; each row adds up to 1.</p>"
    )


def most_changed(answer: Answer) -> tuple[int, int]:
    """Layer and head of the largest KL."""
    return divmod(int(answer.maps.kl.argmax()), answer.maps.kl.shape[1])


def softness_label(softness: float) -> str:
    return {1 / 16: "1/16", 1 / 4: "1/4"}.get(softness, f"{softness:g}")


def _tiles(answer: Answer) -> list[str]:
    what = "cosine of the sentence embeddings"
    if answer.host.text is not None:
        what = "next-token probability that both agree on, mean over the prompt"
    softness = answer.dial.softness
    # Euclidean distance counts the length of a key, which no softness takes out.
    far = "almost the host" if answer.dial.distance == "lifted" else "hardly any contrast"
    note = {SOFTNESSES[0]: "bare gravity", SOFTNESSES[-1]: far}.get(
        softness, f"0: bare gravity, 64: {far}"
    )
    return [
        _tile("softness", "Softness", softness_label(softness), note),
        _tile("likeness", "Likeness to the host", _digits(answer.likeness), what),
        _tile(
            "contrast",
            "Contrast",
            f"{answer.contrast:.2f}",
            "how many times harder a near token pulls than a far one; 1: distance makes no "
            "difference",
        ),
        _tile("kl", "KL to dot product", f"{answer.kl:.2g}", "nats, mean over all heads; 0: equal"),
    ]


def _tile(name: str, title: str, value: str, note: str) -> str:
    head = f'<div class="tile"><span>{title}</span><b id="{name}">{value}</b>'
    return f"{head}<small>{note}</small></div>"


def _digits(likeness: float) -> str:
    """As many nines as tell it from 1."""
    return f"{likeness:.6f}" if likeness > 0.9995 else f"{likeness:.4f}"


def _side(kind: str, title: str, how: str, side: Side, other: Side, answer: Answer) -> str:
    parts = [
        f'<section class="side {kind}" id="{kind}-output"><h3>{title} <small>{how}</small></h3>'
    ]
    if side.text is not None:
        parts.append(_written(answer.prompt, side.text, other.text or ""))
        same = side.text == other.text
        parting = "both write the same" if same else "marked from where the two part"
        parts.append(f'<p class="note">{parting}; likeliest next tokens:</p>')
    else:
        parts.append('<p class="note">cosine of the first sentence to</p>')
    parts += [_bar(label, value) for label, value in side.bars]
    return "".join(parts) + "</section>"


def _written(prompt: str, text: str, other: str) -> str:
    """The continuation, marked from where the two part."""
    same = next(
        (i for i, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]),
        min(len(text), len(other)),
    )
    rest = f"<mark>{escape(text[same:])}</mark>" if text[same:] else ""
    return f'<p class="written"><s>{escape(prompt)}</s><u>{escape(text[:same])}</u>{rest}</p>'


def _bar(label: str, value: float) -> str:
    width = 100 * min(max(value, 0.0), 1.0)
    return (
        f'<div class="bar"><p>{escape(label)}</p><div><i><em style="width:{width:.1f}%"></em></i>'
        f"<output>{value:.3f}</output></div></div>"
    )


def _dial(answer: Answer) -> str:
    dial = answer.dial
    return f"{dial.law} law, {dial.distance}, softness {softness_label(dial.softness)}"


def _footnote(answer: Answer) -> str:
    seen = answer.calibration
    return (
        f"Contrast and KL are of this text, measured at the queries and keys of the gravity model. "
        f"On the calibration text: contrast {seen['contrast_median']:.2f}, KL "
        f"{seen['kl_mean']:.2g} nats over {seen['heads']} heads. "
        f"{escape(answer.model)} on this machine's CPU: {answer.seconds:.2f} s."
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"
