"""Does the router find the belief that a text is about, and does the store know what it knows?

    python scripts/experiments/belief_routing.py --base MODEL --device cuda
    python scripts/experiments/belief_routing.py --base MODEL --parts routing --banks general
    python scripts/experiments/belief_routing.py --quick --out trial.json

`routing`: among the facts of all banks, by paraphrases that were neither indexed nor used for the
threshold; texts about no belief are the facts' neighbours. Controls see the same queries: the same
router on fresh weights (`untrained`), TF-IDF, always the commonest (`majority`), routers by
wording alone, for which a text need not name its subject, and one for more precision. `confidence`:
answers to half of the queries fit a confidence, the other half judge it. `separation`: facts come
from beliefs where one is needed, and prompts that only ask for reasoning stay as they were.
`few_shot`: what 1 to 25 facts teach, against a LoRA of as many parameters. The last three train
deltas for --trained facts of each bank.
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

from belief_measures import PRECISION, calibrated_router, neighbours, store_of
from belief_report import routing_summary, routing_table
from belief_runs import (
    HELD_PARAPHRASES,
    config_of,
    drawn_facts,
    load_base,
    parsed,
    parser_of,
    run_units,
)
from geolip_runs import show

NAME = "belief_routing"
BANKS = ("chemistry", "computing", "general", "invented")
PARTS = ("routing", "confidence", "separation", "few_shot")
ENCODERS = ("hidden:quarter", "hidden:mid", "untrained", "tfidf", "majority")
# Name -> encoder, whether a text has to name the subject, target precision.
ROUTERS = {
    **{name: (name, True, PRECISION) for name in ENCODERS},
    "hidden:quarter, strict": ("hidden:quarter", True, 0.95),
    "hidden:quarter, by wording": ("hidden:quarter", False, PRECISION),
    "tfidf, by wording": ("tfidf", False, PRECISION),
}
CONTROLS = {
    "untrained": "the same router on fresh weights",
    "tfidf": "words in common",
    "majority": "always the commonest belief",
    "by wording": "a text need not name the subject",
    "strict": "a threshold for a precision of 0.95",
    "base": "no delta",
    "lora": "fine-tuning of as many parameters on the same texts, with the best of four rates",
}


def facts_of_banks(options: Any, seed: int) -> list[Any]:
    return [fact for bank in options.banks for fact in drawn_facts(options, bank, seed)]


def routing(options: Any, model: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """Every router on the same store, whose deltas do nothing and are not used."""
    from gravity_hf.knowledge.routing_report import routing_report

    facts = facts_of_banks(options, seed)
    known = [(text, fact.id) for fact in facts for text in fact.paraphrases[HELD_PARAPHRASES:]]
    unknown = neighbours(facts, threshold=False)
    items, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        store = _indexed(f"{folder}/kb", model, tokenizer, facts, config_of(options, seed))
        for name, (encoder, subjects, precision) in ROUTERS.items():
            router = calibrated_router(store, facts, encoder, subjects, precision)
            report = routing_report(router, known, unknown).to_dict()
            ranks = [item["rank"] for item in report.pop("items") if item["key"] is not None]
            found[name] = report
            items.append({"encoder": name, "ranks": ranks})
    return {"encoders": found, "queries": len(known), "per_item": items}


def _indexed(path: str, model: Any, tokenizer: Any, facts: list[Any], config: Any) -> Any:
    """A store of facts whose deltas are there for the form only."""
    import torch

    from gravity_hf.knowledge.delta import LowRankDelta
    from gravity_hf.knowledge.encoding_rows import training_prompts
    from gravity_hf.knowledge.store import BeliefStore
    from gravity_hf.knowledge.targets import in_out_features, target_modules

    name = target_modules(model)[0]
    width, out = in_out_features(model.get_submodule(name))
    store = BeliefStore.create(path, model, tokenizer)
    with store.transaction():
        for i, fact in enumerate(facts):
            vector = torch.zeros(1, width)
            vector[0, i % width] = 1.0
            delta = LowRankDelta({name: (vector, torch.zeros(out, 1))})
            report = {"training_prompts": training_prompts(fact, config)}
            store.add_delta(fact.id, delta, None, fact, report)
    return store


def trained_facts(options: Any, seed: int) -> list[Any]:
    """A few of each bank."""
    generator = random.Random(seed)
    found = []
    for bank in options.banks:
        facts = drawn_facts(options, bank, seed)
        found += generator.sample(facts, min(options.trained, len(facts)))
    return found


def confidence(options: Any, model: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """Fitted on one half of the facts' queries, judged on the other."""
    from gravity_hf.knowledge.confidence import confidence_quality
    from gravity_hf.knowledge.confidence_fitting import confidence_cases, fit_confidence

    with tempfile.TemporaryDirectory() as folder:
        store, facts = _taught(options, model, tokenizer, seed, folder)
        recorder = _recorder(store, facts)
        cases = confidence_cases(recorder, *_queries(facts), batch_size=options.batch)
        random.Random(seed).shuffle(cases)
        half = len(cases) // 2
        fit, judge = cases[:half], cases[half:]
        try:
            fitted = fit_confidence(recorder, fit, seed=seed)
        except ValueError as error:
            return {"failed": str(error), "per_item": []}
        except RuntimeError as error:
            return {"failed": str(error), "per_item": []}
    # Without a source there is no answer of the store: its confidence is 0.
    sure = [fitted.predict(case.features) if case.sources else 0.0 for case in judge]
    quality = vars(confidence_quality(sure, [case.right for case in judge]))
    kept = [case.right for case, p in zip(judge, sure, strict=True) if p >= fitted.point.threshold]
    right = sum(case.right for case in judge)
    return {
        "quality": quality,
        "threshold": fitted.point.threshold,
        "kept": len(kept),
        "precision": sum(kept) / len(kept) if kept else None,
        "recall": sum(kept) / right if right else None,
        "per_item": [
            {"key": case.key, "right": case.right, "routed": len(case.sources), "confidence": p}
            for case, p in zip(judge, sure, strict=True)
        ],
    }


