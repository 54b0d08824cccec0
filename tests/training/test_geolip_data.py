"""What a geolip is trained on: paragraphs, features on disk, images; and what is held out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gravity_hf.models.geolip import GeolipImageProcessor
from gravity_hf.models.geolip.features import FeatureWindow
from gravity_hf.training.geolip import feature_data, feature_files
from gravity_hf.training.geolip.feature_data import split_windows, stored_features, weights_digest
from gravity_hf.training.geolip.feature_files import StoredFeatures, store_features
from gravity_hf.training.geolip.image_data import load_images
from gravity_hf.training.geolip.texts import load_texts, paragraphs_of

LONG = "A paragraph that is long enough to be one, number {}."
# A heading may be as long as a paragraph.
LONG_HEADING = " = Gravity , and what it holds together all over the world = "
WIKI = f"\n{LONG_HEADING}\n \n {LONG.format(1)} \n = = History = = \n {LONG.format(2)} \n short \n"


def windows(count=20, texts=10, width=3):
    generator = torch.Generator().manual_seed(0)
    return [
        FeatureWindow(torch.randn(1 + i % 3, width, generator=generator), i * texts // count)
        for i in range(count)
    ]


def test_wikitext_has_a_paragraph_on_each_line_that_is_no_heading():
    assert paragraphs_of(WIKI) == [LONG.format(1), LONG.format(2)]


def test_elsewhere_blank_lines_stand_between_paragraphs():
    text = f"{LONG.format(1)}\nwhich goes on.\n\nToo short.\n \n{LONG.format(2)}"
    assert paragraphs_of(text) == [f"{LONG.format(1)} which goes on.", LONG.format(2)]


def test_texts_are_distinct_and_drawn_by_seed(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(LONG.format(i % 9) for i in range(30)))
    whole = load_texts([file])
    assert sorted(whole.paragraphs) == [LONG.format(i) for i in range(9)]
    assert whole.description == "9 paragraphs of text.txt"
    some, again, other = (load_texts([file], count=4, seed=seed) for seed in (0, 0, 1))
    assert some == again and len(some.paragraphs) == 4
    assert set(some.paragraphs) < set(whole.paragraphs) and some.digest != other.digest


def test_without_files_it_is_the_help_of_python():
    assert len(load_texts(count=5).paragraphs) == 5


def test_a_folder_of_data_is_a_data_set(tmp_path):
    lines = "\n".join(LONG.format(i) for i in range(6))
    (tmp_path / "train.txt").write_text(lines)
    found = load_texts(dataset=str(tmp_path), count=4, seed=1)
    assert len(found.paragraphs) == 4 and set(found.paragraphs) <= set(lines.splitlines())
    with pytest.raises(ValueError, match="a column 'words'"):
        load_texts(dataset=str(tmp_path), column="words")


def test_one_source_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="Leave one out"):
        load_texts([tmp_path], "wikitext")
    file = tmp_path / "one.txt"
    file.write_text(LONG.format(1))
    with pytest.raises(ValueError, match=r"one\.txt"):
        load_texts([file])


def test_stored_features_are_what_was_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "_FILE_BYTES", 60)
    given = windows()
    store_features(tmp_path / "f", given, {"host": "a"})
    stored = StoredFeatures(tmp_path / "f")
    assert len(stored.manifest["files"]) > 2 and len(stored) == 20
    assert stored.text_indices == [w.text_index for w in given]
    # What worker processes get has no open files in it.
    for row, window in zip(copy.deepcopy(stored), given, strict=True):
        assert torch.equal(row["patches"], window.features)


def test_a_file_that_was_cut_off_is_noticed(tmp_path):
    store_features(tmp_path, windows(), {})
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="whole"):
        StoredFeatures(tmp_path)


def test_an_extraction_that_stops_leaves_nothing(tmp_path):
    def stopping():
        yield from windows()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_features(tmp_path / "f", stopping(), {})
    assert list(tmp_path.iterdir()) == []


def test_features_are_extracted_once_for_each_host_and_layer(tmp_path, monkeypatch):
    calls = []

    def extract(host, tokenizer, texts, **options):
        calls.append(options["layer"])
        return iter(windows())

    monkeypatch.setattr(feature_data, "extract_features", extract)

    def stored(digest, layer=-1):
        key = {"host": digest}
        return stored_features(tmp_path / "f", None, None, ["a"] * 10, key=key, layer=layer)

    first = list(stored("one"))
    assert all(
        torch.equal(a["patches"], b["patches"]) for a, b in zip(first, stored("one"), strict=True)
    )
    assert calls == [-1]
    stored("one", layer=2), stored("two")
    assert calls == [-1, 2, -1]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        stored_features(tmp_path, None, None, ["a"], key={})
    assert (tmp_path / "mine.txt").exists()


def test_hosts_with_one_weight_changed_have_other_digests():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other)
    other.weight.data[0, 0] += 1e-6
    assert weights_digest(one) != weights_digest(other)


def test_no_text_is_on_both_sides(tmp_path):
    given = windows(40, 20)
    train, held_out = split_windows(given, 0.2, seed=1)
    owner = {window.features.data_ptr(): window.text_index for window in given}
    texts = [{owner[row["patches"].data_ptr()] for row in side} for side in (train, held_out)]
    assert len(texts[1]) == 4 and not texts[0] & texts[1]
    assert len(train) + len(held_out) == 40
    store_features(tmp_path / "f", given, {})
    stored = split_windows(StoredFeatures(tmp_path / "f"), 0.2, seed=1)
    assert [set(side.text_indices) for side in stored] == texts
    # Neighbours in the text are no neighbours here.
    assert stored[1].text_indices != sorted(stored[1].text_indices)
    with pytest.raises(ValueError, match="at least 3"):
        split_windows(windows(4, 2))
    with pytest.raises(ValueError, match="share"):
        split_windows(given, 1.0)


@pytest.fixture
def processor():
    return GeolipImageProcessor(image_size=8, patch_size=4)


def test_images_are_held_out_by_seed(processor):
    found = load_images("waves", processor, count=20, held_out=0.2)
    sides = [{tuple(row["pixel_values"].flatten().tolist()) for row in side} for side in found[:2]]
    assert [len(side) for side in sides] == [16, 4] and not sides[0] & sides[1]
    assert found.train[0]["pixel_values"].shape == (3, 8, 8)


def test_a_folder_of_pictures_is_read_one_by_one(processor, tmp_path):
    (tmp_path / "more").mkdir()
    for i, name in enumerate(["a.png", "b.jpg", "more/c.PNG", "d.bmp"]):
        pixels = np.full((16, 16, 3), 40 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = load_images(str(tmp_path), processor, held_out=0.5)
    values = sorted(float(row["pixel_values"].mean()) for side in found[:2] for row in side)
    assert values == pytest.approx([40 * i / 127.5 - 1 for i in range(4)], abs=0.02)
    digest = found.digest
    assert load_images(str(tmp_path), processor).digest == digest
    (tmp_path / "d.bmp").unlink()
    assert load_images(str(tmp_path), processor).digest != digest


def test_what_is_transparent_is_read_as_the_processor_reads_it(processor, tmp_path):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    for i in range(3):
        clear.save(tmp_path / f"{i}.png")
    found = load_images(str(tmp_path), processor)
    expected = processor(clear, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(found.train[0]["pixel_values"], expected) and expected.min() == 1


def test_a_file_that_is_no_image_is_named(processor, tmp_path):
    """One with another's bytes before anything begins, one that was cut off when it is read."""
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:1000])
    broken = load_images(str(tmp_path), processor, held_out=0.5)
    with pytest.raises(ValueError, match=r"1\.png.*Take it out"):
        for side in broken[:2]:
            list(side)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png.*Take it out"):
        load_images(str(tmp_path), processor)


def test_a_data_set_of_images_finds_its_column(processor, monkeypatch):
    import datasets

    pictures = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(4)]
    features = datasets.Features({"label": datasets.Value("int64"), "img": datasets.Image()})
    rows = datasets.Dataset.from_dict({"label": [0] * 4, "img": pictures}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=rows))
    found = load_images("some/images", processor, held_out=0.5)
    assert found.train[0]["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="'label'"):
        load_images("some/images", processor, column="label")


def test_what_is_no_source_is_said(processor, tmp_path):
    with pytest.raises(ValueError, match="shapes"):
        load_images(str(tmp_path / "nothing"), processor)
    with pytest.raises(ValueError, match="at least 3"):
        load_images("waves", processor, count=2)
