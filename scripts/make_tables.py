"""Write README's tables of results from the result files, so that no number is typed by hand.

    python scripts/make_tables.py            # rewrite the tables in README.md
    python scripts/make_tables.py --check    # exit 1 if they are not what the files say

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gravity_hf.integration.support_table import (
    PROMISE_HEADERS,
    SUMMARY_HEADERS,
    SupportTable,
    promise_counts,
    summary,
    support_table,
    unreached,
)
from gravity_hf.training.files import write_text

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "experiments")]

import geolip_tables  # noqa: E402
import knowledge_tables  # noqa: E402
import lean_tables  # noqa: E402
import lgt_experiment_tables  # noqa: E402
import lgt_tables  # noqa: E402
import ngt_tables  # noqa: E402
from table_text import (  # noqa: E402
    Rows,
    benchmark_conditions,
    experiment_conditions,
    markdown,
)

RESULTS = ROOT / "scripts" / "experiments" / "results"
BENCHMARKS = ROOT / "scripts" / "benchmark" / "results"
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def read_lines(name: str, folder: Path = RESULTS) -> Rows:
    """The results in a file of JSON lines."""
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def mean_and_spread(values: Iterable[float], signed: bool = False) -> str:
    """`mean ± standard deviation` over seeds; the mean alone where there is one seed."""
    values = list(values)
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def by_seed(rows: Rows, arm: str, rate: float | None = None) -> dict[int, dict[str, Any]]:
    """The runs of an arm by seed, of one learning rate if given."""
    return {
        row["run"]["seed"]: row
        for row in rows
        if row["run"]["arm"] == arm and rate in (None, row["run"].get("learning_rate"))
    }


def best_control(rows: Rows) -> tuple[float, dict[int, dict[str, Any]]]:
    """The control at the learning rate that serves it best, which is what the rows are held to."""
    rates = {row["run"]["learning_rate"] for row in rows if row["run"]["arm"] == "host"}
    controls = {rate: by_seed(rows, "host", rate) for rate in rates}
    best = min(
        rates, key=lambda rate: statistics.fmean(r["healed"] for r in controls[rate].values())
    )
    return best, controls[best]


def conversion_rows(rows: Rows, arms: dict[str, str]) -> list[list[str]]:
    rate, control = best_control(rows)
    host = f"dot product (the host, at its best of three learning rates, {rate:g})"
    cells = [_conversion_row(host, control, control, {})]
    for arm, title in arms.items():
        runs = by_seed(rows, arm)
        if runs:
            first = next(iter(runs.values()))
            cells.append(_conversion_row(title, runs, control, first["attention_converted"]))
    return cells


def _conversion_row(
    title: str,
    runs: dict[int, dict[str, Any]],
    control: dict[int, dict[str, Any]],
    attention: dict[str, Any],
) -> list[str]:
    seeds = sorted(set(runs) & set(control))
    gaps = [runs[seed]["healed"] - control[seed]["healed"] for seed in seeds]
    healed = [runs[seed].get("attention_healed") for seed in seeds]
    contrast, softness = "–", "–"
    if attention:
        before = statistics.fmean(
            runs[seed]["attention_converted"]["contrast_median"] for seed in seeds
        )
        after = statistics.fmean(h["contrast_median"] for h in healed)
        contrast = f"{before:.2f} → {after:.2f}"
        softness = f"{statistics.fmean(h['softness_median'] for h in healed):.2g}"
    return [
        title,
        mean_and_spread(runs[seed]["raw"] for seed in seeds),
        mean_and_spread(runs[seed]["healed"] for seed in seeds),
        "–" if runs is control else mean_and_spread(gaps, signed=True),
        softness,
        contrast,
        str(len(seeds)),
    ]


_CONVERSION_HEADERS = [
    "attention",
    "converted",
    "healed",
    "minus healed host",
    "softness, healed",
    "contrast",
    "seeds",
]


def conversion() -> str:
    rows = read_lines("conversion.jsonl")
    arms = {
        "published": "force, Gravity-2's constants",
        "force euclidean f=1": "force, euclidean, f = 1",
        "power euclidean f=1": "power, euclidean, f = 1",
        "force lifted f=0": "force, lifted, f = 0",
        "force lifted f=0.25": "force, lifted, f = 0.25",
        "force lifted f=1": "force, lifted, f = 1",
        "power lifted f=0": "power, lifted, f = 0",
        "power lifted f=0.25": "power, lifted, f = 0.25",
        "power lifted f=1": "power, lifted, f = 1",
    }
    return markdown(_CONVERSION_HEADERS, conversion_rows(rows, arms)) + experiment_conditions(rows)


def recipes() -> str:
    """What fits, budgets, a teacher and more softness add, on the small host."""
    rows = read_lines("conversion_small.jsonl")
    arms = {
        "force euclidean f=1": "force, euclidean, f = 1",
        "force euclidean fitted": "force, euclidean, fitted",
        "power euclidean f=1": "power, euclidean, f = 1",
        "power euclidean fitted": "power, euclidean, fitted",
        "force lifted f=0.25": "force, lifted, f = 0.25",
        "force lifted f=0.25 fitted": "..., fitted",
        "force lifted f=0.25 distilled": "..., healed with the host's logits",
        "force lifted f=0.25 matched": "..., healed with the host's attention outputs",
        "force lifted KL<=0.01": "force, lifted, KL at most 0.01",
        "force lifted f=1": "force, lifted, f = 1",
        "force lifted f=4": "force, lifted, f = 4",
        "power lifted f=0.25": "power, lifted, f = 0.25",
        "power lifted f=0.25 fitted": "..., fitted",
        "power lifted KL<=0.01": "power, lifted, KL at most 0.01",
        "power lifted f=1": "power, lifted, f = 1",
        "power lifted f=4": "power, lifted, f = 4",
    }
    return markdown(_CONVERSION_HEADERS, conversion_rows(rows, arms)) + experiment_conditions(rows)


def granularity() -> str:
    large, small = read_lines("conversion.jsonl"), read_lines("conversion_small.jsonl")
    names = {"": "query head", " kv_head": "KV head", " layer": "layer"}
    recipes = {
        "published": "force, Gravity-2's constants",
        "force lifted f=0": "force, lifted, f = 0",
        "force lifted f=1": "force, lifted, f = 1",
        "published power": "power, Gravity-2's constants",
        "power lifted f=0": "power, lifted, f = 0",
        "power lifted f=1": "power, lifted, f = 1",
    }
    headers = ["healed, minus the healed host"]
    headers += [f"{size}, per {name}" for size in ("9.5 M", "1 M") for name in names.values()]
    table = []
    for recipe, title in recipes.items():
        cells = [_gap(rows, recipe + suffix) for rows in (large, small) for suffix in names]
        table.append([title, *cells])
    return markdown(headers, table) + experiment_conditions(large) + experiment_conditions(small)


def _gap(rows: Rows, arm: str) -> str:
    _, control = best_control(rows)
    runs = by_seed(rows, arm)
    gaps = [runs[seed]["healed"] - control[seed]["healed"] for seed in sorted(runs)]
    return mean_and_spread(gaps, signed=True) if gaps else "–"


def from_scratch() -> str:
    headers = ["trained from scratch", "softmax(q.k)", "force", "power", "power minus softmax"]
    table = []
    stages = {
        "bytes": ("loss", "Qwen2 shape, 9.5 M, bytes of the standard library, 1000 steps"),
        "shakespeare": ("best_loss", "GPT-2 shape, 10.8 M, TinyShakespeare characters, 5000 steps"),
    }
    for stage, (measure, title) in stages.items():
        rows = read_lines(f"from_scratch_{stage}.jsonl")
        arms = {arm: by_seed(rows, arm) for arm in ("softmax", "force", "power")}
        seeds = sorted(set.intersection(*(set(runs) for runs in arms.values())))
        cells = [mean_and_spread(runs[s][measure] for s in seeds) for runs in arms.values()]
        gaps = [arms["power"][s][measure] - arms["softmax"][s][measure] for s in seeds]
        label = f"{title}, {len(seeds)} seeds"
        table.append([label, *cells, mean_and_spread(gaps, signed=True)])
    return markdown(headers, table) + experiment_conditions(rows)


def encoder() -> str:
    result = json.loads((RESULTS / "calibration_stages_minilm.json").read_text(encoding="utf-8"))
    headers = ["all-MiniLM-L6-v2, no training", "softness", "contrast", "KL, nats", "mean cosine"]
    table = [
        [
            row["name"],
            f"{row['softness_median']:.2g}",
            f"{row['held_out_contrast_median']:.2f}",
            f"{row['held_out_kl_mean']:.4f}",
            f"{row['cosine_mean']:.4f}",
        ]
        for row in result["rows"]
    ]
    return markdown(headers, table) + experiment_conditions([result])


def transfer() -> str:
    """Attention transfer on the encoder: every stage, over the seeds."""
    files = sorted(RESULTS.glob("minilm_transfer_*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    headers = ["all-MiniLM-L6-v2", "stage", "mean cosine", "softness", "contrast", "seeds"]
    table = []
    for constants, law in sorted(
        {(r["options"]["constants"], r["options"]["law"]) for r in results}
    ):
        runs = [
            r
            for r in results
            if (r["options"]["constants"], r["options"]["law"]) == (constants, law)
        ]
        for stages in zip(*(run["rows"] for run in runs), strict=True):
            softness = statistics.fmean(row["softness_median"] for row in stages)
            contrast = statistics.fmean(row["contrast_median"] for row in stages)
            table.append(
                [
                    f"{law}, {'f = 1' if constants == 'calibrated' else 'Gravity-2'}",
                    stages[0]["stage"],
                    mean_and_spread(row["cosine_mean"] for row in stages),
                    f"{softness:.2g}",
                    f"{contrast:.2f}",
                    str(len(runs)),
                ]
            )
    return markdown(headers, table) + experiment_conditions(results)


def kernels(folder: Path = BENCHMARKS) -> str:
    """One shape's times and memory, then every target: attention, and whole training steps."""
    rows = read_csv("kernels_table.csv", folder)
    reports = [
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("kernels_table.json", "training_step.json")
    ]
    times = _times([row for row in rows if row["launch"] == "eager"], keys=4096, width=128)
    lines = [line for report in reports for line in report["targets"]]
    ends = (benchmark_conditions(report["conditions"]) for report in reports)
    return times + "\n" + _targets(lines) + "\n" + "\n".join(dict.fromkeys(ends)) + "\n"


