"""The fusion of three streams: published numbers, masks, and the gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers.golden_files import OUTPUT_TOLERANCE, facts, golden
from torch import Tensor

from gravity_hf.layers import CrossGravitationalFusion
from gravity_hf.layers.fusion import STREAMS

WIDTH = 16


def fusion_of(**given: Any) -> CrossGravitationalFusion:
    return CrossGravitationalFusion(WIDTH, 4, **given).eval()


def streams_of(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    world, self_, env = (torch.randn(batch, length, WIDTH) for length in (7, 5, 3))
    return world, self_, env


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_fusion_is_reproduced(dtype: torch.dtype) -> None:
    fusion = CrossGravitationalFusion(**facts("fusion")["fusion"]["kwargs"]).eval()
    fusion.load_state_dict(golden("fusion", "fusion", "state"), strict=True)
    inputs = golden("fusion", "fusion", "in")
    fused = fusion.to(dtype)(*(inputs[name].to(dtype) for name in STREAMS))
    expected = golden("fusion", "fusion", "out")
    for name, found in zip(STREAMS, fused, strict=True):
        torch.testing.assert_close(found.float(), expected[name], rtol=0, atol=OUTPUT_TOLERANCE)


@pytest.mark.parametrize("use_gate", [False, True])
@pytest.mark.parametrize("padded", range(3), ids=STREAMS)
def test_padding_is_neither_attended_to_nor_counted(padded: int, use_gate: bool) -> None:
    fusion, streams = fusion_of(use_gate=use_gate), streams_of()
    length = streams[padded].shape[1]
    filled = list(streams)
    filled[padded] = torch.cat([streams[padded], torch.randn(2, 4, WIDTH)], 1)
    mask = torch.arange(length + 4).expand(2, -1) < length
    found = fusion(*filled, **{f"{STREAMS[padded]}_mask": mask})
    for index, expected in enumerate(fusion(*streams)):
        part = found[index][:, : expected.shape[1]]
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


def test_a_stream_that_sees_nothing_gets_nothing() -> None:
    fusion, streams = fusion_of(), streams_of()
    for x in streams:
        x.requires_grad_()
    hidden = torch.tensor([[0], [1]])
    masks = {"self_mask": hidden.expand(2, 5), "env_mask": hidden.expand(2, 3)}
    fused = fusion(*streams, **masks)
    assert torch.equal(fused.world[0], torch.zeros(7, WIDTH))
    torch.testing.assert_close(fused.world[1], fusion(*streams).world[1])
    sum(x.sum() for x in fused).backward()
    assert all(x.grad.isfinite().all() for x in streams)


def test_published_fusion_has_nothing_of_a_stream_but_its_query_and_the_gate_keeps_it() -> None:
    streams = streams_of()
    for use_gate in (False, True):
        fusion = fusion_of(use_gate=use_gate)
        with torch.no_grad():
            # Without queries, what is left of a stream is what the gate lets through.
            fusion.world_cross_attn.in_proj_weight[:WIDTH] = 0.0
        other = (torch.randn_like(streams[0]), *streams[1:])
        same = torch.equal(fusion(*streams).world, fusion(*other).world)
        assert same is not use_gate


@pytest.mark.parametrize("use_gate", [False, True])
def test_no_token_of_a_stream_reaches_another_one_of_it(use_gate: bool) -> None:
    fusion = fusion_of(use_gate=use_gate)
    for index, name in enumerate(STREAMS):
        streams = list(streams_of())
        before = fusion.fuse(name, tuple(streams))
        streams[index] = streams[index].clone()
        streams[index][:, -1] += 1.0
        after = fusion.fuse(name, tuple(streams))
        assert torch.equal(before[:, :-1], after[:, :-1])
        assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("use_gate", [False, True])
def test_every_trainable_weight_gets_a_gradient(use_gate: bool) -> None:
    fusion = fusion_of(use_gate=use_gate)
    sum(x.square().sum() for x in fusion(*streams_of())).backward()
    missing = [n for n, x in fusion.named_parameters() if x.requires_grad and x.grad is None]
    frozen = {n.split(".")[0] for n, x in fusion.named_parameters() if not x.requires_grad}
    assert not missing
    assert frozen == (set() if use_gate else {"gate", "norm"})


def test_masses_are_softplus_of_the_mean() -> None:
    fusion, streams = fusion_of(), streams_of()
    masses = fusion.masses(streams)
    for name, stream, mass in zip(STREAMS, streams, masses, strict=True):
        projected = getattr(fusion, f"{name}_mass")(stream.mean(1))[:, 0]
        torch.testing.assert_close(mass, torch.nn.functional.softplus(projected))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: CrossGravitationalFusion(30, 4), "must be divisible"),
        (lambda: fusion_of()(*streams_of()[:2], torch.zeros(3, 4, WIDTH)), "env: expected"),
        (lambda: fusion_of()(*streams_of()[:2], torch.zeros(2, 0, WIDTH)), "at least one token"),
        (lambda: fusion_of()(*streams_of(), self_mask=torch.ones(2, 7)), "self_mask: expected"),
        (lambda: fusion_of().fuse("moon", streams_of()), "stream: expected one of"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
