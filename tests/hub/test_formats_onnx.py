"""ONNX files: the same numbers in onnxruntime for every size, with and without a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_within_budget
from hosts import logits
from hub.exported import (
    exact_and_peer,
    host,
    left_padded,
    save_gravity,
    tokens,
    with_other_masses,
    with_positions,
)
from torch import Tensor
from transformers import GenerationConfig

from gravity_hf import load_gravity_model
from gravity_hf.hub.formats import onnx_file
from gravity_hf.hub.formats.export import export_gravity_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# Rounding in another order than torch's, by another library.
FACTOR = 4.0
# Not the exporter's own choice, which the encoder has.
OPSET = 18


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return _exported("qwen2", tmp_path_factory.mktemp("decoder"), opset=OPSET)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """With its weights in a file of their own, as a large model has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "IN_ONE_FILE", 0)
        return _exported("bert", tmp_path_factory.mktemp("encoder"))


class Exported:
    """A gravity model's folder, and a session on the ONNX file made of it."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        self.session = onnxruntime.InferenceSession(out / "model.onnx")

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [output.name for output in self.session.get_outputs()]
        arrays = {name: x.numpy() for name, x in inputs.items()}
        found = self.session.run(None, arrays)
        return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}


def _exported(name: str, place: Path, **options: Any) -> Exported:
    folder = save_gravity(name, place / "model")
    export_gravity_model(folder, place / "onnx", format="onnx", length=12, samples=4, **options)
    return Exported(folder, place / "onnx")


def step(decoder: Exported, ids: Tensor, mask: Tensor, cache: dict[str, Tensor]) -> dict:
    """What a user of the file alone does: past in, present out."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    outputs = decoder.run({**inputs, **cache})
    return {k.replace("present", "past_key_values"): x for k, x in outputs.items()}


def nothing_cached(decoder: Exported, batch: int) -> dict[str, Tensor]:
    shapes = {i.name: i.shape for i in decoder.session.get_inputs() if "past" in i.name}
    return {name: torch.zeros(batch, s[1], 0, s[3]) for name, s in shapes.items()}


@pytest.mark.parametrize(("batch", "past", "length"), [(1, 0, 1), (2, 0, 6), (3, 9, 1), (2, 5, 4)])
def test_one_file_serves_the_prompt_and_every_step_after_it(decoder, batch, past, length):
    ids = tokens(batch, past + length)
    mask = left_padded(torch.ones_like(ids))
    cache = nothing_cached(decoder, batch)
    if past:
        cache = step(decoder, ids[:, :past], mask[:, :past], cache)
        cache.pop("logits")
    actual = step(decoder, ids[:, past:], mask, cache)["logits"]
    exact, peer = (x[:, past:] for x in exact_and_peer(decoder.folder, with_positions(ids, mask)))
    shown = mask[:, past:].bool()
    assert_within_budget("logits", actual[shown], exact[shown], peer[shown], factor=FACTOR)


def test_greedy_steps_of_onnxruntime_are_what_generate_writes(decoder):
    model = load_gravity_model(decoder.folder)
    model.generation_config = GenerationConfig(pad_token_id=0)
    ids = tokens(2, 6)
    mask = left_padded(torch.ones_like(ids))
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 6:]
    found, new, cache = [], ids, nothing_cached(decoder, 2)
    for _ in range(10):
        cache = step(decoder, new, mask, cache)
        new = cache.pop("logits")[:, -1].argmax(-1, keepdim=True)
        found.append(new)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(torch.cat(found, 1), expected)
    assert len(expected.unique()) > 3


def test_the_cache_has_the_names_that_other_tools_give_it(decoder):
    inputs = {i.name: i.shape for i in decoder.session.get_inputs()}
    assert inputs == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "past_and_length"],
        "position_ids": ["batch", "length"],
        "past_key_values.0.key": ["batch", 2, "past", 8],
        "past_key_values.0.value": ["batch", 2, "past", 8],
    }
    outputs = [output.name for output in decoder.session.get_outputs()]
    assert outputs == ["logits", "present.0.key", "present.0.value"]


def bert_inputs(batch: int, length: int) -> dict[str, Tensor]:
    ids = tokens(batch, length)
    mask = left_padded(torch.ones_like(ids)).flip(1)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (5, 30)])
def test_an_encoder_gives_the_same_for_every_size_and_padding(encoder, batch, length):
    inputs = bert_inputs(batch, length)
    exact, peer = exact_and_peer(encoder.folder, inputs)
    actual = encoder.run(inputs)["logits"]
    assert_within_budget("logits", actual, exact, peer, factor=FACTOR)


def test_weights_beyond_what_a_protobuf_holds_lie_in_a_file_of_their_own(encoder):
    found = {file.name: file.stat().st_size for file in encoder.out.glob("*.onnx*")}
    report = json.loads((encoder.out / "export.json").read_text())
    assert found.keys() == {"model.onnx", "model.onnx.data"} and report["files"] == found
    assert found["model.onnx.data"] > 4 * 97 * 32


def test_gravity_with_these_masses_is_in_the_file(encoder):
    inputs = bert_inputs(2, 9)
    actual = encoder.run(inputs)["logits"]
    error = (actual - exact_and_peer(encoder.folder, inputs)[0]).abs().max()
    for other in (with_other_masses(encoder.folder, inputs), logits(host("bert"), inputs)):
        assert (actual - other).abs().max() > 1e3 * error


def test_the_file_says_that_it_is_gravity_and_with_what_settings(decoder):
    config = json.loads((decoder.folder / "config.json").read_text())
    found = decoder.session.get_modelmeta().custom_metadata_map
    assert json.loads(found["gravity"]) == config["gravity"]
    assert found["model_type"] == "gravity_qwen2" and found["gravity_law"] == "force"


def test_the_file_says_nothing_of_the_machine_that_made_it(decoder):
    content = (decoder.out / "model.onnx").read_bytes()
    for path in (Path(torch.__file__).parent, Path(__file__).parents[2], decoder.folder):
        assert str(path).encode() not in content


def test_what_was_measured_is_written_beside_the_file(decoder):
    written = json.loads((decoder.out / "export.json").read_text())
    assert (written["format"], written["kind"]) == ("onnx", "decoder")
    assert written["opset"] == OPSET and written["versions"]["onnxruntime"]
    assert written["bytes_after"] == (decoder.out / "model.onnx").stat().st_size
    assert written["measured"]["greedy"] == {"prompts": 4, "tokens": 64, "equal": 64}
    assert 0 < written["measured"]["relative_error"] < 1e-5


def test_the_opset_is_the_one_asked_for(decoder):
    (opset,) = (x.version for x in onnx.load(decoder.out / "model.onnx").opset_import)
    assert opset == OPSET
