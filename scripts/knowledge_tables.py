"""README's tables of the knowledge plane: what deltas teach and disturb, what routers find, and
whether the base comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from belief_report import (
    TITLES,
    beliefs_table,
    interference_table,
    rate_cell,
    restore_table,
    routing_table,
)
from table_text import NONE, experiment_conditions, markdown, result_json

# Of the numbers of active beliefs, what a README has room for.
_ACTIVE = ("1", "2", "5", "10", "20", "100")
_BY_WORDING = "Measured with routers that go by wording alone: no text had to name a subject."
_CATEGORIES = {
    "retrieval": "a fact is needed",
    "reasoning": "reasoning alone",
    "both": "a fact, and reasoning on it",
}


def tables(results: Path) -> dict[str, Callable[[], str]]:
    """Makers by the names of README's marks."""
    return {
        "knowledge-beliefs": lambda: beliefs(results),
        "knowledge-routing": lambda: routing(results),
        "knowledge-interference": lambda: interference(results),
        "knowledge-restore": lambda: restore(results),
    }


def _content(folder: Path, stem: str) -> dict[str, Any]:
    return result_json(folder, f"{stem}.json", f"python scripts/experiments/{stem}.py --base DIR")


def _below(content: dict[str, Any], note: str) -> str:
    """What the table is of, and where it was measured."""
    base = content["base"]
    dtype = (
        f"{base['dtype']}{', products in TF32' if content.get('settings', {}).get('tf32') else ''}"
    )
    where = f"{base['name']}, {dtype}, commit {content['commit'][:10]}."
    measured = experiment_conditions([{"conditions": content}]).strip()
    return f"\n{note} {where} {measured}\n"


def _seeds(units: list[dict[str, Any]]) -> str:
    """The seeds that were run, which may be fewer than were asked for."""
    found = sorted({unit["seed"] for unit in units})
    return f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"


def beliefs(folder: Path) -> str:
    """Every way to have deltas active, and every control, on facts that the base does not know."""
    content = _content(folder, "beliefs")
    note = (
        "Facts that the base does not know (their number in brackets), right in most of the draws "
        "that have them, with Wilson's 95 % intervals; held-out paraphrases: first token, mean; KL "
        f"in nats, and the share of answers that stay, at held-out neighbours; "
        f"{_seeds(content['units'])}."
    )
    if not all(unit["router"].get("subjects") for unit in content["units"]):
        note = f"{note} {_BY_WORDING}"
    headers, rows = beliefs_table(content)
    kept = [row for row in rows if not row[0].endswith(TITLES["other"])]
    return markdown(headers, kept) + _below(content, note)


def interference(folder: Path) -> str:
    """The first ten facts' answers as more beliefs become active."""
    content = _content(folder, "belief_interference")
    headers, rows = interference_table(content)
    kinds = dict.fromkeys(unit["kind"] for unit in content["units"])
    run = [
        f"{kind}: {_seeds([u for u in content['units'] if u['kind'] == kind])}" for kind in kinds
    ]
    note = f"Exact answers to the first ten facts, Wilson's 95 % intervals; {'; '.join(run)}."
    chosen = [row for row in rows if row[0] in _ACTIVE]
    return markdown(headers, chosen) + _below(content, note)


def restore(folder: Path) -> str:
    """Whether the base came back bit for bit, and whether flipped bits were found."""
    content = _content(folder, "belief_restore")
    note = f"{content['settings']['beliefs']} beliefs, {_seeds(content['units'])}."
    return markdown(*restore_table(content)) + _below(content, note)


def routing(folder: Path) -> str:
    """Routers on the same queries, and what is built on the default one."""
    content = _content(folder, "belief_routing")
    units, summary = content["units"], content["summary"]
    parts = [
        _routers(content),
        _confidence(summary, units),
        _separation(summary),
        _few_shot(summary, units),
    ]
    routed = summary.get("routing", {})
    by_wording = routed and "hidden:quarter, by wording" not in routed
    return "".join(parts) + _below(content, _BY_WORDING if by_wording else "All parts:")


