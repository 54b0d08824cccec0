"""A cache of a few bits beside transformers' own: bytes, prompts, single tokens, peak memory."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from gate import first_line  # noqa: E402
from results import conditions  # noqa: E402
from rich.progress import track  # noqa: E402
from timing import quantiles, synchronize  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache  # noqa: E402

from gravity_hf.hub.card_public import public  # noqa: E402
from gravity_hf.integration.cache_memory import cache_bytes  # noqa: E402
from gravity_hf.integration.rotated_cache import RotatedQuantCache  # noqa: E402
from gravity_hf.models.placing import CACHE_FIELD  # noqa: E402
from gravity_hf.training.files import write_json  # noqa: E402
from gravity_hf.training.peak_memory import PeakMemory  # noqa: E402


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, width: int, inner: int) -> Any:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "intermediate_size": inner,
    }


SHAPES = {
    "quick": _shape(64, 2, 2, 1, 32, 128),
    "20M": _shape(384, 8, 6, 2, 64, 1024),
    "1B": _shape(2048, 16, 32, 8, 64, 8192),
}
LENGTHS = (1024, 4096, 8192, 32768)
CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "rotated 4": lambda config: RotatedQuantCache(config),
    "rotated 4, half ranges": lambda config: RotatedQuantCache(config, ranges="half"),
    "rotated 2": lambda config: RotatedQuantCache(config, 2, 2),
    "rotated 8": lambda config: RotatedQuantCache(config, 8, 8),
    "hqq 4": lambda config: QuantizedCache("hqq", config, nbits=4, axis_key=1, axis_value=1),
    "quanto 4": lambda config: QuantizedCache("quanto", config, nbits=4),
    "published": lambda config: RotatedQuantCache(config, codec="reference"),
}
USUAL = ("dynamic", "rotated 4", "rotated 2", "rotated 8", "hqq 4")
# Enough to see one step that packs: with a prompt of whole blocks it is the 64th.
STEPS = {"cpu": 72, "cuda": 96}

EPILOG = """\
A row is one shape, one length and one cache: a Llama with random weights, for which time and memory
are those of any weights. The prompt is read at once into a fresh cache, then tokens follow one by
one, each timed between synchronisations. `prefill_ms` and `decode_ms` are medians with the 20th and
80th percentile; `decode_mean_ms` also holds the steps that pack, `decode_most_ms` is the slowest of
them. `cache_bytes` are those of all storages that the cache holds after the prompt; `ratio` is what
float16 would take over them. `prefill_peak_extra_mib` and `decode_peak_extra_mib` are the most
memory above what was in use before, in the prompt and in the tokens after it: on CUDA of torch's
allocator, else of the process, null where nobody counts. The caches of a shape and length follow
each other in one process; "dynamic" is what the others are beside. An output file that is there is
continued.

  python scripts/benchmark/kv_cache.py --device cuda --out kv_cuda.json
  python scripts/benchmark/kv_cache.py --lengths 1024 4096 --threads 1 --out kv_cpu.json
  python scripts/benchmark/kv_cache.py --quick          # some small rows, to see that it works
