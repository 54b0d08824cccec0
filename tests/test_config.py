"""GravityConfig: frozen, strict, versioned; what is stored is what comes back."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gravity_hf.config import (
    CONFIG_VERSION,
    DISTANCES,
    EPSILON_FLOOR,
    IMPLEMENTATIONS,
    LAWS,
    MASS_GRANULARITIES,
    GravityConfig,
)

valid_settings = st.fixed_dictionaries(
    {},
    optional={
        "epsilon": st.floats(EPSILON_FLOOR, 1e6),
        "mass_init": st.floats(-100, 100),
        "mass_per": st.sampled_from(MASS_GRANULARITIES),
        "law": st.sampled_from(LAWS),
        "distance": st.sampled_from(DISTANCES),
        "learn_softening": st.booleans(),
        "layers": st.none() | st.lists(st.integers(0, 100)),
        "implementation": st.sampled_from(IMPLEMENTATIONS),
        "softness": st.none() | st.floats(0, 100),
        "max_kl": st.none() | st.floats(0, 100, exclude_min=True),
    },
)


def test_defaults_are_the_constants_of_gravity_2() -> None:
    config = GravityConfig()
    assert (config.epsilon, config.mass_init, config.mass_per) == (0.1, 0.5, "query_head")
    assert (config.law, config.distance, config.learn_softening) == ("force", "euclidean", False)
    assert config.layers is None


@given(valid_settings)
def test_round_trip_through_json(values: dict[str, object]) -> None:
    config = GravityConfig(**values)
    stored = json.loads(json.dumps(config.to_dict()))
    restored = GravityConfig.from_dict(stored)
    assert restored == config
    assert restored.to_dict() == stored
    assert hash(restored) == hash(config)


def test_every_field_is_stored() -> None:
    stored = GravityConfig(layers=(1, 0)).to_dict()
    assert set(stored) == {field.name for field in dataclasses.fields(GravityConfig)}
    assert stored["version"] == CONFIG_VERSION
    assert stored["layers"] == [0, 1]


def test_copies_are_equal() -> None:
    config = GravityConfig(law="power", layers=(0, 2))
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(GravityConfig)])
def test_fields_are_frozen(field: str) -> None:
    config = GravityConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))


def test_layers_are_a_sorted_set() -> None:
    assert GravityConfig(layers=[3, 1, 3]).layers == (1, 3)
    assert GravityConfig(layers=[3, 1]) == GravityConfig(layers=(1, 3))
    assert GravityConfig(layers=[]).layers == ()


def test_limits_are_inside() -> None:
    assert GravityConfig(epsilon=EPSILON_FLOOR).epsilon == EPSILON_FLOOR
    assert GravityConfig(epsilon=1).epsilon == 1
    assert GravityConfig(softness=0.0).softness == 0.0
    assert GravityConfig(mass_init=-20.0).mass_init == -20.0


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("epsilon", EPSILON_FLOOR / 2, ">= 1e-06"),
        ("epsilon", 0.0, ">= 1e-06"),
        ("epsilon", -0.1, ">= 1e-06"),
        ("epsilon", float("nan"), "a finite number"),
        ("epsilon", float("inf"), "a finite number"),
        ("epsilon", "0.1", "a finite number"),
        ("epsilon", True, "a finite number"),
        ("epsilon", None, "a finite number"),
        ("mass_init", float("nan"), "a finite number"),
        ("mass_init", float("-inf"), "a finite number"),
        ("mass_init", [0.5], "a finite number"),
        ("mass_per", "head", str(list(MASS_GRANULARITIES))),
        ("mass_per", None, str(list(MASS_GRANULARITIES))),
        ("law", "gravity", str(list(LAWS))),
        ("law", ["force"], str(list(LAWS))),
        ("distance", "cosine", str(list(DISTANCES))),
        ("implementation", "sdpa", str(list(IMPLEMENTATIONS))),
        ("learn_softening", 1, "True or False"),
        ("learn_softening", "no", "True or False"),
        ("layers", 3, "a list of indices >= 0, or None"),
        ("layers", "all", "a list of indices >= 0, or None"),
        ("layers", [-1], "a list of indices >= 0, or None"),
        ("layers", [0.0], "a list of indices >= 0, or None"),
        ("layers", [True], "a list of indices >= 0, or None"),
        ("softness", -1.0, "a finite number >= 0"),
        ("softness", "soft", "a finite number >= 0"),
        ("max_kl", 0.0, "a finite number > 0"),
        ("max_kl", -1.0, "a finite number >"),
        ("max_kl", float("inf"), "a finite number"),
        ("max_kl", "0.1", "a finite number"),
        ("version", 0, "1"),
        ("version", "1", "1"),
        ("version", None, "1"),
    ],
)
def test_refusal_says_what_expected_got(field: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        GravityConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"GravityConfig.{field}: expected ")
    assert expected in message
    assert f"got {value!r}" in message


def test_newer_version_says_what_to_do() -> None:
    stored = {**GravityConfig().to_dict(), "version": CONFIG_VERSION + 1}
    with pytest.raises(ValueError, match=r"GravityConfig\.version.*got 2.*pip install -U"):
        GravityConfig.from_dict(stored)


def test_unknown_keys_are_refused() -> None:
    stored = {**GravityConfig().to_dict(), "spin": 0.5, "charge": 1}
    with pytest.raises(ValueError, match=r"unknown \['charge', 'spin'\]") as caught:
        GravityConfig.from_dict(stored)
    assert "expected only" in str(caught.value) and "'mass_per'" in str(caught.value)
    with pytest.raises(TypeError, match="spin"):
        GravityConfig(spin=0.5)


@pytest.mark.parametrize(
    "value", [None, [], "force", GravityConfig()], ids=lambda v: type(v).__name__
)
def test_from_dict_takes_a_dict_only(value: object) -> None:
    with pytest.raises(ValueError, match=f"expected a dict, got {type(value).__name__}"):
        GravityConfig.from_dict(value)


def test_from_dict_leaves_its_argument_alone() -> None:
    stored = {"layers": [2, 1]}
    config = GravityConfig.from_dict(stored)
    assert stored == {"layers": [2, 1]}
    config.to_dict()["layers"].append(5)
    assert config.layers == (1, 2)
