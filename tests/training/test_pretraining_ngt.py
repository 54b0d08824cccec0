"""An NGT from scratch: runs that can be stopped, models that are kept, curves that can be read."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer import Trainer

from gravity_hf.models.ngt import NGTConfig
from gravity_hf.training.kept_models import BEST, LAST, VALIDATION_FILE
from gravity_hf.training.measures import mean_loss
from gravity_hf.training.new_models import config_of, new_model
from gravity_hf.training.pretraining import PretrainArguments, PretrainResult, pretrain
from gravity_hf.training.projector import TAG
from gravity_hf.training.streams import ConsecutiveWindows, make_stream

SIZES = (
    "hidden_size=16,coord_dim=8,num_hidden_layers=2,num_attention_heads=2,intermediate_size=24,"
    "dropout=0.2"
)
# More tokens than repulsion looks at, so that it draws.
LENGTH = 72
STEPS, SAVED, WARMUP, RATE = 6, 3, 2, 1e-2
TEXT = "".join(f"{i} falls to {i * i % 97}; " for i in range(3000))


@pytest.fixture(scope="module")
def stream():
    return make_stream("char", TEXT[:-4000], TEXT[-4000:])


def arguments(**changes: Any) -> PretrainArguments:
    values = {"architecture": "ngt", "overrides": SIZES, "length": LENGTH, "validation_windows": 4}
    return PretrainArguments(**{**values, "repulsion_weight": 0.05, **changes})


def training(folder: Path, **changes: Any) -> TrainingArguments:
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": SAVED,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**values, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, stream) -> tuple[PretrainResult, Path]:
    folder = tmp_path_factory.mktemp("whole")
    settings = arguments(projector_interval=SAVED)
    return pretrain(settings, training(folder, report_to="tensorboard"), stream), folder


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, stream, whole) -> PretrainResult:
    """As if the run had been killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("cut")
    for name in ("pretrain_settings.json", f"checkpoint-{SAVED}"):
        source = whole[1] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    curves = training(folder, report_to="tensorboard")
    return pretrain(arguments(projector_interval=SAVED), curves, stream)


def test_a_resumed_run_has_the_same_losses_bit_for_bit(whole, resumed) -> None:
    """With dropout, evaluation and drawn repulsion all taking random numbers."""
    record, again = whole[0].record, resumed.record
    assert again["training_losses"] == record["training_losses"]
    assert again["evaluations"] == record["evaluations"]
    assert len(record["evaluations"]) == STEPS
    for (name, one), other in zip(
        whole[0].model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_the_learning_rate_goes_on_with_the_schedule_after_resuming(whole, resumed) -> None:
    """Published resuming went on at the rate of a finished cosine, 0, and no weight moved."""
    expected = {
        step: RATE * min((step - 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * max(0, x))))
        for step in range(1, STEPS + 1)
        for x in [(step - 1 - WARMUP) / (STEPS - WARMUP)]
    }
    assert resumed.record["learning_rates"] == pytest.approx(expected)
    saved = AutoModelForCausalLM.from_pretrained(whole[1] / f"checkpoint-{SAVED}")
    for (name, before), after in zip(
        saved.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert not torch.equal(before, after), name


def test_the_best_and_the_last_model_load_as_they_are(whole, stream) -> None:
    result, folder = whole
    windows = ConsecutiveWindows(stream.validation, 4, LENGTH)
    ids = windows.__getitems__(list(range(4)))
    for name in (BEST, LAST):
        said = json.loads((folder / name / VALIDATION_FILE).read_text())
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        assert mean_loss(model, [ids]) == pytest.approx(said["loss"], abs=1e-5)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer(TEXT[:50])["input_ids"] == stream.train[:50].tolist()
        assert not list((folder / name).glob("*.bin"))
        expected = result.record["best_loss" if name == BEST else "loss"]
        assert said["loss"] == expected
    assert result.record["best_loss"] == min(result.record["evaluations"].values())


def test_the_best_model_of_a_resumed_run_is_the_best_of_all_of_it(tmp_path, stream, whole) -> None:
    """What was better before the stop is not replaced by what comes after it."""
    for name in ("pretrain_settings.json", f"checkpoint-{SAVED}", BEST):
        source = whole[1] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    state = tmp_path / f"checkpoint-{SAVED}" / "trainer_state.json"
    content = json.loads(state.read_text())
    for entry in content["log_history"]:
        if entry["step"] == 1 and "eval_loss" in entry:
            entry["eval_loss"] = 0.5
    state.write_text(json.dumps(content))
    before = (tmp_path / BEST / VALIDATION_FILE).read_text()
    pretrain(
        arguments(projector_interval=SAVED), training(tmp_path, report_to="tensorboard"), stream
    )
    assert (tmp_path / BEST / VALIDATION_FILE).read_text() == before


def test_tensorboard_has_losses_heads_and_coordinates(whole, stream) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result, folder = whole
    (room,) = (folder / "runs").iterdir()
    events = accumulator.EventAccumulator(str(room))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    expected = {"loss", "grad_norm", "learning_rate", "repulsion", "ngt/gamma_mean"}
    assert {f"train/{name}" for name in expected} | {"eval/loss"} <= scalars
    found = {event.step: event.value for event in events.Scalars("eval/loss")}
    assert found == pytest.approx(result.record["evaluations"])
    for step in (SAVED, STEPS):
        points = (room / f"{step:05}" / TAG / "tensors.tsv").read_text().splitlines()
        header, *rows = (room / f"{step:05}" / TAG / "metadata.tsv").read_text().splitlines()
        assert len(points) == len(rows) == 4 * LENGTH and header == "token\tmass\tplace"
        first = stream.tokenizer.decode(stream.validation[:1].tolist())
        assert rows[0].split("\t")[0] == repr(first) and float(rows[0].split("\t")[1]) > 0
    assert (
        f'tensor_path: "{STEPS:05}/{TAG}/tensors.tsv"'
        in (room / "projector_config.pbtxt").read_text()
    )


def test_every_model_sees_the_same_batches_whatever_draws_random_numbers(
    tmp_path, stream, monkeypatch
) -> None:
    """Dropout, evaluation and repulsion drew from the generator of the published data order."""
    seen: dict[str, list[torch.Tensor]] = {}
    original = Trainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        seen.setdefault(str(self.args.output_dir), []).append(inputs["input_ids"].clone())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", spy)
    short = {"save_strategy": "no", "max_steps": 3}
    calm = SIZES.replace("dropout=0.2", "dropout=0.0")
    pretrain(arguments(), training(tmp_path / "a", **short), stream)
    plain = {"overrides": calm, "attention": "dot_product", "repulsion_weight": 0.0}
    unseen = {"eval_strategy": "no", **short}
    twin = pretrain(arguments(**plain), training(tmp_path / "b", **unseen), stream)
    assert twin.model.config.attention == "dot_product"
    one, other = seen.values()
    assert len(one) == 6 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])


