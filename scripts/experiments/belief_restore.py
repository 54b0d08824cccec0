"""Is the base bit for bit what it was, whatever was added and removed?

    python scripts/experiments/belief_restore.py --base MODEL --device cuda
    python scripts/experiments/belief_restore.py --quick --out trial.json

A hundred beliefs with random deltas are added to a store and removed again, in an order drawn by
lot. On the way, every ten changes, the logits of twenty-four prompts are compared by `torch.equal`
with those from before, without beliefs; and those with all beliefs in force have to differ, so that
the comparison could fail. Afterwards the store is opened anew, its base compared by digest, and one
bit of one tensor after another is turned over: each has to be named. Nothing is trained.
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

from belief_measures import random_like
from belief_report import restore_summary, restore_table
from belief_runs import load_base, parsed, parser_of, run_units
from geolip_runs import show

NAME = "belief_restore"
CONTROLS = {"active": "logits with the beliefs in force, which have to differ"}
EVERY = 10


def logits(model: Any, tokenizer: Any, prompts: list[str]) -> list[Any]:
    """At all positions of each prompt, alone in its batch."""
    import torch

    from gravity_hf.knowledge.fact_tokens import prompt_ids

    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([prompt_ids(tokenizer, text)], device=model.device)).logits
            for text in prompts
        ]


def equal(one: list[Any], other: list[Any]) -> int:
    """How many pairs are the same, bit for bit."""
    import torch

    return sum(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def work(options: Any, model: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """One order of changes."""
    from gravity_hf.knowledge.facts import load_facts
    from gravity_hf.knowledge.store import BeliefStore

    prompts = [fact.prompt for fact in load_facts("general")[: options.prompts]]
    before = logits(model, tokenizer, prompts)
    items = []
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/kb"
        store = BeliefStore.create(path, model, tokenizer)
        for step, action in enumerate(changes(options.beliefs, seed), 1):
            if action[0] == "add":
                store.add_delta(f"belief {action[1]}", _delta(model, seed * 1000 + action[1]))
            else:
                store.remove(f"belief {action[1]}")
            if step % EVERY and step != 2 * options.beliefs:
                continue
            items.append({"step": step, **_compared(model, tokenizer, prompts, before, store)})
        again = BeliefStore.open(path, model, tokenizer)
        verified = again.verify()
        reopened = equal(before, logits(model, tokenizer, prompts))
    return {
        "seed": seed,
        "beliefs": options.beliefs,
        "prompts": len(prompts),
        "reopened_equal": reopened,
        "leaves": verified.leaves,
        "flips": flips(model, tokenizer, options.flips, seed),
        "per_item": items,
    }


def changes(count: int, seed: int) -> list[tuple[str, int]]:
    """Each number is added and, later, removed; all else is drawn."""
    generator = random.Random(seed)
    slots = list(range(count)) * 2
    generator.shuffle(slots)
    seen: set[int] = set()
    order = []
    for number in slots:
        order.append(("remove" if number in seen else "add", number))
        seen.add(number)
    return order


def _delta(model: Any, seed: int) -> Any:
    import torch

    from gravity_hf.knowledge.delta import LowRankDelta
    from gravity_hf.knowledge.targets import in_out_features, target_modules

    factors = {}
    for name in target_modules(model):
        width, out = in_out_features(model.get_submodule(name))
        factors[name] = (torch.ones(2, width), torch.ones(out, 2))
    return random_like(LowRankDelta(factors), seed).scaled(0.05)


def _compared(
    model: Any, tokenizer: Any, prompts: list[str], before: list[Any], store: Any
) -> dict[str, Any]:
    bank = store.compile_bank()
    with bank.routed([bank.ids()]):
        active = logits(model, tokenizer, prompts)
    return {
        "in_force": len(store),
        "active_equal": equal(before, active),
        "equal": equal(before, logits(model, tokenizer, prompts)),
    }


def flips(model: Any, tokenizer: Any, count: int, seed: int) -> dict[str, Any]:
    """Turn over one bit of a tensor, compare digests, turn it back; whether it was named alone."""
    import torch

    from gravity_hf.knowledge.digest import compute_digest

    generator = random.Random(seed)
    digest = compute_digest(model, tokenizer)
    state = dict(model.named_parameters(remove_duplicate=True)) | dict(model.named_buffers())
    chosen = generator.sample(sorted(set(state) & set(digest.leaves)), count)
    named = 0
    for name in chosen:
        flat = state[name].data.view(-1)
        at = generator.randrange(len(flat))
        kept = flat[at].clone()
        flat[at : at + 1].view(torch.uint8)[0] ^= 1
        found = digest.compare(compute_digest(model, tokenizer)).names()
        named += list(found) == [name]
        flat[at] = kept
    restored = compute_digest(model, tokenizer).root == digest.root
    return {"flipped": len(chosen), "named": named, "restored": restored}


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = parser_of(__doc__, NAME, ("general",))
    parser.add_argument("--beliefs", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--flips", type=int, default=8, help="bits turned over [8]")
    options = parsed(parser, NAME, given)
    if options.quick:
        options.beliefs, options.flips = 10, 2
    model, tokenizer, base = load_base(options)
    runs = {f"order {seed}": seed for seed in options.seeds}
    content = run_units(
        options,
        base,
        list(runs),
        lambda unit: work(options, model, tokenizer, runs[unit]),
        restore_summary,
        CONTROLS,
    )
    show(*restore_table(content))
    return content


if __name__ == "__main__":
    main()
