"""How many beliefs can be active at once before they drown each other?

    python scripts/experiments/belief_interference.py --base MODEL --device cuda
    python scripts/experiments/belief_interference.py --quick --out trial.json

The first ten facts of a draw are asked while 1, 2, 5, 10, 20 ... 100 beliefs are active in every
row (`all_active`), or while the router chooses among so many (`routed`, at most five to a row).
`plain` deltas are trained without regard to each other. `projected` ones read other directions:
the ten one after the other, each orthogonal to those before it, then the rest, ten at a time,
orthogonal to all before. Alone, each delta of either kind is `oracle`. Facts that the base knows
by itself are not drawn, as long as there are enough others.
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

from belief_measures import ByRouter, always, by_fact, calibrated_router, measured
from belief_report import interference_summary, interference_table
from belief_runs import config_of, drawn_facts, load_base, parsed, parser_of, run_units
from geolip_runs import show

NAME = "belief_interference"
BANKS = ("invented",)
ASKED = 10
COUNTS = (1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
KINDS = ("plain", "projected")
CONTROLS = {
    "base": "no delta",
    "oracle": "the fact's own delta alone",
    "plain": "deltas trained without regard to each other",
}


def unknown_facts(options: Any, model: Any, tokenizer: Any, bank: str, seed: int) -> list[Any]:
    """Facts in an order drawn by lot, those that the base does not know first."""
    facts = drawn_facts(options, bank, seed)
    random.Random(seed).shuffle(facts)
    known = [row["exact"] for row in measured(model, tokenizer, facts, None)]
    order = sorted(range(len(facts)), key=lambda i: known[i])
    return [facts[i] for i in order][: max(options.counts)]


def plain(model: Any, tokenizer: Any, facts: list[Any], config: Any) -> list[Any]:
    """Deltas of all facts, each as if it were alone."""
    from gravity_hf.knowledge.encoding import BeliefEncoder

    return BeliefEncoder(model, tokenizer, config).encode(facts, progress=False)


def projected(model: Any, tokenizer: Any, facts: list[Any], config: Any) -> list[Any]:
    """The same, each orthogonal to those trained before it."""
    from gravity_hf.knowledge.encoding import BeliefEncoder
    from gravity_hf.knowledge.registry import Registry

    endless = float("inf")
    registry = Registry(model, angle_min=0.0, leakage_max=endless, generic_max=endless)
    groups = [[fact] for fact in facts[:ASKED]]
    groups += [facts[i : i + ASKED] for i in range(ASKED, len(facts), ASKED)]
    found = []
    for group in groups:
        encoder = BeliefEncoder(model, tokenizer, config, projector=registry.projector)
        own = encoder.encode(group, progress=False)
        for one in own:
            registry.register(one.fact.id, one.delta)
        found += own
    return found


def work(options: Any, model: Any, tokenizer: Any, kind: str, bank: str, seed: int) -> Any:
    """One kind of deltas of one draw."""
    facts = unknown_facts(options, model, tokenizer, bank, seed)
    encode = {"plain": plain, "projected": projected}[kind]
    encoded = encode(model, tokenizer, facts, config_of(options, seed))
    asked = facts[:ASKED]
    base = measured(model, tokenizer, asked, None)
    items = [_item("base", 0, fact, row) for fact, row in zip(asked, base, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        items += _curve(options, model, tokenizer, facts, encoded, folder)
    return {
        "kind": kind,
        "bank": bank,
        "seed": seed,
        "facts": len(facts),
        "overlap": overlap(encoded),
        "per_item": items,
    }


def _curve(
    options: Any, model: Any, tokenizer: Any, facts: list[Any], encoded: list[Any], folder: str
) -> list[dict[str, Any]]:
    from gravity_hf.knowledge.bank import DeltaBank
    from gravity_hf.knowledge.store import BeliefStore

    store = BeliefStore.create(f"{folder}/kb", model, tokenizer)
    bank = DeltaBank(model)
    ids: dict[str, str] = {}
    items = []
    for count in sorted({min(c, len(facts)) for c in options.counts}):
        new = [one for one in encoded[:count] if one.fact.id not in ids]
        with store.transaction():
            for one in new:
                added = store.add_delta(one.fact.id, one.delta, None, one.fact, one.report)
                ids[one.fact.id] = added.id
        for one in new:
            bank.add(ids[one.fact.id], one.delta)
        asked = facts[: min(count, ASKED)]
        router = calibrated_router(store, facts[:count])
        ways = {
            "all_active": always(bank, list(ids.values())),
            "routed": ByRouter(bank, router),
            "oracle": by_fact(bank, ids),
        }
        for way, apply in ways.items():
            rows = measured(model, tokenizer, asked, apply)
            items += [_item(way, count, fact, row) for fact, row in zip(asked, rows, strict=True)]
    return items


def _item(way: str, count: int, fact: Any, row: dict[str, Any]) -> dict[str, Any]:
    names = ("exact", "top1", "paraphrase_top1", "answer_logprob", "kl_unrelated")
    return {"way": way, "active": count, "id": fact.id, **{name: row[name] for name in names}}


def overlap(encoded: list[Any]) -> float | None:
    """Mean over the ten deltas asked, and over maps, of the share of what they read (the energy of
    `A`) that lies in what the later ones read."""
    import torch

    asked, later = encoded[:ASKED], encoded[ASKED:]
    if not later:
        return None
    shares = []
    for name in asked[0].delta.factors:
        others = torch.cat([one.delta.factors[name][0].double() for one in later])
        basis = torch.linalg.qr(others.mT)[0]
        for one in asked:
            A = one.delta.factors[name][0].double()
            shares.append(float((A @ basis).square().sum() / A.square().sum()))
    return sum(shares) / len(shares)


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = parser_of(__doc__, NAME, BANKS)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="active")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="[both]")
    options = parsed(parser, NAME, given)
    if options.quick:
        options.counts, options.per_bank = [1, 2, 12], 12
    model, tokenizer, base = load_base(options)
    runs = {
        f"{kind} {bank} {seed}": (kind, bank, seed)
        for seed in options.seeds
        for bank in options.banks
        for kind in options.kinds
    }
    content = run_units(
        options,
        base,
        list(runs),
        lambda unit: work(options, model, tokenizer, *runs[unit]),
        interference_summary,
        CONTROLS,
    )
    show(*interference_table(content))
    return content


if __name__ == "__main__":
    main()
