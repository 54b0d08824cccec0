"""The shape of the repository: import direction, file sizes, top level, public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gravity_hf

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gravity_hf"

# A file imports from rooms of lower floors and from its own room, never upwards or sideways.
FLOOR = {
    "config": 0,
    "ops": 1,
    "layers": 2,
    "integration": 3,
    "models": 3,
    "runtime": 3,
    "training": 4,
    "knowledge": 4,
    "viz": 5,
    "hub": 6,  # a push carries figures
    "cli": 7,
}
FACADE = "__init__"
LONGEST_FILE = 500
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "gravity_hf",
    "patches",
    "scripts",
    "tests",
    "model_cards",
}
PUBLIC_NAMES = [
    "CalibrationReport",
    "GeolipCollator",
    "GeolipCompanion",
    "GeolipCompanionConfig",
    "GeolipConfig",
    "GeolipForReconstruction",
    "GeolipImageProcessor",
    "GeolipModel",
    "GeolipPrior",
    "GeolipPriorConfig",
    "GovernedTraining",
    "GravityConfig",
    "GravityTrainer",
    "KeyBudget",
    "LGTConfig",
    "LGTForCausalLM",
    "LGTForSequenceClassification",
    "LGTForTokenClassification",
    "LGTModel",
    "LeanFormerConfig",
    "LeanFormerForCausalLM",
    "LeanFormerModel",
    "MaskAwarePhase",
    "NGTConfig",
    "NGTForCausalLM",
    "NGTModel",
    "RotatedQuantCache",
    "ScreenedCache",
    "SofteningAnnealing",
    "TransferSettings",
    "TransferTrainer",
    "TriModel",
    "TriModelConfig",
    "align_frames",
    "calibrate",
    "calibrate_blocks",
    "densify_attention",
    "densify_feed_forward",
    "extract_features",
    "factorize",
    "fit_predictors",
    "fit_screening",
    "gravity_attention",
    "gravity_lora",
    "gravity_param_groups",
    "gravity_serving",
    "gravity_status",
    "load_factorized",
    "load_gravity_adapter",
    "load_gravity_mass_log",
    "load_gravity_model",
    "measure_attention",
    "measure_screening",
    "patch_with_gravity",
    "push_gravity_model",
    "save_factorized",
    "sparsify_attention",
    "sparsify_feed_forward",
    "sparsity",
    "unpatch_gravity",
]
HEAVY = ["triton", "peft", "datasets", "matplotlib", "plotly", "fastapi", "gradio", "kernels"]
BANNED = {
    r"weights_only\s*=\s*False": "runs code from the file",
    r"\bpickle\.loads?\b": "runs code from the file",
    r"\bexcept\s*:": "swallows KeyboardInterrupt too",
    r"\bmake_block_ptr\b": "is gone from newer Triton",
}


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py"))


def imported_modules(file: Path, root: Path) -> Iterator[tuple[str, str]]:
    """(dotted module, imported name or "") of every import in the file, wherever it stands."""
    package = file.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Level 1 is the package itself, each further level one folder up.
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def room_of(parts: tuple[str, ...], root: Path) -> str:
    """The room of a module under the package, as `ops` or, one per architecture, `models.lgt`."""
    if not parts:
        return FACADE
    if parts[0] == "models" and (root / PACKAGE).joinpath(*parts[:2]).is_dir():
        return ".".join(parts[:2])
    return parts[0]


def may_import(here: str, target: str, name: str) -> bool:
    if target == FACADE:
        # The facade reaches every floor, so only the top floor may go through it.
        return name == "__version__" or here == "cli"
    if here == target or here.startswith(f"{target}.") or target.startswith(f"{here}."):
        return True
    here_floor, target_floor = (FLOOR.get(room.split(".")[0]) for room in (here, target))
    return here_floor is not None and target_floor is not None and target_floor < here_floor


def wrong_imports(root: Path) -> list[str]:
    found = []
    for file in python_files(root, PACKAGE):
        here = room_of(file.relative_to(root / PACKAGE).with_suffix("").parts, root)
        if here == FACADE:
            continue
        if here.split(".")[0] not in FLOOR:
            found.append(f"{file.relative_to(root)}: {here} has no floor")
        for module, name in imported_modules(file, root):
            parts = tuple(module.split("."))
            if parts[0] != PACKAGE:
                continue
            # In `from .. import config` and `from ..models import lgt` the name is the room.
            if name and (parts[1:] == () and name in FLOOR or parts[1:] == ("models",)):
                parts = (*parts, name)
            target = room_of(parts[1:], root)
            if not may_import(here, target, name):
                found.append(f"{file.relative_to(root)}: {here} may not import {target} ({module})")
    return found


def foreign_imports(root: Path) -> list[str]:
    """What the operator imports besides torch, triton and the standard library."""
    known = {"torch", "triton", PACKAGE, *sys.stdlib_module_names}
    return [
        f"{file.relative_to(root)}: {module}"
        for file in python_files(root, f"{PACKAGE}/ops")
        for module, _ in imported_modules(file, root)
        if module.split(".")[0] not in known
    ]


def long_files(root: Path) -> list[str]:
    files = python_files(root, PACKAGE, "patches", "scripts", "tests")
    kernels = root / PACKAGE / "ops" / "triton"
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    return [
        f"{file.relative_to(root)}: {length} lines, the end is {LONGEST_FILE}"
        for file, length in lengths.items()
        if length > LONGEST_FILE and kernels not in file.parents
    ]


def banned_text(root: Path) -> list[str]:
    return [
        f"{file.relative_to(root)}:{number}: {line.strip()!r} {reason}"
        for file in python_files(root, PACKAGE, "patches", "scripts")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for pattern, reason in BANNED.items()
        if re.search(pattern, line)
    ]


def hollow_folders(root: Path) -> list[str]:
    """Folders with nothing in them, and packages without a line of code in any module."""
    found = []
    for top in sorted(TOP_LEVEL):
        for folder in [root / top, *(root / top).rglob("*/")]:
            if not folder.is_dir() or folder.name == "__pycache__":
                continue
            files = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
            if not any(folder.iterdir()):
                found.append(f"{folder.relative_to(root)}: an empty folder")
            elif top == PACKAGE and _modules(files) and not any(map(_has_code, files)):
                found.append(f"{folder.relative_to(root)}: a package without a module")
    return found


def _modules(files: list[Path]) -> list[Path]:
    """A folder without any is one of data."""
    return [path for path in files if path.suffix == ".py"]


def _has_code(path: Path) -> bool:
    if path.suffix != ".py":
        return False
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not isinstance(node, ast.Expr) for node in statements)


def wrong_top_level(names: set[str]) -> list[str]:
    visible = {name for name in names if not name.startswith(".")}
    return [f"{name}: does not belong at the top" for name in sorted(visible - TOP_LEVEL)] + [
        f"{name}: missing at the top" for name in sorted(TOP_LEVEL - visible)
    ]


def committed_top_level(root: Path) -> set[str] | None:
    """First path parts of all files that git tracks or would add; None outside a checkout."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {line.split("/")[0] for line in listing.splitlines() if (root / line).exists()}


