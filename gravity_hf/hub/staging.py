"""Everything that one push brings, laid out on disk before the Hub is asked anything."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..training.files import write_json, write_text
from .card_host import read_host_card
from .card_pretrained import RECORD_FILE
from .card_public import is_hub_name, public
from .checks import ADAPTER_CONFIG_FILE, CONFIG_FILE, is_adapter
from .contents import contents_of
from .extras import Extras, check_extras, given_results, missing_block
from .file_names import CARD_FILE, FIGURES_FOLDER, RESULTS_FILE
from .host_files import Access, host_name, save_host_files
from .input_files import has_inputs, is_processor_file, is_tokenizer_file
from .own_models import is_own_folder
from .saved_model import exported
from .secret_files import refuse_unsafe
from .skeleton import masses_alone
from .staged_card import CardSource, staged_card
from .tensor_files import read_json

DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Staged:
    """`name`: of the repository. `files`: path in it -> file on disk, by path. `notices`: for
    people."""

    name: str
    files: dict[str, Path]
    notices: tuple[str, ...]


@contextmanager
def staged(
    model: nn.Module | str | os.PathLike[str],
    name: str | Callable[[], str],
    extras: Extras,
    *,
    max_shard_size: int | str | None = None,
    online: bool,
    folder: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Iterator[Staged]:
    """Lay out the export of `model` and what goes with it; the files live as long as the context.

    Args:
        model: a patched model, a PeftModel over one, or the folder of an export.
        name: of the repository; the card's title. A function is asked for it once the export has
            been found to be sound.
        online: whether the host's tokenizer may be fetched from the Hub, with `token`.
        folder: where `model` has been saved already.

    Raises:
        TypeError: `model` is nothing of the kind.
        RuntimeError: `model` is compiled or wrapped.
        ValueError: the export is not whole or not safe, or an argument does not fit.
    """
    check_extras(extras)
    with tempfile.TemporaryDirectory(prefix="gravity-push-") as scratch:
        size = DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size
        export = exported(model, Path(scratch, "export"), folder, size, online=online)
        title = name if isinstance(name, str) else name()
        beside = Path(scratch, "beside")
        beside.mkdir()
        loaded = None if isinstance(model, (str, os.PathLike)) else model
        place = _Place(export, beside, loaded)
        yield _lay_out(place, title, extras, Access(online, token, endpoint))


@dataclass(frozen=True)
class _Place:
    """`export`: the folder, which stays as it is. `beside`: what is added. `model`: the export in
    memory, where it is."""

    export: Path
    beside: Path
    model: Any


def _lay_out(place: _Place, name: str, extras: Extras, access: Access) -> Staged:
    contents = contents_of(place.export)
    own = {str(path): place.export / path for path in contents.files}
    notices = [f"left out: {', '.join(contents.left_out)}"] if contents.left_out else []
    notices += _local_base(place.export)
    results, more = _results(own, extras)
    if more:
        del own[RESULTS_FILE]
    if results is not None and (extras.results or read_json(own[RESULTS_FILE]) != results):
        write_json(place.beside / RESULTS_FILE, results)
    if RECORD_FILE in own:
        write_json(place.beside / RECORD_FILE, public(read_json(own[RECORD_FILE])))
    notices += more + _add_inputs(place, own, extras, access)
    notices += _add_figures(place, own, extras.figures, results)
    files = {path: file for path, file in own.items() if not _is_replaced(path, extras)}
    files |= _files_under(place.beside)
    host = host_name(place.export, place.model, access)
    unseen = host and not access.online and not read_host_card(host, online=False)["found"]
    if host and unseen and is_hub_name(host):
        notices.append(f"a push also looks up the card of {host}, and takes its licence over")
    # A repository is not its own host.
    source = CardSource(None if host == name else host, extras.tags, access.online)
    card, more = staged_card(place.export, own, files, name, source)
    if card is not None:
        files[CARD_FILE] = write_text(place.beside / CARD_FILE, card)
    return Staged(name, dict(sorted(files.items())), (*notices, *more))


def _is_replaced(path: str, extras: Extras) -> bool:
    """Whether a file of the export's folder stays at home because of what was given."""
    if path.startswith(f"{FIGURES_FOLDER}/"):
        return extras.figures is False or isinstance(extras.figures, (str, os.PathLike))
    if is_processor_file(path):
        return extras.processor is not None
    kept = isinstance(extras.tokenizer, str) and extras.processor is None
    return is_tokenizer_file(path) and not kept


