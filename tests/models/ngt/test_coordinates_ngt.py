"""Where particles are, what moves them, and which precision that has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gravity_hf.models.ngt import NGTModel
from gravity_hf.models.ngt.coordinates import sinusoids

from .ngt_cases import IDS, option, tiny


@torch.no_grad()
def coordinates(model: Any, ids: Tensor = IDS, **inputs: Any) -> tuple[Tensor, ...]:
    return model(ids, output_coordinates=True, **inputs).layer_coordinates


def with_another_token(place: int) -> Tensor:
    ids = IDS.clone()
    ids[:, place] = 4
    return ids


def test_sinusoids() -> None:
    places = torch.tensor([[0, 7], [100_000, 2]])
    waves = sinusoids(places, 5, 100.0, torch.float64)
    assert waves.shape == (2, 2, 5)
    slow = 7 * 100 ** (-4 / 5)
    expected = [math.sin(7), math.cos(7), math.sin(7 * 100 ** (-2 / 5)), None, math.sin(slow)]
    for column, value in enumerate(expected):
        assert value is None or math.isclose(waves[0, 1, column], value, abs_tol=1e-12)
    assert torch.equal(waves[0, 0], torch.tensor([0.0, 1, 0, 1, 0], dtype=torch.float64))


def test_a_tokens_identity_is_in_its_own_coordinates_in_v2_only() -> None:
    """In the published model a token's identity never reaches its coordinates, but as a mass."""
    for preset, knows in (("v2", True), ("reference", False)):
        model = tiny(NGTModel, preset)
        with torch.no_grad():
            model.mass_emb.weight.zero_()
        before, after = coordinates(model), coordinates(model, with_another_token(5))
        own = [(a - b)[:, 5].abs().max().item() for a, b in zip(before, after, strict=True)]
        assert all(x > 1e-2 for x in own) if knows else own == [0.0] * 3
        later = (before[1] - after[1])[:, 6:].abs().max()
        assert later > 1e-2


@pytest.mark.parametrize("source", ["hidden", "attention", "pre_attention", "none"])
def test_what_moves_coordinates(source: str) -> None:
    """A layer's coordinates after it follow what its source reads, and nothing else."""
    model = tiny(NGTModel, coordinate_source=source, num_hidden_layers=2)
    first = model.layers[0]
    before = coordinates(model)[1]
    moved = {}
    for name, weight in (
        ("out_proj", first.attn.out_proj.weight),
        ("norm1", first.norm1.bias),
        ("norm2", first.norm2.bias),
        ("fc2", first.fc2.weight),
    ):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        moved[name] = not torch.equal(before, coordinates(model)[1])
        with torch.no_grad():
            weight.copy_(kept)
    # norm1 feeds attention, whose output all but the last two read.
    assert moved == {
        "out_proj": source in ("hidden", "attention"),
        "norm1": source != "none",
        "norm2": source == "hidden",
        "fc2": False,
    }
    if source == "none":
        assert torch.equal(*coordinates(model)[:2]) and not hasattr(first, "coord_norm")


def test_the_last_layer_moves_nothing_unless_it_is_asked_to() -> None:
    for moves in (False, True):
        model = tiny(NGTModel, "fixed", evolve_last_layer=moves)
        output = model(IDS, output_coordinates=True)
        every = output.layer_coordinates
        assert len(every) == 3 and output.coordinates is every[-1]
        assert torch.equal(every[-1], every[-2]) != moves
        assert hasattr(model.layers[-1], "coord_proj_next") == moves


def test_place_survives_motion_through_anchors() -> None:
    """Head coordinates of the second layer follow the place of a token that has not moved them."""
    model = tiny(NGTModel, anchor_coordinates=True)
    attention = model.layers[1].attn
    seen: list[Any] = []
    attention.register_forward_pre_hook(lambda module, args: seen.append(args))
    places = torch.arange(9)[None]
    with torch.no_grad():
        model(IDS)
        hidden, geometry = seen[0][0], seen[0][1]
        own = attention.head_coordinates(hidden, geometry).queries
        later = sinusoids(places + 5, 12, 100.0, torch.float32)
        moved = attention.head_coordinates(hidden, geometry._replace(anchors=later)).queries
    weight = attention.anchor_proj.weight[: 2 * 16]
    change = torch.nn.functional.linear(later - geometry.anchors, weight)
    change = change.view(1, 9, 2, -1).transpose(1, 2)
    torch.testing.assert_close(moved - own, change.expand_as(own), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("wanted", "symmetric"), [(0, 0), (1, 1), (2, 2), (99, 2)])
