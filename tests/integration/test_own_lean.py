"""What a LeanFormer is, in words."""

from __future__ import annotations

import pytest

from gravity_hf import LeanFormerConfig
from gravity_hf.integration.own_lean import (
    leanformer_in_words,
    leanformer_sizes_in_words,
    leanformer_without_gravity,
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "dot products, no gravity; causal"),
        ({"attention": "gravity"}, "weights proportional to 1 / (d^2 + e)^g; causal, softening 20"),
        ({"attention": "gravity", "gravity_law": "force"}, "law force: softmax over g / (d^2 + e)"),
        ({"attention_block": 8}, "64 keys at most, chosen in blocks of 8 by a screening"),
        ({"screening": "none"}, "a token looks at every key"),
        ({"feed_forward_policy": "block"}, "uses 0.2 of the neurons, in blocks of 32; the others"),
        ({"exit_threshold": 0.75}, "leave after 2 layers, from a probability of 0.75 on"),
        ({"exit_heads": False}, "every token goes through all layers"),
    ],
)
def test_its_choices_are_said(settings: dict[str, object], said: str) -> None:
    config = LeanFormerConfig(**settings)
    assert said in " | ".join(leanformer_in_words(config))
    assert leanformer_without_gravity(config) == ("attention" not in settings)


def test_its_sizes_are_said() -> None:
    said = leanformer_sizes_in_words(LeanFormerConfig(attention_rank=0, position="learned"))
    assert said == (
        "12 layers, 8 heads, width 512, dense maps in attention and rank 64 behind it, vocabulary "
        "32000, 2048 positions"
    )
