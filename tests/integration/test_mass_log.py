"""The mass file: every accepted layout reads to the same masses, everything else is refused."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gravity_hf.integration.mass_log import MAX_BYTES, check_mass_counts, read_mass_log

LAYERS = 3
NAMES = [f"model.layers.{i}.self_attn" for i in range(LAYERS)]


def example_masses(heads: int = 4) -> list[Tensor]:
    return list(torch.randn(LAYERS, heads))


def keyed(form: str, masses: list[Tensor]) -> dict[str, Tensor]:
    """A dict whose keys are `form` with `{i}` replaced by the layer index."""
    return {form.format(i=i): mass for i, mass in enumerate(masses)}


def flat(masses: list[Tensor]) -> dict[str, Tensor]:
    return keyed("model.layers.{i}.self_attn.gravity_mass_log", masses)


STRING_KEYS = {
    "parameter-names": "model.layers.{i}.self_attn.gravity_mass_log",
    "submodule-names": "model.layers.{i}.self_attn.gravity.mass_log",
    "module-names": "model.layers.{i}.self_attn",
    "index-strings": "{i}",
    "layer_0": "layer_{i}",
    "layers.0": "layers.{i}",
    "layers.0-with-parameter": "layers.{i}.gravity_mass_log",
    "data-parallel": "module.model.layers.{i}.self_attn.gravity_mass_log",
    "compiled": "_orig_mod.model.layers.{i}.self_attn.gravity_mass_log",
    "peft": "base_model.model.model.layers.{i}.self_attn.gravity.mass_log",
    "three-wrappers": "module._orig_mod.base_model.model.model.layers.{i}.self_attn",
}
LAYOUTS = {name: lambda m, form=form: keyed(form, m) for name, form in STRING_KEYS.items()} | {
    "index-integers": lambda m: dict(enumerate(m)),
    "any-order": lambda m: dict(reversed(flat(m).items())),
    "ordered-dict": lambda m: OrderedDict(flat(m)),
    "list": list,
    "tuple": tuple,
    "stacked": torch.stack,
    "state_dict": lambda m: {"state_dict": flat(m)},
    "gravity_mass_log": lambda m: {"gravity_mass_log": list(m)},
    "gravity_mass_log-stacked": lambda m: {"gravity_mass_log": torch.stack(m)},
    "state_dict-gravity_mass_log": lambda m: {"state_dict": {"gravity_mass_log": list(m)}},
    "gravity_mass_log-state_dict": lambda m: {"gravity_mass_log": {"state_dict": flat(m)}},
    "parameters": lambda m: {name: nn.Parameter(mass) for name, mass in flat(m).items()},
    "parameter-list": lambda m: [nn.Parameter(mass) for mass in m],
}
SAFE_LAYOUTS = {name: LAYOUTS[name] for name in [*STRING_KEYS, "gravity_mass_log-stacked"]}


def assert_reads(path: Path, masses: list[Tensor]) -> None:
    read = read_mass_log(path, NAMES)
    assert len(read) == len(masses)
    for actual, mass in zip(read, masses, strict=True):
        assert type(actual) is Tensor
        assert actual.dtype == torch.float32
        assert actual.device.type == "cpu"
        assert not actual.requires_grad
        assert torch.equal(actual, mass.reshape(-1).float())


def assert_refused(path: Path, *words: str) -> ValueError:
    with pytest.raises(ValueError) as caught:
        read_mass_log(path, NAMES)
    for word in (path.name, "xpected", *words):
        assert word in str(caught.value), str(caught.value)
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gravity_mass_log.pt"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_read(layout: str, file: Path) -> None:
    masses = example_masses()
    torch.save(LAYOUTS[layout](masses), file)
    assert_reads(file, masses)


@pytest.mark.parametrize("layout", SAFE_LAYOUTS)
def test_layout_is_read_from_safetensors(layout: str, tmp_path: Path) -> None:
    masses, file = example_masses(), tmp_path / "masses.safetensors"
    safetensors.torch.save_file(SAFE_LAYOUTS[layout](masses), file)
    assert_reads(file, masses)


def test_old_serialization_is_read(file: Path) -> None:
    masses = example_masses()
    torch.save(flat(masses), file, _use_new_zipfile_serialization=False)
    assert_reads(file, masses)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
def test_one_mass_per_layer_is_read(shape: tuple[int, ...], file: Path) -> None:
    masses = [torch.randn(shape) for _ in NAMES]
    torch.save(flat(masses), file)
    assert_reads(file, masses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_masses_become_float32(dtype: torch.dtype, file: Path) -> None:
    masses = [mass.to(dtype) for mass in example_masses()]
    torch.save(masses, file)
    assert_reads(file, masses)


def test_layers_may_differ_in_head_count(file: Path) -> None:
    masses = [torch.randn(heads) for heads in (2, 4, 8)]
    torch.save(flat(masses), file)
    assert_reads(file, masses)


def test_wrapped_layer_names_are_understood(file: Path) -> None:
    masses = example_masses()
    torch.save(flat(masses), file)
    read = read_mass_log(file, [f"_orig_mod.{name}" for name in NAMES])
    assert all(torch.equal(a, b) for a, b in zip(read, masses, strict=True))


def test_module_called_by_a_number_is_a_name_first(file: Path) -> None:
    masses = example_masses()
    torch.save(dict(zip("210", masses, strict=True)), file)
    read = read_mass_log(file, ["2", "1", "0"])
    assert all(torch.equal(a, b) for a, b in zip(read, masses, strict=True))


def test_rows_own_their_memory(file: Path) -> None:
    torch.save(torch.randn(LAYERS, 4), file)
    first, second, _ = read_mass_log(file, NAMES)
    before = second.clone()
    first.zero_()
    assert torch.equal(second, before)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_layout_means_the_same(data: st.DataObject, tmp_path: Path) -> None:
    number = st.floats(-60, 60, width=32)
    heads = data.draw(st.integers(1, 6))
    rows = data.draw(
        st.lists(st.lists(number, min_size=heads, max_size=heads), min_size=3, max_size=3)
    )
    masses = [torch.tensor(row) for row in rows]
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    old = data.draw(st.booleans())
    path = tmp_path / "masses.pt"
    torch.save(LAYOUTS[layout](masses), path, _use_new_zipfile_serialization=not old)
    assert_reads(path, masses)


def with_value(value: object) -> dict[str, object]:
    return {**flat(example_masses()), NAMES[1] + ".gravity_mass_log": value}


def without_layer() -> dict[str, Tensor]:
    return flat(example_masses()[:2])


REFUSALS = {
    "missing-layer": (without_layer, [NAMES[2]]),
    "empty-dict": (dict, NAMES),
    "short-list": (lambda: example_masses()[:2], ["2 rows", NAMES[2]]),
    "long-list": (lambda: [*example_masses(), torch.zeros(4)], ["3 attention", "4 rows"]),
    "short-stack": (lambda: torch.zeros(2, 4), ["2 rows", NAMES[2]]),
    "extra-index": (lambda: {**dict(enumerate(example_masses())), 3: torch.zeros(4)}, ["layer 3"]),
    "unknown-key": (lambda: {**flat(example_masses()), "bias": torch.zeros(4)}, ["'bias'"]),
    "other-module": (lambda: keyed("encoder.{i}.attn", example_masses()), ["'encoder.0.attn'"]),
    "negative-index": (lambda: {-1: torch.zeros(4)}, ["-1"]),
    "bool-key": (lambda: {True: torch.zeros(4)}, ["True"]),
    "tuple-key": (lambda: {(0, 1): torch.zeros(4)}, ["(0, 1)"]),
    "enclosed-and-more": (
        lambda: {"state_dict": flat(example_masses()), "epoch": 3},
        ["'state_dict'", "'epoch'"],
    ),
    "duplicate-layer": (
        lambda: {**flat(example_masses()), 1: torch.zeros(4)},
        ["one entry per", NAMES[1], "keys 'model.layers.1.self_attn.gravity_mass_log' and 1"],
    ),
    "nan": (lambda: with_value(torch.tensor([0.0, float("nan")])), [NAMES[1], "1 of 2 NaN"]),
    "infinite": (lambda: with_value(torch.tensor([float("-inf")])), [NAMES[1], "finite"]),
    "beyond-float32": (lambda: with_value(torch.tensor([1e300], dtype=torch.float64)), ["finite"]),
    "int-dtype": (lambda: with_value(torch.zeros(4, dtype=torch.int64)), ["float", "int64"]),
    "bool-dtype": (lambda: with_value(torch.zeros(4, dtype=torch.bool)), ["torch.bool"]),
    "complex-dtype": (lambda: with_value(torch.zeros(4, dtype=torch.complex64)), ["complex64"]),
    "matrix-row": (lambda: with_value(torch.zeros(4, 1)), [NAMES[1], "[4, 1]"]),
    "empty-row": (lambda: with_value(torch.zeros(0)), [NAMES[1], "[0]"]),
    "number": (lambda: with_value(0.5), [NAMES[1], "a float"]),
    "none": (lambda: with_value(None), ["NoneType"]),
    "list-of-numbers": (lambda: [0.5, 0.5, 0.5], ["a float"]),
    "sparse": (lambda: with_value(torch.eye(2).to_sparse()), ["sparse"]),
    "on-meta": (lambda: with_value(torch.zeros(4, device="meta")), ["meta"]),
    "flat-tensor": (lambda: torch.zeros(LAYERS), ["[layers, heads]", "[3]"]),
    "cube": (lambda: torch.zeros(LAYERS, 4, 1), ["[layers, heads]", "[3, 4, 1]"]),
    "int-stack": (lambda: torch.zeros(LAYERS, 4, dtype=torch.int32), ["int32"]),
    "huge-by-stride": (lambda: torch.zeros(1).expand(LAYERS, 10**12), ["values"]),
    "text": (lambda: "masses", ["a str"]),
    "nothing": (lambda: None, ["NoneType"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_says_what_was_found(case: str, file: Path) -> None:
    make, words = REFUSALS[case]
    torch.save(make(), file)
    assert_refused(file, *words)


def test_dict_that_contains_itself_is_refused(file: Path) -> None:
    loop: dict[str, object] = {}
    loop["state_dict"] = loop
    torch.save(loop, file)
    assert_refused(file, "'state_dict'")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_unreadable_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"masses{suffix}"
    assert_refused(path, "no such file")
    path.write_bytes(b"")
    assert_refused(path, "an empty file")
    for junk in (b"no masses here, only text", b"PK\x03\x04 and then nothing", b"\x80"):
        path.write_bytes(junk)
        assert_refused(path)
    torch.save(example_masses(), path)
    path.write_bytes(path.read_bytes()[:400])
    assert_refused(path, "unreadable")


def test_folder_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "a folder")


def test_no_layers_is_refused(file: Path) -> None:
    torch.save([], file)
    with pytest.raises(ValueError, match="names of the model's attention modules"):
        read_mass_log(file, [])


def test_large_file_is_refused_unread(file: Path) -> None:
    with open(file, "wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    assert_refused(file, "64 MiB")


def test_zip_that_unpacks_to_more_is_refused_unread(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(MAX_BYTES + 1))
    assert file.stat().st_size < 2**20
    assert_refused(file, "64 MiB", "after unpacking")


class Call:
    """Pickles as a call of `function(*arguments)` that the reader is asked to make."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.arguments