def cpu_cost(folder: Path = BENCHMARKS) -> str:
    """The operator beside SDPA on a CPU, at one length."""
    known = json.loads((folder / "cpu_float32.json").read_text(encoding="utf-8"))["conditions"]
    rows = read_csv("cpu_float32.csv", folder)
    return _times(rows, keys=8192) + "\n" + benchmark_conditions(known) + "\n"


def read_csv(name: str, folder: Path = BENCHMARKS) -> Rows:
    """The rows of a benchmark; what looks like a number is one, an empty field None."""
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> float | str | None:
    try:
        return float(text)
    except ValueError:
        return text or None


_PROVIDERS = {
    "sdpa": "SDPA, torch's choice",
    "sdpa_cudnn": "SDPA, cuDNN",
    "sdpa_flash": "SDPA, flash",
    "flex_attention": "FlexAttention",
    "gravity_triton": "gravity, triton",
    "gravity_flex": "gravity, flex",
    "gravity_chunked": "gravity, chunked",
    "gravity_eager": "gravity, eager",
    "gravity_reference": "gravity, reference",
}


def _times(rows: Rows, **shape: float) -> str:
    """Forward and backward of every provider at one shape. A dash: it did not run."""
    rows = [row for row in rows if all(row[key] == value for key, value in shape.items())]
    table = []
    for provider, title in _PROVIDERS.items():
        mine = [row for row in rows if row["provider"] == provider]
        for law, distance in dict.fromkeys((row["law"], row["distance"]) for row in mine):
            found = {r["pass"]: r for r in mine if (r["law"], r["distance"]) == (law, distance)}
            name = title if law == "dot" else f"{title}, {law}"
            name += ", lifted" if distance == "lifted" else ""
            works = (found.get(work, {}) for work in ("forward", "backward"))
            table.append([name, *(cell for row in works for cell in _cells(row))])
    first = rows[0]
    where = (
        f"{first['dtype']}, batch {first['batch']:g}, {first['heads']:g} heads "
        f"({first['kv_heads']:g} KV) of {first['width']:g}, {first['keys']:g} tokens"
    )
    return markdown([where, "forward", "memory", "backward", "memory"], table)


