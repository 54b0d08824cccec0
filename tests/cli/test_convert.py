"""A conversion with every step: what it leaves, what runs again, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conversions import TEXT, convert, ran, rows, save_decoder, save_encoder, tensors

from gravity_hf import load_gravity_model
from gravity_hf.cli.convert.data import conversion_data
from gravity_hf.cli.convert.settings import STEPS, parse_conversion
from gravity_hf.cli.hosts import load_tokenizer
from gravity_hf.cli.steps.batches import held_out_loss
from gravity_hf.integration.hosts import gravity_modules


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("host") / "decoder")


@pytest.fixture(scope="module")
def finished(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conversion; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    _, screen = convert(host, out)
    assert ran(screen) == [step for step in STEPS if step != "figures"]
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_every_stage_is_measured_beside_the_host_and_its_control(finished: Path) -> None:
    found = rows(read_results(finished))
    assert list(found) == ["host", "control", "calibrated", "transferred", "healed"]
    for key in ("calibrated", "transferred", "healed"):
        assert found[key]["attention"]["contrast_median"] > 1
    assert "attention" not in found["host"] and "attention" not in found["control"]
    training = read_results(finished)["training"]
    assert [entry["step"] for entry in training["lora"]["losses"]] == [1, 2, 3, 4]
    assert found["control"]["loss"] != found["host"]["loss"]


def test_the_saved_model_is_the_one_that_was_measured(finished: Path, host: Path) -> None:
    results = read_results(finished)
    model = load_gravity_model(finished)
    settings = parse_conversion(_flags(results))
    data = conversion_data(settings, load_tokenizer(str(host)), results["host"])
    assert held_out_loss(model, data.held_out) == pytest.approx(rows(results)["healed"]["loss"])
    assert not any("lora" in name for name, _ in model.named_parameters())


def _flags(results: dict[str, Any]) -> list[str]:
    found = []
    # Results keep no paths: the text lies where the tests have it.
    for name, value in {**results["settings"], "text_files": [str(TEXT)]}.items():
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *map(str, values)] if value not in (None, []) else []
    return found


def test_transfer_leaves_everything_but_masses_and_softenings_as_it_was(finished: Path) -> None:
    found = tensors(finished)
    before = {n.split(":")[1]: t for n, t in found.items() if n.startswith("work/calibrate")}
    after = {n.split(":")[1]: t for n, t in found.items() if n.startswith("work/transfer")}
    assert before.keys() == after.keys() and all(".gravity." in name for name in after)
    moved = {n.rpartition(".")[2] for n in after if not torch.equal(before[n], after[n])}
    assert moved == {"mass_log", "softening_log"}


def test_finished_training_leaves_no_checkpoints(finished: Path) -> None:
    assert not list(finished.rglob("checkpoint-*"))
    assert not list(finished.rglob("optimizer.pt"))
    assert not [p for p in finished.glob("work/*") if p.name.startswith(".")]


def test_a_finished_conversion_is_not_done_again(copy: Path, host: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    results, screen = convert(host, copy)
    assert ran(screen) == []
    assert screen.count("finished before") == len(STEPS) - 1
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()} == before
    assert results == read_results(copy)


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"distillation": 0.5}, ["lora", "merge", "evaluate", "save", "card"]),
        ({"prompts": ["x"]}, ["evaluate", "save", "card"]),
        ({"save_steps": 4}, []),
        (
            {"softness": 2.0},
            ["calibrate", "transfer", "lora", "merge", "evaluate", "save", "card"],
        ),
    ],
    ids=["distillation", "prompts", "save_steps", "softness"],
)
def test_a_changed_setting_reruns_what_depends_on_it_and_says_so(
    changes: dict[str, Any], again: list[str], copy: Path, host: Path
) -> None:
    _, screen = convert(host, copy, **changes)
    assert ran(screen) == again
    if again:
        ((name, value),) = changes.items()
        assert f"{again[0]}, again: {name} was" in screen
        assert read_results(copy)["settings"][name] == value


def test_another_host_under_the_same_name_is_another_host(
    finished: Path, host: Path, tmp_path: Path
) -> None:
    copied, out = tmp_path / "host", tmp_path / "out"
    shutil.copytree(host, copied)
    convert(copied, out, transfer_steps=0, lora_steps=0)
    from safetensors.torch import load_file, save_file

    file = copied / "model.safetensors"
    changed = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    _, screen = convert(copied, out, transfer_steps=0, lora_steps=0)
    assert ran(screen)[0] == "load"


def test_a_missing_file_is_written_again(copy: Path, host: Path) -> None:
    before = tensors(copy)
    (copy / "model.safetensors").unlink()
    _, screen = convert(host, copy)
    assert ran(screen) == ["save", "card"]
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(copy).items())


def test_without_merging_an_adapter_is_saved_and_loads(copy: Path, host: Path) -> None:
    healed = rows(read_results(copy))["healed"]["loss"]
    (copy / "mine.txt").write_text("kept")
    results, screen = convert(host, copy, merge=False)
    assert ran(screen) == ["evaluate", "save", "card"]
    assert (copy / "adapter_model.safetensors").exists()
    assert not (copy / "config.json").exists() and not (copy / "model.safetensors").exists()
    assert (copy / "mine.txt").read_text() == "kept"
    assert rows(results)["healed"]["loss"] == pytest.approx(healed, abs=1e-5)
    model = load_gravity_model(copy)
    assert gravity_modules(model)
    assert "drop its masses" in (copy / "README.md").read_text()


SKIPPED = {
    "transfer": {"host", "control", "calibrated", "healed"},
    "lora": {"host", "calibrated", "transferred"},
    "control": {"host", "calibrated", "transferred", "healed"},
}


# One of them in every run; the others take as long and differ in a name.
@pytest.mark.parametrize(
    "step", [pytest.param(x, marks=[] if x == "transfer" else pytest.mark.slow) for x in SKIPPED]
)
def test_a_skipped_step_has_no_row_and_the_rest_is_there(
    step: str, host: Path, tmp_path: Path
) -> None:
    short = {"transfer_steps": 2, "lora_steps": 2, "prompts": []}
    results, screen = convert(host, tmp_path / "out", skip=[step], **short)
    assert set(rows(results)) == SKIPPED[step]
    assert step not in ran(screen) and f"{step}: left out" in screen
    assert step in results["left_out"] and results["training"][step] is None
    assert gravity_modules(load_gravity_model(tmp_path / "out"))


def test_without_evaluation_and_card_the_model_is_there_and_nothing_is_claimed(
    host: Path, tmp_path: Path
) -> None:
    results, _ = convert(
        host, tmp_path / "out", skip=["evaluate", "card"], transfer_steps=0, lora_steps=0
    )
    assert results["evaluation"] is None
    assert not (tmp_path / "out" / "README.md").exists()
    assert gravity_modules(load_gravity_model(tmp_path / "out"))


def test_without_calibration_the_constants_are_gravity_2s(host: Path, tmp_path: Path) -> None:
    options = {"skip": ["calibrate"], "distance": "euclidean", "lora_steps": 0}
    results, _ = convert(host, tmp_path / "out", transfer_steps=0, **options)
    assert set(rows(results)) == {"host", "constants"}
    for module in gravity_modules(load_gravity_model(tmp_path / "out")).values():
        assert torch.equal(module.mass_log, torch.full_like(module.mass_log, 0.5))


def test_an_encoder_is_healed_towards_its_host(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    results, _ = convert(
        encoder, tmp_path / "out", softness=0.0, lora_steps=24, lora_learning_rate=2e-3
    )
    found = rows(results)
    assert set(found) == {"host", "calibrated", "transferred", "healed"}
    assert found["host"]["cosine_min"] == pytest.approx(1)
    assert found["healed"]["cosine_mean"] > found["calibrated"]["cosine_mean"]
    assert results["training"]["control"]["left_out"]


def test_annealing_ends_at_a_smaller_softness(host: Path, tmp_path: Path) -> None:
    changes = {"lora_steps": 8, "anneal_to": 0.5, "transfer_steps": 0, "control": False}
    convert(host, tmp_path / "out", lora_learning_rate=1e-6, **changes)
    assert load_gravity_model(tmp_path / "out").config.gravity["softness"] < 1.0


def test_the_work_folder_may_lie_elsewhere(host: Path, tmp_path: Path) -> None:
    options = {"transfer_steps": 0, "lora_steps": 0, "work": tmp_path / "elsewhere"}
    convert(host, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "work").exists()
    _, screen = convert(host, tmp_path / "out", **options)
    assert ran(screen) == []


def test_a_folder_made_from_another_model_is_refused(copy: Path, host: Path) -> None:
    other = shutil.copytree(host, copy.parent / "other")
    before = tensors(copy)
    with pytest.raises(ValueError, match="was made from .*--force"):
        convert(Path(other), copy)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(copy).items())


WRONG: dict[str, dict[str, Any]] = {
    "skip: load": {"skip": ["load"]},
    "skip: calibrate": {"skip": ["calibrate"]},
    "lora_rank": {"lora_rank": 0},
    "softness": {"softness": -1},
    "max_kl": {"max_kl": 0},
    "logging_steps": {"save_steps": 3, "logging_steps": 2},
    "anneal_to": {"anneal_to": 2.0},
    "anneal_to without lora": {"anneal_to": 0.5, "lora_steps": 0},
    "stride": {"stride": 64},
    "validation_share": {"validation_share": 0},
    "layers": {"layers": "x"},
    "samples": {"samples": 100_000},
    "length": {"length": 4096},
    "device": {"device": "cuda:1"},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_wrong_settings_are_refused_before_anything_is_kept(
    changes: dict[str, Any], host: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="expected|need|falls"):
        convert(host, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
