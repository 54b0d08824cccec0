"""Training from scratch with --governed: recorded, written down, resumed, for a LeanFormer too."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from gravity_hf.runtime.verification import verify
from gravity_hf.training.governed.governed_training import read_settings
from gravity_hf.training.pretraining import PretrainArguments, PretrainResult, new_model, pretrain
from gravity_hf.training.streams import TokenStream, make_stream

TEXT = "".join(f"{i} falls to {i * i % 97}; " for i in range(3000))
LEAN = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "min_depth": 1},
    **{"intermediate_size": 32, "attention_rank": 4, "feed_forward_rank": 4, "gate_rank": 2},
    **{"attention_top_k": 8, "local_window": 4, "sink_tokens": 1, "feed_forward_block": 8},
    "screen_dim": 4,
}
SETTINGS = {
    "governors": {
        **{"cooling_threshold": 1.0, "cooling_window": 2, "resume_threshold": 1.0},
        **{"converged_threshold": 1.0, "confirmation_window": 2, "update_threshold": None},
        **{"reactivation_delta": 1.0, "warm_window": 1, "probe_interval": 2},
    },
    "hierarchy": {"warmup_steps": 2, "patience_fraction": 0.2},
    "budget": {"eval_window": 2},
}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stream() -> TokenStream:
    return make_stream("byte", TEXT[:-4000], TEXT[-4000:])


def arguments(**changes: Any) -> PretrainArguments:
    values: dict[str, Any] = {
        **{"architecture": "leanformer", "overrides": json.dumps(LEAN), "length": 16},
        **{"validation_windows": 4, "governed": True, "governed_settings": json.dumps(SETTINGS)},
    }
    return PretrainArguments(**{**values, **changes})


def run(folder: Path, stream: TokenStream, *callbacks: Any, **changes: Any) -> PretrainResult:
    training = TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=2, learning_rate=1e-2,
        save_steps=4, logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return pretrain(arguments(**changes), training, stream, callbacks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, stream: TokenStream) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return {"folder": folder, "result": run(folder, stream)}


def test_the_record_says_what_was_governed(whole: dict[str, Any]) -> None:
    record = whole["result"].record
    governance = record["governance"]
    assert governance["steps"] == 10 and governance["changes"]
    assert record["arguments"]["governed"] and record["training"]["max_grad_norm"] == 1.0
    names = set(governance["groups"])
    assert {"attention_routing", "gates", "exit_classifier", "ff_projections"} <= names
    counted = sum(group["parameters"] for group in governance["groups"].values())
    assert counted == record["parameters"]
    assert verify(whole["folder"] / "governed.jsonl").ok
    json.dumps(record)


def test_a_stopped_run_goes_on_to_the_same_model(
    whole: dict[str, Any], stream: TokenStream, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stream, Stop())
    result = run(tmp_path, stream)
    one, other = result.model.state_dict(), whole["result"].model.state_dict()
    assert [name for name in other if not torch.equal(one[name], other[name])] == []
    assert result.record["governance"] == whole["result"].record["governance"]
    assert verify(tmp_path / "governed.jsonl").ok


def test_a_run_from_before_there_were_settings_goes_on(
    whole: dict[str, Any], stream: TokenStream, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole["folder"], tmp_path / "copy")
    file = folder / "pretrain_settings.json"
    settings = json.loads(file.read_text())
    del settings["arguments"]["projector_interval"]
    file.write_text(json.dumps(settings))
    again = run(folder, stream)
    assert again.record["governance"] == whole["result"].record["governance"]
    with pytest.raises(ValueError, match="governed: True, now False"):
        run(folder, stream, governed=False, governed_settings="")


def test_a_settings_file_that_has_changed_is_another_run(
    whole: dict[str, Any], stream: TokenStream, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole["folder"], tmp_path / "copy")
    file = tmp_path / "governed.json"
    file.write_text(json.dumps(SETTINGS, indent=2))
    same = run(folder, stream, governed_settings=str(file)).record
    assert json.loads(same["arguments"]["governed_settings"]) == SETTINGS
    file.write_text(json.dumps({**SETTINGS, "freeze": False}))
    with pytest.raises(ValueError, match="checkpoints of a run with other settings"):
        run(folder, stream, governed_settings=str(file))


def test_settings_that_do_not_fit_are_said_before_a_folder_is_claimed(
    stream: TokenStream, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="GovernedTraining.budget: expected an object"):
        run(tmp_path, stream, governed_settings='{"budget": {"master": 1}}')
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected only with --governed"):
        arguments(governed=False)


def test_settings_are_read_from_a_file_and_from_json(tmp_path: Path) -> None:
    file = tmp_path / "governed.json"
    file.write_text(json.dumps(SETTINGS))
    assert read_settings(str(file)) == read_settings(json.dumps(SETTINGS)) == SETTINGS
    assert read_settings("") == {}
    for wrong in ("nowhere.json", "{", "[1]"):
        with pytest.raises(ValueError, match="--governed_settings: expected a JSON object"):
            read_settings(wrong)


@pytest.mark.parametrize(
    ("asked", "got"),
    [(None, "dot_product"), ("dot_product", "dot_product"), ("gravity", "gravity")],
)
def test_a_leanformer_attends_as_it_is_asked_to(asked: str | None, got: str) -> None:
    chosen = arguments(attention=asked)
    assert chosen.attention == got == new_model(chosen, 256, 0).config.attention
    assert PretrainArguments().attention == "gravity"


def test_the_command_line_governs_where_it_is_told_to(monkeypatch, tmp_path: Path) -> None:
    scripts = Path(__file__).resolve().parents[3] / "scripts"
    spec = importlib.util.spec_from_file_location("pretrain", scripts / "pretrain.py")
    script = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "pretrain", script)
    spec.loader.exec_module(script)

    def read(*flags: str) -> PretrainArguments:
        place = ["--output_dir", str(tmp_path)]
        return script.settings_of(["--model", "leanformer", *flags, *place])[0]

    asked = read("--governed", "--governed_settings", json.dumps(SETTINGS), "--preset", "tiny")
    assert asked.governed and read_settings(asked.governed_settings) == SETTINGS
    assert (asked.architecture, asked.attention) == ("leanformer", "dot_product")
    assert not read().governed and read("--attention", "gravity").attention == "gravity"
    assert script.config_of(asked, 256).model_type == "leanformer"
