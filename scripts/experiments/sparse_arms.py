"""The runs of `sparse_attention.py`: trained hosts made sparse, and LeanFormers that are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lean_hosts
import torch
from lean_training import train
from paired_changes import paired
from torch import Tensor, nn
from window_losses import window_losses

from gravity_hf import KeyBudget, densify_attention, sparsify_attention, sparsity
from gravity_hf.integration.screening_fit import fit_screening, measure_screening
from gravity_hf.integration.sparse_settings import sparse_modules
from gravity_hf.training.conditions import run_conditions
from gravity_hf.training.measures import mean_loss

# How keys are chosen; the last two are controls with as many keys.
SCREENINGS = ("keys", "principal", "learned", "window", "random")
CONTROLS = ("window", "random")
PROJECTED = ("principal", "learned")
SCREEN_DIM, SINKS, WINDOW = 16, 4, 64
FIT_RATE = 1e-2

SIZES: dict[str, dict[str, Any]] = {
    "gpu": {
        "budgets": ((256, 32), (512, 32), (1024, 32), (2048, 32), (512, 64), (512, 8)),
        "windows": 8,
        "fit": (8, 160),  # batches, steps
        "repeats": 5,
        "native": {
            "sizes": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4},
            "inner": 768,
            "budget": (256, 32),
            "stage": (400, 8, 2048),
            "length": 8192,
            "windows": 8,
        },
    },
    "cpu": {
        "budgets": ((128, 16), (256, 16), (512, 16), (1024, 32)),
        "windows": 4,
        "fit": (4, 60),
        "repeats": 3,
        "native": {
            "sizes": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
            "inner": 384,
            "budget": (64, 8),
            "stage": (150, 4, 512),
            "length": 1024,
            "windows": 8,
        },
    },
    "quick": {
        "budgets": ((32, 8),),
        "windows": 2,
        "fit": (1, 2),
        "repeats": 1,
        "native": {
            "sizes": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "inner": 64,
            "budget": (16, 4),
            "stage": (2, 2, 64),
            "length": 128,
            "windows": 2,
        },
    },
}
# A LeanFormer trained densely learns its screening from what it attends to; one trained sparsely
# attends to what its screening finds from the first step on.
NATIVE = [
    (attention, how) for attention in ("dot_product", "gravity") for how in ("dense", "sparse")
]


class ByLot(nn.Module):
    """A screening that knows nothing: the choice is by lot, the same at each call."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(q.device).manual_seed(self.seed)
        made = [torch.randn(*x.shape[:3], 8, generator=generator, device=x.device) for x in (q, k)]
        return made[0].to(q.dtype), made[1].to(q.dtype)


