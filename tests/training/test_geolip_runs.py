"""From settings to a folder with a model, its verdict and its record; stopped and gone on with."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel, TrainerCallback

from gravity_hf.integration.own_geolip import MECHANISMS
from gravity_hf.models.geolip import GeolipForReconstruction, GeolipImageProcessor
from gravity_hf.training.geolip.feature_files import StoredFeatures
from gravity_hf.training.geolip.run import run, run_image
from gravity_hf.training.geolip.runs import train_features, train_images
from gravity_hf.training.geolip.settings import FeatureSettings, ImageSettings
from gravity_hf.training.geolip.words import verdict_in_words

SMALL = {
    "overrides": {"num_rows": 4, "lens_dim": 4, "hidden_size": 8, "num_attention_heads": 2},
    "batch_size": 4,
    "steps": 4,
    "warmup_steps": 1,
    "eval_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "device": "cpu",
}
IMAGES = {**SMALL, "images": "shared_colour", "count": 20, "image_size": 8, "denoise": 1.0}
TEXTS = [f"{a} {b} {c}" for a in "abcd" for b in "efg" for c in "hi"]


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


class Letters:
    """A tokenizer of letters, of which the first two ids are special."""

    pad_token_id, cls_token_id = 0, 1
    all_special_ids = (0, 1)

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[1, *(2 + ord(c) % 30 for c in t)][:max_length] for t in texts]}


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=32,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=16,
        )
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "out"
    return out, train_images(ImageSettings(out=str(out), **IMAGES))


def test_a_folder_has_the_model_its_verdict_and_its_record(images):
    out, result = images
    names = {file.name for file in out.iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "preprocessor_config.json", "results.json"),
        *("alphas.safetensors", "deviations.json", "samples.safetensors"),
    }
    record = json.loads((out / "results.json").read_text())
    assert record == json.loads(json.dumps(result.record))
    assert record["verdict"] == result.verdict.to_dict()
    assert record["training"]["rows"] == 18 and record["training"]["held_out_rows"] == 2
    assert [entry["step"] for entry in record["history"]["losses"]] == [1, 2, 3, 4]
    assert record["history"]["evaluations"][-1]["step"] == 4
    assert str(out) not in json.dumps(record["settings"])
    alphas = load_file(out / "alphas.safetensors")
    assert alphas["steps"].tolist() == [0, 1, 2, 3, 4] and alphas["alphas"].shape == (5, 2, 4)


def test_auto_classes_load_it_with_its_verdict(images):
    out, result = images
    model = AutoModel.from_pretrained(out)
    assert model.config.verdict == result.verdict.to_dict()
    samples = load_file(out / "samples.safetensors")
    with torch.no_grad():
        found, expected = model(**samples), result.model.eval()(**samples)
    state, trained = model.state_dict(), result.model.state_dict()
    assert all(torch.equal(state[name], trained[name]) for name in trained)
    # Weights that are mapped from a file lie elsewhere in memory, which orders sums otherwise.
    torch.testing.assert_close(found.pixel_reconstruction, expected.pixel_reconstruction)
    assert GeolipImageProcessor.from_pretrained(out).patch_size == 4


def test_a_verdict_is_of_noisy_images_and_clean_targets(images):
    out, result = images
    samples = load_file(out / "samples.safetensors")
    noise = samples["pixel_values"] - samples["labels"]
    assert noise.std().item() == pytest.approx(1.0, rel=0.15)
    again = result.model.verdict([samples], steps=4)
    assert again.recon_mse == pytest.approx(result.verdict.recon_mse, rel=1e-5)
    assert result.verdict.steps == 4 and result.verdict.tokens == 8


def test_a_run_that_was_stopped_goes_on_to_the_same_model(images, tmp_path):
    whole, result = images
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train_images(ImageSettings(out=str(out), **IMAGES), callbacks=[Stop()])
    with pytest.raises(ValueError, match="--resume"):
        train_images(ImageSettings(out=str(out), **IMAGES))
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        train_images(ImageSettings(out=str(out), resume=True, **{**IMAGES, "seed": 1}))
    resumed = train_images(ImageSettings(out=str(out), resume=True, **IMAGES))
    for file in ("model.safetensors", "alphas.safetensors", "samples.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    assert resumed.verdict == result.verdict
    assert resumed.record["history"]["alphas"] == result.record["history"]["alphas"]


def pictures(folder, count):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / f"{i}.png")
    return str(folder)


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    """Another image more, and others would be held out: some that were trained on."""
    out, folder = tmp_path / "out", tmp_path / "pictures"
    settings = {**IMAGES, "out": str(out), "images": pictures(folder, 8)}
    with pytest.raises(KeyboardInterrupt):
        train_images(ImageSettings(**settings), callbacks=[Stop()])
    pictures(folder, 9)
    with pytest.raises(ValueError, match="data that the training"):
        train_images(ImageSettings(resume=True, **settings))
    (folder / "8.png").unlink()
    record = train_images(ImageSettings(resume=True, **settings)).record
    assert record["training"]["rows"] == 6 and record["settings"]["images"] == "pictures"


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    wrong = {**IMAGES, "overrides": {**SMALL["overrides"], "num_channels": 1}}
    with pytest.raises(ValueError, match="num_channels: expected 3"):
        train_images(ImageSettings(out=str(out), **wrong))
    assert not out.exists()


def test_a_loss_that_is_not_finite_ends_a_run(tmp_path):
    settings = {**IMAGES, "steps": 40, "learning_rate": 1e30, "warmup_steps": 0}
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        train_images(ImageSettings(out=str(tmp_path / "out"), **settings))


def test_files_of_the_model_before_do_not_outlive_it(images, host, tmp_path):
    """An image processor beside a model of features would say what it is not."""
    out = tmp_path / "out"
    shutil.copytree(images[0], out)
    settings = FeatureSettings(out=str(out), force=True, **{**SMALL, "steps": 1})
    train_features(settings, host=host, tokenizer=Letters(), texts=TEXTS)
    assert not (out / "preprocessor_config.json").exists()
    assert json.loads((out / "config.json").read_text())["patch_dim"] == 8


def test_a_finished_model_is_replaced_only_by_force(images, tmp_path):
    out, _ = images
    for options in ({}, {"resume": True}):
        with pytest.raises(ValueError, match="expected"):
            train_images(ImageSettings(out=str(out), **options, **IMAGES))
    other = tmp_path / "other"
    (other / "figures").mkdir(parents=True)
    for name in ("config.json", "README.md", "results.json", "figures/old.png"):
        (other / name).write_text("{}")
    train_images(ImageSettings(out=str(other), force=True, **{**IMAGES, "steps": 1}))
    assert json.loads((other / "config.json").read_text())["model_type"] == "geolip"
    assert not (other / "figures").exists() and not (other / "README.md").exists()


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    for options in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(ValueError, match="folder"):
            train_images(ImageSettings(out=str(tmp_path), **options, **IMAGES))
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def features(host, tmp_path_factory):
    room = tmp_path_factory.mktemp("features")
    settings = FeatureSettings(out=str(room / "out"), cache=str(room / "cache"), **SMALL)
    return room, train_features(settings, host=host, tokenizer=Letters(), texts=TEXTS)


def test_features_are_normalised_by_what_is_trained_on(features, host):
    room, result = features
    stored = StoredFeatures(room / "cache")
    assert result.record["training"]["rows"] == 22 and len(stored) == 24
    # Of all windows the statistics are others.
    tokens = torch.cat([row["patches"] for row in stored])
    assert not torch.allclose(result.model.feature_mean, tokens.mean(0), atol=1e-6)
    held = load_file(room / "out" / "samples.safetensors")
    held = held["patches"][held["attention_mask"].bool()]
    trained = tokens.sum(0) - held.sum(0)
    mean = trained / (len(tokens) - len(held))
    torch.testing.assert_close(result.model.feature_mean, mean, rtol=1e-4, atol=1e-5)


def test_a_model_of_features_says_whose_they_are(features):
    room, result = features
    config = AutoModel.from_pretrained(room / "out").config
    assert config.host_config["layer"] == -1 and config.host_config["model_type"] == "bert"
    assert config.patch_dim == 8 and config.verdict["tokens"] == result.verdict.tokens
    assert "24 given texts" in result.record["training"]["data"]


def test_features_of_another_run_are_taken_from_the_cache(features, host, tmp_path, monkeypatch):
    room, result = features
    monkeypatch.setattr(host, "forward", None)
    settings = FeatureSettings(cache=str(room / "cache"), **SMALL)
    again = train_features(settings, host=host, tokenizer=Letters(), texts=TEXTS)
    assert again.verdict == result.verdict


def test_the_prototypes_arguments_mean_what_they_meant(host, tmp_path):
    model, report = run(
        "none",
        TEXTS,
        12,
        D_lens=8,
        epochs=2,
        host=host,
        tokenizer=Letters(),
        hidden_size=8,
        num_rows=4,
        batch_size=5,
        out_dir=tmp_path / "out",
    )
    assert isinstance(model, GeolipForReconstruction) and model.config.lens_dim == 8
    # Two passes over the 10 texts that are not held out.
    assert report["training"]["steps"] == 4 and report["training"]["rows"] == 10
    assert report["verdict"]["mechanism"] in "AB" and report["history"]["alphas"]["steps"]
    for i in range(6):
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    model, report = run_image(D_lens=4, epochs=3, dataset=str(tmp_path), batch_size=3)
    # Two images are held out.
    assert report["training"]["steps"] == 6 and model.config.lens_dim == 4


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        (ImageSettings, {"steps": 0}, "steps"),
        (ImageSettings, {"held_out": 1.0}, "held_out"),
        (ImageSettings, {"save_steps": 30}, "logging_steps"),
        (ImageSettings, {"preset": "huge"}, "preset"),
        (ImageSettings, {"overrides": {"lens_dim": 2}}, "lens_dim"),
        (ImageSettings, {"overrides": {"rows": 2}}, "rows"),
        (ImageSettings, {"patch_size": 5}, "image_size"),
        (ImageSettings, {"resume": True}, "out"),
        (FeatureSettings, {"companion": True}, "out"),
        (FeatureSettings, {"text_files": ("a",), "dataset": "b"}, "Leave one out"),
        (FeatureSettings, {"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_settings_that_do_not_fit_are_said_at_once(kind, wrong, says):
    with pytest.raises(ValueError, match=says):
        kind(**wrong)


def test_a_host_is_asked_for():
    with pytest.raises(ValueError, match="--host"):
        train_features(FeatureSettings())


def test_words_say_what_the_numbers_are(images):
    _, result = images
    text = " ".join(verdict_in_words(result.verdict))
    assert f"{result.verdict.recon_cosine:.4f}" in text and "Of random frames" in text
    assert f"Mechanism B: {MECHANISMS['B']}" in text
    assert f"{result.verdict.coordination_gain:+.2%}" in text
