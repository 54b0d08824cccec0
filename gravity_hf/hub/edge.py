"""Small models for small machines: a preset or a trained model in every format, measured side by
side. What a format gains and loses here stands in `edge.json` beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..training.conditions import run_conditions
from ..training.files import write_json
from ..training.folders import WEIGHTS, require_apart, whole_folder
from .card_public import public
from .edge_folder import EDGE_FILE, require_free_edge
from .formats.export import export_gravity_model
from .formats.folders import bytes_of, copy_companions
from .formats.latency import Latency, pass_latency, step_latency
from .formats.loading import runner_of_export
from .formats.names import require_format
from .formats.source import Source, folder_of, load_source

# The unchanged model, which everything is compared with; always written.
BASE = "fp32"
EDGE_FORMATS = ("torch", "onnx", "fp16", "int8")
DEFAULT_VOCABULARY = 1000
_TIMED_TOKENS = 128

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Claim:
    """What was published of a preset: `parameters`, and `size` in words."""

    parameters: str
    size: str


# Published with the presets. They hold for no common vocabulary: see the report of an export.
PUBLISHED_CLAIMS = {
    "edge_150k": Claim("~150 K", "< 1 MB"),
    "meta_probe": Claim("~600 K", "2.3 MB"),
    "victorcos": Claim("~1.4 M", "5.3 MB"),
    "fractal_res": Claim("~2.1 M", "8.0 MB"),
}


@dataclass(frozen=True)
class EdgeExport:
    """One format.

    Attributes:
        format: `"fp32"` or a name of `gravity_hf.hub.formats.names.FORMATS`; its folder.
        bytes: on disk, of the files that carry the model.
        measured: errors against the float32 model, see `gravity_hf.hub.formats.measuring.measure`;
            None for that model itself.
        prefill: one pass over `timed_tokens` tokens, batch 1.
        step: one token after those, with the cache; None where there is none.
        quantised: of int8: `layers` with 8-bit weights, `of` so many linear ones.
    """

    format: str
    bytes: int
    measured: dict[str, Any] | None
    prefill: Latency
    step: Latency | None
    quantised: dict[str, int] | None = None


@dataclass(frozen=True)
class EdgeReport:
    """What an edge export wrote and measured; `edge.json` holds the same.

    Attributes:
        preset: its name; None for a trained model.
        published: what was published of that preset.
        trained: False for a preset, whose weights are random.
        model_type, architecture: as in config.json.
        parameters: `embedding`, `head`, `others` and `total`; tied weights count once.
        vocab_size, max_positions: which the sizes hold for.
        exports: the float32 model first.
        measured_on: in words.
        timed_tokens: of a prefill.
        threads: of torch and of onnxruntime.
        conditions: device, versions, commit, date and command.
    """

    preset: str | None
    published: Claim | None
    trained: bool
    model_type: str
    architecture: str
    parameters: dict[str, int]
    vocab_size: int
    max_positions: int
    exports: tuple[EdgeExport, ...]
    measured_on: str
    timed_tokens: int
    threads: int
    conditions: dict[str, Any]


def preset_model(
    name: str,
    *,
    vocab_size: int = DEFAULT_VOCABULARY,
    max_positions: int = 512,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """An untrained `LGTForCausalLM` of a published size, in evaluation mode.

    Args:
        name: `"edge_150k"`, `"meta_probe"`, `"victorcos"` or `"fractal_res"`.
        vocab_size, max_positions: with the preset they decide how large the model is.
        seed: of its weights; the state of torch's generator is left as it was.
        **overrides: further fields of `LGTConfig`.

    Raises:
        ValueError: an unknown preset, by the names of the known ones.
    """
    from ..models.lgt import LGTConfig, LGTForCausalLM

    sizes = {"vocab_size": vocab_size, "max_position_embeddings": max_positions}
    config = LGTConfig.from_preset(name, **sizes, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LGTForCausalLM(config).eval()


def require_edge_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats' own names, each once, without the float32 model that is always written.

    ValueError, ImportError: as `require_format`.
    """
    wanted = [name.lower() for name in formats if name.lower() != BASE]
    return tuple(dict.fromkeys(require_format(name) for name in wanted))


