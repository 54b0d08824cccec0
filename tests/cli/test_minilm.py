"""A real pretrained encoder keeps its embeddings through a calibrated conversion."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.cli.demo import minilm
from gravity_hf.training.measures import embedding_likeness
from gravity_hf.training.text import disjoint_samples, prose_paragraphs, read_texts


@pytest.mark.skipif(minilm.minilm_folder() is None, reason=f"needs {minilm.PACKAGE}")
def test_calibration_keeps_what_the_constants_destroy() -> None:
    texts = disjoint_samples(prose_paragraphs(read_texts(None)), 8)
    constants, bare, soft = minilm.minilm_rows(*texts, (0.0, 16.0), tokens=64)
    assert constants["cosine_mean"] < bare["cosine_mean"] < soft["cosine_mean"]
    assert soft["cosine_min"] > 0.99
    assert bare["contrast_median"] > soft["contrast_median"] >= 1
    assert constants["softness"] is None


@pytest.mark.slow
@pytest.mark.skipif(minilm.minilm_folder() is None, reason=f"needs {minilm.PACKAGE}")
def test_128_held_out_paragraphs_keep_their_embeddings_without_training() -> None:
    texts = disjoint_samples(prose_paragraphs(read_texts(None)), 128)
    constants, one, four = minilm.minilm_rows(*texts, (1.0, 4.0))
    assert one["softness"] == 1 and one["cosine_mean"] >= 0.98
    assert four["softness"] == 4 and four["cosine_mean"] >= 0.997
    # The published constants leave nothing of the encoder: the reason to calibrate.
    assert constants["cosine_mean"] < 0.6


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install"):
        minilm.minilm_rows(["a"], ["b"], (1.0,))


def test_likeness_of_equal_and_of_mirrored_embeddings() -> None:
    embeddings = torch.randn(12, 5, dtype=torch.float64)
    same = embedding_likeness(embeddings, embeddings.clone())
    assert same == pytest.approx(
        {"cosine_mean": 1, "cosine_min": 1, "spearman": 1, "same_neighbour": 1}
    )
    mirrored = embedding_likeness(embeddings, -embeddings)
    assert mirrored["cosine_mean"] == pytest.approx(-1)
    assert mirrored["spearman"] == pytest.approx(1)


def test_likeness_of_unrelated_embeddings_is_low() -> None:
    first, second = torch.randn(2, 40, 30, dtype=torch.float64)
    likeness = embedding_likeness(first, second)
    assert abs(likeness["spearman"]) < 0.2
    assert likeness["same_neighbour"] < 0.3
