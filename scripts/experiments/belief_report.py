"""What the experiments on beliefs say, in numbers with intervals, and as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from belief_measures import MEASURES

WAYS = ("oracle", "routed", "all_active")
CONTROLS = ("base", "other", "random", "shuffled", "lora")
_PLACE = {name: i for i, name in enumerate(MEASURES)}
TITLES = {
    "oracle": "its own delta, by name",
    "routed": "what the router finds",
    "all_active": "all deltas at once",
    "base": "base",
    "other": "another fact's delta",
    "random": "random directions, same size",
    "shuffled": "trained on shuffled answers",
    "lora": "LoRA on all facts, same size",
}


def beliefs_summary(units: list[dict[str, Any]]) -> dict[str, Any]:
    """For each bank, and for facts that the base knows and does not know, every way and control."""
    banks = list(dict.fromkeys(unit["bank"] for unit in units))
    return {bank: _bank([x for x in units if x["bank"] == bank]) for bank in banks}


def _bank(units: list[dict[str, Any]]) -> dict[str, Any]:
    parts = {"unknown": False, "known": True}
    return {
        "seeds": [unit["seed"] for unit in units],
        **{
            name: _part([[x for x in u["per_item"] if x["known"] is known] for u in units])
            for name, known in parts.items()
        },
        "deltas": {
            name: statistics.fmean(unit["deltas"][name] for unit in units)
            for name in units[0]["deltas"]
        },
        "elsewhere": _elsewhere(units),
    }


def _part(seeds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of some facts, in each seed."""
    by_fact: dict[str, list[dict[str, Any]]] = {}
    for items in seeds:
        for item in items:
            by_fact.setdefault(item["id"], []).append(item)
    if not by_fact:
        return {"facts": 0}
    return {
        "facts": len(by_fact),
        **{name: _way(name, by_fact, seeds) for name in (*WAYS, *CONTROLS)},
        "oracle_minus_random": _difference(by_fact, "oracle", "random"),
        "oracle_minus_shuffled": _difference(by_fact, "oracle", "shuffled"),
        "routed_against_base": _paired(by_fact, "routed", "base"),
        "oracle_against_lora": _paired(by_fact, "oracle", "lora"),
    }


