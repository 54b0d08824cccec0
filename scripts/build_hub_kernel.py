"""Lay the operator out as a project of the Hugging Face kernels hub, with its builds.

    python scripts/build_hub_kernel.py out/gravity-attention --repo OWNER/gravity-attention
    python -c "from kernels import get_local_kernel; from pathlib import Path;
               print(get_local_kernel(Path('out/gravity-attention')).gravity_attention)"

`torch-ext/` holds the sources for kernel-builder, `build/` what it makes of them: a noarch variant
for each backend, which loads as it is. Pure Python and Triton; nothing is compiled. The same
sources give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
NAME = "gravity-attention"
BACKENDS = ("cpu", "cuda")
# The release of kernel-builder that the project is for, its edition of build.toml, and the oldest
# `kernels` that reads its metadata.
BUILDER, EDITION, KERNELS_MINVER = "v0.17.0", 5, "0.14.0"
ALLOWED_IMPORTS = {"torch", "triton", *sys.stdlib_module_names}

INIT = '''"""Gravity attention: a token attends to what is near it. The card says how to use it."""

from .ops.api import explain_implementation, gravity_attention
from .ops.cutoff import Cutoff

__all__ = ["gravity_attention", "explain_implementation", "Cutoff"]
'''

# kernel-builder writes a file of this name and these two names into what it builds.
OPS = '''"""The namespace of this build's operators: no other version of the kernel has it."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''

# The kernels hub asks for it: old versions of `kernels` look for the package one folder down.
COMPAT = '''"""The kernel one folder up, for versions of `kernels` that look for it here."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _file = Path(__file__).resolve().parents[1] / "__init__.py"
    _spec = importlib.util.spec_from_file_location("{id}", _file)
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])

__all__ = sys.modules["{id}"].__all__
globals().update({{name: getattr(sys.modules["{id}"], name) for name in __all__}})
'''

BUILD_TOML = """[general]
name = "{name}"
version = {major}
edition = {edition}
license = "mit"
backends = [{backends}]
{hub}
[torch-noarch]
pyext = ["md", "py"]
"""

FLAKE = """{{
  description = "{name}, a kernel in Python and Triton";

  inputs.kernel-builder.url = "github:huggingface/kernels/{builder}";

  outputs =
    {{ self, kernel-builder }}:
    kernel-builder.lib.genKernelFlakeOutputs {{
      inherit self;
      path = ./.;
    }};
}}
"""

CARD = Path(__file__).with_name("hub_kernel_card.md")


def collect(package: Path) -> dict[str, str]:
    """Path inside the kernel -> text, of what the operator needs of the package gravity_hf."""
    names = ["config.py", "ops/README.md"]
    names += [file.relative_to(package).as_posix() for file in package.glob("ops/**/*.py")]
    files = {name: _as_kernel(name, (package / name).read_text("utf-8")) for name in sorted(names)}
    files["__init__.py"] = INIT
    for name in files:
        if name.endswith(".py"):
            _check(name, files)
    return dict(sorted(files.items()))


