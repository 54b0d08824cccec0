"""GravityParameters: the masses, softenings and key radii of one attention module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from gravity_hf.config import EPSILON_FLOOR, MASS_GRANULARITIES, GravityConfig
from gravity_hf.layers.parameters import GravityParameters, inverse_softplus

QUERY_HEADS, KV_HEADS = 6, 2
COUNTS = {"query_head": QUERY_HEADS, "kv_head": KV_HEADS, "layer": 1}


def make(**settings: object) -> GravityParameters:
    return GravityParameters(GravityConfig(**settings), QUERY_HEADS, KV_HEADS)


@pytest.mark.parametrize("mass_per", MASS_GRANULARITIES)
def test_every_query_head_gets_the_mass_it_shares(mass_per: str) -> None:
    module = make(mass_per=mass_per)
    count = COUNTS[mass_per]
    assert module.mass_count == count
    assert module.mass_log.shape == (count,)
    with torch.no_grad():
        module.mass_log.copy_(torch.arange(count))
    # Query heads that read the same key/value head are neighbours, as in repeat_kv.
    owner = torch.arange(QUERY_HEADS) // (QUERY_HEADS // count)
    expected = F.softplus(torch.arange(count).float())[owner]
    assert torch.equal(module().mass, expected)


@pytest.mark.parametrize("mass_per", MASS_GRANULARITIES)
@pytest.mark.parametrize("learn_softening", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("distance", ["euclidean", "lifted"])
def test_terms_have_their_shapes(mass_per: str, learn_softening: bool, distance: str) -> None:
    module = make(mass_per=mass_per, learn_softening=learn_softening, distance=distance)
    terms = module()
    assert terms.mass.shape == (QUERY_HEADS,)
    assert terms.softening.shape == (QUERY_HEADS,)
    if distance == "lifted":
        assert terms.key_radius_sq.shape == (KV_HEADS,)
    else:
        assert terms.key_radius_sq is None
    assert all(term.dtype == torch.float32 for term in terms if term is not None)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["mass_log"]),
        ({"learn_softening": True}, ["mass_log", "softening_log"]),
        ({"distance": "lifted"}, ["mass_log", "key_radius_sq"]),
        (
            {"learn_softening": True, "distance": "lifted"},
            ["mass_log", "softening_log", "key_radius_sq"],
        ),
    ],
)
def test_state_names_are_those_of_checkpoints(settings: dict, names: list[str]) -> None:
    module = make(**settings)
    assert list(module.state_dict()) == names
    trained = [name for name, _ in module.named_parameters()]
    assert trained == [name for name in names if name != "key_radius_sq"]


def test_initial_terms_are_those_of_the_config() -> None:
    config = {"epsilon": 0.03, "mass_init": -0.7, "learn_softening": True}
    terms = make(**config)()
    assert torch.equal(terms.mass, F.softplus(torch.full((QUERY_HEADS,), -0.7)))
    assert torch.allclose(terms.softening, torch.tensor(0.03), rtol=1e-6, atol=0)


def test_fixed_softening_is_epsilon_exactly() -> None:
    assert torch.equal(make(epsilon=0.1)().softening, torch.full((QUERY_HEADS,), 0.1))


@pytest.mark.parametrize("epsilon", [EPSILON_FLOOR, 1e-3, 0.1, 1.0, 1e3])
def test_learned_softening_starts_at_epsilon(epsilon: float) -> None:
    softening = make(epsilon=epsilon, learn_softening=True)().softening
    assert torch.allclose(softening, torch.tensor(epsilon), rtol=1e-5, atol=0)


def test_softening_never_falls_below_the_floor() -> None:
    module = make(learn_softening=True)
    with torch.no_grad():
        module.softening_log.copy_(torch.tensor([-1e4, -100.0, -20.0, -14.0, 0.0, 50.0]))
    softening = module().softening
    assert softening.min() == torch.tensor(EPSILON_FLOOR)
    assert (softening[:3] == torch.tensor(EPSILON_FLOOR)).all()
    assert torch.equal(softening[4:], F.softplus(torch.tensor([0.0, 50.0])))


@pytest.mark.parametrize("value", [1e-6, 1e-3, 0.1, 1.0, 20.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inverse_softplus_is_the_inverse(value: float, dtype: torch.dtype) -> None:
    wanted = torch.tensor(value, dtype=dtype)
    found = F.softplus(inverse_softplus(wanted))
    # Near zero, softplus is exp(x) with x = ln(value): one rounding of x is |ln(value)| of found.
    budget = 4 * torch.finfo(dtype).eps * max(1.0, abs(torch.log(wanted).item()))
    # torch replaces softplus(x) by x above 20, which is off by exp(-20) at most.
    budget += 1e-9 if value > 10 else 0
    assert (found - wanted).abs() <= budget * wanted


@pytest.mark.parametrize("mass_per", MASS_GRANULARITIES)
def test_gradients_reach_every_parameter(mass_per: str) -> None:
    module = make(mass_per=mass_per, learn_softening=True)
    terms = module()
    (terms.mass.sum() + terms.softening.sum()).backward()
    shared = QUERY_HEADS // COUNTS[mass_per]
    assert torch.allclose(module.mass_log.grad, shared * module.mass_log.detach().sigmoid())
    assert torch.allclose(module.softening_log.grad, module.softening_log.detach().sigmoid())


def test_key_radius_is_data_and_not_trained() -> None:
    module = make(distance="lifted")
    # Without calibration there is no right value; NaN cannot pass for one.
    assert module().key_radius_sq.isnan().all()
    module.key_radius_sq.copy_(torch.tensor([3.0, 4.0]))
    assert torch.equal(module().key_radius_sq, torch.tensor([3.0, 4.0]))
    assert not module().key_radius_sq.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_terms_are_float32_in_any_host(dtype: torch.dtype) -> None:
    module = make(learn_softening=True, distance="lifted").to(dtype)
    assert all(term.dtype == torch.float32 for term in module())


def test_default_dtype_does_not_matter() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = make(learn_softening=True, distance="lifted").state_dict()
    finally:
        torch.set_default_dtype(default)
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_device_is_honoured() -> None:
    config = GravityConfig(learn_softening=True, distance="lifted")
    module = GravityParameters(config, QUERY_HEADS, KV_HEADS, device="meta")
    assert all(value.is_meta for value in module.state_dict().values())


def test_deep_copy_is_equal_and_independent() -> None:
    module = make(learn_softening=True, distance="lifted")
    module.key_radius_sq.fill_(2.0)
    twin = copy.deepcopy(module)
    assert twin.config == module.config
    for name, value in module.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)
    with torch.no_grad():
        twin.mass_log.add_(1.0)
    assert torch.equal(module.mass_log, torch.full((QUERY_HEADS,), 0.5))


def test_state_round_trips_strictly() -> None:
    source, target = (make(learn_softening=True, distance="lifted") for _ in range(2))
    source.key_radius_sq.fill_(2.0)
    with torch.no_grad():
        source.mass_log.normal_()
    target.load_state_dict(source.state_dict())
    for ours, theirs in zip(target(), source(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="softening_log"):
        make().load_state_dict(source.state_dict())


def test_printing_a_model_shows_the_law() -> None:
    text = repr(make(law="power", distance="lifted", mass_per="kv_head"))
    assert "law=power, distance=lifted, heads=6, masses=2" in text