def _cells(row: dict[str, Any]) -> list[str]:
    time, memory = row.get("p50_ms"), row.get("extra_mib")
    cells = ["–" if time is None else f"{time:.3g} ms" if time < 100 else f"{time:.0f} ms"]
    return [*cells, "–" if memory is None else f"{memory:.0f} MiB"]


def _targets(lines: Rows) -> str:
    """One row for a target: what every law and distance measured, and the worst verdict."""
    order = ("missed", "not measured", "met", "aim reached")
    table = []
    for name in dict.fromkeys(line["name"] for line in lines):
        mine = [line for line in lines if line["name"] == name]
        values = ["–" if x["measured"] is None else f"{x['measured']:.3g}" for x in mine]
        measured = [f"{x['subject']}: {value}" for x, value in zip(mine, values, strict=True)]
        verdict = min((line["verdict"] for line in mine), key=order.index)
        bounds = [mine[0]["at_least"], mine[0]["aim"] or "–"]
        table.append([name, *bounds, "; ".join(measured), verdict])
    return markdown(["target", "at least", "aim", "measured", "verdict"], table)


def support(table: SupportTable | None = None) -> str:
    """How far each kind of model got in the sweep over all model types."""
    table = support_table() if table is None else table
    versions = table.versions
    return (
        markdown(list(SUMMARY_HEADERS), [list(row) for row in summary(table)])
        + "\n"
        + markdown(list(PROMISE_HEADERS), [list(row) for row in promise_counts(table)])
        + f"\n{unreached(table)}\n"
        + f"\ntransformers {versions['transformers']}, torch {versions['torch']}, commit "
        f"{table.commit}, {table.date}.\n"
    )


