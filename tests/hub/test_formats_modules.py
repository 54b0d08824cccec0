"""What sentence-transformers puts behind a model goes with it, or nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub.exported import content, save_gravity
from safetensors.torch import save_file

from gravity_hf.hub.formats.export import export_gravity_model

SMALL = {"length": 12, "samples": 4}
MODULES = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Dense": "sentence_transformers.models.Dense",
    "3_Normalize": "sentence_transformers.models.Normalize",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A gravity encoder in a folder as sentence-transformers lays it out."""
    folder = save_gravity("bert", tmp_path_factory.mktemp("modules") / "model")
    write_modules(folder, MODULES)
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"name": name}))
    save_file({"linear.weight": torch.randn(8, 32)}, folder / "2_Dense" / "model.safetensors")
    return folder


def write_modules(folder: Path, modules: dict[str, str]) -> None:
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": modules[path]}
        for i, path in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))


@pytest.fixture
def source(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def behind(folder: Path) -> dict[str, bytes]:
    return {name: x for name, x in content(folder).items() if "_" in name.split("/")[0][:2]}


def test_every_module_that_the_model_names_is_in_the_export(source, tmp_path):
    # Beside safetensors it is the same again, and is left where it is.
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "4_Unnamed").mkdir()
    out = tmp_path / "out"
    for force in (False, True):
        export_gravity_model(source, out, format="bf16", force=force, **SMALL)
        assert behind(out).keys() == {
            *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")
        }
        assert behind(out).items() <= behind(source).items()
        assert (out / "modules.json").read_bytes() == (source / "modules.json").read_bytes()


def pickled(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def with_code(folder: Path) -> None:
    (folder / "mine.py").write_text("class Head: ...")
    write_modules(folder, {**MODULES, "2_Dense": "mine.Head"})


def nested(folder: Path) -> None:
    (folder / "2_Dense" / "query").mkdir()


def outside(folder: Path) -> None:
    write_modules(folder, {**MODULES, "../other": "sentence_transformers.models.Dense"})


def no_list(folder: Path) -> None:
    (folder / "modules.json").write_text("{}{")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickled, r"2_Dense/pytorch_model\.bin"),
        (with_code, r"mine\.py"),
        (nested, "2_Dense/query"),
        (outside, r"modules\.json"),
        (no_list, r"modules\.json"),
    ],
)
def test_modules_that_cannot_go_with_it_are_refused(change, message, source, tmp_path):
    change(source)
    before = content(source)
    with pytest.raises(ValueError, match=f"export: expected modules .*{message}"):
        export_gravity_model(source, tmp_path / "out", format="bf16", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and content(source) == before


def test_a_folder_with_a_module_of_its_own_making_is_not_replaced(saved, tmp_path):
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    (out / "2_Dense" / "notes.pdf").write_text("mine")
    before = content(out)
    with pytest.raises(ValueError, match=r"also holds 2_Dense/notes\.pdf"):
        export_gravity_model(saved, out, format="bf16", force=True, **SMALL)
    assert content(out) == before