def _queries(facts: list[Any]) -> tuple[list[tuple[str, str]], list[str]]:
    known = [(text, fact.id) for fact in facts for text in fact.paraphrases[HELD_PARAPHRASES:]]
    return known, neighbours(facts, threshold=False)


# Of the seed that was asked for last: two parts need the same deltas.
_ENCODED: dict[int, list[Any]] = {}


def _taught(options: Any, model: Any, tokenizer: Any, seed: int, folder: str) -> tuple[Any, Any]:
    from gravity_hf.knowledge.encoding import BeliefEncoder

    facts = trained_facts(options, seed)
    if seed not in _ENCODED:
        _ENCODED.clear()
        encoder = BeliefEncoder(model, tokenizer, config_of(options, seed))
        _ENCODED[seed] = encoder.encode(facts, progress=False)
    return store_of(f"{folder}/kb", model, tokenizer, _ENCODED[seed]), facts


def _recorder(store: Any, facts: list[Any]) -> Any:
    from gravity_hf.knowledge.provenance import ProvenanceRecorder

    return ProvenanceRecorder(store, router=calibrated_router(store, facts))


def separation(options: Any, model: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """The benchmark on the trained facts."""
    from gravity_hf.knowledge.separation import separation_benchmark

    with tempfile.TemporaryDirectory() as folder:
        store, facts = _taught(options, model, tokenizer, seed, folder)
        report = separation_benchmark(
            store,
            calibrated_router(store, facts),
            batch_size=options.batch,
            limit=options.asked,
            seed=seed,
        ).to_dict()
    keep = ("category", "kind", "key", "right", "routing_right", "flag_right", "confidence")
    items = [{name: item[name] for name in keep} for item in report.pop("per_item")]
    return {**report, "per_item": items}


def few_shot(options: Any, model: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """One draw of the sweep."""
    from gravity_hf.knowledge.few_shot import few_shot_sweep

    facts = trained_facts(options, seed)
    sweep = few_shot_sweep(
        model,
        tokenizer,
        facts,
        counts=[count for count in options.shots if count + options.hidden <= len(facts)],
        seeds=[seed],
        hidden=options.hidden,
        config=config_of(options, seed),
    ).to_dict()
    keep = ("method", "count", "memorised", "paraphrases", "unseen", "kl_unrelated", "parameters")
    items = [{name: item[name] for name in keep} for item in sweep["per_item"]]
    return {"summary": sweep["summary"], "per_item": items}


def work(options: Any, model: Any, tokenizer: Any, part: str, seed: int) -> dict[str, Any]:
    """One part with one seed."""
    parts = {
        "routing": routing,
        "confidence": confidence,
        "separation": separation,
        "few_shot": few_shot,
    }
    found = parts[part](options, model, tokenizer, seed)
    return {"part": part, "seed": seed, **found}


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = parser_of(__doc__, NAME, BANKS)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--trained", type=int, default=40, help="facts of each bank with deltas [40]")
    add("--asked", type=int, default=40, help="facts that the separation benchmark asks for [40]")
    add("--shots", type=int, nargs="+", default=[1, 3, 5, 10, 25], help="facts shown")
    add("--hidden", type=int, default=20, help="facts never shown [20]")
    add("--batch", type=int, default=16, help="rows generated together [16]")
    options = parsed(parser, NAME, given)
    if options.quick:
        options.trained, options.asked, options.shots, options.hidden = 4, 3, [1, 2], 2
    model, tokenizer, base = load_base(options)
    runs = {f"{part} {seed}": (part, seed) for seed in options.seeds for part in options.parts}
    content = run_units(
        options,
        base,
        list(runs),
        lambda unit: work(options, model, tokenizer, *runs[unit]),
        routing_summary,
        CONTROLS,
    )
    show(*routing_table(content))
    return content


if __name__ == "__main__":
    main()