def parallel() -> str:
    """Two processes against one: the last loss, and the largest difference of any step's."""
    files = {"all weights": "fsdp2.json", "LoRA": "two_processes_cuda.json"}
    rows, conditions = [], {}
    for trained, name in files.items():
        report = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        conditions, runs = report["conditions"], report["runs"]
        for run, result in runs.items():
            strategy, dtype = run.split("-")
            peer = runs[f"single-{dtype}" if strategy != "single" else "single-float32"]["losses"]
            gap = max(abs(a - b) for a, b in zip(result["losses"], peer, strict=True))
            against = "one process" if strategy != "single" else "float32"
            title = f"{trained}, {report['settings']['steps']} steps, {strategy}, {dtype}"
            shown = "–" if run == "single-float32" else f"{gap:.2g} from {against}"
            rows.append([title, f"{result['losses'][-1]:.4f}", shown])
    device, versions = conditions["device"], conditions["versions"]
    return (
        markdown(["trained, beside float32 masses", "last loss", "largest difference"], rows)
        + f"\n2 x {device}, NCCL, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {conditions['date'][:10]}.\n"
    )


def formats(folder: Path = BENCHMARKS) -> str:
    """What every export format weighs and loses."""
    result = json.loads((folder / "formats.json").read_text(encoding="utf-8"))
    headers = ["model", "format", "size, MB", "max error / largest output", "mean KL, nats"]
    table = []
    for row in result["rows"]:
        measured = row["measured"]
        size = f"{row['bytes_after'] / 1e6:.1f} of {row['bytes_before'] / 1e6:.1f}"
        divergence, cosine = measured.get("kl_mean"), measured.get("cosine_mean")
        shown = [
            "–" if divergence is None else f"{divergence:.1e}",
            "–" if cosine is None else f"{max(0.0, 1 - cosine):.1e}",
        ]
        error = f"{measured['relative_error']:.1e}"
        table.append([row["model"], row["format"], size, error, *shown])
    return (
        markdown([*headers, "1 − mean cosine"], table)
        + f"\n{benchmark_conditions(result['conditions'])}\n"
    )


def space(folder: Path = BENCHMARKS) -> str:
    """How long a visitor of the Space waits."""
    result = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    columns = ("median_s", "max_s", "cpu_median_s")
    table = [
        [f"{row['model']}, {row['what']}", str(row["answers"]), *(f"{row[c]:.2f}" for c in columns)]
        for row in result["rows"]
    ]
    headers = ["seconds per answer", "answers", "median", "longest", "CPU, median"]
    return markdown(headers, table) + f"\n{benchmark_conditions(result['conditions'])}\n"


TABLES: dict[str, Callable[[], str]] = {
    "lgt-presets": lgt_tables.presets_text,
    "lgt-speed": lambda: lgt_tables.speed_text(BENCHMARKS),
    "lgt-bits": lambda: lgt_tables.bits_text(BENCHMARKS),
    "lgt-cuda": lambda: lgt_tables.cuda_text(BENCHMARKS),
    "lgt-mirror": lambda: lgt_tables.mirror_text(BENCHMARKS),
    "lgt-recall": lambda: lgt_experiment_tables.recall_text(RESULTS),
    "lgt-language-model": lambda: lgt_experiment_tables.language_model_text(RESULTS),
    **ngt_tables.tables(RESULTS, BENCHMARKS),
    **geolip_tables.tables(RESULTS),
    **lean_tables.tables(BENCHMARKS, RESULTS),
    **knowledge_tables.tables(RESULTS),
    "parallel": parallel,
    "formats": formats,
    "space": space,
    "support": support,
    "conversion": conversion,
    "recipes": recipes,
    "granularity": granularity,
    "from-scratch": from_scratch,
    "encoder": encoder,
    "transfer": transfer,
    "kernels": kernels,
    "cpu-cost": cpu_cost,
}


def with_tables(text: str) -> str:
    """`text` with every marked table replaced by what the result files say."""

    def replaced(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"README.md: expected a table of {list(TABLES)}, got {match[2]!r}")
        return f"{match[1]}{TABLES[match[2]]()}{match[4]}"

    return _TABLE.sub(replaced, text)


def write_tables() -> None:
    """Bring README.md up to date."""
    file = ROOT / "README.md"
    text = file.read_text(encoding="utf-8")
    made = with_tables(text)
    if made != text:
        write_text(file, made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    options = parser.parse_args()
    try:
        if not options.check:
            write_tables()
            return
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        stale = with_tables(text) != text
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.exit("README.md: tables are stale: python scripts/make_tables.py" if stale else 0)


if __name__ == "__main__":
    main()
