"""Coordinates as the model has them, distances as they are, and figures whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.commands import run

from gravity_hf import LGTConfig, LGTForCausalLM, NGTConfig, NGTForCausalLM
from gravity_hf.training.tokenizers import byte_tokenizer
from gravity_hf.viz.coordinate_figures import coordinate_picture, coordinate_slider
from gravity_hf.viz.coordinates import Coordinates, collect_coordinates, project, weighed
from gravity_hf.viz.export import write_coordinate_figures
from gravity_hf.viz.style import LIGHT, drawing_in

TEXT = "a fall\nof <b>"
SIZES = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def small_ngt(**settings: Any) -> NGTForCausalLM:
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 16, "coord_dim": 6, "max_position_embeddings": 32}
    return NGTForCausalLM(NGTConfig(**sizes, **settings))


@pytest.fixture(scope="module")
def ngt() -> NGTForCausalLM:
    return small_ngt()


@pytest.fixture(scope="module")
def collected(ngt: NGTForCausalLM) -> Coordinates:
    return collect_coordinates(ngt, byte_tokenizer(), TEXT)


def made_up(layers: torch.Tensor, masses: torch.Tensor | None = None) -> Coordinates:
    count = layers.shape[1]
    tokens = tuple(f" {letter}" for letter in "abcdefghijklm"[:count])
    return Coordinates(
        tokens, torch.linspace(0.5, 2.0, count) if masses is None else masses, layers
    )


def test_what_is_collected_is_what_the_model_says(ngt, collected: Coordinates) -> None:
    ids = byte_tokenizer()(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        output = ngt.eval()(input_ids=ids, output_coordinates=True)
    assert "".join(collected.tokens) == TEXT
    assert torch.equal(collected.masses, output.masses[0])
    assert collected.layers.shape == (3, len(TEXT), 6)
    for found, wanted in zip(collected.layers, output.layer_coordinates, strict=True):
        assert torch.equal(found, wanted[0])


def test_as_many_tokens_as_asked_for_and_as_the_window_has(ngt) -> None:
    ngt.train()
    assert len(collect_coordinates(ngt, byte_tokenizer(), TEXT, max_tokens=4).tokens) == 4
    assert len(collect_coordinates(ngt, byte_tokenizer(), "x" * 99).tokens) == 32
    assert ngt.training


def test_a_model_without_coordinates_is_named(ngt) -> None:
    twin = small_ngt(attention="dot_product")
    lgt = LGTForCausalLM(LGTConfig(**SIZES, dim_position=4, max_position_embeddings=32))
    for model in (twin, lgt):
        with pytest.raises(TypeError, match=f"coordinates.*got {type(model).__name__} without"):
            collect_coordinates(model, byte_tokenizer(), TEXT)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        collect_coordinates(ngt, byte_tokenizer(), "x")


def test_distances_of_every_layer_are_kept_along_common_directions() -> None:
    frame = torch.linalg.qr(torch.randn(8, 3)).Q
    one, other = torch.randn(7, 3) @ frame.T, 3.0 * torch.randn(7, 3) @ frame.T
    shift = 5.0 * torch.randn(8)
    projection = project(made_up(torch.stack([one, other, one + shift])))
    for points, layer in zip(projection.points, (one, other), strict=False):
        wanted = torch.cdist(layer, layer).double()
        torch.testing.assert_close(torch.cdist(points, points), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(projection.points[2], projection.points[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(projection.explained.sum(-1), torch.ones(3).double())
    share = projection.points[1].var(0) / projection.points[1].var(0).sum()
    torch.testing.assert_close(projection.explained[1], share)


def test_one_dimension_and_tokens_in_one_place_have_three_components() -> None:
    projection = project(made_up(torch.stack([torch.arange(4.0)[:, None], torch.ones(4, 1)])))
    assert projection.points.shape == (2, 4, 3) and projection.points.isfinite().all()
    assert projection.explained.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert (projection.limits.diff(dim=-1) > 0).all()


def test_areas_grow_with_mass() -> None:
    assert weighed(torch.tensor([1.0, 2.0, 3.0]), 10.0, 30.0).tolist() == [10.0, 20.0, 30.0]
    assert weighed(torch.ones(2), 10.0, 30.0).tolist() == [20.0, 20.0]


def test_the_picture_shows_the_layer_asked_for_in_one_scale() -> None:
    coordinates = made_up(torch.randn(4, 9, 5) * torch.tensor([9.0, 3.0, 1.0, 0.2, 0.2]))
    projection = project(coordinates)
    drawing = coordinate_picture(coordinates, projection, layer=1)
    assert drawing.title == "Coordinates of 9 tokens after layer 1"
    assert coordinate_picture(coordinates, projection).title.endswith("after layer 2")
    with drawing_in(LIGHT):
        figure = drawing.build(LIGHT)
    axis, bar = figure.axes
    assert bar.get_ylabel() == "mass m"
    assert axis.get_xlabel() == projection.axis_titles(2)[0]
    assert "·i" in [text.get_text().strip() for text in axis.texts]  # the heaviest
    drawn = [end - start for start, end in (axis.get_xlim(), axis.get_ylim(), axis.get_zlim())]
    per_unit = [float(side) / span for side, span in zip(axis.get_box_aspect(), drawn, strict=True)]
    assert per_unit == pytest.approx([per_unit[0]] * 3)


def test_the_slider_has_every_layer_with_its_own_titles() -> None:
    coordinates = made_up(torch.randn(3, 6, 5))
    projection = project(coordinates)
    figure = coordinate_slider(coordinates, projection).figure
    (slider,) = figure.layout.sliders
    assert [step.label for step in slider.steps] == [
        "before layer 0",
        *map("after layer {}".format, range(2)),
    ]
    for layer, step in enumerate(slider.steps):
        places, titles, traces = step.args
        for values in places["y"]:
            assert values == pytest.approx(projection.points[layer, :, 1].tolist(), rel=1e-3)
        assert titles["scene.yaxis.title.text"] == projection.axis_titles(layer)[1]
        assert list(traces) == [0, 1]
    assert slider.active == 2
    assert list(figure.data[1].marker.color) == pytest.approx(coordinates.masses.tolist(), rel=1e-3)


def test_the_folder_holds_what_its_list_says_or_nothing(collected, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
        write_coordinate_figures(collected, tmp_path / "a", layer=2)
    assert list(tmp_path.iterdir()) == []
    (entry,) = write_coordinate_figures(collected, tmp_path / "a")
    assert entry["interactive"] == "interactive.html#coordinates"
    wanted = {entry["file"], entry["svg"], "interactive.html", "figures.json"}
    assert {file.name for file in (tmp_path / "a").iterdir()} == wanted


def test_the_verb_draws_an_ngt_and_refuses_what_has_no_coordinates(ngt, tmp_path: Path) -> None:
    for name, model in (("ngt", ngt), ("twin", small_ngt(attention="dot_product"))):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    for folder, option in (("twin", ()), ("ngt", ("--against", "x"))):
        result = run("figures", tmp_path / folder, *option)
        assert result.exit_code == 2 and "expected" in result.stderr
        assert not (tmp_path / folder / "figures").exists()
    result = run("figures", tmp_path / "ngt", "--prompt", TEXT, "--layer", 0)
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((tmp_path / "ngt/figures/figures.json").read_text(encoding="utf-8"))
    assert entry["title"] == f"Coordinates of {len(TEXT)} tokens after layer 0"
    assert entry["file"] in result.output and "interactive.html" in result.output