"""


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="default cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="float32, on CUDA bfloat16")
    add("--shapes", nargs="+", choices=list(SHAPES), help="default 20M, on CUDA 1B too")
    add("--lengths", nargs="+", type=int, help="tokens of the prompt (1024 to 32768, CPU 8192)")
    add("--caches", nargs="+", default=list(USUAL), choices=list(CACHES), metavar="CACHE")
    add("--prompts", type=int, default=3, help="timed prompts [3]")
    add("--steps", type=int, help=f"single tokens ({STEPS})")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--commit", help="where the tree is a copy without git")
    add("--quick", action="store_true", help="a tiny shape and two short lengths")
    add("--out", type=Path, metavar="FILE.json", help="write rows and conditions here")
    options = parser.parse_args(given)
    on_cuda = options.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none; use --device cpu")
    options.dtype = options.dtype or ("bfloat16" if on_cuda else "float32")
    if options.quick:
        options.shapes, options.lengths = ["quick"], options.lengths or [1024, 2048]
    options.shapes = options.shapes or (["20M", "1B"] if on_cuda else ["20M"])
    options.lengths = options.lengths or list(LENGTHS if on_cuda else LENGTHS[:3])
    options.steps = options.steps or (4 if options.quick else STEPS[options.device])
    if min(*options.lengths, options.steps, options.prompts) < 1:
        parser.error("--lengths, --steps, --prompts: expected 1 or more")
    return options


def build(shape: str, longest: int, options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        **SHAPES[shape],
    )
    with torch.device(options.device):
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, options.dtype)).eval().requires_grad_(False)


@torch.no_grad()
def measure(model: LlamaForCausalLM, case: dict[str, Any], options: Any) -> dict[str, Any]:
    """One row; one that fails has its error as `note`."""
    row = {**case, "note": ""}
    prompts: list[float] = []
    try:
        # The first one compiles kernels and asks the allocator for memory, and does not count.
        for turn in range(1 + options.prompts):
            gc.collect()
            cache = CACHES[case["cache"]](model.config)
            found = _read_prompt(model, cache, case["length"], options.device)
            prompts += [found.pop("ms")] * (turn > 0)
            if turn in (0, options.prompts):
                steps = options.steps if turn else 2
                found |= _read_tokens(model, cache, steps, options.device)
    except Exception as error:
        return {**row, "note": f"failed: {first_line(error)}"}
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    found["prefill_ms"] = _spread(prompts)
    found["fp16_bytes"] = 2 * numbers * case["length"]
    found["ratio"] = found["fp16_bytes"] / found["cache_bytes"]
    return row | found


def _read_prompt(model: Any, cache: Any, length: int, device: str) -> dict[str, Any]:
    ids = torch.randint(0, 512, (1, length), device=device)
    with PeakMemory(device) as memory:
        synchronize(device)
        start = time.perf_counter()
        model(ids, **{CACHE_FIELD: cache}, logits_to_keep=1)
        synchronize(device)
        milliseconds = (time.perf_counter() - start) * 1e3
    return {
        "ms": milliseconds,
        "cache_bytes": cache_bytes(cache),
        "prefill_peak_extra_mib": _mib(memory),
    }


def _read_tokens(model: Any, cache: Any, steps: int, device: str) -> dict[str, Any]:
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    times = []
    with PeakMemory(device) as memory:
        for _ in range(steps):
            synchronize(device)
            start = time.perf_counter()
            model(token, **{CACHE_FIELD: cache})
            synchronize(device)
            times.append((time.perf_counter() - start) * 1e3)
    return {
        "decode_ms": _spread(times),
        "decode_mean_ms": statistics.fmean(times),
        "decode_most_ms": max(times),
        "decode_peak_extra_mib": _mib(memory),
    }


def _spread(times: list[float]) -> dict[str, float]:
    return dict(zip(("p50", "p20", "p80"), quantiles(times), strict=True))


def _mib(memory: PeakMemory) -> float | None:
    return None if memory.above is None else memory.above / 2**20


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """`decode_speed`, `prefill_speed`: of a DynamicCache of the same shape and length over ours."""
    peers = {(r["shape"], r["length"]): r for r in rows if r["cache"] == "dynamic"}
    for row in rows:
        peer = peers.get((row["shape"], row["length"]), {})
        if "decode_ms" in row and "decode_ms" in peer:
            row["decode_speed"] = peer["decode_ms"]["p50"] / row["decode_ms"]["p50"]
            row["prefill_speed"] = peer["prefill_ms"]["p50"] / row["prefill_ms"]["p50"]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["length"], row["cache"]


def finished(file: Path | None, known: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of an earlier run under the same conditions, by what they measured."""
    if file is None or not file.exists():
        return {}
    before = json.loads(file.read_text(encoding="utf-8"))
    same = ("device", "versions", "commit", "settings")
    if any(before["conditions"].get(name) != known.get(name) for name in same):
        return {}
    return {_key(row): row for row in before["rows"] if not row["note"]}


def show(row: dict[str, Any]) -> str:
    name = f"{row['shape']:<6} T={row['length']:<6} {row['cache']:<23}"
    if row["note"]:
        return f"{name} {row['note']}"
    return (
        f"{name} {row['cache_bytes'] / 2**20:9.2f} MiB ({row['ratio']:.2f}x) prefill "
        f"{row['prefill_ms']['p50']:9.1f} ms, token {row['decode_ms']['p50']:8.3f} ms"
    )


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads() if options.device == "cpu" else None
    known = conditions(options.device, options.commit) | {
        "command": shlex.join(["python", "scripts/benchmark/kv_cache.py", *given]),
        "settings": {"dtype": options.dtype, "threads": threads, "steps": options.steps}
        | {"prompts": options.prompts},
        "shapes": {name: SHAPES[name] for name in options.shapes},
    }
    before = finished(options.out, public(known))
    todo = [(s, n, c) for s in options.shapes for n in options.lengths for c in options.caches]
    rows = [row for key, row in before.items() if key not in todo]
    model, built = None, None
    for shape, length, cache in track(todo, "kv cache", disable=not sys.stderr.isatty()):
        done = before.get((shape, length, cache))
        if done is None and built != shape:
            model, built = build(shape, max(options.lengths) + options.steps, options), shape
        case = {"shape": shape, "length": length, "cache": cache}
        rows.append(done or measure(model, case, options))
        if done is None:
            print(show(rows[-1]), flush=True)
        add_ratios(rows)
        if options.out:
            write_json(options.out, public({"conditions": known, "rows": rows}))


if __name__ == "__main__":
    main()
