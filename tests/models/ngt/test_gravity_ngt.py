"""The law of an NGT, written out once more, and what the heads' constants do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.models.ngt import NGTModel

from .ngt_cases import IDS, OPTIONS, option, padded, tiny

# About half of the pairs are nearer than that in a new model of either kind.
RADIUS = {"v2": 7.0, "fixed": 3.0}
LAWS = [x for x in OPTIONS if x not in ("still", "pre_attention", "learned", "fixed")]


def expected_weights(model: Any, layer: int) -> Tensor:
    """Weights of a layer by the definition, pair by pair, float64; `IDS`, no padding."""
    config, attention = model.config, model.layers[layer].attn
    seen: list[Any] = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args))
    masses = model(IDS, output_coordinates=True).masses
    hook.remove()
    q, k = attention.head_coordinates(seen[0][0], seen[0][1])
    d2 = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
    gravity = attention.gravity

    def head(x: Tensor) -> Tensor:
        return x[:, None, None]

    g = head(F.softplus(gravity.gamma))
    softening = config.softening
    if config.learn_softening:
        softening = head(F.softplus(gravity.softening_log) + 1e-4)
    mine, theirs = masses[:, None, :, None], masses[:, None, None, :]
    if config.law == "power":
        score = -g * (d2 + softening).log()
        if config.token_masses:
            score = score + head(gravity.mass_exponent) * (theirs + 1e-6).log()
        if config.fading_heads:
            rates = F.pad(F.softplus(gravity.fading), (2 - config.fading_heads, 0))
            place = torch.arange(9)
            score = score - head(rates) * (place[:, None] - place)
    else:
        score = (-1 if config.repulsive else 1) * g / (d2 + softening)
        score = score + (head(gravity.bias) if config.head_bias else 0.0)
        score = score if config.mass_in_value else score * mine * theirs
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    if config.cutoff != "none":
        radius_sq = F.softplus(gravity.radius) ** 2
        if config.cutoff == "soft":
            score = score * (1 - d2 / radius_sq).relu()
        elif config.cutoff == "log":
            score = score + F.logsigmoid((radius_sq - d2) / config.cutoff_width)
        else:
            visible = visible & (d2 <= radius_sq)
    if config.exclude_self:
        others = visible & ~torch.eye(9, dtype=torch.bool)
        visible = torch.where(others.any(-1, keepdim=True), others, visible)
    return score.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()


def _kind(name: str) -> str:
    return "v2" if OPTIONS[name][0] == "v2" else "fixed"


def stirred(model: Any) -> Any:
    """Constants that differ from head to head, in double precision."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gravity" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.4)
    return model.double()


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_weights_are_those_of_the_law(name: str) -> None:
    model = stirred(option(name, NGTModel, initial_radius=RADIUS[_kind(name)]))
    weights = model(IDS, output_attentions=True).attentions
    for layer in range(2):
        torch.testing.assert_close(weights[layer], expected_weights(model, layer))


@pytest.mark.parametrize("name", LAWS)
def test_implementations_agree_in_float64_gradients_included(name: str) -> None:
    def gradients(implementation: str) -> dict[str, Tensor]:
        model = stirred(option(name, implementation=implementation, dropout=0.0)).train()
        model(**padded("left"), labels=padded("left")["input_ids"]).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    exact = gradients("reference")
    for parameter, gradient in gradients("auto").items():
        torch.testing.assert_close(gradient, exact[parameter], atol=1e-11, rtol=1e-7, msg=parameter)


