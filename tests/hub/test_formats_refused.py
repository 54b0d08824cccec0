"""Exports that are refused: by name, and with every folder as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hosts import tiny_host
from hub.exported import content, host, save_gravity

from gravity_hf import load_gravity_model
from gravity_hf.hub.formats.export import export_gravity_model
from gravity_hf.hub.formats.onnx_file import require_opset_of
from gravity_hf.training.folders import require_free
from gravity_hf.training.tokenizers import byte_tokenizer

SMALL = {"length": 12, "samples": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_gravity("qwen2", tmp_path_factory.mktemp("refused") / "model")


@pytest.mark.parametrize("name", ["gguf", "GGUF"])
def test_gguf_is_refused_with_the_reason_before_anything_is_read(name, tmp_path):
    nowhere = tmp_path / "no model at all"
    with pytest.raises(ValueError, match=r"ggml has no operator for gravity.*onnx.*unpatch"):
        export_gravity_model(nowhere, tmp_path / "out", format=name)
    assert list(tmp_path.iterdir()) == []


def save_plain(place: Path) -> Path:
    host("qwen2").save_pretrained(place / "plain")
    return place / "plain"


def save_adapter(place: Path) -> Path:
    return _with_files(place / "adapter", "adapter_config.json")


def save_empty(place: Path) -> Path:
    return _with_files(place / "notes", "notes.txt")


def save_program(place: Path) -> Path:
    return _with_files(place / "program", "config.json", "model.onnx")


def _with_files(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


def save_cross(place: Path) -> Path:
    return save_gravity("cross attention", place / "bart")


def save_recurrent(place: Path) -> Path:
    return save_gravity("linear attention between", place / "recurrent")


@pytest.mark.parametrize(
    ("save", "format", "message"),
    [
        (save_plain, "fp16", r"got a plain qwen2|dot-product"),
        (save_adapter, "fp16", r"got an adapter.*merge_and_unload"),
        (save_empty, "fp16", r"no config.json. Give the folder"),
        (save_program, "fp16", r"got a program \(model.onnx\)"),
        (save_cross, "onnx", r"GravityBartForConditionalGeneration, an encoder-decoder.*int8"),
        (save_recurrent, "torch", r"GravityQwen3NextForCausalLM, which keeps .*Linear"),
    ],
    ids=[
        *("a plain host", "an adapter", "no model", "an ONNX file"),
        *("an encoder-decoder", "a recurrent state"),
    ],
)
def test_what_a_format_cannot_carry_is_refused_by_name(save, format, message, tmp_path):
    pytest.importorskip("onnxruntime")
    source = save(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        export_gravity_model(source, tmp_path / "out", format=format, **SMALL)
    assert ("merge" in str(refusal.value).lower()) == (save is save_adapter)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_name_on_the_hub_is_no_folder_and_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="'some/model' is none.*hf download") as refusal:
        export_gravity_model("some/model", tmp_path / "out", format="fp16")
    assert "adapter" not in str(refusal.value)


def test_an_unpatched_model_in_memory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a gravity model, got Qwen2ForCausalLM"):
        export_gravity_model(tiny_host("qwen2"), tmp_path / "out", format="fp16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onyx"}, "expected one of"),
        ({"format": "fp16", "opset": 18}, "with format 'onnx' only"),
        ({"format": "onnx", "opset": 17}, r"expected 18 to \d+, .*got 17"),
        ({"format": "onnx", "opset": 99}, r"expected 18 to \d+, .*got 99"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path):
    if options["format"] == "onnx":
        pytest.importorskip("onnxruntime")
    # There is no model: they are refused before it is looked for.
    with pytest.raises(ValueError, match=message):
        export_gravity_model(tmp_path / "model", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_opset_than_was_asked_for_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "nothing", [], [])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.save(model, tmp_path / "model.onnx")
    require_opset_of(tmp_path / "model.onnx", 18)
    with pytest.raises(ValueError, match="expected 20, .* gave 18"):
        require_opset_of(tmp_path / "model.onnx", 20)


@pytest.mark.parametrize("where", [".", "..", "inside"])
def test_no_export_lies_in_its_source_or_around_it(where, folder, tmp_path):
    """By force, the source would go with the folder that is replaced."""
    place = tmp_path / "place"
    shutil.copytree(folder, place / "model")
    (place / "config.json").write_text("{}")
    before = content(place)
    link = tmp_path / "link"
    link.symlink_to(place / "model")
    with pytest.raises(ValueError, match="OUT: expected a folder apart from the model's"):
        export_gravity_model(link, place / "model" / where, format="fp16", force=True, **SMALL)
    assert content(place) == before


def test_a_model_of_several_files_with_its_tokenizer_is_replaced_by_force(folder, tmp_path):
    """All that save_pretrained and the demonstration write."""
    model = load_gravity_model(folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "calibration.json").write_text("{}")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    require_free(tmp_path, force=True)


@pytest.mark.parametrize("mine", ["notes.txt", "figures/masses.png", "work/step.json", ".git/HEAD"])
def test_force_replaces_a_model_and_nothing_else(mine, folder, tmp_path):
    out = tmp_path / "out"
    (out / mine).parent.mkdir(parents=True)
    for name in ("config.json", mine):
        (out / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"also holds {mine.split('/')[0]}\."):
        export_gravity_model(folder, out, format="fp16", force=True, **SMALL)
    assert content(out) == {"config.json": b"{}", mine: b"{}"}
