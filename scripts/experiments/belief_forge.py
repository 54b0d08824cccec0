"""How many facts get past the forge's own bar, and what keeps the others out?

    python scripts/experiments/belief_forge.py --base MODEL --device cuda
    python scripts/experiments/belief_forge.py --quick --out trial.json

Facts of a bank, drawn by the seed, go through `Forge` in batches of ten, with the settings of the
library: answers first after four fifths of the prompts and of the held-out paraphrases, at most
0.05 nats at neighbours. A batch is tried with more and more layers, and is registered or refused as
a whole.

`given`: the facts as they are. `misworded`, the control: each fact's held-out paraphrases are those
of another fact, which no delta of these facts can answer. A bar that they pass judges nothing.
"""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

from belief_report import forge_summary, forge_table
from belief_runs import config_of, drawn_facts, load_base, parsed, parser_of, run_units
from geolip_runs import show

NAME = "belief_forge"
BANKS = ("general", "invented")
KINDS = ("given", "misworded")
CONTROLS = {"misworded": "held-out paraphrases are those of another fact"}


def misworded(facts: list[Any]) -> list[Any]:
    """Each fact with what is held out of the next one."""
    following = [*facts[1:], facts[0]]
    return [
        dataclasses.replace(fact, paraphrases=(*fact.paraphrases[:1], *other.paraphrases[1:]))
        for fact, other in zip(facts, following, strict=True)
    ]


def work(options: Any, model: Any, tokenizer: Any, kind: str, bank: str, seed: int) -> Any:
    """One run of the forge, into a store of its own."""
    from gravity_hf.knowledge.forge import Forge
    from gravity_hf.knowledge.registry import Registry
    from gravity_hf.knowledge.store import BeliefStore

    facts = drawn_facts(options, bank, seed)
    facts = misworded(facts) if kind == "misworded" else facts
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(BeliefStore.create(f"{folder}/kb", model, tokenizer))
        forge = Forge(
            model,
            tokenizer,
            registry,
            facts_per_delta=options.facts_per_delta,
            encoding=config_of(options, seed),
            most_attempts=options.attempts,
        )
        result = forge.run(facts, domain=bank, progress=False)
        stored = len(registry.store)
    batches = [
        *(_batch(own.facts, True, own.metrics, "") for own in result.deltas),
        *(_batch(own.facts, False, own.metrics, own.reason) for own in result.rejected),
    ]
    return {"kind": kind, "bank": bank, "seed": seed, "stored": stored, "per_item": batches}


def _batch(facts: Any, passed: bool, metrics: dict[str, Any], reason: str) -> dict[str, Any]:
    measured = {
        name: metrics.get(name) for name in ("top1", "paraphrase_top1", "exact", "kl_unrelated")
    }
    tried = len(metrics.get("attempts", ()))
    kept = {"facts": len(facts), "passed": passed, "attempts": tried, "reason": reason}
    return {**kept, **measured}


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = parser_of(__doc__, NAME, BANKS)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="[both]")
    add("--facts-per-delta", type=int, default=10, help="[10]")
    add("--attempts", type=int, default=12, help="of training for one batch, at most [12]")
    options = parsed(parser, NAME, given)
    options.per_bank = options.per_bank or 20
    if options.quick:
        options.facts_per_delta, options.attempts = 2, 2
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
        forge_summary,
        CONTROLS,
    )
    show(*forge_table(content))
    return content


if __name__ == "__main__":
    main()
