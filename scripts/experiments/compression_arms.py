"""The runs of `compression.py`: one host made smaller in one way, and trained on a little."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lean_hosts
import torch
from paired_changes import paired
from pool import training_arguments
from torch import nn
from window_losses import window_losses

from gravity_hf import factorize
from gravity_hf.training.conditions import run_conditions

# Calibration and held-out windows, of the host's length or of this one; healing steps of `rows`
# windows of `heal_length`.
SIZES: dict[str, dict[str, Any]] = {
    "gpu": {"calibration": (32, 1024), "windows": 8, "heal": (60, 16, 1024), "repeats": 9},
    "cpu": {"calibration": (16, 512), "windows": 4, "heal": (40, 8, 256), "repeats": 3},
    "quick": {"calibration": (4, 64), "windows": 2, "heal": (2, 2, 64), "repeats": 1},
}
_STEP = 8
# What several runs of one process need: of a host and seed its losses of windows; of a host and an
# energy the ranks and the parameters; the arm that was made last, which seeds may share.
_host_losses: dict[Path, list[float]] = {}
_ranks: dict[tuple[Path, float], dict[str, int]] = {}
_counts: dict[tuple[Path, float], int] = {}
_last: dict[tuple[Path, str, float | None], tuple[nn.Module, dict[str, Any]]] = {}


def one_run(run: dict[str, Any]) -> dict[str, Any]:
    """Of one seed and arm: parameters, losses before, after and healed, seconds of a forward."""
    sizes, device = SIZES[run["size"]], run["device"]
    host = lean_hosts.host_of(run)
    dense = host.load(device)
    held_out = host.held_out(sizes["windows"]).split(1)
    if host.shelf not in _host_losses:
        _host_losses[host.shelf] = window_losses(dense, held_out)
    before = _host_losses[host.shelf]
    result: dict[str, Any] = {"host_loss": statistics.fmean(before), "length": host.length}
    model, more = _shared(run, host, dense, sizes)
    losses = window_losses(model, held_out)
    result |= {**more, **_parameters(model), "loss": statistics.fmean(losses)}
    result |= {**paired(losses, before), "windows": len(losses)}
    steps, *shape = sizes["heal"]
    steps = run.get("heal", steps)
    if steps:
        healed = _healed(copy.deepcopy(model), run, host, (steps, *shape), held_out)
        result |= {"healed_loss": statistics.fmean(healed), "healed_losses": healed}
    return {
        **{name: run[name] for name in ("arm", "energy", "seed", "size")},
        **result,
        "heal": [steps, *shape, host.heal_rate],
        "unit": host.unit,
        "host": host.described(),
        "host_seconds": host.record.get("seconds"),
        "conditions": run_conditions(device),
    }


def smaller_sizes(sizes: dict[str, Any], vocabulary: int, parameters: int) -> dict[str, Any]:
    """The sizes of a Llama of the same depth and heads with about as many parameters: width, heads
    and feed-forward layer scaled alike, the last to what fits best."""
    widths = range(_STEP, sizes["hidden_size"] + 1, _STEP)
    near = [_scaled(sizes, width / sizes["hidden_size"]) for width in widths]
    best = min(near, key=lambda x: abs(_count(x, vocabulary) - parameters))
    inner = best["intermediate_size"]
    around = [inner + _STEP * i for i in range(-16, 17) if inner + _STEP * i > 0]
    options = [{**best, "intermediate_size": width} for width in around]
    return min(options, key=lambda x: abs(_count(x, vocabulary) - parameters))


def _shared(run: dict[str, Any], host: Any, dense: nn.Module, sizes: dict[str, Any]) -> Any:
    """`_made` and seconds of its forward, once for runs of the same host and arm that follow each
    other."""
    known = (host.folder, run["arm"], run["energy"])
    if known not in _last:
        _last.clear()
        model, more = _made(run, host, dense, sizes)
        more = {**more, **_seconds(model, dense, host, sizes["repeats"], run["device"])}
        _last[known] = (model, more)
    return _last[known]


def _made(run: dict[str, Any], host: Any, dense: nn.Module, sizes: dict[str, Any]) -> Any:
    """The model of an arm, and what is known of it."""
    model = copy.deepcopy(dense)
    if run["arm"] == "dense":
        return model, {}
    known = (host.folder, run["energy"])
    if run["arm"] == "layers" and known in _counts:
        return _fewer_layers(dense, _counts[known])
    count, length = sizes["calibration"]
    seed = 0 if run.get("pretrained") else run["seed"]
    ids = host.calibration(count, min(length, host.length), seed=seed)
    batches = [{"input_ids": x} for x in ids.split(4)]
    rank: Any = f"energy:{run['energy']}"
    shown: Any = batches
    if run["arm"] == "plain":
        if known not in _ranks:
            other = copy.deepcopy(dense)
            _ranks[known] = factorize(other, rank, calibration=batches, progress=False).ranks
        rank, shown = _ranks[known], None
    start = time.perf_counter()
    report = factorize(model, rank, calibration=shown, progress=False)
    _ranks[known], _counts[known] = report.ranks, _parameters(model)["parameters"]
    more = {
        "factorize_seconds": time.perf_counter() - start,
        "ranks": _by_kind(report.ranks),
        "summary": report.summary(),
        "calibration_tokens": 0 if shown is None else ids.numel(),
    }
    if run["arm"] == "control":
        return _control(run, model)
    if run["arm"] == "layers":
        return _fewer_layers(dense, _counts[known])
    return model, more


def _by_kind(ranks: dict[str, int]) -> dict[str, list[int]]:
    """Ranks by the last name of their maps, from the first layer on."""
    found: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        found.setdefault(name.rpartition(".")[2], []).append(rank)
    return found


def _control(run: dict[str, Any], model: nn.Module) -> Any:
    """A dense model of as many parameters as `model`, trained from scratch on as many tokens as the
    host."""
    usual = lean_hosts.PRESETS[run["preset"]]
    vocabulary: Any = model.config.vocab_size
    target = sum(p.numel() for p in model.parameters())
    sizes = smaller_sizes(usual.sizes, vocabulary, target)
    name = f"{run['preset']}-{sizes['hidden_size']}x{sizes['intermediate_size']}"
    lean_hosts.PRESETS[name] = dataclasses.replace(usual, sizes=sizes)
    small = lean_hosts.host_of({**run, "preset": name})
    return small.load(run["device"]), {"sizes": sizes, "trained_seconds": small.record["seconds"]}


def _fewer_layers(dense: nn.Module, parameters: int) -> Any:
    """The host without some of its later layers, the last one kept, with about as many parameters
    as asked for: what is smaller without any factor."""
    model: Any = copy.deepcopy(dense)
    layers = model.model.layers
    each = sum(p.numel() for p in layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    left = min(max(1, len(layers) - round((total - parameters) / each)), len(layers))
    model.model.layers = nn.ModuleList([*layers[: left - 1], layers[-1]])
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = left
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [*kinds[: left - 1], kinds[-1]]
    return model, {"layers": left}


def _parameters(model: nn.Module) -> dict[str, int]:
    """Of the layers alone, and of all; tied tensors count once."""
    layers: Any = model.get_submodule("model.layers")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layer_parameters": sum(p.numel() for p in layers.parameters()),
    }


def _seconds(
    model: nn.Module, dense: nn.Module, host: Any, repeats: int, device: str
) -> dict[str, float]:
    """Of a forward of one window, medians; the two models are called in turns, in the dtype that a
    user of the device would take."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    both = {"seconds": copy.deepcopy(model).to(dtype), "dense_seconds": copy.deepcopy(dense)}
    both["dense_seconds"].to(dtype)
    ids = host.held_out(1).to(device)
    times: dict[str, list[float]] = {name: [] for name in both}
    with torch.no_grad():
        for _ in range(repeats + 1):  # the first call of each chooses kernels
            for name, called in both.items():
                times[name].append(_time(called, ids, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _time(model: nn.Module, ids: Any, device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _healed(
    model: nn.Module, run: dict[str, Any], host: Any, heal: tuple[int, int, int], held_out: Any
) -> list[float]:
    """Losses of windows after a short training of all weights, the same for every arm."""
    from transformers.trainer_callback import PrinterCallback

    from gravity_hf.training.optim import GravityTrainer
    from gravity_hf.training.streams import RandomWindows, collate

    (steps, rows, length), cuda = heal, run["device"] == "cuda"
    length = min(length, host.length)
    seed = 1000 + run["seed"]
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(
            folder,
            steps,
            host.heal_rate,
            seed,
            per_device_train_batch_size=rows,
            use_cpu=not cuda,
            bf16=cuda,
            torch_compile=False,
        )
        trainer = GravityTrainer(
            model=model,
            args=training,
            train_dataset=RandomWindows(host.text.train, steps * rows, length, seed=seed),
            data_collator=collate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    _without_autocast(model)
    return window_losses(model, held_out)


def _without_autocast(model: nn.Module) -> None:
    """Take off the wrapper that accelerate leaves around `forward` after training in bfloat16:
    losses are of the weights as they are. Its own `unwrap_model` takes off the decorators that
    transformers has there, too."""
    forward = vars(model).pop("_original_forward", None)
    if forward is None:
        return
    vars(model).pop("forward", None)
    if model.forward != forward:
        model.forward = forward


def _scaled(sizes: dict[str, Any], share: float) -> dict[str, Any]:
    named = ("hidden_size", "head_dim", "intermediate_size")
    return {**sizes, **{name: _near(sizes[name] * share) for name in named}}


def _near(size: float) -> int:
    return _STEP * max(1, round(size / _STEP))


def _count(sizes: dict[str, Any], vocabulary: int) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))
    return sum(p.numel() for p in model.parameters())