def hostile(kind: str, marker: Path) -> object:
    """An object whose loading would create `marker`."""
    shell = f"touch {marker}"
    if kind == "os.system":
        return Call(os.system, shell)
    if kind == "subprocess.Popen":
        return Call(subprocess.Popen, ["touch", str(marker)])
    if kind == "builtins.eval":
        return Call(eval, f"open({str(marker)!r}, 'w').close()")
    if kind == "in-state-dict":
        return {"state_dict": {NAMES[0]: torch.zeros(4), NAMES[1]: Call(os.system, shell)}}
    return [torch.zeros(4), torch.zeros(4), Call(os.system, shell)]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "old", "bare-pickle", "bare-protocol-2"])
@pytest.mark.parametrize(
    "kind", ["os.system", "subprocess.Popen", "builtins.eval", "in-state-dict", "in-list"]
)
def test_code_is_refused_and_never_run(
    kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, file = tmp_path / "executed", tmp_path / "gravity_mass_log.pt"
    payload = hostile(kind, marker)
    if form.startswith("bare"):
        file.write_bytes(pickle.dumps(payload, protocol=2 if form.endswith("2") else 4))
    else:
        torch.save(payload, file, _use_new_zipfile_serialization=form == "zip")
    # Would switch torch's protection off where a caller leaves the choice to torch.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    started: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching[0] and event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
            started.append(event)

    # An audit hook cannot be removed, so it is told when to stop.
    sys.addaudithook(watch)
    try:
        error = assert_refused(file, "contains code", "nothing was executed")
    finally:
        watching[0] = False
    assert error.__cause__ is not None
    assert "weights_only" not in str(error), "no advice to load it without protection"
    assert started == []
    assert not marker.exists()


def test_hostile_files_are_hostile(tmp_path: Path) -> None:
    """The payloads above do run under an unprotected reader, so the test above can fail."""
    marker = tmp_path / "executed"
    pickle.load(io.BytesIO(pickle.dumps(hostile("builtins.eval", marker))))
    assert marker.exists()


def test_refused_call_is_named(file: Path) -> None:
    torch.save(Call(os.system, "true"), file)
    assert_refused(file, f"{os.system.__module__}.system")


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_torchscript_is_refused_as_code(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", "}."), ("constants.pkl", ")."), ("version", "3")):
            archive.writestr(f"archive/{name}", data)
    assert_refused(file, "contains code", "a TorchScript archive")


