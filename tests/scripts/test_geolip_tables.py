"""README's tables of geolip can be made of what the experiments write."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts.tiny_encoder import save_tiny_encoder

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (str(ROOT / "scripts"), str(ROOT / "scripts" / "experiments"))
OWN = ("pool", "table_text")
NAMES = ("features", "mechanisms", "compression", "generation", "alignment")


def _forget() -> None:
    for name in [name for name in sys.modules if name in OWN or name.startswith("geolip_")]:
        sys.modules.pop(name)


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    yield
    _forget()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result of every experiment, tried with tiny models."""
    out = tmp_path_factory.mktemp("results")
    host = str(save_tiny_encoder(out / "host"))
    features = ["--host", host, "--texts", "8"]
    chosen = {
        "features": [*features, "--arms", "base", "signs dropped", "base, no attention"],
        "mechanisms": ["--only", "shared colour, den"],
        "compression": [*features, "--figure", str(out / "figure.png")],
        "generation": ["--only", "waves"],
        "alignment": ["--encoder", "untrained"],
    }
    with pytest.MonkeyPatch.context() as patch:
        for folder in FOLDERS:
            patch.syspath_prepend(folder)
        for name, own in chosen.items():
            experiment = importlib.import_module(f"geolip_{name}")
            shared = ["--quick", "--workers", "0", "--seeds", "0", "--out", str(out / name)]
            experiment.main([*shared, "--summary", str(out / f"geolip_{name}.json"), *own])
    _forget()
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_made_of_what_its_experiment_writes(results: Path, name: str) -> None:
    import geolip_tables

    lines = geolip_tables.tables(results)[f"geolip-{name}"]().splitlines()
    assert lines[0].startswith("| ") and lines[1].startswith("|---|") or lines[1].startswith("| -")
    columns = {line.count("|") for line in lines[:3]}
    assert len(columns) == 1, "a row has other columns than the header"
    conditions = json.loads((results / f"geolip_{name}.json").read_text())["conditions"]
    assert lines[-1].startswith(conditions["device"])


@pytest.mark.parametrize("name", NAMES)
def test_a_table_without_its_file_names_the_command_that_makes_it(
    tmp_path: Path, name: str
) -> None:
    import geolip_tables

    with pytest.raises(FileNotFoundError, match=f"python scripts/experiments/geolip_{name}.py"):
        geolip_tables.tables(tmp_path)[f"geolip-{name}"]()


def feature_row(arm: str, seed: int, cosine: float, attends: bool = True) -> dict[str, Any]:
    verdict = {"n_params": 1000, "recon_cosine": cosine, "frame_deviation": -0.001}
    verdict |= {"frame_deviation_absmax": 0.03 + seed / 100, "random_deviation_absmax": 0.04}
    verdict |= {"frac_in_envelope": 1.0, "random_frac_in_envelope": 0.9951, "dev_critical": 0.04}
    verdict |= {"mean_alpha": 0.025 if attends else None, "coordination_gain": 0.0}
    verdict |= {"mechanism": "B", "alpha_drift": False}
    shared = {"arm": arm, "seed": seed, "group": "main", "verdict": verdict}
    return {**shared, "numbers_per_token": 96, "principal_cosine": 0.85}


def test_features_show_means_over_seeds_and_the_worst_frame_of_all() -> None:
    from geolip_report import features_table

    rows = [feature_row("base", 0, 0.95), feature_row("base", 1, 0.96)]
    content = {"rows": [*rows, feature_row("base, no attention", 0, 0.94, attends=False)]}
    headers, lines = features_table(content, "main")
    assert lines[0][:5] == ["base", "1,000", "96", "0.9550 ± 0.0071", "0.8500"]
    assert lines[0][5:8] == ["-0.0010 ± 0.0000", "0.040 (0.040)", "100.00% (99.51%)"]
    assert lines[0][8:] == ["0.0250 ± 0.0000", "0.0000 ± 0.0000", "B"]
    assert lines[1][8:] == ["–", "–", "B"] and len(headers) == len(lines[1])
