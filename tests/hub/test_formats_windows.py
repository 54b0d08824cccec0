"""Programs of models whose layers see a window: the mask is made of core operators, too."""

from __future__ import annotations

import torch
from helpers import assert_within_budget
from hosts import logits
from hub.exported import exact_and_peer, left_padded, save_gravity, tokens, with_positions

from gravity_hf.hub.formats.programs import trace
from gravity_hf.hub.formats.source import load_source
from gravity_hf.hub.formats.torch_file import operators_beyond_core


def test_a_decoder_with_a_sliding_window_is_a_program_of_core_operators(tmp_path):
    """Ranges of visible keys once brought running minima into it, which ONNX does not have."""
    folder = save_gravity("mistral", tmp_path / "model")
    program, _ = trace(load_source(folder), {})
    assert operators_beyond_core(program.run_decompositions()) in (
        [],
        # Asserts of dtypes, which the writer takes out.
        ["aten._assert_tensor_metadata.default"],
    )
    # Longer than the window of 5, and padded.
    ids = tokens(2, 12)
    mask = left_padded(torch.ones_like(ids))
    inputs, shown = with_positions(ids, mask), mask.bool()
    nothing = [(torch.zeros(2, 2, 0, 8),) * 2]
    with torch.no_grad():
        actual, _ = program.module()(**inputs, past_key_values=nothing)
    exact, peer = exact_and_peer(folder, inputs)
    assert_within_budget("logits", actual[shown], exact[shown], peer[shown], factor=4.0)
    unseen = dict(inputs, input_ids=ids.index_fill(1, torch.tensor(0), 96))
    assert torch.equal(logits(load_source(folder).model, unseen)[0, -1], peer[0, -1])