@torch.no_grad()
def test_in_the_last_heads_keys_are_where_queries_are(wanted: int, symmetric: int) -> None:
    """At most in half of them; in the others once their maps have moved apart."""
    model = tiny(NGTModel, num_attention_heads=4, symmetric_heads=wanted, shared_start=False)
    attention = model.layers[0].attn
    seen: list[Any] = []
    attention.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(IDS)
    queries, keys = attention.head_coordinates(*seen[0][:2])
    assert queries.shape == keys.shape == (2, 4, 9, 16)
    same = [torch.equal(queries[:, head], keys[:, head]) for head in range(4)]
    assert same == [False] * (4 - symmetric) + [True] * symmetric
    assert attention.coord_proj.out_features == (4 + 4 - symmetric) * 16


def test_masses_belong_to_token_types() -> None:
    model = tiny(NGTModel)
    masses = model(IDS, output_coordinates=True).masses
    expected = torch.nn.functional.softplus(model.mass_emb.weight[IDS, 0])
    assert torch.equal(masses, expected) and masses.min() > 0
    # Nobody knows the type of an embedding: its mass is 1.
    embeds = model.token_emb(IDS)
    assert (model(inputs_embeds=embeds, output_coordinates=True).masses == 1).all()
    assert (option("massless", NGTModel)(IDS, output_coordinates=True).masses == 1).all()


def test_a_twin_has_no_coordinates() -> None:
    twin = tiny(NGTModel, attention="dot_product")
    assert twin(IDS).coordinates is None
    with pytest.raises(ValueError, match="output_coordinates: .* got its dot-product twin"):
        twin(IDS, output_coordinates=True)


@pytest.mark.parametrize("name", ["v2", "reference", "symmetric"])
def test_geometry_is_float32_in_half_precision_and_under_autocast(name: str) -> None:
    exact = coordinates(option(name, NGTModel))
    half = option(name, NGTModel).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = coordinates(option(name, NGTModel))
    for every in (coordinates(half), cast):
        assert all(x.dtype == torch.float32 for x in every)
        # What moves them is rounded, where they start is not, but for the embeddings of a half.
        error = (every[1] - exact[1]).abs().max()
        assert 0 < error < 0.1
    assert torch.equal(cast[0], exact[0]) or name != "reference"
    seen: dict[str, torch.dtype] = {n: x.dtype for n, x in half.named_parameters()}
    wide = {n for n, x in seen.items() if x == torch.float32}
    geometry = ("gravity.", "mass_emb", "coord_emb", "coord_norm", "attn.coord_proj", "anchor_proj")
    assert wide == {n for n in seen if any(x in n for x in geometry)}


def test_double_precision_is_double_everywhere() -> None:
    model = tiny(NGTModel, cutoff="log").double()
    output = model(IDS, output_coordinates=True)
    assert {x.dtype for x in (*output.layer_coordinates, output.masses)} == {torch.float64}


def test_computed_positions_go_on_and_tables_end() -> None:
    long = torch.arange(70)[None] % 47 + 3
    with torch.no_grad():
        assert tiny()(long).logits.shape[1] == 70
    for learned in (tiny(coordinate_positions="learned"), tiny(attention="dot_product")):
        with pytest.raises(ValueError, match="at most 64 tokens .* got 70 tokens. Shorten"):
            learned(long)
        with pytest.raises(ValueError, match="got positions 3 to 64"):
            learned(long[:, :62], position_ids=torch.arange(3, 65)[None])


@pytest.mark.parametrize("name", ["v2", "reference", "hard"])
def test_inputs_that_are_too_long_lose_their_beginning_where_asked(name: str) -> None:
    model = option(name, crop_long_inputs=True, max_position_embeddings=6)
    seen = torch.ones_like(IDS)
    seen[0, :5] = 0
    with torch.no_grad():
        plain = model(IDS[:, -6:], attention_mask=seen[:, -6:]).logits
        assert torch.equal(model(IDS, attention_mask=seen).logits, plain)
        counted = (seen.cumsum(-1) - 1).clamp(min=0)
        given = model(IDS, attention_mask=seen, position_ids=counted).logits
        torch.testing.assert_close(given, plain)
        square = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
        whole = model(IDS, attention_mask=square).logits
        torch.testing.assert_close(whole, model(IDS[:, -6:]).logits)
        # Once labels kept theirs.
        loss = model(IDS, labels=IDS).loss
        torch.testing.assert_close(loss, model(IDS[:, -6:], labels=IDS[:, -6:]).loss)
    if model.config.has_position_table:
        with pytest.raises(ValueError, match="at most 6 tokens"):
            model.train()(IDS)
