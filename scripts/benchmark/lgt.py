"""LGT's presets beside a transformer encoder of the same sizes around torch's SDPA.

    python scripts/benchmark/lgt.py                      # CPU: results/lgt_cpu.json
    python scripts/benchmark/lgt.py --sweep              # and lengths from 64 to 2048
    python scripts/benchmark/lgt.py --device cuda        # bf16, lengths to 16384: lgt_cuda.json
    python scripts/benchmark/lgt.py --quick              # to see that it works; writes nothing

Both are called in turns, so that a busy machine is busy for both; rows have median, 20th and 80th
percentile and the least of the calls, in ms. Both have a vocabulary of 1000, an untied head and
dropout 0.1 in training. An LGT in evaluation mode keeps its table of distances: the first call,
which makes it, is not timed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lgt_calls import Model, build, calls_in_turns, peak_mib, prepare, weight_bytes
from results import conditions
from rich.progress import track

from gravity_hf.hub.card_public import public
from gravity_hf.models.lgt import LGT_PRESETS, LGTConfig
from gravity_hf.training.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
OUTPUT_HELP = "JSON (default: results/lgt_DEVICE.json; nothing with --quick or --preset)"
VOCABULARY = 1000
STEP = (8, 128)  # batch and length of a training step
_LENGTHS, _SWEEP = (128, 512), (64, 128, 256, 512, 1024, 2048)
_CUDA_LENGTHS = (512, 2048, 4096, 8192, 16384)
_CUDA_STEP_LENGTHS = (512, 2048, 8192)
_CUDA_PATHS = ("triton", "flex", "chunked")
_DTYPES = ("float32", "float16", "int8")


@dataclass(frozen=True)
class Case:
    """One comparison: `paths` of the LGT, and the peer, at one shape.

    Attributes:
        preset: a name of `LGT_PRESETS`.
        work: `forward` or `step`: forward, backward and AdamW.
        causal: whether tokens see what comes after them.
        dtype: of the weights: float32, float16, bfloat16 or int8 (torchao, weights only).
        paths: implementations of `gravity_attention`.
    """

    preset: str
    work: str
    batch: int
    length: int
    causal: bool
    dtype: str
    paths: tuple[str, ...] = ("auto",)

    @property
    def models(self) -> tuple[Model, ...]:
        """The peer is no int8: what is asked there is what 8 bits do to an LGT."""
        peer = () if self.dtype == "int8" else (Model("sdpa", "sdpa"),)
        return (*peer, *(Model("lgt", path) for path in self.paths))


def cpu_cases(presets: tuple[str, ...], lengths: tuple[int, ...]) -> Iterator[Case]:
    for preset in presets:
        for causal in (False, True):
            for length in lengths:
                yield Case(preset, "forward", 1, length, causal, "float32")
            yield Case(preset, "step", *STEP, causal, "float32")
        for dtype in _DTYPES[1:]:
            yield Case(preset, "forward", 1, STEP[1], True, dtype)


def cuda_cases(presets: tuple[str, ...]) -> Iterator[Case]:
    for preset in presets:
        for work, lengths in (("forward", _CUDA_LENGTHS), ("step", _CUDA_STEP_LENGTHS)):
            for length in lengths:
                yield Case(preset, work, 1, length, True, "bfloat16", _CUDA_PATHS)


def quick(case: Case) -> Case:
    """The same in seconds: one short row, to see that it works."""
    return replace(case, batch=min(case.batch, 2), length=min(case.length, 16))


def measure(case: Case, device: str, seconds: float) -> list[dict[str, Any]]:
    """One row for each model of `case`. One that cannot run has its error as `note`."""
    length = max(case.length, 512)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": length}
    config = LGTConfig.from_preset(case.preset, **sizes, is_causal=case.causal)
    ids = torch.randint(VOCABULARY, (case.batch, case.length + 1), device=device)
    calls, known, notes = {}, {}, {}
    for model in case.models:
        try:
            module = build(model, config, case.dtype, device, case.work == "step")
            calls[model] = prepare(module, ids, case.work)
            calls[model]()
            known[model] = {
                "parameters": sum(p.numel() for p in module.parameters()),
                "weights_bytes": weight_bytes(module),
                "peak_mib": peak_mib(calls[model], device),
            }
        except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
            calls.pop(model, None)
            notes[model] = " ".join(str(error).split())[:160] or type(error).__name__
    times = calls_in_turns(calls, device, seconds) if calls else {}
    return [_row(case, m, known.get(m, {}), times.get(m), notes.get(m)) for m in case.models]


def _row(
    case: Case,
    model: Model,
    known: dict[str, Any],
    times: dict[str, Any] | None,
    note: str | None,
) -> dict[str, Any]:
    shape = {"batch": case.batch, "length": case.length, "causal": case.causal}
    row = {"preset": case.preset, "model": model.kind, "path": model.path, "work": case.work}
    row |= {**shape, "dtype": case.dtype, **known, **(times or {})}
    if times:
        row["tokens_per_s"] = case.batch * case.length / times["median_ms"] * 1e3
    return row if note is None else {**row, "note": note}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", action="append", choices=list(LGT_PRESETS), help="repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sweep", action="store_true", help=f"forward at {_SWEEP} on the CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each case (3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (1)")
    parser.add_argument("--commit", help="where the tree is a copy without git")
    parser.add_argument("--quick", action="store_true", help="short rows, to see that it works")
    parser.add_argument("--output", type=Path, help=OUTPUT_HELP)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    presets = tuple(options.preset or LGT_PRESETS)
    cpu = options.device == "cpu"
    lengths = _SWEEP if options.sweep else _LENGTHS
    cases = list(cpu_cases(presets, lengths) if cpu else cuda_cases(presets))
    if options.quick:
        cases = list(dict.fromkeys(quick(case) for case in cases))
    rows = []
    for case in track(cases, "LGT", disable=not sys.stderr.isatty()):
        rows += measure(case, options.device, 0.0 if options.quick else options.seconds)
        print("\n".join(_in_words(row) for row in rows[-len(case.models) :]), flush=True)
    known = conditions(options.device, options.commit) | {
        "command": shlex.join(["python", "scripts/benchmark/lgt.py", *given]),
        "threads": torch.get_num_threads(),
        "settings": {"vocabulary": VOCABULARY, "seconds": options.seconds},
        "quick": options.quick,
    }
    whole = None if options.quick or options.preset else RESULTS / f"lgt_{options.device}.json"
    if output := options.output or whole:
        print(f"written to {write_json(output, public({'conditions': known, 'rows': rows}))}")


def _in_words(row: dict[str, Any]) -> str:
    sight = "causal" if row["causal"] else "both ways"
    what = f"{row['preset']:<12} {row['model']}/{row['path']:<8} {row['work']:<8}"
    shape = f"{row['batch']} x {row['length']:<6} {sight:<10} {row['dtype']:<9}"
    if "median_ms" not in row:
        return f"{what} {shape} {row.get('note')}"
    return f"{what} {shape} {row['median_ms']:8.2f} ms, {row['peak_mib']:8.1f} MiB"


if __name__ == "__main__":
    main()
