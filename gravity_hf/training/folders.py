"""Output folders that are either complete or not there."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

# What lies beside a model's weights: settings, code, tokenizer. All of it holds for the same model
# in any format.
COMPANIONS = (
    *("config.json", "modeling_gravity.py", "generation_config.json", "calibration.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.model", "preprocessor_config.json", "processor_config.json"),
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json"),
)
WEIGHTS = ("*.safetensors", "*.onnx", "*.onnx.data", "*.pt2")
EXPORT_FILE = "export.json"
# What a training from scratch keeps in its folder beside the model as it was last.
BEST, LAST = "best", "last"
VALIDATION_FILE = "validation.json"
_MODEL_FILES = (*COMPANIONS, *WEIGHTS, "*.safetensors.index.json", EXPORT_FILE)
_NAMED_AT_MOST = 5


def require_free(out: Path, force: bool, own: Collection[Path] = ()) -> None:
    """Refuse an `out` that holds anything, unless `force` and all that it holds is a model.

    Args:
        out: folder to write.
        force: replace the model in it.
        own: files in folders of `out` that belong to the model in it.

    Raises:
        ValueError: a file, or a folder with anything that would be lost.
    """
    if out.is_file():
        raise ValueError(f"OUT: expected a folder, {str(out)!r} is a file. Choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise ValueError(
            f"OUT: expected a new or empty folder, {str(out)!r} is not empty. Choose another name, "
            "or say force (--force) to replace the model in it"
        )
    if not (out / "config.json").is_file():
        raise ValueError(
            f"OUT: force replaces model folders only, {str(out)!r} has no config.json. Choose "
            "another name, or empty it yourself"
        )
    foreign = _foreign(out, set(own))
    if foreign:
        more = f" and {len(foreign) - _NAMED_AT_MOST} more" if foreign[_NAMED_AT_MOST:] else ""
        raise ValueError(
            f"OUT: force replaces a model and nothing else, {str(out)!r} also holds "
            f"{', '.join(foreign[:_NAMED_AT_MOST])}{more}. Move what you want to keep, delete the "
            "rest, or choose another name"
        )


def _foreign(out: Path, own: set[Path]) -> list[str]:
    """Names in `out` of what is neither a model's file nor in `own`."""
    own = own | {path for pattern in _MODEL_FILES for path in out.glob(pattern) if path.is_file()}
    rooms = {path.parent for path in own} - {out}
    found = [path for room in (out, *rooms) for path in room.iterdir()]
    return sorted(str(path.relative_to(out)) for path in found if path not in own | rooms)


def require_apart(source: Path, out: Path) -> None:
    """ValueError where replacing `out` would take `source` with it, or put it inside of itself."""
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(
            f"OUT: expected a folder apart from the model's, got {str(out)!r} for the model in "
            f"{str(source)!r}. Neither may lie in the other; choose another name"
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; it takes the place of `out` only if all went well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as room:
        building = Path(room, "new")
        building.mkdir()
        yield building
        replaced = Path(room, "old")
        if out.exists():
            # Out of the way first: a folder cannot be renamed onto one that holds files.
            out.rename(replaced)
        try:
            building.rename(out)
        except OSError:
            if replaced.exists():
                replaced.rename(out)
            raise
