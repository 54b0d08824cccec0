"""Do deltas teach facts, in other words too, and leave everything else alone?

    python scripts/experiments/beliefs.py --base MODEL --device cuda
    python scripts/experiments/beliefs.py --base MODEL --banks invented --per-bank 8 --seeds 0
    python scripts/experiments/beliefs.py --quick --out trial.json      # a minute, to try

Every fact of every bank gets its own delta. A fact counts as known where greedy decoding gives the
whole answer (`exact`); `top1` and `top5` are of its first token; `paraphrase_*` of prompts that
neither training nor any threshold has seen. How deltas are active: `oracle`, the fact's own, by
name; `routed`, what the router finds for the prompt, its threshold set on other paraphrases;
`all_active`, those of the whole bank in every row. Controls see the same prompts: `base`; another
fact's delta; a random one of the same size, several times over; deltas trained on answers that
were dealt out among the facts; and plain fine-tuning with a LoRA of as many parameters on the same
texts. Elsewhere: KL at the fact's own held-out neighbours, at 200 prompts about other things, and
the loss on running text. Facts that the base knows are summed up apart from those it does not.

Intervals are Wilson's over facts; a fact counts as right where it is in most seeds, so that seeds,
which share the facts, do not pass for more of them. `spread` is over seeds.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from typing import Any

from belief_measures import (
    MEASURES,
    ByRouter,
    always,
    by_fact,
    calibrated_router,
    change_elsewhere,
    measured,
    others,
    random_like,
    store_of,
    text_loss,
)
from belief_report import beliefs_summary, beliefs_table
from belief_runs import (
    config_of,
    drawn_facts,
    foreign_prompts,
    load_base,
    parsed,
    parser_of,
    run_units,
    running_text,
)
from geolip_runs import show

NAME = "beliefs"
BANKS = ("chemistry", "computing", "general", "invented")
CONTROLS = {
    "base": "no delta",
    "other": "the delta of another fact with another answer",
    "random": "random directions, of the same size on each map; mean over draws",
    "shuffled": "deltas trained on answers dealt out among the facts of the bank",
    "lora": "one LoRA of as many parameters, fine-tuned on the texts of all facts of the bank; the "
    "best of four rates",
}


def work(options: Any, model: Any, tokenizer: Any, bank_name: str, seed: int) -> dict[str, Any]:
    """Teach one bank with one seed, and measure."""
    from gravity_hf.knowledge.encoding import BeliefEncoder

    facts = drawn_facts(options, bank_name, seed)
    config = config_of(options, seed)
    encoded = BeliefEncoder(model, tokenizer, config).encode(facts, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(f"{folder}/kb", model, tokenizer, encoded)
        bank = store.compile_bank()
        ids = {fact.id: store.get(fact.id).id for fact in facts}
        router = ByRouter(bank, calibrated_router(store, facts))
        ways = {
            "oracle": by_fact(bank, ids),
            "routed": router,
            "all_active": always(bank, list(ids.values())),
        }
        rival = _controls(options, model, tokenizer, facts, encoded, bank, ids, seed)
        found = {
            name: measured(model, tokenizer, facts, apply)
            for name, apply in {"base": None, **ways, **rival}.items()
        }
        found |= _means_of_draws(found)
        elsewhere = _elsewhere(options, model, tokenizer, facts, ids, bank, ways, rival, seed)
    return {
        "bank": bank_name,
        "seed": seed,
        "facts": len(facts),
        "deltas": _costs(encoded),
        "router": {
            "threshold": router.router.threshold_value,
            "subjects": router.router.subjects,
        },
        "elsewhere": elsewhere,
        "per_item": _items(facts, encoded, found),
    }


def _controls(
    options: Any,
    model: Any,
    tokenizer: Any,
    facts: list[Any],
    encoded: list[Any],
    bank: Any,
    ids: dict[str, str],
    seed: int,
) -> dict[str, Any]:
    """Name of each control -> how it is active."""
    from gravity_hf.knowledge.bank import DeltaBank
    from gravity_hf.knowledge.lora_control import lora_control

    config, rivals = config_of(options, seed), DeltaBank(model)
    for one in encoded:
        for draw in range(options.nulls):
            number = random.Random(f"{seed} {draw} {one.fact.id}").getrandbits(32)
            rivals.add(f"random {draw} {one.fact.id}", random_like(one.delta, number))
    for fact, delta in _shuffled(model, tokenizer, facts, config, seed):
        rivals.add(f"shuffled {fact.id}", delta)
    rivals.add("lora", lora_control(model, tokenizer, facts, config).delta)
    other = {name: ids[fact.id] for name, fact in others(facts, seed).items()}
    draws = {
        f"random {draw}": by_fact(rivals, {x.id: f"random {draw} {x.id}" for x in facts})
        for draw in range(options.nulls)
    }
    return {
        "other": by_fact(bank, other),
        **draws,
        "shuffled": by_fact(rivals, {x.id: f"shuffled {x.id}" for x in facts}),
        "lora": always(rivals, ["lora"]),
    }


def _shuffled(
    model: Any, tokenizer: Any, facts: list[Any], config: Any, seed: int
) -> list[tuple[Any, Any]]:
    """Deltas that were trained just as the others, on answers of other facts."""
    from gravity_hf.knowledge.encoding import BeliefEncoder

    wrong = others(facts, seed + 1000)
    taught = [dataclasses.replace(fact, answer=wrong[fact.id].answer, aliases=()) for fact in facts]
    encoded = BeliefEncoder(model, tokenizer, config).encode(taught, progress=False)
    return [(fact, one.delta) for fact, one in zip(facts, encoded, strict=True)]


def _means_of_draws(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The draws of the random control as one: shares and means over them."""
    draws = [found.pop(name) for name in list(found) if name.startswith("random ")]
    means = []
    for rows in zip(*draws, strict=True):
        values = {name: [row[name] for row in rows if row[name] is not None] for name in MEASURES}
        means.append({name: sum(x) / len(x) if x else None for name, x in values.items()})
    return {"random": means}


