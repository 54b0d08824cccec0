"""NGT against its dot-product twins, and against itself with one thing changed, as language models.

    python scripts/experiments/ngt_language_model.py --device cuda --workers 3 \\
        --data wikitext2=wikitext2-valid.txt,wikitext2-test.txt \\
        --data tinyshakespeare=tinyshakespeare.txt --data stdlib
    python scripts/experiments/ngt_language_model.py --device cuda --arms ablations --data stdlib
    python scripts/experiments/ngt_language_model.py --size small --tokenizer byte  # CPU cores
    python scripts/experiments/ngt_language_model.py --quick                        # to try

`--data NAME=FILE[,FILE]` are text files, whose last tenth is held out; `--data stdlib` is the
source of the Python standard library, of which other files are held out. All models of a text have
as many parameters (feed-forward widths make up for what attention costs) and see the same windows
in the same order for as many steps, with the published dropout of 0.1. For each text every arm gets
the best of the same learning rates, tried in whole runs on a seed that is not used again, then
other seeds.

The number of a run is the lowest of its losses on the held-out text, which is measured at the same
20 steps for all; the last one is kept beside it. Losses are in nats per token and bits per byte.

Seconds are in the file; they are the model's own only where no other worker shared its GPU.

Every run is a file in --out and not done again when the command is; what is left when the minutes
are over is done by the next call, with other arms and texts if so wished: the summary holds all
runs of its size that lie in --out, of models that have the same settings today.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ngt_arms import ARMS, GROUPS, SHAPES, chosen, fingerprint, matched_settings
from ngt_report import by_section, summary, tables
from pool import run_all, training_arguments

HERE = Path(__file__).resolve().parent
SUMMARY = HERE / "results" / "ngt_language_model.json"
STDLIB = "stdlib"
TUNING_SEED = 100
EVALUATIONS = 20
RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)

# Beside the shapes: how long, in passes over the text or in steps, and windows to validate on.
SIZES: dict[str, dict[str, Any]] = {
    "large": {"rows": 32, "passes": 10.0, "validation_windows": 256, "rates": RATES},
    "small": {"rows": 16, "steps": 600, "validation_windows": 256, "rates": (1e-3, 2e-3, 4e-3)},
    "quick": {"rows": 4, "steps": 2, "validation_windows": 8, "rates": (4e-3,)},
}


def job_of(arm: str, data: str, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of an arm on a text, for one worker: what it compiles serves them all."""
    return {
        "id": f"{options.size} {data} {arm}",
        **{"arm": arm, "data": data, "files": options.texts[data], "size": options.size},
        **{"tokenizer": options.tokenizer, "schedule": options.schedule},
        **{"rates": list(options.rates), "seeds": list(options.seeds)},
        **{"folder": str(options.out), "until": time.time() + 60 * options.minutes},
        "keep": options.keep_models,
    }


def run_of(job: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
    schedule = " ".join(f"{name}={value:g}" for name, value in job["schedule"].items())
    model = fingerprint(job["arm"], job["size"])
    name = f"{job['id']} {job['tokenizer']} rate={rate:g} {schedule} seed={seed} {model}"
    kept = {x: job[x] for x in ("arm", "data", "size", "tokenizer", "schedule")}
    return {"id": name, **kept, "rate": rate, "seed": seed, "model": model}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do the runs of a job that are not there yet, until its time is over."""
    left = 0
    tried = [run_of(job, rate, TUNING_SEED) for rate in job["rates"]]
    tuned = [_done(run, job) for run in tried] if len(tried) > 1 else []
    left += tuned.count(None)
    rate = best_rate([x for x in tuned if x]) if len(tried) > 1 else job["rates"][0]
    if not left and rate is not None:
        runs = [_done(run_of(job, rate, seed), job) for seed in job["seeds"]]
        left += runs.count(None)
    return {"left": left}


def best_rate(tuned: list[dict[str, Any]]) -> float | None:
    """The learning rate with the lowest loss; None where none is finite."""
    finite = [x for x in tuned if x["best"] is not None]
    return min(finite, key=lambda x: x["best"])["run"]["rate"] if finite else None


def _done(run: dict[str, Any], job: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run, of now or from before; None: there was no time for it."""
    from gravity_hf.training.files import write_json

    file = Path(job["folder"]) / "runs" / f"{_slug(run['id'])}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    if time.time() > job["until"]:
        return None
    first = run["seed"] == job["seeds"][0] and job["keep"]
    models = Path(job["folder"]) / "models" / _slug(f"{run['data']} {run['arm']}")
    result = train(run, job["files"], models if first else None)
    write_json(file, result)
    best = "not finite" if result["best"] is None else f"{result['best']:.4f}"
    print(f"{run['id']}: {best} in {result['seconds']:.0f} s", flush=True)
    return result


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "=.-" else "-" for letter in text)


