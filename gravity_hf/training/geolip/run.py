"""Trainings by the names and arguments of the published prototype's trainers.

model, report = run("bert-base-uncased", "wikitext", n_sentences=512, D_lens=64, epochs=200)
model, report = run_image(D_lens=16, epochs=8, denoise=2.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .runs import train_features, train_images
from .settings import FeatureSettings, ImageSettings

__all__ = ["run", "run_image"]


def run(
    model_name: str = "bert-base-uncased",
    corpus_source: str | Path | Sequence[str] = "wikitext",
    n_sentences: int | None = 512,
    D_lens: int = 64,
    epochs: int = 200,
    *,
    host: PreTrainedModel | None = None,
    tokenizer: Any = None,
    hidden_size: int = 256,
    num_rows: int = 32,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    out_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A geolip of a host's features, by the arguments of the published prototype's trainer.

    Args:
        model_name: of the host, or of none where `host` and `tokenizer` are given.
        corpus_source: `"wikitext"`, a text file, or sentences.
        n_sentences: at most so many.
        D_lens: dimensions of the lens.
        epochs: passes over nine tenths of the sentences; the rest is measured on.
        out_dir: folder for model and results. None: nothing is kept.

    Returns:
        The model, and a report: verdict, history, settings, conditions.
    """
    is_name = isinstance(corpus_source, (str, Path))
    texts = None if is_name else list(corpus_source)[:n_sentences]
    is_dataset = corpus_source == "wikitext"
    settings = FeatureSettings(
        out=None if out_dir is None else str(out_dir),
        preset="tiny",
        overrides={"lens_dim": D_lens, "hidden_size": hidden_size, "num_rows": num_rows},
        host="" if host is not None else model_name,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        seed=seed,
        dataset="wikitext" if is_dataset else None,
        text_files=() if is_dataset or texts is not None else (str(corpus_source),),
        texts=n_sentences if texts is None else None,
    )
    result = train_features(settings, host=host, tokenizer=tokenizer, texts=texts)
    return result.model, result.record


def run_image(
    D_lens: int = 16,
    epochs: int = 8,
    dataset: str = "synthetic",
    denoise: float = 0.0,
    *,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    out_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A geolip of images, by the arguments of the published prototype's trainer.

    Args:
        D_lens: dimensions of the lens.
        epochs: passes over nine tenths of the images; the rest is measured on.
        dataset: `"synthetic"`, a kind of `synthetic_images`, a folder with images, or a data set.
        denoise: standard deviation of noise that is to be taken away.
        out_dir: folder for model and results. None: nothing is kept.

    Returns:
        The model, and a report: verdict, history, settings, conditions.
    """
    settings = ImageSettings(
        out=None if out_dir is None else str(out_dir),
        overrides={"lens_dim": D_lens},
        epochs=epochs,
        images="shapes" if dataset == "synthetic" else dataset,
        denoise=denoise,
        batch_size=batch_size,
        learning_rate=lr,
        seed=seed,
    )
    result = train_images(settings)
    return result.model, result.record