def _files_under(folder: Path) -> dict[str, Path]:
    files = contents_of(folder).files
    refuse_unsafe(folder, files)
    return {str(path): folder / path for path in files}


def _local_base(export: Path) -> list[str]:
    """An adapter whose base is a folder of this machine, or has no name, loads nowhere else."""
    if not is_adapter(export):
        return _local_company(export)
    base = read_json(export / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    if base and not Path(base).expanduser().exists():
        return []
    what = f"is the folder {base} of this machine" if base else "has no name"
    return [
        f"the adapter's base {what}, so that others cannot load it. Push the base, and name it in "
        f"{ADAPTER_CONFIG_FILE}: base_model_name_or_path"
    ]


def _local_company(export: Path) -> list[str]:
    """Hosts of a geolip or a companion, and the geolip of a prior, that are folders of this
    machine."""
    config = read_json(export / CONFIG_FILE)
    inner = config.get("geolip") if isinstance(config.get("geolip"), dict) else {}
    named = {key: config.get(key) for key in ("host_name_or_path", "geolip_name_or_path")}
    for where, settings in (("host_config", config), ("geolip.host_config", inner)):
        host = settings.get("host_config")
        named[f"{where}.name_or_path"] = (
            host.get("name_or_path") if isinstance(host, dict) else None
        )
    return [
        f"{CONFIG_FILE} has {key} {name!r}, a folder of this machine, which others can read there "
        "and do not have. Write a name on the Hub in its place"
        for key, name in named.items()
        if isinstance(name, str) and name and Path(name).expanduser().exists()
    ]


def _results(own: dict[str, Path], extras: Extras) -> tuple[dict[str, Any] | None, list[str]]:
    """What was measured, as others may read it: what was given, else the folder's own."""
    given = given_results(extras)
    if given is not None or RESULTS_FILE not in own:
        return None if given is None else public(given), []
    results = read_json(own[RESULTS_FILE])
    missing = missing_block(results)
    if missing is None:
        return public(results), []
    return None, [
        f"{RESULTS_FILE} is not that of a conversion (it has no block {missing!r}): it stays at "
        "home, and the card says 'not measured'"
    ]


def _add_inputs(place: _Place, own: dict[str, Path], extras: Extras, access: Access) -> list[str]:
    given = extras.given_inputs
    for part in given:
        part.save_pretrained(place.beside)
    wanted = extras.tokenizer is not None and not given
    if not wanted or has_inputs(own):
        return []
    return save_host_files(place.export, place.model, place.beside, access)


def _add_figures(
    place: _Place, own: dict[str, Path], figures: Any, results: dict[str, Any] | None
) -> list[str]:
    """Figures that are given, else the export's own, else new ones."""
    target = place.beside / FIGURES_FOLDER
    if isinstance(figures, (str, os.PathLike)):
        folder = Path(figures).expanduser()
        refuse_unsafe(folder, contents_of(folder).files)
        shutil.copytree(folder, target)
        return []
    if is_own_folder(place.export):
        # Those that are drawn show what a host's queries and keys do.
        return []
    if figures is False or any(path.startswith(f"{FIGURES_FOLDER}/") for path in own):
        return []
    if importlib.util.find_spec("matplotlib") is None:
        return ["no figures: matplotlib is not installed (pip install matplotlib)"]
    # Imported here because matplotlib is optional.
    from ..viz.export import write_figures

    # Of a folder only the masses are drawn: its weights may be larger than this machine.
    only_masses = place.model is None and not is_adapter(place.export)
    model = masses_alone(place.export) if only_masses else place.model
    if model is None:
        return [
            f"no figures: those of {place.export} need the whole model. Draw them with: "
            f"gravity-hf figures {place.export}"
        ]
    write_figures(model, target, results=results)
    return []
