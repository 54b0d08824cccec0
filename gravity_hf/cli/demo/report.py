"""`report.html` and `table.md` from the results."""

from __future__ import annotations

from html import escape

from ...viz.histories import LossPanel, TrainingCurve
from ...viz.losses import loss_curves
from ...viz.masses import mass_heatmaps
from . import page
from .heal import CALIBRATED, CONTROL, PUBLISHED, TITLES
from .minilm import HOW_TO_GET
from .results import DemoResults
from .tables import encoder_cells, head_cells, loss_cells, to_html, to_markdown

_LOSS = "training loss, nats per byte"
_LEAD = (
    "A language model is trained with ordinary dot-product attention, then its attention is "
    "replaced by gravity: a token attends to what is near it. What that costs depends on the "
    "constants."
)
_READING = (
    "Validation loss in nats per byte on fixed windows of files that were not trained on; lower is "
    "better. Converted: right after the attention was replaced. Healed: after a short LoRA "
    "training, the same for every row; the first row, the host itself with that training, is the "
    "control. Vs host: healed, minus the healed host."
)
_CONTRAST = (
    "Softness f and contrast say how gravitational a model is. Contrast is how much stronger a "
    "near key (5th percentile of distance) pulls than a far one (95th); at 1 distance makes no "
    "difference. A large f buys closeness to the host with less gravity."
)
_ENCODER = (
    "Mean-pooled embeddings of held-out paragraphs, each compared with the original model's; the "
    "paragraphs used for calibration are others. Nothing was trained."
)


def report_html(results: DemoResults) -> str:
    """One self-contained document."""
    body = [
        f'<div class="verdict{" bad" if results.problems else ""}">{escape(results.verdict)}</div>',
        _tiles(results),
        page.section(
            "Converted and healed",
            page.paragraph(_READING),
            to_html(loss_cells(results.outcomes)),
            page.paragraph(_CONTRAST, "soft"),
        ),
        _curves(results),
        _masses(results),
        _encoder(results),
        _sample(results),
        _conditions(results),
    ]
    return page.page("Gravity attention: a demonstration", _LEAD, "\n".join(body))


def table_markdown(results: DemoResults) -> str:
    """The tables for a README, with their conditions."""
    conditions = results.conditions
    settings, versions = conditions["settings"], conditions["versions"]
    parts = [
        to_markdown(loss_cells(results.outcomes)),
        f"Validation loss, nats per byte. Host: byte-level Qwen2, {_millions(conditions)} M "
        f"parameters, {settings['host_steps']} steps on the {conditions['corpus']}. Heal: "
        f"{settings['heal_steps']} steps of LoRA r = {settings['rank']}. Seed {settings['seed']}, "
        f"{conditions['device']}, {conditions['dtype']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {conditions['date']}. `{conditions['command']}`",
    ]
    if results.encoder:
        parts += [
            to_markdown(encoder_cells(results.encoder)),
            f"all-MiniLM-L6-v2, converted without training: embeddings of "
            f"{settings['encoder_paragraphs']} held-out paragraphs against the original's, "
            f"calibrated on {settings['encoder_paragraphs']} others.",
        ]
    return "\n\n".join(parts) + "\n"


def _tiles(results: DemoResults) -> str:
    rows = results.outcomes
    values = [
        (f"{rows[CONTROL].healed:.3f}", "host, healed (nats per byte)"),
        (f"{rows[CALIBRATED].healed:.3f}", "calibrated gravity, healed"),
        (f"{rows[PUBLISHED].healed:.3f}", "Gravity-2's constants, healed"),
    ]
    if results.encoder:
        calibrated = next((r for r in results.encoder if r["softness"] == 1), results.encoder[-1])
        values.append((f"{calibrated['cosine_mean']:.3f}", "MiniLM: cosine to the original, f = 1"))
    return page.tiles(values)


def _curves(results: DemoResults) -> str:
    healed = {
        TITLES[key]: TrainingCurve.of_losses(outcome.losses)
        for key, outcome in results.outcomes.items()
    }
    host = {"host": TrainingCurve.of_losses(results.host_losses)}
    svg = loss_curves(
        [
            LossPanel("Training the host", host, _LOSS),
            LossPanel("Healing, same batches for all", healed, _LOSS),
        ]
    ).inline_svg()
    caption = "Training loss, smoothed. The heal starts where each conversion left the model."
    return page.section("Loss curves", page.figure(svg, caption))


def _masses(results: DemoResults) -> str:
    published, calibrated = results.outcomes[PUBLISHED], results.outcomes[CALIBRATED]
    panels = {
        "Gravity-2's constant": published.masses_before,
        "calibrated": calibrated.masses_before,
        "calibrated and healed": calibrated.masses_after,
    }
    svg = mass_heatmaps({title: masses for title, masses in panels.items() if masses}).inline_svg()
    caption = (
        "Mass M of every head. Calibration gives each head the mass that its distances ask for."
    )
    heads = (
        ""
        if calibrated.report is None
        else page.details("Calibration, head by head", to_html(head_cells(calibrated.report.rows)))
    )
    return page.section("Masses", page.figure(svg, caption), heads)


def _encoder(results: DemoResults) -> str:
    title = "A real pretrained encoder: all-MiniLM-L6-v2"
    if not results.encoder:
        return page.section(title, page.paragraph(f"Not part of this run: {HOW_TO_GET}.", "soft"))
    table = to_html(encoder_cells(results.encoder))
    return page.section(title, page.paragraph(_ENCODER), table)


def _sample(results: DemoResults) -> str:
    reload = results.reload
    equal = (
        "are identical to"
        if reload["identical"]
        else (f"differ by at most {reload['logits_difference']:.1e} from")
    )
    text = (
        "The calibrated and healed model was saved, loaded in a new process, and asked to continue "
        f"the marked prompt there. Its logits on a fixed input {equal} those before saving. A "
        "model this small writes the shape of code, not code."
    )
    sample = f"<pre><em>{escape(reload['prompt'])}</em>{escape(reload['sample'])}</pre>"
    return page.section("Saved, reloaded, generated", page.paragraph(text), sample)


def _conditions(results: DemoResults) -> str:
    known = results.conditions
    settings = known["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in results.seconds.items())
    values = {
        "Command": known["command"],
        "Date": known["date"],
        "Device": f"{known['device']}, {known['dtype']}; {settings['threads']} thread(s) for "
        f"the host, {known['threads']} for the encoder",
        "Versions": versions,
        "Text": known["corpus"],
        "Host": f"byte-level Qwen2, {_millions(known)} M parameters, {settings['layers']} layers, "
        f"{settings['heads']} query and {settings['key_value_heads']} key/value heads of "
        f"{settings['head_dim']}; {settings['host_steps']} steps of {settings['host_batch']} x "
        f"{settings['length']} bytes",
        "Heal": f"{settings['heal_steps']} steps of {settings['heal_batch']} x "
        f"{settings['length']} bytes, LoRA r = {settings['rank']}, alpha = {settings['alpha']}, "
        f"learning rate {settings['heal_learning_rate']:g}, masses and softenings 30 times that",
        "Calibration": f"{settings['calibration_windows']} x {settings['length']} bytes of "
        "training text",
        "Validation": f"{settings['validation_windows']} x {settings['length']} bytes",
        "Seed": str(settings["seed"]),
        "Time": seconds,
    }
    return page.section("Conditions", page.definitions(values))


def _millions(conditions: dict) -> str:
    return f"{conditions['host_parameters'] / 1e6:.1f}"
