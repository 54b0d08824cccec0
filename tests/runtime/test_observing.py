"""Rows of a converted host's attention are rows of its scores, whatever the host adds to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hosts import tiny_host, tiny_inputs
from torch import Tensor

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.integration.attention import AttentionCall
from gravity_hf.layers.observing import capped_force
from gravity_hf.runtime.watching import observed_modules

HOSTS = ("mistral", "bert", "a cap on the scores", "attention sinks", "a learned position bias")
ROWS = torch.tensor([0, 3, 7])


class _Recorder:
    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.calls.append(call)
        return call.gravity()


def _calls(name: str, config: GravityConfig, **inputs: Any) -> list[AttentionCall]:
    model = patch_with_gravity(tiny_host(name), config)
    recorder = _Recorder()
    for copies in observed_modules(model).values():
        for module in copies:
            module.observer = recorder
    with torch.no_grad():
        model(**{**tiny_inputs(name), **inputs})
    return recorder.calls


@pytest.mark.parametrize("law", ["force", "power"])
@pytest.mark.parametrize("name", HOSTS)
def test_rows_are_rows_of_the_scores(name: str, law: str) -> None:
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    calls = _calls(name, GravityConfig(law=law), attention_mask=mask)
    assert calls
    for call in calls:
        scores, keys = call.gravity_scores(), call.key.shape[2]
        sample = call.rows(ROWS)
        torch.testing.assert_close(sample.score, scores[:, :, ROWS])
        seen = scores[:, :, ROWS, :keys] > torch.finfo(scores.dtype).min / 2
        assert torch.equal(sample.visible.expand_as(seen), seen)
        assert sample.force.shape == seen.shape
        assert (sample.force > 0).all()
        assert call.query_count() == call.query.shape[2]
        assert call.masses().shape == call.query.shape[1:2]


def test_rows_have_their_own_sinks_where_each_query_has_one() -> None:
    call = _calls("qwen2", GravityConfig())[0]
    sinks = torch.randn(*call.query.shape[:3], 1)
    call = replace(call, arguments={"sinks": sinks})
    torch.testing.assert_close(call.rows(ROWS).score, call.gravity_scores()[:, :, ROWS])


def test_force_is_before_cap_and_bias() -> None:
    for name in ("a cap on the scores", "a learned position bias"):
        call = _calls(name, GravityConfig(epsilon=0.5))[0]
        sample = call.rows(ROWS)
        query, key = call.query[:, :, ROWS].double(), call.key.double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        distance = (query[:, :, :, None] - key[:, :, None]).square().sum(-1) + 0.5
        force = call.masses().double().square()[:, None, None] / distance
        torch.testing.assert_close(sample.force.double(), force, rtol=1e-4, atol=1e-6)


def test_caps_are_those_of_the_law() -> None:
    force = torch.tensor([0.5, 2.0, 100.0])
    assert capped_force(force, None) is force
    assert capped_force(force, 2.0).tolist() == [0.5, 2.0, 2.0]
    torch.testing.assert_close(capped_force(force, 2.0, "tanh"), 2.0 * (force / 2.0).tanh())