def _way(
    name: str, by_fact: dict[str, list[dict[str, Any]]], seeds: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    from gravity_hf.knowledge.statistics import bootstrap_median, rate

    found: dict[str, Any] = {}
    for measure in ("exact", "top1", "top5", "paraphrase_exact", "paraphrase_top1"):
        found[measure] = rate(_majority(by_fact, name, measure))._asdict()
    paraphrases = [_means(items, name, "paraphrase_top1") for items in seeds if items]
    found["paraphrase_share"] = _over(paraphrases)
    found["spread"] = {
        measure: _over([_means(items, name, measure) for items in seeds if items])
        for measure in ("exact", "top1")
    }
    gains = [
        _value(item, name, "answer_logprob") - _value(item, "base", "answer_logprob")
        for items in by_fact.values()
        for item in items
    ]
    found["answer_logprob_gain"] = bootstrap_median(gains, seed=0)._asdict()
    kls = [_value(x, name, "kl_unrelated") for items in by_fact.values() for x in items]
    kept = [_value(x, name, "unrelated_kept") for items in by_fact.values() for x in items]
    found["kl_unrelated"] = _mean(kls)
    found["unrelated_kept"] = _mean(kept)
    return found


def _value(item: dict[str, Any], way: str, measure: str) -> Any:
    return item[way][_PLACE[measure]]


def _majority(by_fact: dict[str, list[dict[str, Any]]], way: str, measure: str) -> list[bool]:
    """Of each fact, whether it is right in more than half of the seeds (of a share: on average)."""
    found = []
    for items in by_fact.values():
        values = [x for item in items if (x := _value(item, way, measure)) is not None]
        if values:
            found.append(sum(values) / len(values) > 0.5)
    return found


def _means(items: list[dict[str, Any]], way: str, measure: str) -> float | None:
    return _mean([_value(item, way, measure) for item in items])


def _mean(values: Sequence[float | None]) -> float | None:
    there = [x for x in values if x is not None]
    return statistics.fmean(there) if there else None


def _over(values: list[float | None]) -> dict[str, Any]:
    from gravity_hf.knowledge.statistics import spread

    there = [x for x in values if x is not None]
    return spread(there)._asdict() if there else {}


def _difference(by_fact: dict[str, list[dict[str, Any]]], one: str, other: str) -> dict[str, Any]:
    """Treatment less control, of `exact`, paired by fact."""
    from gravity_hf.knowledge.statistics import paired_difference

    pairs = [
        tuple(_mean([_value(item, way, "exact") for item in items]) or 0.0 for way in (one, other))
        for items in by_fact.values()
    ]
    if len(pairs) < 2:
        return {}
    return paired_difference([x for x, _ in pairs], [y for _, y in pairs])._asdict()


def _paired(by_fact: dict[str, list[dict[str, Any]]], one: str, other: str) -> dict[str, Any]:
    from gravity_hf.knowledge.statistics import mcnemar

    first, second = (_majority(by_fact, way, "exact") for way in (one, other))
    return mcnemar(first, second)._asdict()


def _elsewhere(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds."""
    at_prompts = {
        name: {
            x: statistics.fmean(u["elsewhere"]["prompts"][name][x] for u in units)
            for x in ("kl", "kept", "prompts")
        }
        for name in units[0]["elsewhere"]["prompts"]
    }
    text = {
        name: statistics.fmean(u["elsewhere"]["text"][name] for u in units)
        for name in units[0]["elsewhere"]["text"]
    }
    return {"prompts": at_prompts, "text": text}


BELIEF_HEADERS = ["bank, deltas", "exact", "first token", "paraphrases", "KL at neighbours", "kept"]


def beliefs_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Facts that the base does not know: a row for each bank and way, with Wilson's intervals."""
    rows = []
    for bank, found in content["summary"].items():
        part = found["unknown"]
        if not part["facts"]:
            continue
        for way in (*WAYS, *CONTROLS):
            own = part[way]
            rows.append(
                [
                    f"{bank} ({part['facts']}), {TITLES[way]}",
                    rate_cell(own["exact"]),
                    rate_cell(own["top1"]),
                    _percent(own["paraphrase_share"].get("mean")),
                    _number(own["kl_unrelated"]),
                    _percent(own["unrelated_kept"]),
                ]
            )
    return BELIEF_HEADERS, rows


def rate_cell(rate: dict[str, Any]) -> str:
    """A share in percent with its interval."""
    if not rate or not rate["trials"]:
        return "–"
    return f"{rate['rate']:.0%} ({rate['low']:.0%} to {rate['high']:.0%})"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def interference_summary(units: list[dict[str, Any]]) -> dict[str, Any]:
    """For each kind of deltas, way and number of active beliefs: shares over facts and seeds."""
    from gravity_hf.knowledge.statistics import rate

    found: dict[str, Any] = {}
    for kind in dict.fromkeys(unit["kind"] for unit in units):
        own = [unit for unit in units if unit["kind"] == kind]
        items = [item for unit in own for item in unit["per_item"]]
        points = {}
        for way in dict.fromkeys(item["way"] for item in items):
            for count in sorted({x["active"] for x in items if x["way"] == way}):
                chosen = [x for x in items if (x["way"], x["active"]) == (way, count)]
                points[f"{way} {count}"] = {
                    "exact": rate(x["exact"] for x in chosen)._asdict(),
                    "top1": rate(x["top1"] for x in chosen)._asdict(),
                    "paraphrase_share": _mean([x["paraphrase_top1"] for x in chosen]),
                    "kl_unrelated": _mean([x["kl_unrelated"] for x in chosen]),
                }
        found[kind] = {"overlap": _mean([unit["overlap"] for unit in own]), "points": points}
    return found


def interference_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each number of active beliefs; exact answers of the first ten facts."""
    kinds = list(content["summary"])
    ways = ("all_active", "routed", "oracle")
    headers = ["active", *(f"{kind}, {way.replace('_', ' ')}" for kind in kinds for way in ways)]
    counts = sorted({x["active"] for x in content["per_item"] if x["active"]})
    rows = []
    for count in counts:
        cells = []
        for kind in kinds:
            points = content["summary"][kind]["points"]
            cells += [rate_cell(points.get(f"{w} {count}", {}).get("exact", {})) for w in ways]
        rows.append([str(count), *cells])
    return headers, rows


def restore_summary(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether all comparisons came out equal, and how many there were."""
    items = [(unit, item) for unit in units for item in unit["per_item"]]
    with_beliefs = [(unit, item) for unit, item in items if item["in_force"]]
    return {
        "comparisons": sum(unit["prompts"] for unit, _ in items),
        "equal": sum(item["equal"] for _, item in items),
        "active_comparisons": sum(unit["prompts"] for unit, _ in with_beliefs),
        "active_equal": sum(item["active_equal"] for _, item in with_beliefs),
        "reopened": sum(unit["prompts"] for unit in units),
        "reopened_equal": sum(unit["reopened_equal"] for unit in units),
        "flipped": sum(unit["flips"]["flipped"] for unit in units),
        "named": sum(unit["flips"]["named"] for unit in units),
        "restored": all(unit["flips"]["restored"] for unit in units),
    }


def restore_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What was compared, and how often it was equal or found."""
    found = content["summary"]
    rows = [
        ["logits without beliefs, torch.equal", found["equal"], found["comparisons"]],
        ["the same with beliefs in force (control)", found["active_equal"],
         found["active_comparisons"]],
        ["after opening the store anew", found["reopened_equal"], found["reopened"]],
        ["single bits of the base, found by name", found["named"], found["flipped"]],
    ]  # fmt: skip
    return ["compared", "equal or found", "of"], [[str(cell) for cell in row] for row in rows]


def forge_summary(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each kind and bank, the facts that passed, over all seeds, and what was measured of the
    batches that passed and of those that did not."""
    from gravity_hf.knowledge.statistics import rate

    found: dict[str, Any] = {}
    for kind, bank in dict.fromkeys((unit["kind"], unit["bank"]) for unit in units):
        own = [x for u in units if (u["kind"], u["bank"]) == (kind, bank) for x in u["per_item"]]
        facts = [batch["passed"] for batch in own for _ in range(batch["facts"])]
        found[f"{kind} {bank}"] = {
            "facts": rate(facts)._asdict(),
            "batches": len(own),
            "attempts": _mean([batch["attempts"] for batch in own]),
            **{
                name: {
                    measure: _mean([batch[measure] for batch in own if batch["passed"] is passed])
                    for measure in ("top1", "paraphrase_top1", "kl_unrelated")
                }
                for name, passed in (("passed", True), ("refused", False))
            },
        }
    return found


def forge_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Facts that passed, and how far off the others were."""
    rows = []
    for name, found in content["summary"].items():
        far = found["refused"]
        rows.append([
            name, rate_cell(found["facts"]), _percent(found["passed"]["paraphrase_top1"]),
            _percent(far["paraphrase_top1"]), _number(far["kl_unrelated"]),
        ])  # fmt: skip
    headers = ["facts, bank", "passed", "held-out paraphrases of these", "of the others"]
    return [*headers, "KL of the others"], rows


def routing_summary(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Of routing: of each encoder the measures of each seed, and their spread. Of the others what
    each seed found."""
    parts: dict[str, Any] = {}
    for unit in units:
        parts.setdefault(unit["part"], []).append(unit)
    found: dict[str, Any] = {}
    if "routing" in parts:
        found["routing"] = {
            encoder: _encoder([unit["encoders"][encoder] for unit in parts["routing"]])
            for encoder in parts["routing"][0]["encoders"]
        }
    if "confidence" in parts:
        fitted = [unit for unit in parts["confidence"] if "quality" in unit]
        found["confidence"] = {
            "seeds": len(fitted),
            **{
                name: _over([unit["quality"][name] for unit in fitted])
                for name in ("auroc", "ece", "brier")
            },
            **{name: _over([unit[name] for unit in fitted]) for name in ("precision", "recall")},
        }
    if "separation" in parts:
        found["separation"] = [
            {name: unit[name] for name in ("seed", "categories", "routing", "flags")}
            for unit in parts["separation"]
        ]
    if "few_shot" in parts:
        found["few_shot"] = _few_shot([x for unit in parts["few_shot"] for x in unit["per_item"]])
    return found


def _encoder(reports: list[dict[str, Any]]) -> dict[str, Any]:
    rates = ("top1", "first_right", "activated", "false_activation", "precision")
    return {
        **{name: _over([report[name]["rate"] for report in reports]) for name in rates},
        "mrr": _over([report["mrr"] for report in reports]),
        "recall_at_5": _over([report["recall"]["5"]["rate"] for report in reports]),
        "top1_first_seed": reports[0]["top1"],
        "beliefs": reports[0]["beliefs"],
        "domain_chance": reports[0]["domain_chance"],
        "domain_precision": _over([report["domain_precision"]["rate"] for report in reports]),
    }


def _few_shot(items: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for method, count in dict.fromkeys((x["method"], x["count"]) for x in items):
        own = [x for x in items if (x["method"], x["count"]) == (method, count)]
        found[f"{method} {count}"] = {
            name: _over([_mean(x[name]) for x in own])
            for name in ("memorised", "paraphrases", "unseen")
        }
    return found


def routing_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each encoder: how often the right belief is found, and used."""
    headers = ["router", "nearest is right", "among five", "used first", "used wrongly"]
    rows = []
    for encoder, found in content["summary"].get("routing", {}).items():
        cells = (found[x].get("mean") for x in ("top1", "recall_at_5", "first_right"))
        wrong = found["false_activation"].get("mean")
        rows.append([encoder, *map(_percent, cells), _percent(wrong)])
    return headers, rows
