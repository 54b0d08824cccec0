"""What NGT costs beside its dot-product twins: training steps, forwards, tokens generated.

    python scripts/benchmark/ngt.py --device cuda          # published sizes: results/ngt_cuda.json
    python scripts/benchmark/ngt.py                        # CPU, one thread: results/ngt_cpu.json
    python scripts/benchmark/ngt.py --device cuda --works step --modes eager --batches 16
    python scripts/benchmark/ngt.py --quick                # to see that it works; writes nothing

All models of a case are built side by side, have as many parameters, and take turns in every round,
so that a busy machine is busy for all. Rows have the median over rounds, its 20th and 80th
percentile, and the same of the ratio to the vanilla twin within a round. A step is forward, loss,
backward and AdamW with dropout 0.1; on CUDA in bfloat16 autocast with fused AdamW. Memory is the
peak of a step: the model's own weights and optimizer with what the step takes above them; where
CUDA graphs replay it (mode `graphs`), it lies in their pool and is not measured. A token generated
is one of a batch of one, with a cache, in bfloat16 weights on CUDA.

A file that is there keeps the rows of other cases if device and commit are the same.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent / "experiments")]

import torch  # noqa: E402
from gate import first_line  # noqa: E402
from ngt_arms import ARMS, GROUPS, SHAPES, VANILLA, chosen  # noqa: E402
from ngt_subjects import Subject, build, rounds  # noqa: E402
from results import conditions  # noqa: E402
from rich.progress import track  # noqa: E402

from gravity_hf.hub.card_public import public  # noqa: E402
from gravity_hf.training.files import write_json  # noqa: E402

RESULTS = HERE / "results"
VOCABULARY = 8192
# In the order in which they are measured: what is compiled takes longest.
WORKS, MODES = ("step", "forward", "generate"), ("eager", "graphs", "compile")
PROMPT = 64  # tokens before those that are generated
_ROUNDS = {"cpu": 7, "cuda": 20}
_CALLS = {"cpu": 1, "cuda": 5}  # of a model in a round


@dataclass(frozen=True)
class Case:
    """One comparison of all models.

    Attributes:
        shape: a name of `ngt_arms.SHAPES`.
        work: `step`, `forward` or `generate`.
        mode: `eager`; `compile`: torch.compile of the whole model; or `graphs`: the same with CUDA
            graphs, so that the host's time for launches does not count.
        batch: sequences.
        length: tokens of each; of `generate`: that are generated.
    """

    shape: str
    work: str
    mode: str
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def cuda_cases(batches: tuple[int, ...]) -> Iterator[Case]:
    length = SHAPES["large"]["max_position_embeddings"]
    for mode in MODES:
        for batch in batches:
            yield Case("large", "step", mode, batch, length)
    for mode in MODES:
        yield Case("large", "forward", mode, max(batches), length)
    yield Case("large", "generate", "eager", 1, 128)


def cpu_cases() -> Iterator[Case]:
    length = SHAPES["small"]["max_position_embeddings"]
    yield Case("small", "step", "eager", 8, length)
    yield Case("small", "forward", "eager", 1, length)
    yield Case("small", "generate", "eager", 1, 32)
    length = SHAPES["large"]["max_position_embeddings"]
    yield Case("large", "step", "eager", 1, length)
    yield Case("large", "forward", "eager", 1, length)
    yield Case("large", "generate", "eager", 1, 32)


def quick_cases() -> Iterator[Case]:
    for work, length in (("step", 16), ("forward", 16), ("generate", 4)):
        yield Case("quick", work, "eager", 1 if work == "generate" else 2, length)


def measure(case: Case, names: list[str], device: str, turns: int) -> list[dict[str, Any]]:
    """One row for each model. One that cannot run has its error as `note`."""
    subjects: dict[str, Subject] = {}
    notes: dict[str, str] = {}
    vocabulary = 64 if case.shape == "quick" else VOCABULARY
    prompt = 4 if case.shape == "quick" else PROMPT
    if case.mode != "eager":
        torch._dynamo.reset()
        # All models are of one class; beyond the limit they would run eagerly and nobody would see.
        torch._dynamo.config.recompile_limit = 4 * len(ARMS)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    for name in names:
        try:
            subjects[name] = build(
                *(name, case.shape, vocabulary, case.work, device),
                mode=case.mode,
                size=(case.batch, prompt if case.work == "generate" else case.length),
                made=case.length,
            )
        except Exception as error:  # a model that fails must not end the others' comparison
            notes[name] = first_line(error)
    made = case.length if case.work == "generate" else 1
    calls = 1 if case.work == "generate" else _CALLS[device]
    found = rounds(subjects, device, turns, calls, made, VANILLA)
    rows = []
    for name in names:
        row = {"model": name, **asdict(case)}
        if name in subjects:
            row |= subjects[name].known | found[name]
            row["tokens_per_s"] = case.tokens / (row["median_ms"] * made) * 1e3
        rows.append(row if name not in notes else {**row, "note": notes[name]})
    subjects.clear()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    return rows


def kept_rows(file: Path, known: dict[str, Any], new: set[Case]) -> list[dict[str, Any]]:
    """Rows of `file` of other cases, if they were measured on the same device and commit."""
    import json

    if not file.is_file():
        return []
    content = json.loads(file.read_text(encoding="utf-8"))
    same = all(content["conditions"].get(x) == known.get(x) for x in ("device", "commit"))
    rows = content["rows"] if same else []
    return [row for row in rows if Case(**{x: row[x] for x in Case.__annotations__}) not in new]


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--models", nargs="+", default=["main"], help=f"of {[*GROUPS, *ARMS]}")
    add("--works", nargs="+", choices=WORKS, default=list(WORKS))
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--batches", type=int, nargs="+", default=[16, 32], help="of training steps on CUDA")
    add("--shapes", nargs="+", choices=tuple(SHAPES), help="those of the cases that are measured")
    add("--rounds", type=int, help=f"turns of every model (default: {_ROUNDS})")
    add("--threads", type=int, default=1, help="of torch on the CPU (1)")
    add("--commit", help="where the tree is a copy without git")
    add("--quick", action="store_true", help="tiny models, to see that it works")
    add("--output", type=Path, help="JSON (default: results/ngt_DEVICE.json; none with --quick)")
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none; use --device cpu")
    try:
        options.models = [arm.name for arm in chosen(options.models)]
    except ValueError as error:
        parser.error(str(error).replace("--arms", "--models"))
    return options


def cases_of(options: argparse.Namespace) -> list[Case]:
    if options.quick:
        found = quick_cases()
    elif options.device == "cuda":
        found = cuda_cases(tuple(options.batches))
    else:
        found = cpu_cases()
    return [
        case
        for case in found
        if case.work in options.works
        and case.mode in options.modes
        and case.shape in (options.shapes or SHAPES)
    ]


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    torch.set_num_threads(options.threads)
    turns = options.rounds or (2 if options.quick else _ROUNDS[options.device])
    cases = cases_of(options)
    known = conditions(options.device, options.commit) | {
        "command": shlex.join(["python", "scripts/benchmark/ngt.py", *given]),
        "settings": {"vocabulary": VOCABULARY, "rounds": turns, "prompt": PROMPT},
        "quick": options.quick,
    }
    if options.device == "cpu":
        known["threads"] = torch.get_num_threads()
    default = None if options.quick else RESULTS / f"ngt_{options.device}.json"
    output = options.output or default
    rows = kept_rows(output, known, set(cases)) if output else []
    for case in track(cases, "NGT", disable=not sys.stderr.isatty()):
        rows += measure(case, options.models, options.device, turns)
        print("\n".join(_in_words(row) for row in rows[-len(options.models) :]), flush=True)
        if output:  # after every case: a run that is cut short leaves what it has
            write_json(output, public({"conditions": known, "rows": rows}))
    if output:
        print(f"written to {output}")


def _in_words(row: dict[str, Any]) -> str:
    what = (
        f"{row['shape']:<6} {row['work']:<8} {row['mode']:<8} {row['batch']:>2} x {row['length']}"
    )
    if "median_ms" not in row:
        return f"{what:<36} {row['model']:<16} {row.get('note')}"
    memory = f"{row['peak_mib']:9.1f} MiB" if "peak_mib" in row else ""
    ratio = f"{row['ratio']:6.3f} x vanilla" if "ratio" in row else ""
    return f"{what:<36} {row['model']:<16} {row['median_ms']:9.3f} ms {ratio} {memory}"


if __name__ == "__main__":
    main()
