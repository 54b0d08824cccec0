"""The sentences of a model card, each said only where the results hold what it says."""

from __future__ import annotations

from typing import Any

_LAWS = {
    "force": "score(i, j) = M^2 / ({distance} + eps), then softmax over j",
    "power": "weight(i, j) ~ ({distance} + eps)^(-M^2), normalised over j",
}
_DISTANCES = {"euclidean": "|q_i - k_j|^2", "lifted": "(|q_i|^2 + R^2 - 2 q_i.k_j)"}


def law_text(results: dict[str, Any]) -> str:
    distance = _DISTANCES[_distance(results)]
    return _LAWS[results["law"]].format(distance=distance)


def constants(results: dict[str, Any]) -> str:
    """Where M, eps and R come from."""
    settings, calibration = results["settings"], results["calibration"]
    per = settings["mass_per"].replace("_", " ")
    if calibration is None:
        return f"Not calibrated: one mass M per {per}, started at Gravity-2's constants, eps = 0.1."
    way = "closed forms"
    if calibration.get("max_kl") is not None:
        way = f"a budget of {calibration['max_kl']:g} nats of KL to the host's attention per head"
    elif settings["fit"]:
        way = "a fit of every head to the host's attention"
    text = f"One mass M per {per} and a softening eps per head, set by {way}"
    if _distance(results) == "lifted":
        text += "; R is the length of the longest key seen, per KV head"
    return (
        f"{text}. Softness at calibration {calibration['softness']:g}: eps in units of the squared "
        "lengths of queries and keys."
    )


def contrast(results: dict[str, Any]) -> str:
    summary = _last_attention(results) or results["calibration"]
    if summary is None:
        return "not measured."
    return (
        f"median softness {summary['softness_median']:.3g}, median contrast of the scores "
        f"{summary['contrast_median']:.3g} (from {summary['contrast_min']:.3g} to "
        f"{summary['contrast_max']:.3g} over {summary['heads']} heads). Contrast 1 = distance "
        "makes no difference; at a large softness the model is its host again."
    )


def recipe(results: dict[str, Any]) -> list[str]:
    """One line for each step that ran, one for those that were left out."""
    settings, training = results["settings"], results["training"]
    lines = [f"Seed {settings['seed']}, windows of {settings['length']} tokens."]
    if results["calibration"] is not None:
        lines.append(f"Calibrated on {settings['samples']} windows, without training.")
    if training["transfer"] is not None:
        objective = training["transfer"]["objective"]
        lines.append(
            f"Attention transfer, {objective['mode']}: {settings['transfer_steps']} steps, masses "
            f"and softenings only, learning rate {settings['transfer_learning_rate']:g}; factors "
            f"{_factors(objective)}."
        )
    if training["lora"] is not None:
        objective = training["lora"]["objective"]
        learnt = "the text alone" if objective is None else _factors(objective)
        lines.append(
            f"LoRA on the attention projections: rank {settings['lora_rank']}, alpha "
            f"{settings['lora_alpha']}, {settings['lora_steps']} steps of {settings['batch_size']}"
            f" x {settings['accumulation']} windows on each of "
            f"{results['conditions']['processes']} process(es), learning rate "
            f"{settings['lora_learning_rate']:g}; loss on {learnt}. "
            + ("Saved as an adapter." if results["saved"] == "adapter" else "Merged.")
        )
        if settings["anneal_to"] is not None:
            lines.append(
                f"Softness lowered towards {settings['anneal_to']:g} in the course of LoRA, as far "
                "as the loss held."
            )
    left_out = [name for name in results["left_out"] if name != "card"]
    if left_out:
        lines.append(f"Left out: {', '.join(left_out)}.")
    return lines


def conditions(results: dict[str, Any]) -> str:
    found = results["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['device']}, {results['host']['dtype']} weights, {versions}, {found['date']}."


def loading(results: dict[str, Any], name: str) -> str:
    """Code for both cases: with the library, and without it where that works."""
    with_library = (
        "With the library:\n\n```python\nfrom gravity_hf import load_gravity_model\n\n"
        f'model = load_gravity_model("{name}")\n```'
    )
    if results["saved"] == "adapter":
        return (
            f"{with_library}\n\nThe adapter needs its host and the library: "
            "`peft.PeftModel.from_pretrained` alone would put it onto an unpatched host, without "
            "an error, and drop its masses."
        )
    auto = _auto_class(results["host"]["class"])
    return (
        f"{with_library}\n\nWithout it, through the code that lies beside the weights:\n\n"
        f"```python\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)\n```'
    )


def limits(results: dict[str, Any]) -> list[str]:
    """What follows from what it is."""
    lines = [
        "Software that does not know gravity attention cannot run it: llama.cpp, vLLM, TGI and "
        "other servers have none. Plain transformers refuses the model type.",
        "Attention runs in torch code that is slower than fused dot-product attention.",
    ]
    if results["saved"] == "adapter":
        lines[0] = (
            "Software that does not know gravity attention would run the adapter on dot-product "
            "attention, which it was not trained for: load it with the library only."
        )
    if results["law"] == "force":
        lines.append("The scores of the force law go through a softmax; it is not literal gravity.")
    if _distance(results) == "lifted":
        lines.append(
            "Squared distances are clamped at 0, which keys longer than any seen in calibration "
            "can reach."
        )
    if results["evaluation"] is None:
        lines.append("Its quality was not measured.")
    else:
        lines.append("The numbers above hold for the text above; other text was not measured.")
    lines.append("It knows what its host knows, wrongs included; the host's licence applies.")
    return lines


def _auto_class(model_class: str) -> str:
    """`BertForMaskedLM` loads through `AutoModelForMaskedLM`."""
    if model_class.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    _, found, task = model_class.partition("For")
    return f"AutoModelFor{task}" if found else "AutoModel"


def _distance(results: dict[str, Any]) -> str:
    calibration = results["calibration"]
    return "euclidean" if calibration is None else calibration["distance"]


def _factors(objective: dict[str, Any]) -> str:
    names = ("outputs", "weights", "states", "logits", "loss")
    return ", ".join(f"{name} {objective[name]:g}" for name in names if objective.get(name))


def _last_attention(results: dict[str, Any]) -> dict[str, Any] | None:
    rows = (results["evaluation"] or {}).get("rows", [])
    found = [row["attention"] for row in rows if row.get("attention")]
    return found[-1] if found else None