def export_edge_model(
    model_or_folder: nn.Module | str | os.PathLike,
    out: str | os.PathLike,
    *,
    formats: Sequence[str] = EDGE_FORMATS,
    preset: str | None = None,
    text: Sequence[Path] | None = None,
    samples: int = 8,
    length: int = 64,
    seed: int = 0,
    seconds: float = 2.0,
    force: bool = False,
    command: str | None = None,
    advance: Advance = lambda note: None,
) -> EdgeReport:
    """Write a gravity model to a folder for each format below `out`, and time them in turns.

    Every format is loaded again from its folder, compared with the float32 model, and timed
    beside it. `out` is complete, or untouched.

    Args:
        model_or_folder: an LGT, any gravity model of text, or the folder of one.
        out: a new or empty folder.
        formats: names of formats; `fp32` is written in any case.
        preset: the name of the preset that the model is, untrained.
        text: files to measure on; see `export_gravity_model`.
        samples, length, seed: of what is measured.
        seconds: of timing, for prefills and again for steps.
        force: replace an edge export in `out`; refused where it holds anything else.
        command: noted in the report.
        advance: called after each format, and after timing.

    Raises:
        ValueError: a format, model, preset or folder that does not fit, by name.
        ImportError: a package that a format needs.
    """
    formats = require_edge_formats(formats)
    target = Path(out).expanduser()
    if not isinstance(model_or_folder, nn.Module):
        require_apart(Path(model_or_folder).expanduser(), target)
    require_free_edge(target, force)
    measuring = {"text": text, "samples": samples, "length": length, "seed": seed}
    with folder_of(model_or_folder) as folder, whole_folder(target) as building:
        source = _write_base(folder, building / BASE)
        advance(BASE)
        reports = {}
        for name in formats:
            reports[name] = export_gravity_model(
                building / BASE, building / name, format=name, **measuring
            )
            advance(name)
        ids = _timed_ids(source, seed)
        prefill, step = _timed(source, building, (BASE, *formats), ids, seconds)
        advance("timed")
        exports = [EdgeExport(BASE, _size(building / BASE), None, prefill[BASE], step.get(BASE))]
        for name, found in reports.items():
            numbers = (found.bytes_after, found.measured, prefill[name], step.get(name))
            exports.append(EdgeExport(name, *numbers, found.quantised))
        report = EdgeReport(
            preset=preset,
            published=PUBLISHED_CLAIMS.get(preset or ""),
            trained=preset is None,
            model_type=source.model_type,
            architecture=type(source.model).__name__,
            parameters=count_parts(source.model),
            vocab_size=source.model.config.get_text_config().vocab_size,
            max_positions=source.model.config.max_position_embeddings,
            exports=tuple(exports),
            measured_on=next((r.measured_on for r in reports.values()), "nothing"),
            timed_tokens=ids.shape[1],
            threads=torch.get_num_threads(),
            conditions=_conditions(command),
        )
        write_json(building / EDGE_FILE, asdict(report))
    return report


def count_parts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the `embedding`, the `head` over it, all `others`, and in `total`."""
    embedding = {id(p): p.numel() for p in model.get_input_embeddings().parameters()}
    outputs = model.get_output_embeddings()
    head = {} if outputs is None else {id(p): p.numel() for p in outputs.parameters()}
    total = sum(p.numel() for p in model.parameters())
    own = sum(n for key, n in head.items() if key not in embedding)
    parts = {"embedding": sum(embedding.values()), "head": own}
    return {**parts, "others": total - sum(parts.values()), "total": total}


def _write_base(folder: Path, target: Path) -> Source:
    source = load_source(folder)
    if source.kind not in ("decoder", "encoder"):
        raise ValueError(
            f"edge export: expected a model of text, got {type(source.model).__name__}, of kind "
            f"{source.kind}. Export it to one format at a time: gravity-hf export FOLDER OUT "
            "--format NAME"
        )
    source.model.save_pretrained(target)
    copy_companions(folder, target)
    return load_source(target)


def _size(folder: Path) -> int:
    return bytes_of(folder, *WEIGHTS)


def _timed_ids(source: Source, seed: int) -> Tensor:
    config = source.model.config
    length = min(_TIMED_TOKENS, getattr(config, "max_position_embeddings", _TIMED_TOKENS) - 1)
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(config.get_text_config().vocab_size, (1, length), generator=draw)


def _timed(
    source: Source, building: Path, names: Sequence[str], ids: Tensor, seconds: float
) -> tuple[dict[str, Latency], dict[str, Latency]]:
    """Of a prefill and of a step, by format. What is loaded here is gone when it returns, so that
    its files are closed."""
    runners = {name: runner_of_export(source, building / name) for name in names}
    prefill = pass_latency(source, runners, ids, seconds)
    decodes = source.kind == "decoder"
    return prefill, step_latency(source, runners, ids, seconds) if decodes else {}


def _conditions(command: str | None) -> dict[str, Any]:
    known = run_conditions("cpu")
    known["command"] = command
    return public(known)