def test_an_ngt_is_trained_as_it_is(whole) -> None:
    model = whole[0].model
    assert model.config.model_type == "ngt" and model.config.attention == "gravity"
    assert model.config.max_position_embeddings == LENGTH
    assert "attention" not in whole[0].record
    assert whole[0].record["arguments"]["gravity_scale"] == 1.0


def test_what_is_given_wins_over_a_preset_even_where_it_is_the_default() -> None:
    default = NGTConfig().law
    assert NGTConfig.from_preset("fixed").law != default
    chosen = arguments(
        preset="fixed", overrides=f"law={default},repulsive=false,head_bias=false,length_free=1"
    )
    with pytest.raises(ValueError, match="length_free"):
        config_of(chosen, 40)
    chosen.overrides = chosen.overrides.replace(",length_free=1", "")
    assert config_of(chosen, 40).law == default
    assert config_of(arguments(preset="fixed"), 40).law == NGTConfig.from_preset("fixed").law


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "v9"}, "expected one of .*'reference'.*, got 'v9'"),
        ({"architecture": "gpt2", "overrides": "", "preset": "v2"}, "gpt2 has no presets"),
        ({"overrides": "law=inverse"}, "settings that fit together.*inverse"),
        ({"overrides": "{"}, "expected a JSON object or name=value"),
        ({"law": "force"}, "--law: expected only with a host that is patched"),
        (
            {"attention": "dot_product", "overrides": "attention=gravity"},
            "expected the attention of --overrides, 'gravity'",
        ),
    ],
    ids=["preset", "no-presets", "value", "json", "of-hosts", "two-attentions"],
)
def test_settings_that_contradict_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_model(arguments(**changes), 40, seed=0)


def test_the_projector_needs_its_board_and_coordinates(tmp_path, stream) -> None:
    with pytest.raises(ValueError, match="expected --report_to tensorboard beside it"):
        pretrain(arguments(projector_interval=1), training(tmp_path / "a"), stream)
    twin = {"attention": "dot_product", "repulsion_weight": 0.0, "projector_interval": 1}
    with pytest.raises(TypeError, match="with dot-product attention"):
        pretrain(arguments(**twin), training(tmp_path / "b", report_to="tensorboard"), stream)
    assert not list(tmp_path.glob("*/pretrain_settings.json"))


def test_an_lgt_trains_as_before(tmp_path, stream) -> None:
    sizes = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,dim_position=4"
    settings = arguments(
        architecture="lgt", overrides=sizes, attention="dot_product", repulsion_weight=0.0
    )
    small = training(tmp_path, max_steps=1, save_strategy="no", eval_strategy="no")
    result = pretrain(settings, small, stream)
    assert result.model.config.model_type == "lgt" and result.record["loss"] > 0.0