def _routers(content: dict[str, Any]) -> str:
    found = content["summary"].get("routing", {})
    if not found:
        return ""
    first = next(iter(found.values()))
    own = [unit for unit in content["units"] if unit["part"] == "routing"]
    asked = first["top1_first_seed"]["trials"]
    return markdown(*routing_table(content)) + (
        f"\n{first['beliefs']} beliefs, {asked} held-out paraphrases each, {_seeds(own)}. Used "
        "wrongly: of neighbours, which are about no belief.\n"
    )


def _confidence(summary: dict[str, Any], units: list[dict[str, Any]]) -> str:
    if "confidence" not in summary:
        return ""
    found = summary["confidence"]
    if not found["seeds"]:
        return "\nConfidence: not fitted, since nothing was routed that it could be fitted to.\n"
    own = [unit for unit in units if unit["part"] == "confidence" and "quality" in unit]
    count = sum(unit["quality"]["cases"] for unit in own)
    values = ", ".join(f"{title} {_span(found[x])}" for x, title in (
        ("auroc", "AUROC"), ("ece", "calibration error"), ("brier", "Brier score"),
    ))  # fmt: skip
    return (
        f"\nConfidence, judged on {count} queries that it was not fitted to ({_seeds(own)}; mean, "
        f"lowest to highest): {values}.\n"
    )


def _span(found: dict[str, Any]) -> str:
    if not found:
        return NONE
    return f"{found['mean']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"


def _separation(summary: dict[str, Any]) -> str:
    """Generated answers that are right, by what a prompt asks for; all seeds together."""
    runs = summary.get("separation", [])
    if not runs:
        return ""
    ways = {
        "base": "base",
        "named": "its belief, by name",
        "routed": "routed",
        "all": "all at once",
    }
    table = []
    for name, title in _CATEGORIES.items():
        own = [run["categories"][name] for run in runs]
        prompts = sum(category["prompts"] for category in own)
        cells = [_pooled([category["right"][way] for category in own]) for way in ways]
        routed = _pooled([category["routing"] for category in own])
        table.append([f"{title} ({prompts})", *cells, routed])
    headers = ["right text, prompts", *ways.values(), "routed as it should be"]
    return "\n" + markdown(headers, table) + f"\n{_seeds(runs).capitalize()}.\n"


def _pooled(rates: list[dict[str, Any]]) -> str:
    from gravity_hf.knowledge.statistics import rate

    hits = sum(one["successes"] for one in rates)
    misses = sum(one["trials"] for one in rates) - hits
    return rate_cell(rate([True] * hits + [False] * misses)._asdict())


def _few_shot(summary: dict[str, Any], units: list[dict[str, Any]]) -> str:
    """First tokens that are right, by the number of facts that were shown."""
    found = summary.get("few_shot", {})
    if not found:
        return ""
    cells: dict[str, dict[str, str]] = {}
    for name, values in found.items():
        method, _, count = name.rpartition(" ")
        cells.setdefault(method.replace("_", " "), {})[count] = _three(values)
    counts = list(dict.fromkeys(name.rpartition(" ")[2] for name in found))
    table = [[method, *(row.get(count, NONE) for count in counts)] for method, row in cells.items()]
    own = [unit for unit in units if unit["part"] == "few_shot"]
    headers = ["taught", *(f"{count} facts" for count in counts)]
    said = "Right: trained prompts / first tokens of held-out paraphrases / facts never shown"
    return "\n" + markdown(headers, table) + f"\n{said}; {_seeds(own)}.\n"


def _three(values: dict[str, Any]) -> str:
    means = (values[measure].get("mean") for measure in ("memorised", "paraphrases", "unseen"))
    return " / ".join(NONE if mean is None else f"{mean:.0%}" for mean in means)
