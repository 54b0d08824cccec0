"""Examples from text and chats: what is held out, what is learnt, what packed documents see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import VOCABULARY, tiny_host
from transformers import HfArgumentParser, TrainingArguments

from gravity_hf import GravityConfig, GravityTrainer, patch_with_gravity
from gravity_hf.training.data import DataArguments, prepare_data
from gravity_hf.training.packing import IGNORED, Collator, DocumentPacker, require_packable
from gravity_hf.training.tokenizers import byte_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def numbered(count: int, words: int = 6) -> str:
    """Paragraphs that can be told apart wherever a row cuts them."""
    return "\n\n".join(" ".join([f"<{i}>"] * words) for i in range(count))


def write(folder: Path, text: str, name: str = "text.txt") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def numbers_in(rows) -> set[str]:
    text = b"".join(bytes(row["input_ids"].tolist()) for row in rows).decode()
    return {part.split(">")[0] for part in text.split("<")[1:] if ">" in part}


def packed_row(lengths: list[int], length: int) -> tuple[dict, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    packer = DocumentPacker(length, padding=0)
    for document in documents:
        packer.add(document.numpy().astype(np.int32), np.ones(len(document), bool))
    (row,) = packer.finish()
    # The longest comes first.
    return row, sorted(documents, key=len, reverse=True)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("law", ["force", "power"])
def test_packed_documents_equal_separate_ones(implementation: str, law: str) -> None:
    model = tiny_host("qwen2")
    patch_with_gravity(model, GravityConfig(law=law, implementation=implementation))
    row, documents = packed_row([9, 17, 5], length=36)
    batch = Collator(padding=0, padded=False)([row])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    with torch.no_grad():
        packed = model(**batch, use_cache=False)
        alone = [
            model(input_ids=d[None], labels=d[None], use_cache=False, num_items_in_batch=1)
            for d in documents
        ]
    expected = torch.cat([output.logits[0] for output in alone])
    torch.testing.assert_close(packed.logits[0, : len(expected)], expected, rtol=1e-4, atol=1e-4)
    predictions = sum(len(d) - 1 for d in documents)
    mean = sum(output.loss for output in alone) / predictions
    torch.testing.assert_close(packed.loss, mean, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        seen = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert not torch.allclose(seen[0, 17:22], expected[17:22], atol=1e-2)


def test_no_document_is_predicted_from_the_one_before() -> None:
    row, documents = packed_row([9, 17, 5], length=36)
    starts = [0, 17, 26]
    learnt = [i for i in range(31) if i not in starts]
    assert np.flatnonzero(row["labels"] != IGNORED).tolist() == learnt
    assert (row["labels"][learnt] == row["input_ids"][learnt]).all()
    assert np.flatnonzero(row["position_ids"] == 0).tolist() == [*starts, 31]
    assert torch.equal(torch.tensor(row["input_ids"][:31]).long(), torch.cat(documents))


def test_documents_fill_rows_without_being_cut() -> None:
    packer = DocumentPacker(16, padding=0)
    sizes = [3, 16, 7, 9, 5, 4, 12, 2, 40]
    rows = []
    for number, size in enumerate(sizes, 1):
        rows += packer.add(np.full(size, number, np.int32), np.ones(size, bool))
    rows += packer.finish()
    assert all(len(row["input_ids"]) == 16 for row in rows)
    ids = np.concatenate([row["input_ids"] for row in rows])
    assert [int((ids == n).sum()) for n in range(1, 10)] == sizes
    for number, size in enumerate(sizes[:-1], 1):
        (holder,) = [row for row in rows if (row["input_ids"] == number).any()]
        assert holder["position_ids"][holder["input_ids"] == number].tolist() == [*range(size)]
    # 98 tokens need 7 rows of 16.
    assert len(rows) == 7


def test_blocks_are_the_text_with_separators(tmp_path: Path) -> None:
    files = [write(tmp_path, "abcdefg", "a.txt"), write(tmp_path, "hijkl", "b.txt")]
    arguments = DataArguments(text_files=files, length=7, validation_share=0)
    prepared = prepare_data(byte_tokenizer(), arguments)
    assert prepared.validation is None
    ids = b"".join(bytes(row["input_ids"].tolist()) for row in prepared.train)
    assert ids in (b"abcdefg\0hijkl\0", b"hijkl\0abcdefg\0")
    for row in prepared.train:
        assert row["labels"].tolist() == [IGNORED, *row["input_ids"].tolist()[1:]]


def test_the_tail_of_a_file_is_held_out(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    arguments = DataArguments(text_files=[write(tmp_path, text)], length=10)
    prepared = prepare_data(byte_tokenizer(), arguments)
    for rows, part in ((prepared.train, text[:900]), (prepared.validation, text[900:])):
        ids = b"".join(bytes(row["input_ids"].tolist()) for row in rows)
        assert ids.decode() == part


@pytest.mark.parametrize("packing", ["blocks", "documents", "none"])
def test_no_document_is_on_both_sides(packing: str, tmp_path: Path) -> None:
    # Written twice: equal documents must not be separated either.
    text = numbered(60) + "\n\n" + numbered(60)
    arguments = DataArguments(
        text_files=[write(tmp_path, text)],
        text_unit="paragraph",
        length=40,
        packing=packing,
        # Nine of sixty: an odd number of rows would part a pair.
        validation_share=0.15,
    )
    prepared = prepare_data(byte_tokenizer(), arguments)
    train, held_out = numbers_in(prepared.train), numbers_in(prepared.validation)
    assert len(held_out) > 5
    assert len(train) > 30
    assert train.isdisjoint(held_out)


def test_validation_files_are_left_out_of_training(tmp_path: Path) -> None:
    arguments = DataArguments(
        text_files=[write(tmp_path, numbered(40))],
        validation_files=[write(tmp_path, numbered(10), "held_out.txt")],
        text_unit="paragraph",
        packing="none",
        length=40,
    )
    prepared = prepare_data(byte_tokenizer(), arguments)
    assert numbers_in(prepared.validation) == {str(i) for i in range(10)}
    assert numbers_in(prepared.train) == {str(i) for i in range(10, 40)}
    assert "10 of them also validated on" in prepared.description


def test_a_padded_batch_hides_its_padding(tmp_path: Path) -> None:
    arguments = DataArguments(
        text_files=[write(tmp_path, "short\n\nsomewhat longer")],
        text_unit="paragraph",
        packing="none",
        length=40,
        validation_share=0,
    )
    prepared = prepare_data(byte_tokenizer(), arguments)
    batch = prepared.collator([prepared.train[0], prepared.train[1]])
    real = batch["attention_mask"].bool()
    assert sorted(real.sum(1).tolist()) == [6, 16]
    assert (batch["labels"][~real] == IGNORED).all()
    assert (batch["labels"][:, 1:][real[:, 1:]] == batch["input_ids"][:, 1:][real[:, 1:]]).all()


def test_readers_get_whole_texts_without_labels(tmp_path: Path) -> None:
    arguments = DataArguments(
        text_files=[write(tmp_path, numbered(8))],
        text_unit="paragraph",
        packing="none",
        length=12,
        validation_share=0,
    )
    prepared = prepare_data(byte_tokenizer(), arguments, labels=False)
    assert len(prepared.train) == 8
    batch = prepared.collator([prepared.train[i] for i in range(8)])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == (8, 12)


def test_a_limit_takes_a_sample_and_not_the_beginning(tmp_path: Path) -> None:
    whole = DataArguments(
        text_files=[write(tmp_path, numbered(2000))], text_unit="paragraph", length=40
    )
    limited = prepare_data(byte_tokenizer(), replace(whole, max_train_tokens=4000))
    assert len(limited.train) == 100
    numbers = [int(n) for n in numbers_in(limited.train)]
    assert min(numbers) < 500
    assert max(numbers) > 1500
    everything = prepare_data(byte_tokenizer(), whole)
    for i in (0, 50, 99):
        assert torch.equal(limited.train[i]["input_ids"], everything.train[i]["input_ids"])


IN_A_NEW_PROCESS = """
import sys
from gravity_hf.training.data import DataArguments, prepare_data
from gravity_hf.training.tokenizers import byte_tokenizer
arguments = DataArguments(text_files=[sys.argv[1]], text_unit="paragraph", length=32)
print(prepare_data(byte_tokenizer(), arguments).digest)
"""


def test_the_same_examples_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, numbered(50))
    arguments = DataArguments(text_files=[file], text_unit="paragraph", length=32)
    first = prepare_data(byte_tokenizer(), arguments)
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(tmp_path / "other"),
        "PYTHONHASHSEED": "7",
    }
    other = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, file],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == first.digest
    reseeded = DataArguments(text_files=[file], text_unit="paragraph", length=32, seed=1)
    assert prepare_data(byte_tokenizer(), reseeded).digest != first.digest


def test_the_second_time_nothing_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, numbered(50))
    arguments = DataArguments(text_files=[file], text_unit="paragraph", length=32)
    first = prepare_data(byte_tokenizer(), arguments)

    def refuse(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr("gravity_hf.training.tokenizing.Tokenizing._texts", refuse)
    assert prepare_data(byte_tokenizer(), arguments).digest == first.digest
    write(tmp_path, numbered(51))
    with pytest.raises(AssertionError, match="tokenized again"):
        prepare_data(byte_tokenizer(), arguments)


def test_a_resumed_run_sees_the_same_examples(tmp_path: Path) -> None:
    file = write(tmp_path, numbered(40))
    data = prepare_data(
        byte_tokenizer(),
        DataArguments(text_files=[file], text_unit="paragraph", packing="documents", length=64),
    )

    def train(folder: Path, steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        model = patch_with_gravity(tiny_host("qwen2", vocab_size=256), GravityConfig())
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GravityTrainer(
            model, arguments, train_dataset=data.train, data_collator=data.collator
        )
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "cut", 2)
    resumed = train(tmp_path / "cut", 4, resume=str(tmp_path / "cut" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_embedded_default_needs_no_files() -> None:
    arguments = DataArguments(length=64, max_train_tokens=640, max_validation_tokens=640)
    prepared = prepare_data(byte_tokenizer(), arguments)
    assert (len(prepared.train), len(prepared.validation)) == (10, 10)
    assert "standard library" in prepared.description


@pytest.mark.parametrize("column", ["text", "messages"])
def test_datasets_give_text_or_chats(column: str, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, first in (("train", 0), ("test", 8)):
        chats = [
            [{"role": "user", "content": f"<{i}>"}, {"role": "assistant", "content": f"<{i}> {i}"}]
            for i in range(first, first + 8)
        ]
        rows = [{"text": f"<{c[0]['content']}>" * 9, "messages": c} for c in chats]
        rows.append({"text": "  ", "messages": chats[0]})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = DataArguments(
        dataset=str(folder),
        dataset_validation_split="test",
        text_column=column,
        packing="none",
        length=64,
    )
    prepared = prepare_data(byte_tokenizer(), arguments)
    expected = 8 if column == "text" else 9
    assert (len(prepared.train), len(prepared.validation)) == (expected, 9 if expected == 9 else 8)
    learnt = [row["labels"] != IGNORED for row in prepared.train]
    assert all(mask[1:].all() for mask in learnt) == (column == "text")
    with pytest.raises(ValueError, match=r"text_column.*'messages', 'text'|text_column.*'text'"):
        prepare_data(byte_tokenizer(), DataArguments(dataset=str(folder), text_column="body"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text_files": ["a"], "chat_files": ["b"]}, "one source, got text_files and chat_files"),
        ({"text_files": "a.txt"}, "text_files: expected a list"),
        ({"dataset_config": "x"}, "expected a dataset"),
        ({"packing": "tight"}, "packing: expected one of"),
        ({"length": 1}, "length: expected a whole number of at least 2"),
        ({"length": "64"}, "length: expected a whole number"),
        ({"max_train_tokens": 10}, "max_train_tokens: expected a whole number of at least 1024"),
        ({"validation_share": 1.0}, "validation_share: expected"),
        ({"text_unit": "line"}, "text_unit: expected one of"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataArguments(**wrong)


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    arguments = DataArguments(text_files=[write(tmp_path, numbered(50))], length=32)
    with pytest.raises(ValueError, match="at most 16 tokens, the longest input of the model"):
        prepare_data(byte_tokenizer(), arguments, max_positions=16)
    with pytest.raises(ValueError, match="token ids below 60, the model's vocabulary, got 62"):
        prepare_data(byte_tokenizer(), arguments, vocabulary=60)
    with pytest.raises(ValueError, match="packing: expected 'none' for a model that only reads"):
        prepare_data(byte_tokenizer(), arguments, labels=False)


def test_unusable_text_is_named(tmp_path: Path) -> None:
    empty = write(tmp_path, " \n", "empty.txt")
    with pytest.raises(ValueError, match=r"empty\.txt: expected a file with text"):
        prepare_data(byte_tokenizer(), DataArguments(text_files=[empty], length=8))
    with pytest.raises(ValueError, match=r"gone\.txt: expected a readable file"):
        prepare_data(byte_tokenizer(), DataArguments(text_files=[str(tmp_path / "gone.txt")]))
    short = write(tmp_path, "0123456789", "short.txt")
    with pytest.raises(ValueError, match="train data.*at least one example of 64.*got 10 tokens"):
        prepare_data(byte_tokenizer(), DataArguments(text_files=[short], length=64))
    one = DataArguments(text_files=[short], text_unit="paragraph", length=4)
    with pytest.raises(ValueError, match="at least 2 different documents"):
        prepare_data(byte_tokenizer(), one)


def test_a_model_without_positions_cannot_take_packed_documents() -> None:
    require_packable(tiny_host("qwen2"))
    with pytest.raises(ValueError, match="ViTForImageClassification does not"):
        require_packable(tiny_host("vit"))


def test_arguments_are_read_from_flags_and_from_yaml(tmp_path: Path) -> None:
    parser = HfArgumentParser(DataArguments)
    flags = "--text_files a.txt b.txt --packing documents --length 64 --seed 3"
    (from_flags,) = parser.parse_args_into_dataclasses(flags.split())
    yaml = "text_files: [a.txt, b.txt]\npacking: documents\nlength: 64\nseed: 3\n"
    (from_yaml,) = parser.parse_yaml_file(write(tmp_path, yaml, "data.yaml"))
    assert from_flags == from_yaml
    assert from_flags.text_files == ["a.txt", "b.txt"]