def budget_of(top_k: int, block_size: int, screening: str = "keys") -> KeyBudget:
    """The control `window` spends all of it on the last keys."""
    window = top_k - SINKS if screening == "window" else min(WINDOW, top_k // 2)
    return KeyBudget(top_k, block_size, window, SINKS)


def host_run(run: dict[str, Any]) -> dict[str, Any]:
    """One host under one budget: losses, recall, times and memory of every screening, beside
    dense."""
    host, size = lean_hosts.host_of(run), SIZES[run["size"]]
    device, dtype = run["device"], torch.float32 if run["device"] == "cpu" else torch.bfloat16
    model = host.load(device, dtype)
    windows = host.held_out(size["windows"], run["context"]).split(1)
    dense = window_losses(model, windows)
    rows = []
    for screening in SCREENINGS:
        _make_sparse(model, run, screening, host, size)
        losses = window_losses(model, windows)
        row = {"screening": screening, "loss": statistics.fmean(losses), **paired(losses, dense)}
        row |= _prefill(model, windows[0].to(device), size["repeats"])
        if screening not in CONTROLS:
            recall = measure_screening(model, [{"input_ids": x} for x in windows[:2]])
            row |= {"recall": recall._asdict()}
        rows.append(row)
        densify_attention(model)
    return {
        "kind": "host",
        **{name: run[name] for name in ("seed", "top_k", "block_size")},
        "length": windows[0].shape[1],
        "dense_loss": statistics.fmean(dense),
        "unit": host.unit,
        "windows": len(windows),
        "parameters": model.num_parameters(),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "host": host.described(),
        "conditions": run_conditions(device),
    }


def native_run(run: dict[str, Any]) -> dict[str, Any]:
    """Train a LeanFormer densely or sparsely; measure it both ways, at its length and beyond."""
    from gravity_hf import LeanFormerConfig, LeanFormerForCausalLM

    size, device = SIZES[run["size"]]["native"], run["device"]
    text = lean_hosts.stream(tuple(run["files"]))
    top_k, block_size = size["budget"]
    budget = budget_of(top_k, block_size)
    torch.manual_seed(run["seed"])
    config = LeanFormerConfig(
        vocab_size=text.vocabulary,
        intermediate_size=size["inner"],
        max_position_embeddings=size["length"],
        attention=run["attention"],
        attention_rank=0,
        feed_forward_rank=0,
        attention_top_k=top_k,
        attention_block=block_size,
        local_window=budget.window,
        sink_tokens=budget.sinks,
        exit_heads=False,
        gate_weight=0.0,
        **size["sizes"],
    )
    model = LeanFormerForCausalLM(config).to(device)
    started = time.perf_counter()
    with sparsity(model, attention=run["trained"]):
        losses = train(model, text, size["stage"], rate=1.5e-3, seed=run["seed"], device=device)
    seconds = time.perf_counter() - started
    return {
        "kind": "native",
        **{name: run[name] for name in ("seed", "attention", "trained")},
        "budget": list(size["budget"]),
        "stage": list(size["stage"]),
        "losses": _native_losses(model, text, size),
        "unit": "nats per byte of held-out text",
        "training_losses": losses,
        "seconds": seconds,
        "parameters": model.num_parameters(),
        "conditions": run_conditions(device),
    }


def _native_losses(model: Any, text: Any, size: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Held-out loss by length and by how attention is computed."""
    from gravity_hf.training.streams import ConsecutiveWindows

    found = {}
    for length in (size["stage"][2], size["length"]):
        held_out = ConsecutiveWindows(text.validation, size["windows"], length)
        windows = held_out.__getitems__(list(range(len(held_out)))).split(1)
        found[str(length)] = {}
        for how in ("dense", "sparse"):
            with sparsity(model, attention=how):
                found[str(length)][how] = mean_loss(model, windows)
    return found


def _make_sparse(
    model: Any, run: dict[str, Any], screening: str, host: lean_hosts.Host, size: dict[str, Any]
) -> None:
    budget = budget_of(run["top_k"], run["block_size"], screening)
    projected = screening in PROJECTED or screening == "random"
    sparsify_attention(
        model, budget, screening="learned" if projected else "keys", screen_dim=SCREEN_DIM
    )
    if screening == "random":
        for module in sparse_modules(model).values():
            module.screening = ByLot(run["seed"])
    if screening in PROJECTED:
        _fit(model, screening, host, size, run["context"])


def _fit(
    model: Any, screening: str, host: lean_hosts.Host, size: dict[str, Any], context: int | None
) -> None:
    """Projections do not depend on the budget: they are learnt once for a host."""
    from safetensors.torch import load_file, save_file

    modules = sparse_modules(model)
    batches, steps = size["fit"]
    steps = steps if screening == "learned" else 0
    how = f"{SCREEN_DIM}-{batches}-{steps}-{context or host.length}"
    file = host.shelf / f"screening-{screening}-{how}.safetensors"
    if not file.is_file():
        known = host.calibration(batches + 1, context, seed=1 + host.seed).split(1)
        inputs = [{"input_ids": ids} for ids in known]
        fit_screening(model, inputs[1:], steps=steps, lr=FIT_RATE, evaluation=inputs[:1])
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".tmp")
        save_file(_tensors(modules), unfinished)
        unfinished.replace(file)
    tensors = load_file(file)
    for name, module in modules.items():
        parts = {x: tensors[f"{name}.{x}"] for x in ("query", "key")}
        module.screening.load_state_dict(parts)


def _tensors(modules: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor.float().cpu().contiguous()
        for name, module in modules.items()
        for part, tensor in module.screening.state_dict().items()
    }


def _prefill(model: Any, ids: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a prefill of `ids`, sparse and dense, called in turns; on a GPU the peak of
    each above what is there before it, in MiB."""

    def dense() -> None:
        with sparsity(model, attention="dense"):
            prefill()

    def prefill() -> None:
        with torch.inference_mode():
            model(ids, use_cache=False, logits_to_keep=1)

    calls: dict[str, Callable[[], None]] = {"": prefill, "dense_": dense}
    times: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, float] = {}
    for number in range(repeats + 1):
        for name, call in calls.items():
            before = _start_watching(ids)
            start = time.perf_counter()
            call()
            _synchronize(ids)
            if number:  # the first one chooses and compiles
                times[name].append(time.perf_counter() - start)
            if ids.is_cuda:
                found[f"{name}peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {**{f"{name}seconds": statistics.median(x) for name, x in times.items()}, **found}


def _start_watching(x: Tensor) -> int:
    """Bytes that are allocated on x's GPU, above which its peak counts from now on."""
    if not x.is_cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
