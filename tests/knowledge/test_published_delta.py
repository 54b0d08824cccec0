"""Published deltas do in our models what they say, and files that are none are refused."""

from __future__ import annotations

import io
import json
import os
import zipfile

import pytest
import torch

from gravity_hf.knowledge import published_delta
from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.errors import IncompatibleBaseError, UnsafeFileError, ValidationError
from gravity_hf.knowledge.published_delta import read_published
from gravity_hf.knowledge.residual_delta import ResidualDelta
from gravity_hf.knowledge.store import BeliefStore
from gravity_hf.knowledge.targets import decoder_layers

INPUTS = torch.arange(3, 27).view(3, 8)
MANIFEST = {
    "delta_id": "0b7c9d1e-4f52-4f3c-8a38-0d9c3e1f2a11",
    "version": 1,
    "category": "chemistry",
    "target_layers": [0, 1],
    "delta_rank": 2,
    "d_model": 32,
    "format_version": "2.0",
}


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def theirs(layers=(0, 1), width=32, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (
            torch.randn(width, rank, generator=generator) * 0.3,
            torch.randn(rank, width, generator=generator) * 0.3,
        )
        for layer in layers
    }


def parts_of(factors):
    parts = {
        "manifest.json": json.dumps({**MANIFEST, "target_layers": sorted(factors)}).encode(),
        "embedding.pt": saved(torch.zeros(32)),
        "subspace_basis.pt": saved(torch.zeros(32, 2)),
    }
    for layer, (A, B) in factors.items():
        parts[f"factors/{layer}_A.pt"], parts[f"factors/{layer}_B.pt"] = saved(A), saved(B)
    return parts


def write(path, parts):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


@torch.no_grad()
def by_definition(model, factors):
    """After block i: h + h A_i B_i, for every row and position."""
    handles = []
    for layer, (A, B) in factors.items():

        def after(module, arguments, output, A=A, B=B):
            h = output[0] if isinstance(output, tuple) else output
            new = h + h @ A @ B
            return (new, *output[1:]) if isinstance(output, tuple) else new

        block = model.get_submodule(decoder_layers(model)[layer])
        handles.append(block.register_forward_hook(after))
    try:
        return model(input_ids=INPUTS).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("host", ["llama", "gravity_llama", "gpt2"])
