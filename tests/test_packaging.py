"""What a user gets by installing: the wheel's content, and folders that move under the package."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ["pyproject.toml", "README.md", "LICENSE", "gravity_hf", "patches", "model_cards"]
# Folders at the top of the repository -> the package that they are once installed.
MAPPED = {"patches": "gravity_hf._remote_code", "model_cards": "gravity_hf._cards"}

# Prints where each mapped package is found and what lies in it.
LOCATE = f"""
from importlib import resources
for package in {list(MAPPED.values())}:
    folder = resources.files(package)
    print(folder, *sorted(path.name for path in folder.iterdir() if path.is_file()))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: setuptools writes beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir"]
    _run(source, "-m", "pip", "wheel", ".", *options, str(out))
    return _unpack(out)


def _run(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _unpack(folder: Path) -> Path:
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def _run_installed(installed: Path, code: str, folder: Path) -> list[str]:
    """Lines that `code` prints where `installed` is the only gravity_hf on the path."""
    # -S leaves out an editable install of the tests' own environment.
    start = f"import site, sys; site.addsitedir({str(installed)!r}); "
    start += f"sys.path += {site.getsitepackages()!r}\n"
    return _run(folder, "-S", "-c", start + code).splitlines()


def test_wheel_has_every_module(wheel: Path) -> None:
    """A package that pyproject.toml forgets works from a checkout and is missing for users."""
    shipped = {str(file.relative_to(wheel)) for file in wheel.glob("gravity_hf/**/*.py")}
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "gravity_hf").rglob("*.py")}
    for folder, package in MAPPED.items():
        target = Path(*package.split("."))
        expected |= {str(target / file.name) for file in (ROOT / folder).glob("*.py")}
    assert shipped == expected


def test_wheel_has_remote_code_and_cards(wheel: Path, tmp_path: Path) -> None:
    """F20: `patches/` and `model_cards/` ship as packages of gravity_hf."""
    for file in ("py.typed", "ops/README.md", "_remote_code/README.md"):
        assert (wheel / "gravity_hf" / file).is_file(), file
    remote = "modeling_gravity.py"
    assert (wheel / "gravity_hf" / "_remote_code" / remote).read_bytes() == (
        ROOT / "patches" / remote
    ).read_bytes()
    cards = {file.name for file in (ROOT / "model_cards").glob("*.md")}
    assert cards == {file.name for file in (wheel / "gravity_hf" / "_cards").glob("*.md")}
    assert cards

    code_line, cards_line = _run_installed(wheel, LOCATE, tmp_path)
    assert code_line.startswith(str(wheel)) and remote in code_line
    assert cards_line.startswith(str(wheel)) and "README.md" in cards_line


def test_editable_install_maps_folders(source: Path, tmp_path: Path) -> None:
    """F20: the same two packages exist in an editable install, and are the folders themselves."""
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    _run(source, "-c", build)
    code_line, cards_line = _run_installed(_unpack(tmp_path), LOCATE, tmp_path)
    assert code_line.split()[0] == str(source / "patches")
    assert "modeling_gravity.py" in code_line.split()
    assert cards_line.split()[0] == str(source / "model_cards")


def test_wheel_has_nothing_else(wheel: Path) -> None:
    top = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"gravity_hf"}