def run_fresh(code: str) -> str:
    """What the code prints in a new interpreter."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_point_down() -> None:
    assert wrong_imports(ROOT) == []


def test_files_are_short() -> None:
    assert long_files(ROOT) == []


def test_unsafe_text_is_absent() -> None:
    assert banned_text(ROOT) == []


def test_no_folder_is_hollow() -> None:
    assert hollow_folders(ROOT) == []


def test_top_level_is_exact() -> None:
    names = committed_top_level(ROOT)
    if names is None:
        pytest.skip("not a git checkout: no listing of what belongs to the repository")
    assert wrong_top_level(names) == []


def test_public_names_are_pinned() -> None:
    assert gravity_hf.__all__ == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_resolves(name: str) -> None:
    assert getattr(gravity_hf, name).__name__ == name


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gravity_hf.no_such_name


def test_import_is_cheap() -> None:
    code = f"import sys, gravity_hf; print([n for n in {HEAVY} if n in sys.modules])"
    assert run_fresh(code).strip() == "[]"


def test_operator_imports() -> None:
    code = "from gravity_hf.ops import gravity_attention; print(gravity_attention.__name__)"
    assert run_fresh(code).strip() == "gravity_attention"


def test_operator_needs_torch_only() -> None:
    assert foreign_imports(ROOT) == []


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


NEIGHBOUR = {"gravity_hf/models/ngt/modeling_ngt.py": ""}
LGT = "gravity_hf/models/lgt/modeling_lgt.py"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("gravity_hf/ops/api.py", "from ..layers import parameters"),
        ("gravity_hf/ops/api.py", "from .. import layers"),
        ("gravity_hf/ops/api.py", "import gravity_hf.layers.parameters"),
        ("gravity_hf/ops/api.py", "def f():\n    from gravity_hf.integration import patching"),
        ("gravity_hf/ops/triton/forward.py", "from ...layers.parameters import x"),
        ("gravity_hf/config.py", "from .ops import api"),
        ("gravity_hf/integration/hosts.py", "from ..models.ngt import modeling_ngt"),
        ("gravity_hf/training/lora.py", "from ..knowledge import store"),
        ("gravity_hf/hub/cards.py", "from gravity_hf import calibrate"),
        ("gravity_hf/viz/figures.py", "from .. import calibrate"),
        ("gravity_hf/cli/main.py", "from .._remote_code import modeling_gravity"),
        ("gravity_hf/attic/old.py", "import torch"),
        (LGT, "from ...integration import attention"),
        (LGT, "from ..ngt import modeling_ngt"),
        (LGT, "from .. import ngt"),
    ],
)
def test_checker_sees_wrong_import(file: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path, {**NEIGHBOUR, file: text})
    (line,) = wrong_imports(tmp_path)
    assert line.startswith(file)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("gravity_hf/ops/api.py", "from ..config import GravityConfig\nfrom . import reference"),
        ("gravity_hf/ops/triton/forward.py", "from ..reference import x\nimport torch"),
        ("gravity_hf/models/__init__.py", "from .ngt import modeling_ngt"),
        ("gravity_hf/hub/export.py", "from .. import __version__"),
        ("gravity_hf/cli/demo/run.py", "from gravity_hf import calibrate"),
        ("gravity_hf/cli/demo/run.py", "from ..main import app\nfrom ...viz import figures"),
        (LGT, "from .configuration_lgt import x\nfrom ...layers import parameters"),
    ],
)
def test_checker_accepts_right_import(file: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path, {**NEIGHBOUR, file: text})
    assert wrong_imports(tmp_path) == []


def test_checker_sees_foreign_import(tmp_path: Path) -> None:
    plant(tmp_path, {"gravity_hf/ops/api.py": "import math, torch\nfrom transformers import x"})
    assert foreign_imports(tmp_path) == ["gravity_hf/ops/api.py: transformers"]


def test_checker_sees_long_file(tmp_path: Path) -> None:
    text = "x = 1\n" * (LONGEST_FILE + 1)
    plant(tmp_path, {"scripts/a.py": text, "tests/b.py": text[6:], "patches/c.py": text})
    plant(tmp_path, {"gravity_hf/ops/triton/forward.py": text, "gravity_hf/ops/api.py": text})
    named = [line.split(":")[0] for line in long_files(tmp_path)]
    assert named == ["gravity_hf/ops/api.py", "patches/c.py", "scripts/a.py"]


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only = False)",
        "pickle.load(f)",
        "pickle.loads(b)",
        "except:",
        "tl.make_block_ptr(x)",
    ],
)
def test_checker_sees_banned_text(text: str, tmp_path: Path) -> None:
    plant(tmp_path, {"patches/a.py": f"x = 1\n{text}\n"})
    (line,) = banned_text(tmp_path)
    assert line.startswith("patches/a.py:2")


def test_checker_accepts_safe_text(tmp_path: Path) -> None:
    plant(tmp_path, {"scripts/a.py": "torch.load(f, weights_only=True)\nexcept OSError:\n"})
    assert banned_text(tmp_path) == []


def test_checker_sees_hollow_folders(tmp_path: Path) -> None:
    plant(tmp_path, {"gravity_hf/hub/__init__.py": '"""Later."""\n', "gravity_hf/a.py": "x = 1"})
    plant(tmp_path, {"gravity_hf/ops/__init__.py": "", "gravity_hf/ops/api.py": "x = 1"})
    (tmp_path / "scripts" / "benchmark").mkdir(parents=True)
    assert hollow_folders(tmp_path) == [
        "gravity_hf/hub: a package without a module",
        "scripts/benchmark: an empty folder",
    ]


def test_checker_sees_wrong_top_level() -> None:
    assert wrong_top_level({*TOP_LEVEL, ".github"}) == []
    assert wrong_top_level({*TOP_LEVEL, "docs"}) == ["docs: does not belong at the top"]
    assert wrong_top_level(TOP_LEVEL - {"LICENSE"}) == ["LICENSE: missing at the top"]


def test_listing_outside_a_checkout_is_none(tmp_path: Path) -> None:
    assert committed_top_level(tmp_path) is None