def test_a_published_delta_does_what_its_format_says(host, request, tmp_path):
    model, factors = request.getfixturevalue(host), theirs()
    path = write(tmp_path / "a.delta", parts_of(factors))
    store = BeliefStore.create(tmp_path / "kb", model)
    belief = store.import_published(path)
    assert belief.key == MANIFEST["delta_id"] and belief.metadata["category"] == "chemistry"
    again = BeliefStore.open(store.path, model).get(belief.key)
    assert (
        isinstance(again.delta, ResidualDelta) and again.delta.rank(decoder_layers(model)[0]) == 2
    )
    expected = by_definition(model, factors)
    with torch.no_grad():
        base = model(input_ids=INPUTS).logits
        with store.active([belief.key]):
            torch.testing.assert_close(model(input_ids=INPUTS).logits, expected)
        with store.compile_bank().routed([[belief.id], [], [belief.id]]):
            rows = model(input_ids=INPUTS).logits
        torch.testing.assert_close(rows[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)
        assert torch.equal(rows[1], base[1]) and not torch.equal(rows[0], base[0])
        assert torch.equal(model(input_ids=INPUTS).logits, base)


def test_both_kinds_are_active_together(llama, tmp_path, random_delta):
    store = BeliefStore.create(tmp_path / "kb", llama)
    store.import_published(write(tmp_path / "a.delta", parts_of(theirs())), "blocks")
    store.add_delta("maps", random_delta(llama, 1))
    with torch.no_grad():
        with store.active(["maps", "blocks"]):
            both = llama(input_ids=INPUTS).logits
        with store.compile_bank().routed([[store.get(key).id for key in store]]):
            torch.testing.assert_close(llama(input_ids=INPUTS).logits, both)
        for key in store:
            with store.active([key]):
                assert not torch.allclose(llama(input_ids=INPUTS).logits, both)


def test_a_dict_with_factors_is_a_residual_delta_too(llama, tmp_path):
    factors = theirs()
    torch.save({"name": "gold", "factors": factors}, tmp_path / "a.pt")
    delta, metadata = read_published(tmp_path / "a.pt", llama)
    archive, _ = read_published(write(tmp_path / "a.delta", parts_of(factors)), llama)
    assert metadata == {"name": "gold"}
    for name, pair in archive.factors.items():
        assert all(map(torch.equal, pair, delta.factors[name]))


def test_a_dict_with_layer_deltas_is_a_delta_of_linear_maps(llama, tmp_path):
    deltas = {
        "layer_0_down_proj": (torch.randn(64, 2), torch.randn(2, 32)),
        "layer_1_out_proj": (torch.randn(32, 2), torch.randn(2, 32)),
    }
    torch.save({"name": "gold", "layer_deltas": deltas}, tmp_path / "a.pt")
    delta, _ = read_published(tmp_path / "a.pt", llama)
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    assert list(delta.factors) == names
    for name, (A, B) in zip(names, deltas.values(), strict=True):
        torch.testing.assert_close(delta.update(name), (A @ B).T)
    store = BeliefStore.create(tmp_path / "kb", llama)
    assert store.import_published(tmp_path / "a.pt").key == "gold"


def test_a_delta_for_another_base_is_refused(llama, tmp_path):
    for factors, message in (
        (theirs(layers=(0, 2)), "layers 0 to 1, got 2"),
        (theirs(width=48), "expected 32 features, got 48"),
    ):
        with pytest.raises(IncompatibleBaseError, match=message):
            read_published(write(tmp_path / "a.delta", parts_of(factors)), llama)
    torch.save({"layer_deltas": {"layer_0_router": next(iter(theirs().values()))}}, tmp_path / "a")
    with pytest.raises(IncompatibleBaseError, match="a map router in layer 0"):
        read_published(tmp_path / "a", llama)
    names = {"model.layers.7": (torch.ones(1, 32), torch.ones(32, 1))}
    with pytest.raises(IncompatibleBaseError, match=r"blocks from model.layers.0 to"):
        DeltaBank(llama).add("a", ResidualDelta(names))


class Code:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_is_run(llama, tmp_path):
    mark = tmp_path / "executed"
    parts = parts_of(theirs())
    parts["factors/0_A.pt"] = saved(Code(mark))
    with pytest.raises(UnsafeFileError, match=r"0_A.pt: expected tensors"):
        read_published(write(tmp_path / "a.delta", parts), llama)
    torch.save({"factors": Code(mark)}, tmp_path / "a.pt")
    torch.save({"factors": Code(mark)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "old.pt"):
        with pytest.raises(UnsafeFileError):
            read_published(tmp_path / name, llama)
    assert not mark.exists()
    # The trap is one: without our reader it springs.
    torch.load(tmp_path / "a.pt", weights_only=not True)
    assert mark.exists()


CHANGES = {
    "path out of the archive": {"../../evil.pt": b"x"},
    "absolute path": {"/etc/evil.pt": b"x"},
    "unknown file": {"setup.py": b"import os"},
    "one factor missing": {"factors/0_B.pt": None},
    "other layers than named": {"factors/0_A.pt": None, "factors/0_B.pt": None},
    "no JSON": {"manifest.json": b"{"},
    "newer format": {"manifest.json": json.dumps({**MANIFEST, "format_version": "3.0"}).encode()},
    "no version": {"manifest.json": b"{}"},
    "not a number": {"factors/0_A.pt": saved(torch.full((32, 2), torch.nan))},
    "infinite": {"embedding.pt": saved(torch.full((32,), torch.inf))},
    "integers": {"factors/0_A.pt": saved(torch.ones(32, 2, dtype=torch.int64))},
    "complex": {"factors/0_A.pt": saved(torch.ones(32, 2, dtype=torch.complex64))},
    "sparse": {"factors/0_A.pt": saved(torch.ones(32, 2).to_sparse())},
    "vector": {"factors/0_A.pt": saved(torch.ones(32))},
    "other ranks": {"factors/0_A.pt": saved(torch.ones(32, 3))},
    "dtypes that differ": {"factors/0_A.pt": saved(torch.ones(32, 2).half())},
    "a dict for a tensor": {"factors/0_A.pt": saved({"a": torch.ones(32, 2)})},
    "a view of one number": {"factors/0_A.pt": saved(torch.ones(1, 1).expand(32, 2))},
    "no tensor at all": {"factors/0_A.pt": b"PK\x03\x04"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_archives_that_are_no_deltas_are_refused(change, llama, tmp_path):
    parts = {**parts_of(theirs()), **change}
    write(tmp_path / "a.delta", {n: data for n, data in parts.items() if data is not None})
    with pytest.raises(UnsafeFileError):
        read_published(tmp_path / "a.delta", llama)
    assert [p.name for p in tmp_path.iterdir()] == ["a.delta"]


@pytest.mark.parametrize(
    "content", [[1], {"weights": torch.ones(2)}, {"factors": {"0": 1}}, {"factors": {0: (1, 2)}}]
)
def test_other_dicts_are_refused(content, llama, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises((UnsafeFileError, IncompatibleBaseError)):
        read_published(tmp_path / "a.pt", llama)


def test_bombs_are_not_unpacked(llama, tmp_path, monkeypatch):
    """A file that says that it is large, one that hides it, and one inside another."""
    monkeypatch.setattr(published_delta, "LARGEST_UNPACKED", 10**6)
    zeros = bytes(2 * 10**6)
    parts = parts_of(theirs())
    path = write(tmp_path / "large.delta", {**parts, "factors/0_A.pt": zeros})
    assert path.stat().st_size < 10**5
    with pytest.raises(UnsafeFileError, match="not unpacked"):
        read_published(path, llama)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", zeros)
    write(path, {**parts, "factors/0_A.pt": inner.getvalue()})
    with pytest.raises(UnsafeFileError, match=r"0_A.pt: expected at most"):
        read_published(path, llama)
    write(path, {**parts, "factors/0_A.pt": zeros[: 10**5]})
    data = path.read_bytes()
    # The directory's word for its size, made small: then what comes out is more.
    path.write_bytes(data.replace((10**5).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(UnsafeFileError, match=r"0_A.pt"):
        read_published(path, llama)


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_kinds_of_compression_without_a_bound_are_refused(kind, llama, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.delta", "w", kind) as archive:
        for name, data in parts_of(theirs()).items():
            archive.writestr(name, data)
    with pytest.raises(UnsafeFileError, match="stored or deflated"):
        read_published(tmp_path / "a.delta", llama)


def test_large_files_and_odd_archives_are_refused(llama, tmp_path, monkeypatch):
    path = write(tmp_path / "a.delta", parts_of(theirs()))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("embedding.pt", b"another")
    with pytest.raises(UnsafeFileError, match="a name each"):
        read_published(path, llama)
    monkeypatch.setattr(published_delta, "LARGEST_FILE", 100)
    with pytest.raises(UnsafeFileError, match="at most 100 bytes"):
        read_published(path, llama)
    (tmp_path / "text").write_text("no archive")
    for name in ("text", "nowhere"):
        with pytest.raises(UnsafeFileError):
            read_published(tmp_path / name, llama)


def test_a_residual_delta_is_of_one_kind(llama):
    blocks = ResidualDelta({"model.layers.0": (torch.ones(1, 32), torch.ones(32, 1))})
    assert type(blocks.to(dtype=torch.bfloat16)) is type(blocks.scaled(2.0)) is ResidualDelta
    assert ResidualDelta.sum([blocks, blocks]).rank("model.layers.0") == 2
    blocks.check(llama)
    from gravity_hf.knowledge.delta import LowRankDelta

    with pytest.raises(ValidationError, match="this kind"):
        LowRankDelta.sum([blocks])
