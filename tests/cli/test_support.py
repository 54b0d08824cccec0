"""`gravity-hf support` says what the support table says."""

from __future__ import annotations

import pytest
from cli.commands import run

from gravity_hf.integration.support_table import (
    SUMMARY_HEADERS,
    summary,
    support_table,
    unreached,
)


def shown(*arguments: str) -> str:
    result = run("support", *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_all_kinds_of_models_are_counted() -> None:
    text = shown()
    # Narrow terminals break the titles of the columns.
    assert set(" ".join(SUMMARY_HEADERS).split()) <= set(text.split())
    for row in summary(support_table()):
        assert " ".join(row) in text
    assert unreached(support_table()) in text


def test_what_the_inputs_left_out_is_named() -> None:
    name = next(n for n, r in support_table().records.items() if len(r.not_reached) == 1)
    (place,) = support_table().of(name).not_reached
    assert f"not reached by the inputs, 1 of the places of attention: {place}" in shown(name)


@pytest.mark.parametrize("name", ["qwen2", "gravity_qwen2"])
def test_a_model_type_that_passes_is_shown_with_its_promises(name: str) -> None:
    text = shown(name)
    assert "qwen2: passes" in text and "Qwen2ForCausalLM" in text
    assert "gravity in: model.layers.*.self_attn" in text
    assert "correct: passed" in text and "lowest cosine to the host: 0.99" in text


def test_a_model_type_that_does_not_is_shown_with_its_reason() -> None:
    text = shown("bloom")
    assert "bloom: no routed attention" in text and "BloomAttention" in text


def test_an_unknown_model_type_is_refused_in_one_line() -> None:
    result = run("support", "qwen_2")
    assert result.exit_code == 2
    assert "got 'qwen_2'. Near it: qwen2" in " ".join(result.output.split())
