"""What scripts/pretrain.py understands of a command line and of a recipe."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from gravity_hf.training.new_models import new_model

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "scripts" / "recipes" / "ngt-w3-25m.yaml"
SCHEDULE = ROOT / "tests" / "golden" / "ngt" / "schedule.json"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "scripts" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["pretrain"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pretrain"]


@pytest.fixture
def settings(script, tmp_path):
    def of(*arguments):
        return script.settings_of([*map(str, arguments), "--output_dir", str(tmp_path / "out")])

    return of


def shape(settings, *flags):
    model, _, _ = settings(RECIPE, "--use_cpu", *flags)
    with torch.device("meta"):
        return new_model(model, 8192, seed=0)


@pytest.mark.parametrize(
    ("flags", "parameters", "is_twin"),
    [
        ((), 25_476_416, False),
        (
            ("--preset", "reference", "--overrides", "intermediate_size=2048"),
            25_591_432,
            False,
        ),
        (("--overrides", "attention=dot_product,intermediate_size=1536"), 25_486_336, True),
        (
            ("--overrides", "attention=dot_product,positions=alibi,intermediate_size=1568"),
            25_486_592,
            True,
        ),
    ],
    ids=["v2", "reference", "vanilla", "alibi"],
)
def test_the_recipe_and_what_it_is_compared_with_are_of_one_size(
    settings, flags, parameters, is_twin
):
    made = shape(settings, *flags)
    assert made.num_parameters() == parameters
    assert (made.config.attention == "dot_product") == is_twin
    assert made.config.dropout == 0.1 and made.config.max_position_embeddings == 512


def test_the_recipe_is_the_published_experiment(settings):
    model, text, training = settings(RECIPE, "--use_cpu")
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert rows * model.length == 16_384 and training.max_steps == 15_000
    assert (model.architecture, model.preset) == ("ngt", "v2") and training.bf16
    assert (text.dataset, text.tokenizer) == ("wikitext103", "bpe:8192")
    assert model.validation_windows * model.length == 163_840
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        training.warmup_steps,
        training.max_steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    published = json.loads(SCHEDULE.read_text())["w3(2000,15000)"]
    for step, factor in published.items():
        if int(step) <= training.max_steps:
            assert schedule.lr_lambdas[0](int(step)) == pytest.approx(factor, abs=1e-12)


def test_flags_win_over_the_file_even_where_they_say_the_default(settings, tmp_path):
    """A published preset replaced whatever was typed, if it happened to be the default."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: gpt2\nlength: 64\nlearning_rate: 0.01\npreset: fixed\n")
    usual = settings("--use_cpu")
    model, _, training = settings(
        recipe,
        "--use_cpu",
        *("--model", "ngt", "--length", usual[0].length, "--preset", "reference"),
        *("--learning_rate", usual[2].learning_rate),
    )
    assert model.length == usual[0].length and training.learning_rate == usual[2].learning_rate
    assert (model.architecture, model.preset) == ("ngt", "reference")


def test_the_older_name_of_model_still_works(settings, script):
    assert settings("--architecture", "gpt2", "--use_cpu")[0].architecture == "gpt2"
    assert settings("--architecture", "ngt", "--model", "ngt", "--use_cpu")[0].overrides == ""
    usual = settings("--use_cpu")[0]
    assert usual.architecture == "qwen2" and usual.overrides == script.SMALL_QWEN2
    with pytest.raises(ValueError, match="expected one name"):
        settings("--architecture", "gpt2", "--model", "ngt", "--use_cpu")


def test_help_teaches_with_examples(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.settings_of(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for part in ("--model ngt", "ngt-w3-25m.yaml", "gravity-hf chat", "--repulsion_weight"):
        assert part in shown


def test_errors_are_one_line_before_any_work(script, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text("depth: 3\n")
    for arguments, message in (
        ([str(recipe)], "unknown ['depth']"),
        (["--model", "ngt", "--overrides", "law=inverse"], "'inverse'"),
        (["--model", "ngt", "--text_files", "/nowhere.txt"], "expected a readable text file"),
    ):
        with pytest.raises(SystemExit) as end:
            script.main([*arguments, "--output_dir", str(out), "--use_cpu"])
        shown = capsys.readouterr()
        assert end.value.code == 2 and message in shown.err and shown.err.count("\n") == 1
        assert not shown.out and not out.exists()


def test_control_c_ends_in_one_line(script, monkeypatch, capsys, tmp_path):
    def interrupted(**_):
        raise KeyboardInterrupt  # what Ctrl-C is; where SIGINT is ignored a signal would be nothing

    monkeypatch.setattr(script, "load_stream", interrupted)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--model", "ngt", "--use_cpu", "--output_dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 130 and "goes on from the last checkpoint" in said
    assert "Traceback" not in said