@pytest.mark.parametrize("name", ["v2", "reference", "mass_in_value", "log", "hard"])
@torch.no_grad()
def test_rows_shown_to_observers_are_those_of_attention(name: str) -> None:
    """Softmax of the shown scores is the attention that comes out, padding included."""
    model = option(name, NGTModel, initial_radius=RADIUS[_kind(name)])
    seen: list[Any] = []

    class Watcher:
        def attend(self, call: Any) -> tuple[Tensor, Tensor | None]:
            seen.append(call)
            return call.gravity()

    attentions = model(**padded("left"), output_attentions=True).attentions
    plain = model(**padded("left"))[0]
    model.layers[1].attn.gravity.observer = Watcher()
    watched = model(**padded("left"))[0]
    assert torch.equal(plain, watched)
    (call,) = seen
    rows = torch.tensor([4, 11])
    sample, expected = call.rows(rows), attentions[1][:, :, rows]
    torch.testing.assert_close(sample.score.softmax(-1), expected, atol=3e-6, rtol=1e-4)
    assert sample.visible.expand_as(expected)[expected > 1e-6].all()
    assert not sample.visible.expand_as(expected)[:, :, :, :3].any()
    assert ((sample.force < 0) == model.config.repulsive).all()
    assert call.query_count() == 12 and call.max_force is None
    assert call.masses().shape == ((2,) if name == "mass_in_value" else (2, 2, 12))


def test_the_radius_has_the_gradient_of_its_cutoff() -> None:
    """By differences for a logarithmic cutoff; and a hard one, which published models leave
    without any, has one."""

    def loss(model: Any) -> Tensor:
        return F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    slopes = {}
    for cutoff in ("log", "hard"):
        model = stirred(tiny(cutoff=cutoff, dropout=0.0, initial_radius=RADIUS["v2"]))
        radius = model.model.layers[0].attn.gravity.radius
        loss(model).backward()
        slopes[cutoff] = radius.grad.item()
        if cutoff == "log":
            with torch.no_grad():
                radius.add_(1e-5)
                above = loss(model)
                radius.sub_(2e-5)
                difference = (above - loss(model)) / 2e-5
            torch.testing.assert_close(radius.grad, difference, rtol=1e-6, atol=1e-10)
    assert slopes["hard"] != 0.0 and slopes["log"] != 0.0


@torch.no_grad()
def test_a_hard_cutoff_hides_what_is_far_and_never_the_token_itself() -> None:
    model = tiny(NGTModel, cutoff="hard", initial_radius=-5.0)
    weights = model(IDS, output_attentions=True).attentions[0]
    assert torch.equal(weights, torch.eye(9).expand_as(weights))


@torch.no_grad()
def test_rows_that_see_nothing_are_finite() -> None:
    for name in ("v2", "reference", "soft"):
        mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
        mask[:, :, 4:, :3] = True
        assert option(name)(IDS, attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize(
    "name, constant, value, direction",
    [
        ("v2", "gamma", 4.0, "near"),
        ("fixed", "gamma", 4.0, "far"),
        ("v2", "mass_exponent", 4.0, "heavy"),
        ("v2", "fading", 4.0, "young"),
        ("mass_in_value", "bias", 3.0, "same"),
    ],
)
@torch.no_grad()
def test_what_a_heads_constants_do(name: str, constant: str, value: float, direction: str) -> None:
    """A stronger head prefers what is nearer, or, repulsive, farther; a larger power of masses what
    is heavier; faster fading what is younger; and beside masses in values a bias does nothing."""
    some = {"mass_fading": 0.5} if direction == "young" else {}
    model = option(name, NGTModel, cutoff="none", **some)
    attention, seen = model.layers[0].attn, []
    if direction in ("near", "far"):
        model.mass_emb.weight.zero_()
    attention.register_forward_pre_hook(lambda module, args: seen.append(args))
    before = model(IDS, output_attentions=True).attentions[0][:, :, 8]
    getattr(attention.gravity, constant).fill_(value)
    after = model(IDS, output_attentions=True).attentions[0][:, :, 8]
    hidden, geometry = seen[0][:2]
    queries, keys = attention.head_coordinates(hidden, geometry)
    distance = (queries[:, :, 8:] - keys).norm(dim=-1)
    mass = geometry.masses[:, None].expand_as(distance)
    if direction == "same":
        torch.testing.assert_close(after, before)
        return
    young = torch.arange(9.0).expand_as(distance)
    liked = {"near": -distance, "far": distance, "heavy": mass, "young": young}[direction]
    change = ((after - before) * liked).sum(-1)
    # Of two heads, masses fade in the last where half of them fade.
    assert (change[:, 1:] > 0).all() and ((change[:, 0] == 0) == (direction == "young")).all()
