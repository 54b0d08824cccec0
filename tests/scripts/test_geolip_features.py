"""The experiment on features: what is compared is comparable, what was measured is shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts.tiny_encoder import WIDTH, save_tiny_encoder

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "scripts" / "experiments"
MODULES = ("pool", "geolip_arms", "geolip_runs", "geolip_report", "geolip_features")
ARMS = ("base", "base, no attention", "base, last layer", "signs dropped")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole experiment with tiny models and a tiny encoder: its command and its result."""
    out = tmp_path_factory.mktemp("features")
    command = ["--quick", "--workers", "0", "--out", str(out), "--texts", "12", "--arms", *ARMS]
    command += ["--host", str(save_tiny_encoder(out / "host"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import geolip_features

        geolip_features.main([*command, "--seeds", "0", "1"])
    content = json.loads((out / "geolip_features.json").read_text())
    return {"out": out, "command": command, "content": content}


def test_every_arm_learns_from_the_same_texts_for_as_long(quick: dict[str, Any]) -> None:
    rows = quick["content"]["rows"]
    assert {(row["arm"], row["seed"]) for row in rows} == {(a, s) for a in ARMS for s in (0, 1)}
    assert {row["steps"] for row in rows} == {2}
    held_out = quick["content"]["data"]["held_out_tokens"]
    assert {row["verdict"]["tokens"] for row in rows} == {held_out}
    assert 0 < held_out < quick["content"]["data"]["tokens"]


def test_a_run_stands_beside_random_frames_and_principal_components(quick: dict[str, Any]) -> None:
    for row in quick["content"]["rows"]:
        verdict = row["verdict"]
        assert 0 < verdict["random_frac_in_envelope"] <= 1
        assert verdict["random_deviation_absmax"] > 0
        assert verdict["lens_orthogonality_error"] < 1e-5 > verdict["lens_angle_error"]
        # 4 rows of 3 angles, of 24 numbers of a token.
        assert row["numbers_per_token"] == 12 and 0.1 < row["principal_cosine"] < 1
    assert str(quick["out"]) not in json.dumps(quick["content"])


def test_what_is_done_is_not_done_again(quick: dict[str, Any]) -> None:
    import geolip_features

    lines = (quick["out"] / "runs.jsonl").read_text()
    geolip_features.main([*quick["command"], "--seeds", "0", "1"])
    assert (quick["out"] / "runs.jsonl").read_text() == lines
    with pytest.raises(SystemExit, match="all 4 runs failed or were left"):
        geolip_features.main([*quick["command"], "--seeds", "2", "--minutes", "0"])


def test_principal_components_are_those_of_the_texts_to_learn_from(quick: dict[str, Any]) -> None:
    import geolip_features

    data = geolip_features.load(str(quick["out"] / "features-2"))
    train = torch.cat([row["patches"] for row in data.train])
    values, held_out = ((x - train.mean(0)) / train.std(0) for x in (train, data.tokens))
    basis = torch.linalg.svd(values, full_matrices=False).Vh[:5]
    expected = torch.cosine_similarity(held_out, held_out @ basis.T @ basis, dim=-1).mean()
    assert geolip_features.principal_cosine(data, 5) == pytest.approx(float(expected), abs=2e-3)
    assert geolip_features.principal_cosine(data, WIDTH) == pytest.approx(1.0, abs=1e-5)


def test_a_run_under_other_settings_is_another_run_and_its_folder_is_none(
    quick: dict[str, Any],
) -> None:
    import geolip_features

    known = {"key": {"texts": "a"}, "layer": -2, "description": "some"}

    def ids(folder: str, *more: str) -> list[str]:
        options = geolip_features.parse(["--arms", "base", *more])
        runs = geolip_features.plan(options, {-2: {**known, "folder": folder}})
        return [run["id"] for run in runs]

    assert ids("here") == ids("there") and len(ids("here")) == 3
    assert not set(ids("here")) & set(ids("here", "--rate", "1e-4"))


def test_an_arm_differs_from_base_in_what_it_is_named_for() -> None:
    from geolip_arms import ARMS, BASE, chosen

    from gravity_hf.models.geolip import GeolipConfig

    seen = [GeolipConfig(**ARMS[BASE].settings(384)).to_dict()]
    for arm in list(ARMS.values())[1:]:
        settings = GeolipConfig(**arm.settings(384)).to_dict()
        assert settings not in seen or arm.layer is not None, arm.name
        changed = {name for name, value in settings.items() if value != seen[0][name]}
        assert set(arm.changes) <= changed, arm.name
        seen.append(settings)
    with pytest.raises(ValueError, match="expected of .*got \\['all'\\]"):
        chosen(["all"])


def test_the_arm_without_a_lift_has_about_as_many_numbers_as_base() -> None:
    from geolip_arms import ARMS, BASE

    from gravity_hf.models.geolip import GeolipConfig

    base, other = (
        GeolipConfig(**ARMS[name].settings(384)) for name in (BASE, "no lift, 26 rows of 16")
    )
    numbers = [config.num_rows * (config.base_dim - 1) for config in (base, other)]
    assert abs(numbers[1] / numbers[0] - 1) < 0.02 and other.base_dim == other.lens_dim


def committed() -> dict[str, Any]:
    file = EXPERIMENTS / "results" / "geolip_features.json"
    if not file.is_file():
        pytest.skip(f"{file.name} has not been measured yet")
    return json.loads(file.read_text(encoding="utf-8"))


def test_committed_runs_are_comparable() -> None:
    from geolip_arms import ARMS
    from geolip_report import grouped

    content = committed()
    assert len({(row["commit"], row["steps"]) for row in content["rows"]}) == 1
    # Another layer has as many tokens.
    assert len({row["verdict"]["tokens"] for row in content["rows"]}) == 1
    by = grouped(content["rows"], "arm")
    # What the README speaks of; other arms may be missing, but not some of their seeds.
    assert {("base",), ("base, gravity",), ("tiny",)} <= set(by) <= {(name,) for name in ARMS}
    for (name,), rows in by.items():
        assert len({row["seed"] for row in rows}) >= ARMS[name].seeds, name


def test_base_keeps_a_cosine_of_95_percent_of_held_out_features() -> None:
    cosines = [
        row["verdict"]["recon_cosine"] for row in committed()["rows"] if row["arm"] == "base"
    ]
    assert len(cosines) >= 3 and min(cosines) >= 0.95


def test_committed_frames_are_rigid_beside_random_ones() -> None:
    for row in committed()["rows"]:
        verdict = row["verdict"]
        assert verdict["lens_orthogonality_error"] < 1e-5 > verdict["lens_angle_error"]
        assert verdict["in_envelope"], row["arm"]
