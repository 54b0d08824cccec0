"""Ways of generating that reorder, repeat or crop the cache, or read the prompt in parts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from integration.running import (
    TOLERANCE,
    assert_same,
    assert_unlike_the_host,
    generate,
    gravity_host,
    host,
    inputs_of,
    left_padded,
)
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

CACHES = [{"use_cache": False}, {}, {"cache_implementation": "static"}]
DECODERS = ["qwen2", "mistral", "gemma3"]
ENCODER_DECODERS = ["bart", "a learned position bias"]

model_of = functools.cache(gravity_host)


def prompt_of(family: str) -> dict[str, Tensor]:
    if family not in ENCODER_DECODERS:
        return left_padded(family)
    return {name: value for name, value in inputs_of(family).items() if "decoder" not in name}


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_beams_are_the_same_with_every_cache(family):
    """After each token beams change places, and their keys with them."""
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    runs = [generate(model_of(family), prompt_of(family), **beams, **cache) for cache in CACHES]
    for run in runs[1:]:
        assert torch.equal(run.text, runs[0].text)
        torch.testing.assert_close(run.scores, runs[0].scores, **TOLERANCE)
    assert all(run.calls > 0 for run in runs)
    of_host = generate(host(family), prompt_of(family), **beams)
    assert (runs[0].scores - of_host.scores).abs().max() > 1e-3


@pytest.mark.parametrize("family", DECODERS)
def test_samples_are_the_same_with_every_cache(family):
    model, prompt, runs = model_of(family), prompt_of(family), []
    for cache in CACHES:
        torch.manual_seed(0)  # after the model is made, which draws its weights
        sampling = {"do_sample": True, "num_return_sequences": 3, **cache}
        runs.append(generate(model, prompt, **sampling))
    for run in runs[1:]:
        assert_same(run, runs[0])
    assert len(runs[0].text.unique(dim=0)) == 6


@pytest.mark.parametrize("family", [*DECODERS, "gpt2"])
def test_rows_of_a_left_padded_batch_are_what_they_are_alone(family):
    model = model_of(family)
    rows = [inputs_of(family, batch=1, length=n, seed=n) for n in (11, 7, 4)]
    together = {
        name: torch.cat(
            [nn.functional.pad(row[name], (11 - row[name].shape[1], 0)) for row in rows]
        )
        for name in rows[0]
    }
    batch = generate(model, together)
    for index, row in enumerate(rows):
        alone = generate(model, row)
        assert torch.equal(batch.text[index, 11:], alone.text[0, -12:])
        torch.testing.assert_close(batch.logits[index], alone.logits[0], **TOLERANCE)
    assert batch.calls == 3 * 12
    assert_unlike_the_host(batch, family, together)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_prompt_read_in_chunks_is_the_same_prompt(family, cache):
    model, inputs = model_of(family), left_padded(family)
    whole = generate(model, inputs)
    chunks = generate(model, inputs, prefill_chunk_size=4, cache_implementation=cache)
    assert_same(chunks, whole)
    # Eleven tokens in three chunks instead of one.
    assert chunks.calls == whole.calls + 2 * 3


def windows_can_be_cropped() -> bool:
    """transformers 5.17 has more keys than its own mask after two steps that may be taken back."""
    layer, token = DynamicSlidingWindowLayer(sliding_window=2), torch.zeros(1, 1, 2, 1)
    layer.activate_past_recording()
    layer.update(token, token)
    masked, _ = layer.get_mask_sizes(2)
    return layer.update(token, token)[0].shape[2] == masked


class Forwards:
    """How often a model was run."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self.handle = model.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("assistant", ["the host", "another gravity", "the prompt"])
@pytest.mark.parametrize("family", DECODERS)
def test_assisted_text_is_the_greedy_text(family, assistant):
    """Guesses that were wrong are cropped from the cache."""
    model, inputs = model_of(family), inputs_of(family, batch=1)
    greedy = generate(model, inputs)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if assistant != "the prompt":
        if family != "qwen2" and not windows_can_be_cropped():
            pytest.skip("this transformers cannot take steps back in a window's cache")
        helper = host(family) if assistant == "the host" else gravity_host(family, softness=4.0)
        options = {"assistant_model": helper}
    forwards = Forwards(model)
    run = generate(model, inputs, **options)
    forwards.handle.remove()
    assert torch.equal(run.text, greedy.text) and run.calls > 0
    if assistant != "the prompt":
        # The model read guesses by the handful, and believed some.
        assert forwards.count < 12


def test_rows_of_a_cache_may_be_repeated_chosen_and_cropped():
    """What searches do that live outside of transformers now, like contrastive search."""
    model, ids = model_of("qwen2"), inputs_of("qwen2")["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([4, 0, 5]))
        cache.reorder_cache(torch.tensor([1, 0, 2]))
        cache.crop(-2)
        rows = ids[[0, 1, 1]]
        continued = model(rows[:, 6:], past_key_values=cache, use_cache=True).logits
        expected = model(rows, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(continued, expected, **TOLERANCE)