@functools.cache
def stream(tokenizer: str, files: tuple[str, ...]) -> Any:
    from gravity_hf.training.streams import load_stream

    return load_stream(tokenizer, list(files) or None)


def train(run: dict[str, Any], files: list[str], kept: Path | None) -> dict[str, Any]:
    """Train one model from scratch; save it in `kept`."""
    import torch
    from transformers.utils import logging

    from gravity_hf.training.pretraining import PretrainArguments, pretrain

    logging.set_verbosity_error()
    # Beyond the limit models would run uncompiled and nobody would see.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    arm, size, shape = ARMS[run["arm"]], SIZES[run["size"]], SHAPES[run["size"]]
    text = stream(run["tokenizer"], tuple(files))
    length = shape["max_position_embeddings"]
    steps = step_count(run["schedule"], len(text.train), size["rows"] * length)
    batch, windows = evaluation_size(len(text.validation) // length, size)
    settings = matched_settings(run["arm"], run["size"], text.vocabulary)
    arguments = PretrainArguments(
        architecture="ngt",
        overrides=json.dumps(settings),
        attention="dot_product" if arm.is_twin else "gravity",
        gravity_scale=arm.scale,
        length=length,
        validation_windows=windows,
        **({"repulsion_weight": arm.repulsion} if arm.repulsion else {}),
    )
    graphs = _graphs()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(
            folder,
            steps,
            run["rate"],
            run["seed"],
            per_device_train_batch_size=size["rows"],
            per_device_eval_batch_size=batch,
            eval_strategy="steps",
            eval_steps=max(1, steps // EVALUATIONS),
            logging_steps=max(1, steps // 100),
        )
        # Trainer prints every loss; they are in the record.
        with contextlib.redirect_stdout(io.StringIO()):
            model, record = pretrain(arguments, training, text)
    if kept is not None:
        model.save_pretrained(kept)
        text.tokenizer.save_pretrained(kept)
    peak = torch.cuda.max_memory_allocated() / 2**30 if training.bf16 else None
    compiled = {"graphs_compiled": _graphs() - graphs, "peak_gib": peak, "steps": steps}
    return {"id": run["id"], "run": run, **measured(record), **compiled} | {
        "intermediate_size": settings["intermediate_size"],
        "validation_tokens": windows * (length - 1),
    }


def step_count(schedule: dict[str, float], tokens: int, each: int) -> int:
    """Steps of `each` tokens: as many as given, or those of so many passes over the text; where
    there are that many, a multiple of the evaluations, so that the last one is at the end."""
    steps = schedule.get("steps")
    wanted = max(1, round(schedule["passes"] * tokens / each if steps is None else steps))
    return wanted - wanted % EVALUATIONS if wanted >= EVALUATIONS else wanted


def evaluation_size(available: int, size: dict[str, Any]) -> tuple[int, int]:
    """Rows of a batch, and windows: whole batches of one size, since another is compiled anew."""
    wanted = min(available, size["validation_windows"])
    batch = max(1, min(size["rows"], wanted))
    return batch, max(batch, wanted - wanted % batch)


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a record of `pretrain`; a loss that is not finite is None."""
    losses = {int(step): _finite(loss) for step, loss in record["evaluations"].items()}
    finite = {step: loss for step, loss in losses.items() if loss is not None}
    best = min(finite, key=lambda step: finite[step], default=None)
    names = ("parameters", "tokens", "seconds", "training", "text", "conditions")
    return {
        "best": None if best is None else finite[best],
        "best_step": best,
        "final": _finite(record["loss"]),
        "evaluations": losses,
        "training_losses": {k: _finite(v) for k, v in record["training_losses"].items()},
        **{name: record[name] for name in names},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", action="append", metavar="NAME=FILE[,FILE]", help=f"repeatable [{STDLIB}]")
    add("--arms", nargs="+", default=["main"], help=f"groups or names: {[*GROUPS, *ARMS]}")
    add("--tokenizer", help="byte, or bpe:SIZE [bpe:8192; of quick and small: byte]")
    add("--size", choices=("large", "small"), default="large", help="the published sizes, or 0.4 M")
    add("--rates", type=float, nargs="+", help="learning rates to try; one: no tuning")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs that are compared")
    add("--steps", type=int, help="of every run, instead of passes over the text")
    add("--passes", type=float, help="over the text [large: 10]")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--gpus", type=int, default=1, help="of --device cuda")
    add("--workers", type=int, default=1, help="processes, over all GPUs; 0: this one")
    add("--minutes", type=float, default=60, help="start no run later than this")
    add("--out", type=Path, default=Path("runs/ngt"), help="runs, models")
    add("--keep-models", action="store_true", help="save the model of every first seed")
    add("--summary", type=Path, help=f"JSON file [large: results/{SUMMARY.name}; else in --out]")
    add("--quick", action="store_true", help="tiny models, 2 steps: to try")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size = "quick"
    size = SIZES[options.size]
    options.tokenizer = options.tokenizer or ("bpe:8192" if options.size == "large" else "byte")
    options.rates = options.rates or list(size["rates"])
    if options.steps and options.passes:
        parser.error("--steps: expected it alone, got --passes, too. Leave one out")
    given = {"steps": options.steps, "passes": options.passes}
    own = {name: size[name] for name in ("steps", "passes") if name in size}
    options.schedule = {name: value for name, value in given.items() if value} or own
    if TUNING_SEED in options.seeds:
        parser.error(f"--seeds: expected others than {TUNING_SEED}, which is that of the tuning")
    try:
        options.arms = chosen(options.arms)
        options.texts = texts_of(options.data or [STDLIB])
    except ValueError as error:
        parser.error(str(error))
    return options


def texts_of(given: list[str]) -> dict[str, list[str]]:
    """Files by the name of their text; the standard library has none."""
    texts = {}
    for text in given:
        name, _, files = text.partition("=")
        texts[name] = [file for file in files.split(",") if file]
        if not texts[name] and name != STDLIB:
            raise ValueError(f"--data: expected {STDLIB} or NAME=FILE[,FILE], got {text!r}")
        missing = [file for file in texts[name] if not Path(file).is_file()]
        if missing:
            raise ValueError(f"--data: expected files, got {missing}, which are none")
    return texts


def jobs_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One worker keeps what it compiled of an arm for the next text. Several would all compile the
    same arm at once: they begin with different ones, and find the others on the disk later."""
    jobs = [job_of(arm.name, data, options) for data in options.texts for arm in options.arms]
    if options.workers > 1:
        return jobs
    return sorted(jobs, key=lambda job: list(ARMS).index(job["arm"]))


def all_runs(out: Path, size: str) -> list[dict[str, Any]]:
    """Results of that size in `out`, by arm and seed; not of models that were other ones then."""
    files = sorted((out / "runs").glob("*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    order = list(ARMS)
    mine = [x for x in found if x["run"]["size"] == size and x["run"]["arm"] in ARMS]
    now = [x for x in mine if x["run"]["model"] == fingerprint(x["run"]["arm"], size)]
    if len(now) < len(mine):
        print(f"{len(mine) - len(now)} runs left out: their arms have other settings now")
    return sorted(now, key=lambda x: (order.index(x["run"]["arm"]), x["run"]["seed"]))


def main(arguments: list[str] | None = None) -> None:
    from gravity_hf.hub.card_public import public
    from gravity_hf.training.files import write_json

    options = parse(arguments)
    jobs = jobs_of(options)
    with tempfile.TemporaryDirectory() as folder:
        # What is done already is known by the files of the runs.
        answers = run_all(
            jobs,
            work,
            Path(folder) / "jobs.jsonl",
            workers=options.workers,
            gpus=options.gpus if options.device == "cuda" else 0,
            minutes=options.minutes,
        )
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", f"scripts/experiments/{Path(__file__).name}", *given])
    runs = all_runs(options.out, options.size)
    compared = [x for x in runs if x["run"]["seed"] != TUNING_SEED]
    if compared:
        tuned = [x for x in runs if x["run"]["seed"] == TUNING_SEED]
        settings = {**SHAPES[options.size], **SIZES[options.size], "size": options.size}
        content = public(summary(compared, tuned, settings, command))
        default = SUMMARY if options.size == "large" else options.out / SUMMARY.name
        file = options.summary or default
        print(f"written to {write_json(file, content)}")
        for section in by_section(content):
            print("\n".join(["", section, *tables(content, section)]))
    left = sum(answer["left"] for answer in answers) + len(jobs) - len(answers)
    if left:
        raise SystemExit(f"error: {left} runs or more failed or were left for later: run it again")


if __name__ == "__main__":
    main()
