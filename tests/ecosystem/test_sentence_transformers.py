"""A real sentence encoder under gravity, inside sentence-transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.folders import all_differ, counted_calls, masses
from torch import Tensor

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.cli.demo.minilm import PACKAGE, minilm_folder
from gravity_hf.training.text import disjoint_samples, prose_paragraphs, read_texts

pytest.importorskip("sentence_transformers")
if minilm_folder() is None:
    pytest.skip(f"needs {PACKAGE}", allow_module_level=True)
from sentence_transformers import SentenceTransformer  # noqa: E402

# Run where gravity_hf is not imported: what such a user sees, without and with trust.
WITHOUT_THE_PLUGIN = """
import json, sys
from sentence_transformers import SentenceTransformer
folder, text = sys.argv[1:]
try:
    SentenceTransformer(folder, device="cpu")
    refused = ""
except ValueError as error:
    refused = str(error)
trusted = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
vector = trusted.encode(text).tolist()
print(json.dumps([refused, "gravity_hf" in sys.modules, vector]))
"""


def fresh(folder: Any = None) -> SentenceTransformer:
    return SentenceTransformer(str(folder or minilm_folder()), device="cpu")


def embed(encoder: SentenceTransformer, texts: list[str]) -> Tensor:
    return encoder.encode(texts, convert_to_tensor=True)


def patched_encoder(texts: list[str]) -> SentenceTransformer:
    """The encoder with its transformer patched in place, calibrated at softness 1."""
    encoder = fresh()
    transformer = encoder[0].auto_model
    patch_with_gravity(transformer, GravityConfig(learn_softening=True))
    batch = encoder.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    calibrate(transformer, [dict(batch)], softness=1.0, progress=False)
    return encoder


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    """Eight paragraphs to calibrate on, eight others to compare."""
    short = [text[:300] for text in prose_paragraphs(read_texts(None))]
    return disjoint_samples(short, 8)


@pytest.fixture(scope="module")
def encoder(texts: tuple[list[str], list[str]]) -> SentenceTransformer:
    return patched_encoder(texts[0])


@pytest.fixture(scope="module")
def folder(encoder: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encoder")
    encoder.save_pretrained(str(place))
    return place


def test_a_calibrated_encoder_keeps_its_embeddings_under_gravity(encoder, texts) -> None:
    with counted_calls(encoder) as calls:
        under_gravity = embed(encoder, texts[1])
    assert len(set(calls)) == encoder[0].auto_model.config.num_hidden_layers
    host = embed(fresh(), texts[1])
    cosine = torch.cosine_similarity(under_gravity, host)
    assert cosine.min() >= 0.99, cosine
    assert not torch.allclose(under_gravity, host, atol=1e-3)


def test_a_saved_encoder_comes_back_with_the_same_embeddings(encoder, folder, texts) -> None:
    loaded = fresh(folder)
    assert type(loaded[0].auto_model).__name__ == "GravityBertModel"
    assert torch.equal(embed(loaded, texts[1]), embed(encoder, texts[1]))


def test_a_gravity_folder_of_the_bare_transformer_becomes_an_encoder(
    encoder, texts, tmp_path: Path
) -> None:
    encoder[0].auto_model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    # Mean pooling is added to it; the original ends in a normalisation, which a cosine ignores.
    loaded = fresh(tmp_path)
    assert type(loaded[0].auto_model).__name__ == "GravityBertModel"
    cosine = torch.cosine_similarity(embed(loaded, texts[1]), embed(encoder, texts[1]))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@pytest.mark.slow
def test_without_the_plugin_trust_is_asked_for_and_gives_the_same(encoder, folder, texts) -> None:
    text = texts[1][0]
    command = [sys.executable, "-c", WITHOUT_THE_PLUGIN, str(folder), text]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, plugin, vector = json.loads(done.stdout.splitlines()[-1])
    assert "trust_remote_code" in refused and not plugin
    torch.testing.assert_close(torch.tensor(vector), embed(encoder, [text])[0], atol=1e-4, rtol=0)


def test_another_attention_is_refused_when_a_folder_is_loaded(folder) -> None:
    with pytest.raises(ValueError, match="expected attn_implementation 'gravity'"):
        SentenceTransformer(str(folder), device="cpu", model_kwargs={"attn_implementation": "sdpa"})


def test_patching_the_wrapper_instead_of_its_transformer_is_refused() -> None:
    encoder = fresh()
    with pytest.raises(TypeError, match="SentenceTransformer"):
        patch_with_gravity(encoder, GravityConfig())


def test_a_training_step_moves_every_mass_and_the_result_loads(texts, tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    trained = patched_encoder(texts[0])
    before = masses(trained)
    pairs = Dataset.from_dict({"anchor": texts[0][:4], "positive": texts[1][:4]})
    trainer = SentenceTransformerTrainer(
        model=trained,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(trained),
    )
    trainer.train()
    assert all_differ(before, masses(trained))
    trained.save_pretrained(str(tmp_path / "out"))
    assert torch.equal(embed(fresh(tmp_path / "out"), texts[1]), embed(trained, texts[1]))
