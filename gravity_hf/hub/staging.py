"""Everything that one push brings, laid out on disk before the Hub is asked anything."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from ..integration.hosts import settings_of
from ..training.files import write_json, write_text
from .card_host import read_host_card
from .cards import card_of_folder
from .checks import ADAPTER_CONFIG_FILE, check_export, is_adapter
from .contents import contents_of
from .host_files import host_name, save_host_files
from .skeleton import masses_alone
from .tensor_files import read_json

CARD_FILE = "README.md"
RESULTS_FILE = "results.json"
FIGURES_FOLDER = "figures"

# What says that a folder has its tokenizer or processor already.
_INPUT_FILES = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Extras:
    """What goes up beside the export; the arguments of `push_gravity_model` of the same names."""

    tokenizer: Any = "host"
    processor: Any = None
    results: Any = None
    figures: Any = True
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Staged:
    """`files`: path in the repository -> file on disk, by path. `notices`: for people."""

    files: dict[str, Path]
    notices: tuple[str, ...]


@contextmanager
def staged(
    model: nn.Module | str | os.PathLike[str],
    name: str,
    extras: Extras,
    *,
    max_shard_size: int | str,
    online: bool,
    folder: Path | None = None,
) -> Iterator[Staged]:
    """Lay out the export of `model` and what goes with it; the files live as long as the context.

    Args:
        model: a patched model, a PeftModel over one, or the folder of an export.
        name: of the repository; the card's title.
        online: whether the host's tokenizer may be fetched from the Hub.
        folder: where `model` has been saved already.

    Raises:
        TypeError: `model` is nothing of the kind.
        ValueError: the export is not whole or not safe.
    """
    with tempfile.TemporaryDirectory(prefix="gravity-push-") as scratch:
        if isinstance(model, (str, os.PathLike)):
            export, loaded = Path(model).expanduser(), None
        else:
            export, loaded = folder or Path(scratch, "export"), model
            if folder is None:
                save_model(model, export, max_shard_size, online=online)
        check_export(export)
        beside = Path(scratch, "beside")
        beside.mkdir()
        yield _lay_out(export, beside, loaded, name, extras, online)


def save_model(model: nn.Module, folder: Path, max_shard_size: int | str, *, online: bool) -> None:
    """Save a patched model, or the adapter of a PeftModel over one, to a new folder.

    Raises:
        TypeError: any other model.
    """
    adapter: Any = model if hasattr(model, "get_base_model") else None
    base: Any = model if adapter is None else adapter.get_base_model()
    if settings_of(base) is None:
        raise TypeError(
            "push_gravity_model: expected a patched model, a gravity_lora model or the folder of "
            f"an export, got {type(base).__name__} with its own attention. Call "
            "patch_with_gravity(model) first, or push it with model.push_to_hub"
        )
    if adapter is None:
        base.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    # peft would ask the Hub for the base's config, to see whether the vocabulary has grown.
    auto = online or Path(base.name_or_path or "").is_dir()
    adapter.save_pretrained(folder, save_embedding_layers="auto" if auto else False)
    # peft writes a card of its own kind; ours is made from what was measured.
    (folder / CARD_FILE).unlink(missing_ok=True)


def _lay_out(
    export: Path, beside: Path, model: Any, name: str, extras: Extras, online: bool
) -> Staged:
    contents = contents_of(export)
    files = {str(path): export / path for path in contents.files}
    notices = [f"left out: {', '.join(contents.left_out)}"] if contents.left_out else []
    notices += _local_base(export)
    _add_results(export, beside, extras.results)
    notices += _add_inputs(export, beside, model, extras, online)
    notices += _add_figures(export, beside, model, extras.figures)
    if extras.figures is False:
        files = {path: f for path, f in files.items() if not path.startswith(f"{FIGURES_FOLDER}/")}
    files |= _files_under(beside)
    host = host_name(export, model)
    if host and not online and not read_host_card(host, online=False)["found"]:
        notices.append(f"a push also looks up the card of {host}, and takes its licence over")
    card = _card(export, files, name, host, extras.tags, online)
    if card is not None:
        files[CARD_FILE] = write_text(beside / CARD_FILE, card)
    return Staged(dict(sorted(files.items())), tuple(notices))


def _files_under(folder: Path) -> dict[str, Path]:
    return {str(path): folder / path for path in contents_of(folder).files}


def _local_base(export: Path) -> list[str]:
    """An adapter whose base is a folder of this machine, or has no name, loads nowhere else."""
    if not is_adapter(export):
        return []
    base = read_json(export / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    if base and not Path(base).expanduser().exists():
        return []
    what = f"is the folder {base} of this machine" if base else "has no name"
    return [
        f"the adapter's base {what}, so that others cannot load it. Push the base, and name it in "
        f"{ADAPTER_CONFIG_FILE}: base_model_name_or_path"
    ]


def _add_results(export: Path, beside: Path, results: Any) -> None:
    if isinstance(results, (str, os.PathLike)):
        results = read_json(Path(results))
    if results is not None:
        write_json(beside / RESULTS_FILE, results)


def _add_inputs(export: Path, beside: Path, model: Any, extras: Extras, online: bool) -> list[str]:
    notices: list[str] = []
    given = [part for part in (extras.tokenizer, extras.processor) if part not in (None, "host")]
    for part in given:
        part.save_pretrained(beside)
    has_own = any((export / file).is_file() for file in _INPUT_FILES)
    if extras.tokenizer == "host" and not has_own and extras.processor is None:
        notices += save_host_files(export, model, beside, online=online)
    return notices


def _add_figures(export: Path, beside: Path, model: Any, figures: Any) -> list[str]:
    """Figures that are given, else the export's own, else new ones."""
    target = beside / FIGURES_FOLDER
    if isinstance(figures, (str, os.PathLike)):
        contents_of(Path(figures))
        shutil.copytree(figures, target)
        return []
    if figures is False or (export / FIGURES_FOLDER).is_dir():
        return []
    if importlib.util.find_spec("matplotlib") is None:
        return ["no figures: matplotlib is not installed (pip install matplotlib)"]
    # Imported here because matplotlib is optional.
    from ..viz.export import write_figures

    if model is None:
        # Of a folder only the masses are drawn: its weights may be larger than this machine.
        model = None if is_adapter(export) else masses_alone(export)
    if model is None:
        return [f"no figures in {export}; draw them with: gravity-hf figures {export}"]
    found = (place / RESULTS_FILE for place in (beside, export))
    results = next((read_json(file) for file in found if file.is_file()), None)
    write_figures(model, target, results=results)
    return []


def _card(
    export: Path,
    files: dict[str, Path],
    name: str,
    host: str | None,
    tags: tuple[str, ...],
    online: bool,
) -> str | None:
    """The card's text; None where the one in the folder goes up as it is."""
    own = export / CARD_FILE
    if not own.is_file() or _is_generated(own, export, host, online):
        card = _generated(files, name, host, online)
    elif tags:
        card = ModelCard.load(own)
    else:
        return None
    data: Any = card.data
    known = data.tags or []
    if tags:
        data.tags = [*known, *(tag for tag in tags if tag not in known)]
    return str(card)


def _is_generated(own: Path, export: Path, host: str | None, online: bool) -> bool:
    """Whether nobody has touched a card since it was written: it may take the new name."""
    written = str(card_of_folder(export, export.resolve().name, host=host, online=online))
    return own.read_text(encoding="utf-8").strip() == written.strip()


def _generated(files: dict[str, Path], name: str, host: str | None, online: bool) -> ModelCard:
    """The card of the staged files, which lie in several folders: linked into one."""
    with tempfile.TemporaryDirectory(prefix="gravity-card-") as scratch:
        for path, source in files.items():
            link = Path(scratch, path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source.resolve())
        return card_of_folder(Path(scratch), name, host=host, online=online)
