"""The operator as a kernel of the kernels hub: loads alone, beside the library, beside itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.operator_cases import cast, make_inputs, values_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from gravity_hf.ops import gravity_attention

kernels = pytest.importorskip("kernels")

ROOT = Path(__file__).resolve().parents[2]

# Loads the kernel where gravity_hf cannot be imported, as old versions of `kernels` do and as new
# ones do, and compares it with its own reference.
ALONE = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gravity_hf":
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Absent())
import torch
from kernels import get_local_kernel

variant = Path(sys.argv[1]) / "build" / "torch-cpu"
spec = spec_from_file_location("old", variant / "gravity_attention" / "__init__.py")
old = module_from_spec(spec)
spec.loader.exec_module(old)
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert old.gravity_attention is kernel.gravity_attention
q, k, v = torch.randn(3, 1, 2, 9, 8)
mass = torch.ones(2)
results = [
    kernel.gravity_attention(q, k, v, mass, eps=0.1, causal=True, impl=impl)
    for impl in sys.argv[2:]
]
for result in results[1:]:
    torch.testing.assert_close(result, results[0])
assert Path(kernel.__file__) == variant / "__init__.py"
assert not [name for name in sys.modules if name.split(".")[0] == "gravity_hf"]
"""


@pytest.fixture(scope="module")
def script():
    file = ROOT / "scripts" / "build_hub_kernel.py"
    spec = importlib.util.spec_from_file_location("build_hub_kernel", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project(script, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kernel") / "gravity-attention"
    script.main([str(out)])
    return out


@pytest.fixture(scope="module")
def kernel(project):
    return kernels.get_local_kernel(project)


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of what the kernel is made from, to change."""
    copy = tmp_path / "package"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gravity_hf" / "ops", copy / "ops", ignore=ignore)
    for name in ("__init__.py", "config.py"):
        shutil.copy(ROOT / "gravity_hf" / name, copy)
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    """Of what was written; loading adds bytecode."""
    files = [x for x in folder.rglob("*") if x.is_file() and x.suffix != ".pyc"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("law", ["force", "power"])
@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_output_and_gradients_are_those_of_the_library(kernel, impl, law):
    if impl == "triton":
        pytest.importorskip("triton")
    inputs = make_inputs(queries=17, keys=20, width=16, lifted=law == "power", law=law)
    inputs = cast(inputs, torch.float64 if impl == "reference" else torch.float32)
    if torch.cuda.is_available():
        inputs = {name: x.cuda() for name, x in inputs.items()}
    options = {"impl": impl, "law": law, "causal": True}
    expected = values_and_gradients(gravity_attention, inputs, **options)
    actual = values_and_gradients(kernel.gravity_attention, inputs, **options)
    assert actual.keys() == expected.keys() == {"output", *inputs}
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_decoding_step_is_that_of_the_library(kernel):
    pytest.importorskip("triton")
    inputs = cast(make_inputs(queries=1, keys=40, width=16), torch.float32)
    if torch.cuda.is_available():
        inputs = {name: x.cuda() for name, x in inputs.items()}
    tensors = [inputs.pop(name) for name in ("q", "k", "v", "mass")]
    results = [
        function(*tensors, **inputs, causal=True, impl="triton")
        for function in (gravity_attention, kernel.gravity_attention)
    ]
    assert torch.equal(*results)


class Operators(TorchDispatchMode):
    """The namespaces of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_kernel_and_library_call_their_own_operators(kernel, impl):
    if impl == "triton":
        pytest.importorskip("triton")
    inputs = cast(make_inputs(), torch.float32)
    if torch.cuda.is_available():
        inputs = {name: x.cuda() for name, x in inputs.items()}
    own = {gravity_attention: "gravity_hf", kernel.gravity_attention: kernel.__name__}
    for function, name in own.items():
        with Operators() as operators:
            values_and_gradients(function, inputs, impl=impl)
        assert operators.seen & set(own.values()) == {name}


def test_the_kernel_runs_where_the_library_is_not(project):
    impls = ["reference", "chunked"]
    if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
        impls.append("triton")
    command = [sys.executable, "-c", ALONE, str(project), *impls]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_kernels_library_finds_the_project_whole(project):
    """Its parsers of build.toml and of metadata, and its digest of what lies in a build."""
    from kernels._rust import Build, Digest

    assert {str(x) for x in Build.open(project).general.backends} == {"cpu", "cuda"}
    identities = set()
    for backend in ("cpu", "cuda"):
        variant = project / "build" / f"torch-{backend}"
        metadata = kernels.Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
        assert (str(metadata.backend.backend_type), metadata.version) == (backend, 0)
        assert metadata.license == "mit" and metadata.python_depends == []
        assert metadata.id.startswith(f"_gravity_attention_{backend}_")
        assert f"torch.ops.{metadata.id}\n" in (variant / "_ops.py").read_text("utf-8")
        identities.add(metadata.id.rsplit("_", 1)[1])
    assert len(identities) == 1  # one source, one identity


def test_kernel_builder_gets_sources_without_what_it_generates(project):
    source = contents(project / "torch-ext" / "gravity_attention")
    for backend in ("cpu", "cuda"):
        built = contents(project / "build" / f"torch-{backend}")
        assert built.items() >= source.items()
        added = {"_ops.py", "metadata.json", "gravity_attention/__init__.py"}
        assert built.keys() - source.keys() == added


def test_old_versions_of_kernels_get_the_same_module(kernel):
    file = Path(kernel.__file__).parent / "gravity_attention" / "__init__.py"
    spec = importlib.util.spec_from_file_location("one_folder_down", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.gravity_attention is kernel.gravity_attention
    assert module.__all__ == kernel.__all__
    assert sys.modules[kernel.__name__] is kernel


def test_the_same_sources_give_the_same_bytes(script, project, tmp_path):
    script.main([str(tmp_path / "again")])
    assert contents(tmp_path / "again") == contents(project)


def test_another_version_loads_beside_the_first(script, kernel, package, tmp_path):
    """Operators are registered for the whole process, once per name."""
    file = package / "ops" / "precision.py"
    file.write_text(file.read_text("utf-8") + "\n# another version\n", encoding="utf-8")
    script.write_project(script.make_project(package, script.NAME, None), tmp_path / "other")
    other = kernels.get_local_kernel(tmp_path / "other")
    assert other.__name__ != kernel.__name__
    inputs = cast(make_inputs(), torch.float32)
    first, second = (
        values_and_gradients(x.gravity_attention, inputs, impl="chunked") for x in (kernel, other)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import numpy", r"ops/api.py:\d+: import: expected the standard .*, got numpy\. Move"),
        ("from transformers import x", "got transformers"),
        ("from ..layers import x", r"got \.\.layers\. Move"),
        ("from ...elsewhere import x", r"got \.\.\.elsewhere"),
        ("from . import missing", r"got \.\. Move"),
        ("torch.library.define(NAME, '')", "named by a literal .* got NAME"),
    ],
)
def test_what_a_kernel_may_not_hold_is_refused(script, package, line, message):
    file = package / "ops" / "api.py"
    file.write_text(file.read_text("utf-8") + f"\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        script.collect(package)


def test_only_a_kernel_project_is_replaced_and_only_by_force(script, project, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(SystemExit, match="expected no such path"):
        script.main([str(out)])
    with pytest.raises(SystemExit, match="--force: expected a kernel project"):
        script.main([str(out), "--force"])
    assert contents(out) == {"mine.txt": b"keep"}
    again = tmp_path / "again"
    shutil.copytree(project, again, ignore=shutil.ignore_patterns("__pycache__"))
    (again / "build" / "torch-cpu" / "stale.py").write_text("", encoding="utf-8")
    script.main([str(again), "--force"])
    assert contents(again) == contents(project)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["again", "out"]


def test_the_card_names_the_repository_and_parses(script, tmp_path):
    from huggingface_hub import ModelCard

    script.main([str(tmp_path / "out"), "--name", "my_gravity", "--repo", "me/my-gravity"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "kernels"
    assert 'get_kernel("me/my-gravity", version=0' in card.text
    assert 'repo-id = "me/my-gravity"' in (tmp_path / "out" / "build.toml").read_text("utf-8")
    code = card.text.split("```python\n")[1].split("```")[0]
    assert "gravity_attention" in code and (tmp_path / "out/torch-ext/my_gravity").is_dir()


@pytest.mark.parametrize("arguments", [["--name", "Gravity"], ["--repo", "no-owner"]])
def test_names_that_the_hub_refuses_are_refused(script, tmp_path, arguments, capsys):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "out"), *arguments])
    assert f"{arguments[0]}: expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
