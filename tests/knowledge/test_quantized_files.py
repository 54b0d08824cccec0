"""Coded deltas in files: sizes as reported, and a second look at everything when they are read."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.errors import IntegrityError, QuantizationError, UnsafeFileError
from gravity_hf.knowledge.quantized_delta import Tier
from gravity_hf.knowledge.quantized_files import (
    METADATA,
    parsed,
    read_quantized,
    serialized,
    write_quantized,
)
from gravity_hf.knowledge.quantizing import quantize


def gaussian_delta(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        {
            f"model.layers.{i}.down_proj": (
                torch.randn(2, 192, generator=generator),
                torch.randn(128, 2, generator=generator),
            )
            for i in range(2)
        }
    )


@pytest.fixture(scope="module")
def coded():
    return quantize(gaussian_delta(), 2, embedding=torch.linspace(-1, 1, 64))


@pytest.fixture
def file(coded, tmp_path):
    path = tmp_path / "d.safetensors"
    write_quantized(path, *coded)
    return path


def header(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()[METADATA])


def rewrite(path, change_header=lambda h: None, change_tensors=lambda t: None):
    described, tensors = header(path), load_file(path)
    change_header(described)
    change_tensors(tensors)
    save_file(tensors, path, {METADATA: json.dumps(described)})


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_the_file_is_as_large_as_reported(tier, tmp_path):
    for delta in (gaussian_delta(), LowRankDelta({"m": (torch.ones(1, 40), torch.ones(40, 1))})):
        coded = quantize(delta, tier)
        size = write_quantized(tmp_path / "d.safetensors", *coded)
        assert size == (tmp_path / "d.safetensors").stat().st_size
        assert size == pytest.approx(coded.report.bytes, rel=0.01)


def test_the_file_is_really_smaller():
    """Wide enough for its header not to matter: 4 bits, a scale for 64, and a sketch."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 4096, generator=generator)
    report = quantize(LowRankDelta({"m": (A, A.T.flip(0))}), 3).report
    assert report.bits == 4 and report.bits_per_parameter < 4.6
    assert report.bytes < report.bytes_exact / 6.9


def test_what_is_read_is_what_was_written(file, coded):
    found = read_quantized(file, exact=gaussian_delta())
    assert found.report == coded.report
    assert (found.delta.tier, found.delta.codec, found.delta.shapes) == (
        coded.delta.tier,
        coded.delta.codec,
        coded.delta.shapes,
    )
    used, before = found.delta.dequantize(), coded.delta.dequantize()
    for name, pair in before.factors.items():
        assert all(map(torch.equal, used.factors[name], pair))
    assert torch.equal(found.delta.embedding(), coded.delta.embedding())
    assert serialized(*found) == file.read_bytes()


def test_other_texts_travel_in_the_header(coded):
    data = serialized(*coded, beside={"fact": "null"})
    assert parsed(data, "d").report.bits == coded.report.bits


@pytest.mark.parametrize("name", ["codes", "scales", "norms", "sketches", "update_norms"])
def test_one_changed_byte_is_found(file, name):
    def flip(tensors):
        tensors[name].view(torch.uint8).view(-1)[3] ^= 1

    rewrite(file, change_tensors=flip)
    with pytest.raises(IntegrityError) as raised:
        read_quantized(file)
    assert raised.value.names == ["d.safetensors"]


def test_codes_that_do_not_meet_their_tier_are_refused(tmp_path):
    """A writer that calls 2 bits tier 2, with a report that lies: the sketches tell."""
    strict = quantize(gaussian_delta(), 2)
    coarse = quantize(gaussian_delta(), Tier(7, 0.9, 0.0, 0.0))
    assert coarse.report.bits == 2
    disguised = replace(coarse.delta, tier=strict.delta.tier)
    path = tmp_path / "d.safetensors"
    write_quantized(path, disguised, replace(strict.report, bits=2))
    with pytest.raises(QuantizationError, match="by its sketches"):
        read_quantized(path)


def test_a_report_that_admits_to_missing_the_tier_is_refused(coded, tmp_path):
    path = tmp_path / "d.safetensors"
    for change, match in [
        ({"rel_frobenius": 0.11}, "reported error"),
        ({"routing_cosine": 0.5}, "routing cosine"),
        ({"angle": 0.01}, "angle"),
        ({"passed": False}, "did not pass"),
        ({"bits": 8}, "another delta"),
        ({"tier": 3}, "another delta"),
    ]:
        write_quantized(path, coded.delta, replace(coded.report, **change))
        with pytest.raises(QuantizationError, match=match):
            read_quantized(path)


def test_a_tier_cannot_be_softened(file):
    rewrite(file, lambda h: h["tier"].update(frobenius=0.9))
    with pytest.raises(QuantizationError, match="limits of tier 2"):
        read_quantized(file)


def test_another_exact_delta_is_told_from_the_own(file):
    with pytest.raises(QuantizationError, match="expected an error of at most"):
        read_quantized(file, exact=gaussian_delta(seed=1))
    with pytest.raises(QuantizationError, match="expected the maps"):
        read_quantized(file, exact=LowRankDelta({"m": (torch.ones(1, 4), torch.ones(4, 1))}))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(format="gravity-delta-codes/9"),
        lambda h: h.update(more=1),
        lambda h: h.pop("codec"),
        lambda h: h["codec"].update(bits=9),
        lambda h: h["codec"].update(more=9),
        lambda h: h.update(shapes={}),
        lambda h: h["shapes"].update(x=[1, 2]),
        lambda h: h["shapes"].update(x=[1, 2, -3]),
        lambda h: h["shapes"].update(x=[1 << 30, 1 << 30, 1 << 30]),
        lambda h: h["shapes"].update({"model.layers.0.down_proj": [3, 192, 128]}),
        lambda h: h.update(embedding_width=-1),
        lambda h: h.update(kind="other"),
        lambda h: h.update(report=[]),
        lambda h: h["report"].update(rel_frobenius="small"),
        lambda h: h["report"].update(rel_frobenius=None),
        lambda h: h["report"].pop("tried"),
        lambda h: h["report"].update(tried=[[1]]),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(file, change):
    rewrite(file, change)
    with pytest.raises(UnsafeFileError):
        read_quantized(file)


def test_tensors_other_than_described_are_refused(file):
    rewrite(file, change_tensors=lambda t: t.update(codes=t["codes"][:-1]))
    with pytest.raises(UnsafeFileError, match="codes: expected"):
        read_quantized(file)


def test_not_a_number_is_refused(file):
    rewrite(file, change_tensors=lambda t: t["norms"].fill_(float("nan")))
    with pytest.raises(UnsafeFileError, match="norms"):
        read_quantized(file)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UnsafeFileError, match="description"):
        read_quantized(path)
    for data in (b"", b"\xff" * 64, pickle.dumps({"x": 1}), b"PK\x03\x04" + b"0" * 40):
        path.write_bytes(data)
        with pytest.raises(UnsafeFileError):
            read_quantized(path)


def test_a_failed_write_leaves_the_older_file(file, coded, monkeypatch):
    import os

    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_quantized(file, *coded)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]
