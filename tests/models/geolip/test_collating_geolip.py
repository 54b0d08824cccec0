"""Batches of rows: padded, masked, and always with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from gravity_hf.models.geolip import GeolipCollator, GeolipConfig, GeolipForReconstruction

COLLATE = GeolipCollator()


def test_ragged_patches_are_padded_and_masked() -> None:
    short, long = torch.randn(2, 5), torch.randn(3, 5)
    batch = COLLATE([{"patches": short, "text": "left out"}, {"patches": long.tolist()}])
    assert set(batch) == {"patches", "labels", "attention_mask"}
    assert torch.equal(batch["patches"][0], torch.cat([short, torch.zeros(1, 5)]))
    assert torch.equal(batch["patches"][1], long)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["attention_mask"].dtype == torch.int64


def test_labels_are_the_inputs_unless_rows_bring_clean_ones() -> None:
    noisy, clean = torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    batch = COLLATE([{"pixel_values": noisy}] * 2)
    assert torch.equal(batch["labels"], batch["pixel_values"])
    batch["pixel_values"].add_(1.0)  # noise added in place leaves the target alone
    assert torch.equal(batch["labels"][0], noisy)
    batch = COLLATE([{"pixel_values": noisy, "labels": clean}])
    assert torch.equal(batch["labels"][0], clean)
    ragged = COLLATE([{"patches": torch.ones(n, 4), "labels": torch.zeros(n, 4)} for n in (1, 2)])
    assert not ragged["labels"].any()


def test_a_mask_of_a_row_is_kept() -> None:
    masked = {"patches": torch.ones(3, 2), "attention_mask": [1, 0, 1]}
    assert COLLATE([masked, {"patches": torch.ones(4, 2)}])["attention_mask"].tolist() == [
        [1, 0, 1, 0],
        [1, 1, 1, 1],
    ]


ONE, OTHER = torch.zeros(2, 3), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "one row or more"),
        ([{"input_ids": ONE}], "remove_unused_columns=False"),
        ([{"patches": ONE}, {"pixel_values": ONE}], "'patches' .* in every row"),
        ([{"patches": ONE}, {"patches": OTHER}], "of one P"),
        ([{"pixel_values": ONE[None]}, {"pixel_values": OTHER[None]}], "resize them"),
        ([{"patches": ONE, "labels": ONE}, {"patches": ONE}], "in 1 of 2 rows"),
        ([{"patches": ONE, "labels": OTHER}], "labels of the shape"),
        ([{"patches": ONE.long()}], "floating-point"),
        ([{"patches": ONE, "attention_mask": [1]}], r"attention_mask \[2\]"),
    ],
    ids=[
        *("none", "names", "mixed", "width", "size", "some-labels", "label-shape", "integers"),
        "mask",
    ],
)
def test_rows_that_do_not_fit_are_errors(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        COLLATE(rows)


def test_trainer_evaluates_a_loss(tmp_path: Path) -> None:
    model = GeolipForReconstruction(
        GeolipConfig(patch_dim=5, num_rows=4, hidden_size=8, num_spectral_layers=1)
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        per_device_eval_batch_size=2,
    )
    rows: Any = [{"patches": torch.randn(n, 5)} for n in (2, 4, 3)]
    trainer = Trainer(model, arguments, data_collator=COLLATE, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] > 0
