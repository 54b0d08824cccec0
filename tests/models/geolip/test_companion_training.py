"""A companion that learns: beside a frozen host, through Trainer, with the host's statistics."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from gravity_hf import GeolipCompanion, GeolipConfig
from gravity_hf.models.geolip.features import feature_statistics

from .companion_cases import (
    IDS,
    INNER,
    MASK,
    WIDTH,
    companion_of,
    host_named,
    inputs_of,
)

ROWS = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(IDS, MASK, strict=True)] * 4


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _trainer(companion: GeolipCompanion, folder: Path, **options: Any) -> Trainer:
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    arguments = TrainingArguments(str(folder), **settings, **quiet, **options)
    return Trainer(companion, arguments, _stacked, train_dataset=ROWS, eval_dataset=ROWS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[GeolipCompanion, Trainer, Path]:
    """The companion as it was, its Trainer after training, and the folder."""
    folder = tmp_path_factory.mktemp("run")
    companion = companion_of("bert", write="residual", read_layer=INNER)
    before = copy.deepcopy(companion)
    trainer = _trainer(companion, folder)
    trainer.train()
    return before, trainer, folder


def test_trainer_lowers_the_reconstruction_loss(trained: Any) -> None:
    before, trainer, _ = trained
    after = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        assert after < float(before(**_stacked(ROWS)).loss)


def test_labels_that_are_named_reach_the_host(tmp_path: Path) -> None:
    head = BertForSequenceClassification(host_named("bert").config)
    companion = companion_of(head, write="residual", read_layer=INNER)
    rows = [{**row, "labels": torch.tensor(1)} for row in ROWS]
    rows = [{name: value.tolist() for name, value in row.items()} for row in rows]
    options = {"label_names": ["labels"], "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), **options)
    trainer = Trainer(companion, arguments, eval_dataset=Dataset.from_list(rows))
    output = trainer.predict(trainer.eval_dataset)
    assert output.label_ids.tolist() == [1] * len(rows)
    with torch.no_grad():
        alone = companion(**_stacked(ROWS)).loss
    assert output.metrics["test_loss"] > alone + 0.1


def test_host_stays_as_it_is(trained: Any) -> None:
    before, trainer, _ = trained
    for name, value in before.host.state_dict().items():
        assert torch.equal(trainer.model.host.state_dict()[name], value), name


def test_checkpoints_leave_the_host_out_and_go_on(trained: Any) -> None:
    before, trainer, folder = trained
    checkpoint = folder / "checkpoint-2"
    assert not [x for x in load_file(checkpoint / "model.safetensors") if x.startswith("host")]
    again = _trainer(copy.deepcopy(before), folder)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_frozen_host_stays_in_evaluation() -> None:
    companion = companion_of("bert").train()
    assert companion.geolip.training and not companion.host.training
    assert not any(parameter.requires_grad for parameter in companion.host.parameters())


def test_trained_host_learns() -> None:
    companion = companion_of("bert", train_host=True).train()
    assert companion.host.training
    companion(**inputs_of("bert")).loss.backward()
    assert companion.host.encoder.layer[0].output.dense.weight.grad is not None


@pytest.mark.parametrize("norm", ["zscore", "whiten"])
def test_fitted_statistics_are_those_of_the_content(norm: str) -> None:
    host = host_named("bert", hidden_dropout_prob=0.5)
    settings = GeolipConfig(patch_dim=WIDTH, feature_norm=norm)
    companion = companion_of(host, geolip=settings, train_host=True).train()
    # Several windows, of which none alone has these statistics.
    loader = [{"input_ids": (IDS + i) % 40, "attention_mask": MASK} for i in range(6)]
    companion.fit_statistics(loader)
    rows = torch.cat([hidden[mask] for hidden, mask in (companion.read(**x) for x in loader)])
    expected, geolip = feature_statistics(rows, norm), companion.geolip
    torch.testing.assert_close(geolip.feature_mean, expected.mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(geolip.feature_std, expected.std, atol=1e-6, rtol=1e-5)
    restored = geolip.restore_features(geolip.normalize_features(rows))
    torch.testing.assert_close(restored, rows, atol=1e-4, rtol=1e-4)
    assert companion.host.training, "the mode of the host is left as it was"


def test_statistics_of_a_geolip_that_normalises_nothing_are_refused() -> None:
    companion = companion_of("bert", geolip=GeolipConfig(patch_dim=WIDTH, feature_norm="none"))
    with pytest.raises(ValueError, match="feature_norm='none'"):
        companion.fit_statistics([inputs_of("bert")])