def _elsewhere(
    options: Any,
    model: Any,
    tokenizer: Any,
    facts: list[Any],
    ids: dict[str, str],
    bank: Any,
    ways: dict[str, Any],
    rival: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """What is changed at prompts about other things, and on running text."""
    prompts = foreign_prompts(facts, options.foreign, seed)
    turn = list(ids.values())
    place = {prompt: turn[i % len(turn)] for i, prompt in enumerate(prompts)}
    applied = {
        "oracle": lambda rows: bank.routed([place[row.prompt] for row in rows]),
        "routed": ways["routed"],
        "all_active": ways["all_active"],
        "lora": rival["lora"],
    }
    at_prompts = {
        name: change_elsewhere(model, tokenizer, prompts, facts[0], apply)
        for name, apply in applied.items()
    }
    windows = running_text(options, tokenizer, options.windows, options.length)
    one_each = [turn[i % len(turn)] for i in range(len(windows))]
    before = text_loss(model, windows, None)
    contexts = {
        "oracle": bank.routed(one_each),
        "all_active": bank.routed([turn]),
        "lora": rival["lora"]([]),
    }
    text: dict[str, Any] = {"base": sum(before) / len(before), "tokens": windows.numel()}
    for name, context in contexts.items():
        after = text_loss(model, windows, context)
        text[name] = sum(a - b for a, b in zip(after, before, strict=True)) / len(before)
    return {"prompts": at_prompts, "text": text}


def _costs(encoded: list[Any]) -> dict[str, Any]:
    count = len(encoded)
    reports = [one.report for one in encoded]
    return {
        "parameters": encoded[0].delta.parameters(),
        "parameters_fraction": reports[0]["params_fraction"],
        "bytes": encoded[0].delta.nbytes(),
        "seconds": sum(report["seconds"] for report in reports) / count,
        "steps": sum(report["steps"] for report in reports) / count,
        "converged": sum(bool(report["converged"]) for report in reports) / count,
    }


def _items(
    facts: list[Any], encoded: list[Any], found: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """For each fact its measures in every way, as lists in the order of `MEASURES`."""
    return [
        {
            "id": fact.id,
            "known": found["base"][i]["exact"],
            "norm": encoded[i].report["norm"],
            "steps": encoded[i].report["steps"],
            **{name: [rows[i][x] for x in MEASURES] for name, rows in found.items()},
        }
        for i, fact in enumerate(facts)
    ]


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = parser_of(__doc__, NAME, BANKS)
    add = parser.add_argument
    add("--nulls", type=int, default=3, help="draws of the random control [3]")
    add("--foreign", type=int, default=200, help="prompts about other things [200]")
    add("--windows", type=int, default=16, help="of running text [16]")
    add("--length", type=int, default=256, help="tokens of a window [256]")
    options = parsed(parser, NAME, given)
    if options.quick:
        options.nulls, options.foreign = 1, 8
        options.windows, options.length = 2, 32
    model, tokenizer, base = load_base(options)
    runs = {f"{bank} {seed}": (bank, seed) for seed in options.seeds for bank in options.banks}
    content = run_units(
        options,
        base,
        list(runs),
        lambda unit: work(options, model, tokenizer, *runs[unit]),
        beliefs_summary,
        CONTROLS,
    )
    show(*beliefs_table(content))
    return content


if __name__ == "__main__":
    main()