COUNTS = [(8, 2), (8, 2), (4, 2)]


@pytest.mark.parametrize(
    ("sizes", "granularity"),
    [((8, 8, 4), "query_head"), ((2, 2, 2), "kv_head"), ((1, 1, 1), "layer")],
)
def test_granularity_is_the_one_that_fits_all_layers(sizes: tuple[int], granularity: str) -> None:
    assert check_mass_counts([torch.zeros(n) for n in sizes], COUNTS) == granularity


def test_finest_granularity_wins() -> None:
    masses = [torch.zeros(4), torch.zeros(1)]
    assert check_mass_counts(masses, [(4, 4), (1, 1)]) == "query_head"
    assert check_mass_counts([torch.zeros(1)], [(4, 1)]) == "kv_head"
    # The first layer alone would be read as one mass per query head.
    assert check_mass_counts([torch.zeros(2), torch.zeros(2)], [(2, 2), (4, 2)]) == "kv_head"


def test_unfitting_count_names_the_layer() -> None:
    with pytest.raises(ValueError, match=r"layer 0: expected 8 .* or 2 .* or 1 .*, got 3"):
        check_mass_counts([torch.zeros(3), torch.zeros(8), torch.zeros(4)], COUNTS)
    with pytest.raises(ValueError, match=r"layer 2: expected 4 \(one per query_head\).*, got 2"):
        check_mass_counts([torch.zeros(8), torch.zeros(8), torch.zeros(2)], COUNTS)
    with pytest.raises(ValueError, match=re.escape("each of 3 attention layers, got 1")):
        check_mass_counts([torch.zeros(8)], COUNTS)
