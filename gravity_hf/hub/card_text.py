"""The sentences of a model card, each said only where the facts hold what it says."""

from __future__ import annotations

import re
from typing import Any

from ..config import GravityConfig
from .card_attribution import base_model, host_name
from .card_law import NOT_MEASURED, contrast, learnt, overall
from .card_tables import is_encoder
from .card_words import counted

_SAID_ELSEWHERE = ("card", "figures")


def introduction(facts: dict[str, Any]) -> str:
    """One sentence: what it is, and of what."""
    name, patch = host_name(facts), facts["patch"]
    kind = facts["host"]["class"] or "a model"
    what = f"LoRA and masses for {kind}" if facts["saved"] == "adapter" else kind
    whose = "not recorded" if name is None else f"`{name}`"
    text = (
        f"{what[0].upper()}{what[1:]} with its dot-product attention replaced by gravity: a token "
        f"attends to what is *near* it, not to what is *aligned* with it. The host is {whose}; "
        f"{len(patch['layers'])} of its attention modules "
        f"{'was' if len(patch['layers']) == 1 else 'were'} converted"
    )
    if patch["skipped"]:
        count = len(patch["skipped"])
        text += f", {count} {'keeps' if count == 1 else 'keep'} dot-product attention"
    return text + "."


def changes(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of what was changed: what, how much."""
    host = facts["host"]
    where = base_model(facts)
    name = host_name(facts)
    shown = "not recorded" if name is None else f"`{name}`"
    rows = [("host", shown if where in (None, name) else f"{shown} (`{where}` on the Hub)")]
    rows.append(("class, weights", _joined(host["class"], host["dtype"])))
    patch = facts["patch"]
    kept = "" if patch["skipped"] is None else f" of {len(patch['layers']) + len(patch['skipped'])}"
    rows.append(("attention modules converted", f"{len(patch['layers'])}{kept}"))
    before = host["parameters"]
    rows.append(("parameters of the host", NOT_MEASURED if before is None else f"{before:,}"))
    rows.append(("added", _added(facts)))
    for title, key in (("masses M", "mass"), ("softenings eps", "softening")):
        found = overall(facts, key)
        if found is not None:
            rows.append((f"{title}, lowest and highest", _range(found)))
    rows.append(("how gravitational", contrast(facts)))
    return rows


def recipe(facts: dict[str, Any]) -> list[str]:
    """One line for each step that ran, one for those that were left out."""
    settings, training = facts["settings"], facts["training"]
    if settings is None or training is None:
        return _recipe_of_folder(facts)
    noun = "text" if is_encoder(facts) else "window"
    most = "texts of at most" if is_encoder(facts) else "windows of"
    lines = [f"Seed {settings['seed']}, {most} {settings['length']} tokens."]
    if facts["calibration"] is not None:
        lines.append(f"Calibrated on {counted(settings['samples'], noun)}, without training.")
    if training["transfer"] is not None:
        objective = training["transfer"]["objective"]
        lines.append(
            f"Attention transfer, {objective['mode']}: "
            f"{counted(settings['transfer_steps'], 'step')}, {learnt(facts)} only, learning rate "
            f"{settings['transfer_learning_rate']:g}; factors {_factors(objective)}."
        )
    if training["lora"] is not None:
        lines += _lora(facts, settings, training, noun)
    left_out = [name for name in facts["left_out"] if name not in _SAID_ELSEWHERE]
    if left_out:
        lines.append(f"Left out: {', '.join(left_out)}.")
    return lines


def samples(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What the model wrote."""
    found = (facts["evaluation"] or {}).get("samples", [])
    return [_fenced(sample["prompt"] + sample["text"]) for sample in found]


def command(facts: dict[str, Any]) -> dict[str, str] | None:
    """The call that repeats the conversion."""
    text = (facts["conditions"] or {}).get("command")
    return _fenced(text) if text else None


def _fenced(text: str) -> dict[str, str]:
    """The text, with a fence that it does not contain."""
    longest = max((len(run) for run in re.findall("~+", text)), default=0)
    return {"text": text, "fence": "~" * max(4, longest + 1)}


def conditions(facts: dict[str, Any]) -> str:
    """Device, weights, versions and date of the measurements."""
    found = facts["conditions"]
    if found is None:
        return "not recorded."
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    dtype = facts["host"]["dtype"]
    weights = "" if dtype is None else f"{dtype} weights, "
    return f"{found['device']}, {weights}{versions}, {found['date']}."


def loading(facts: dict[str, Any], name: str) -> str:
    """Code for both cases: with the library, and without it where that works."""
    with_library = (
        "With the library:\n\n```python\nfrom gravity_hf import load_gravity_model\n\n"
        f'model = load_gravity_model("{name}")\n```'
    )
    if facts["saved"] == "adapter":
        return (
            f"{with_library}\n\nThe adapter needs its host and the library. On an unpatched host "
            "its LoRA would run on dot-product attention, which it was not trained for, and "
            "drop its masses: `load_gravity_model` patches the host first, or refuses."
        )
    auto = _auto_class(facts["host"]["class"])
    return (
        f"{with_library}\n\nWithout it, through the code that lies beside the weights:\n\n"
        f"```python\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)\n```'
    )


def _recipe_of_folder(facts: dict[str, Any]) -> list[str]:
    """What a folder shows of how it was made, where nothing describes it."""
    lines = ["How it was made is not recorded in this folder; what follows is read from its files."]
    settings = GravityConfig.from_dict(facts["gravity"])
    if settings.softness is not None:
        lines.append(f"Calibrated, {settings.softness_in_words}.")
    rank = (facts.get("lora") or {}).get("rank")
    if rank is not None:
        lines.append(f"LoRA: rank {rank}, alpha {facts['lora']['alpha']}.")
    return [*lines, f"Control, the host with the same training: {NOT_MEASURED}."]


def _lora(
    facts: dict[str, Any], settings: dict[str, Any], training: dict[str, Any], noun: str
) -> list[str]:
    objective = training["lora"]["objective"]
    learnt_from = "the text alone" if objective is None else _factors(objective)
    lines = [
        f"LoRA on the attention projections: rank {settings['lora_rank']}, alpha "
        f"{settings['lora_alpha']}, {counted(settings['lora_steps'], 'step')} of "
        f"{_batch(settings, noun)} on {_processes(facts)}, learning rate "
        f"{settings['lora_learning_rate']:g}; loss on {learnt_from}. "
        + ("Saved as an adapter." if facts["saved"] == "adapter" else "Merged.")
    ]
    if settings["anneal_to"] is not None:
        lines.append(
            f"Softness lowered towards {settings['anneal_to']:g} in the course of LoRA, as far "
            "as the loss held."
        )
    lines.append(_control(training["control"]))
    return lines


def _batch(settings: dict[str, Any], noun: str) -> str:
    one = settings["batch_size"] * settings["accumulation"] == 1
    return f"{settings['batch_size']} x {settings['accumulation']} {noun}{'' if one else 's'}"


def _processes(facts: dict[str, Any]) -> str:
    count = facts["conditions"]["processes"]
    return "1 process" if count == 1 else f"each of {counted(count, 'process')}"


def _control(control: dict[str, Any] | None) -> str:
    if control is None:
        return f"The host with the same LoRA, for comparison: {NOT_MEASURED}."
    if "left_out" in control:
        return f"The host with the same LoRA: {NOT_MEASURED}, {control['left_out']}."
    return (
        "Control: the host with its own attention, given the same LoRA rank, steps, learning rate, "
        "data and order."
    )


def _added(facts: dict[str, Any]) -> str:
    """Numbers that the host does not have."""
    names = (("mass", "masses"), ("softening", "softenings"), ("key radius", "key radii"))
    parts = []
    for noun, plural in names:
        found = overall(facts, noun.replace(" ", "_"))
        if found is not None:
            fixed = ", fixed" if noun == "key radius" else ""
            parts.append(counted(found["count"], noun, plural) + fixed)
    if facts["saved"] == "adapter" and facts["parameters"]:
        parts.append(f"{facts['parameters']['others']:,} of LoRA")
    return "; ".join(parts) or NOT_MEASURED


def _range(found: dict[str, Any]) -> str:
    ends = [f"{found[which]:.4g}" for which in ("lowest", "highest")]
    return " and ".join(dict.fromkeys(ends))


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part) or "not recorded"


def _auto_class(model_class: str | None) -> str:
    """`BertForMaskedLM` loads through `AutoModelForMaskedLM`."""
    if (model_class or "").endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    _, found, task = (model_class or "").partition("For")
    return f"AutoModelFor{task}" if found else "AutoModel"


def _factors(objective: dict[str, Any]) -> str:
    names = ("outputs", "weights", "states", "logits", "loss")
    said = (f"{name} {objective[name]:g}" for name in names if objective.get(name))
    return ", ".join(said) or "not recorded"
