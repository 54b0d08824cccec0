"""Generation, measured: the script runs, every set has every measure, and runs are not repeated."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
MODULES = ("pool", "geolip_runs", "geolip_generation")


@pytest.fixture(scope="module")
def experiment() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import geolip_generation

        yield geolip_generation
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def out(experiment: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("generation")
    threads = torch.get_num_threads()
    experiment.main(arguments(folder))
    torch.set_num_threads(threads)
    return folder


def arguments(folder: Path) -> list[str]:
    figure = str(folder / "rows.png")
    asked = ["--quick", "--only", "waves", "--seeds", "0", "--workers", "0"]
    return [*asked, "--out", str(folder), "--figure", figure]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "geolip_generation.json").read_text())


def test_every_set_has_every_measure(out: Path, experiment: ModuleType) -> None:
    rows = result(out)["rows"]
    assert [row["set"] for row in rows] == list(experiment.SETS)
    for row in rows:
        assert all(row[name]["median"] >= 0 for name in experiment.MEASURES)
    assert result(out)["conditions"]["versions"]["torch"] == torch.__version__


def test_real_images_are_nearest_to_real_ones(out: Path) -> None:
    distances = {row["set"]: row["pixel_distance"]["median"] for row in result(out)["rows"]}
    assert distances.pop("held out") < min(distances.values())


def test_the_picture_has_a_row_for_every_set(out: Path, experiment: ModuleType) -> None:
    from safetensors.torch import load_file

    assert (out / "rows.png").read_bytes().startswith(b"\x89PNG")
    kept = load_file(out / "waves-quick-0.safetensors")
    assert set(kept) == {"training", *experiment.SETS}
    assert all(len(images) == experiment.SHOWN for images in kept.values())


def test_runs_that_are_done_are_not_done_again(
    out: Path, experiment: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    before = result(out)["runs"]
    experiment.main(arguments(out))
    assert "0 runs to do, 1 done before" in capsys.readouterr().out
    assert result(out)["runs"] == before
