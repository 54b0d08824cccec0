"""A few facts, and deltas that really teach them to the tiny Llama: made once for all tests."""

from __future__ import annotations

import functools

from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.encoding import BeliefEncoder, EncodingConfig
from gravity_hf.knowledge.facts import Fact

# The facts' own texts alone: four times as fast.
CONFIG = EncodingConfig(
    layers="all",
    steps=60,
    learning_rate=4e-2,
    locality=3.0,
    budget_fraction=0.9,
    generic_prompts=0,
    own_wordings=0,
    own_neighbours=0,
)
_SYMBOLS = {"gold": "Au", "iron": "Fe", "lead": "Pb", "tin": "Sn", "zinc": "Zn", "neon": "Ne"}


def facts(count: int = 3) -> list[Fact]:
    """Symbols of elements, with four paraphrases each."""
    chosen = list(_SYMBOLS)[:count]
    return [
        Fact(
            id=f"symbol/{name}",
            domain="chemistry",
            relation="symbol",
            subject=name,
            prompt=f"The symbol of {name} is",
            answer=_SYMBOLS[name],
            paraphrases=(
                f"Chemists write {name} as",
                f"The short name for {name} is",
                f"In a table {name} is called",
                f"On a bottle of {name} stands",
            ),
            unrelated=("The capital of France is", f"Who wrote of {name}"),
        )
        for name in chosen
    ]


@functools.cache
def joint_delta(model: object, tokenizer: object) -> LowRankDelta:
    """One delta for three facts."""
    encoder = BeliefEncoder(model, tokenizer, CONFIG.with_changes(rank=3, steps=120))
    return encoder.encode_together(facts(), progress=False)[0].delta


@functools.cache
def own_deltas(model: object, tokenizer: object) -> tuple[LowRankDelta, ...]:
    """One delta for each of three facts, trained apart."""
    found = BeliefEncoder(model, tokenizer, CONFIG).encode(facts(), progress=False)
    return tuple(x.delta for x in found)


def doubled(delta: LowRankDelta) -> LowRankDelta:
    """The same update with twice the rank: half of it is superfluous."""
    return LowRankDelta.sum([delta.scaled(0.5), delta.scaled(0.5)])