def _as_kernel(name: str, text: str) -> str:
    """With the operators in the namespace of the build instead of the library's."""
    text = re.sub(r'"gravity_hf::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    text = text.replace("torch.ops.gravity_hf.", "ops.")
    # What is left are words in documentation and errors.
    text = text.replace("gravity_hf::", "").replace("gravity_hf.ops.", "")
    needed = [x for x in ("add_op_namespace_prefix", "ops") if re.search(rf"\b{x}[.(]", text)]
    if not name.endswith(".py") or not needed:
        return text
    root = "." * len(PurePosixPath(name).parts)
    line = f"from {root}_ops import {', '.join(needed)}\n"
    return re.sub(r"^(?=from \.)", line, text, count=1, flags=re.MULTILINE)


def _check(name: str, files: dict[str, str]) -> None:
    """Refuse what the kernels hub's requirements forbid: foreign imports, shared operator names."""
    for node in ast.walk(ast.parse(files[name])):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            foreign = {x.name.split(".")[0] for x in node.names} - ALLOWED_IMPORTS
            _expect_import(not foreign, where, ", ".join(sorted(foreign)))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            _expect_import(node.module.split(".")[0] in ALLOWED_IMPORTS, where, node.module)
        elif isinstance(node, ast.ImportFrom):
            got = "." * node.level + (node.module or "")
            _expect_import(_is_held(name, node, files), where, got)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.library."):
            given = ast.unparse(node.args[0]) if node.args else "nothing"
            if not given.startswith("add_op_namespace_prefix("):
                raise ValueError(
                    f"{where}: {ast.unparse(node.func)}: expected an operator named by a literal "
                    f"'gravity_hf::...', which can be renamed, got {given}. Write the literal there"
                )


def _is_held(name: str, node: ast.ImportFrom, files: dict[str, str]) -> bool:
    """Whether a relative import of file `name` ends at other files of the kernel."""
    parents = PurePosixPath(name).parents
    if node.level > len(parents):
        return False
    # In `from . import name` the names are the files.
    modules = [node.module] if node.module else [alias.name for alias in node.names]
    targets = [parents[node.level - 1] / module.replace(".", "/") for module in modules]
    held = {*files, "_ops.py"}
    return all(not {f"{x}.py", f"{x}/__init__.py"}.isdisjoint(held) for x in targets)


def _expect_import(condition: bool, where: str, got: str) -> None:
    if not condition:
        raise ValueError(
            f"{where}: import: expected the standard library, torch, triton or a file that the "
            f"kernel holds (config.py, ops/), got {got}. Move what is needed into gravity_hf/ops"
        )


def unique_id(files: dict[str, str]) -> str:
    """Ten hexadecimal digits of the content's hash."""
    content = hashlib.sha256()
    for name, text in files.items():
        content.update(f"{name}\0{len(text)}\0{text}".encode())
    return content.hexdigest()[:10]


def make_variant(files: dict[str, str], name: str, major: int, backend: str) -> dict[str, str]:
    """Path -> text of `build/torch-<backend>/`: the sources, their namespace and metadata."""
    module = name.replace("-", "_")
    identity = f"_{module}_{backend}_{unique_id(files)}"
    variant = {**files, "_ops.py": OPS.format(id=identity)}
    variant[f"{module}/__init__.py"] = COMPAT.format(id=identity)
    hashes = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(variant.items())
    }
    metadata = {
        "name": name,
        "id": identity,
        "version": major,
        "kernels-minver": KERNELS_MINVER,
        "license": "mit",
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    variant["metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    return variant


def version_of(package: Path) -> str:
    """Read, not imported: the package need not be installed. Kernels count its first number."""
    text = (package / "__init__.py").read_text("utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE).group(1)


def make_project(package: Path, name: str, repo: str | None) -> dict[str, str]:
    """Path -> text of the whole project."""
    files = collect(package)
    version = version_of(package)
    module, major = name.replace("-", "_"), int(version.split(".")[0])
    hub = f'\n[general.hub]\nrepo-id = "{repo}"\n' if repo else ""
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    card = CARD.read_text("utf-8").format(
        name=name,
        module=module,
        version=version,
        repo=repo or f"OWNER/{name}",
        major=major,
        unique=unique_id(files),
        option=f" --name {name}" if name != NAME else "",
    )
    project = {
        "build.toml": BUILD_TOML.format(
            name=name, major=major, edition=EDITION, backends=backends, hub=hub
        ),
        "flake.nix": FLAKE.format(name=name, builder=BUILDER),
        # The template that kernel-builder asks for, and the card of a folder uploaded as it is.
        "CARD.md": card,
        "README.md": card,
        "LICENSE": (ROOT / "LICENSE").read_text("utf-8"),
    }
    project |= {f"torch-ext/{module}/{path}": text for path, text in files.items()}
    for backend in BACKENDS:
        variant = make_variant(files, name, major, backend)
        project |= {f"build/torch-{backend}/{path}": text for path, text in variant.items()}
    return project


def write_project(project: dict[str, str], out: Path, force: bool = False) -> None:
    """Under another name first, then renamed. `force` replaces a project, and nothing else."""
    _expect_free(out, force)
    unfinished, old = (out.with_name(f".{out.name}.{x}") for x in ("tmp", "old"))
    for rest in (unfinished, old):
        shutil.rmtree(rest, ignore_errors=True)
    for path, text in project.items():
        file = unfinished / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
    if out.exists():
        out.rename(old)
    unfinished.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _expect_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"{out}: expected no such path, got one. Name another, or --force")
    if not (out / "build.toml").is_file() or not (out / "torch-ext").is_dir():
        raise FileExistsError(
            f"{out}: --force: expected a kernel project (build.toml, torch-ext/), which it may "
            "replace, got something else. Name another path"
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--name", default=NAME, help=f"of the kernel (default: {NAME})")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the Hub repository it will go to")
    parser.add_argument("--force", action="store_true", help="replace a project that is there")
    options = parser.parse_args(arguments)
    options.out, options.name = options.out.absolute(), options.name.replace("_", "-")
    if not re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", options.name):
        parser.error(
            f"--name: expected a lower-case letter, then letters, digits and dashes, ending in a "
            f"letter or digit, got {options.name!r}"
        )
    if options.repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo):
        parser.error(f"--repo: expected OWNER/NAME, got {options.repo!r}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        project = make_project(ROOT / "gravity_hf", options.name, options.repo)
        write_project(project, options.out, options.force)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    major = version_of(ROOT / "gravity_hf").split(".")[0]
    repo = options.repo or f"OWNER/{options.name}"
    print(f"{options.out}: {len(project)} files, builds for {' and '.join(BACKENDS)}")
    print(f"publish: hf upload {repo} {options.out} --type kernel --revision v{major}")


if __name__ == "__main__":
    main()
