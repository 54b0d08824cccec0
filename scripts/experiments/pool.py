"""Many small training runs side by side: a few worker processes on each GPU, one file of results.

A run is a dict with an `id`. Its result is one line of JSON; a run whose line is there already is
not done again, so a list that was cut short is simply started again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any, TextIO

Run = dict[str, Any]


def run_all(
    runs: list[Run],
    work: Callable[[Run], dict[str, Any]],
    results: Path,
    *,
    workers: int,
    gpus: int,
    minutes: float,
) -> list[dict[str, Any]]:
    """Do the runs that have no result yet; all results of `runs` afterwards, in their order.

    Args:
        runs: what to do, each with a unique `id`.
        work: does one; imported by name in the workers, so it must live in a module.
        results: JSON lines; appended to by this process alone.
        workers: processes in all, dealt out over the GPUs; 0 works in this process.
        gpus: how many GPUs; 0 runs on the CPU.
        minutes: no run is started later than this.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    done = read_results(results)
    todo = [run for run in runs if run["id"] not in done]
    print(f"{len(todo)} runs to do, {len(runs) - len(todo)} done before", flush=True)
    if todo:
        _do(todo, work, results, min(workers, len(todo)), gpus, time.time() + 60 * minutes)
    done = read_results(results)
    return [done[run["id"]] for run in runs if run["id"] in done]


def read_results(results: Path) -> dict[str, dict[str, Any]]:
    """Results by run id; a last line that was cut off is dropped."""
    if not results.exists():
        return {}
    found = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        found[result["id"]] = result
    return found


def training_arguments(
    folder: str, steps: int, learning_rate: float, seed: int, **others: Any
) -> Any:
    """What the runs share: AdamW, warmup, cosine to a tenth, no checkpoints, nothing on the screen;
    on a GPU bfloat16 and compiled. `others` win."""
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    values: dict[str, Any] = {
        "per_device_eval_batch_size": 64,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": min(100, steps // 10),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": cuda,
        "torch_compile": cuda,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
    }
    values |= {"max_steps": steps, "learning_rate": learning_rate, "seed": seed}
    return TrainingArguments(folder, **{**values, **others})


def _do(
    todo: list[Run],
    work: Callable[[Run], dict[str, Any]],
    results: Path,
    workers: int,
    gpus: int,
    deadline: float,
) -> None:
    if not workers:
        _do_here(todo, work, results, deadline)
        return
    context = multiprocessing.get_context("spawn")
    queue, answers = context.Queue(), context.Queue()
    for run in todo:
        queue.put(run)
    for _ in range(workers):
        queue.put(None)
    processes = [
        context.Process(target=_serve, args=(number, gpus, work, queue, answers, deadline))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    working, started = workers, time.time()
    with results.open("a", encoding="utf-8") as file:
        while working:
            try:
                answer = answers.get(timeout=10)
            except Empty:
                if not any(process.is_alive() for process in processes):
                    raise RuntimeError(
                        "pool: expected an answer, got none: the workers died. Try --workers 1"
                    ) from None
                continue
            if answer is None:
                working -= 1
                continue
            if "error" in answer:
                print(f"{answer['id']} FAILED: {answer['error']}", flush=True)
                continue
            _keep(answer, file, started)
    for process in processes:
        process.join()


def _do_here(
    todo: list[Run], work: Callable[[Run], dict[str, Any]], results: Path, deadline: float
) -> None:
    """In this process; what is done is on the disk before the next run starts."""
    started = time.time()
    with results.open("a", encoding="utf-8") as file:
        for run in todo:
            if time.time() >= deadline:
                return
            try:
                _keep({"id": run["id"], "run": run, **work(run)}, file, started)
            except Exception:
                print(f"{run['id']} FAILED: {traceback.format_exc()}", flush=True)


def _keep(answer: dict[str, Any], file: TextIO, started: float) -> None:
    file.write(json.dumps(answer) + "\n")
    file.flush()
    print(f"[{time.time() - started:6.0f} s] {answer['id']}: {_brief(answer)}", flush=True)


def _serve(
    number: int,
    gpus: int,
    work: Callable[[Run], dict[str, Any]],
    queue: Any,
    answers: Any,
    deadline: float,
) -> None:
    # Read when CUDA starts, which is later than this. Of those that this process may see.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % gpus] if gpus else ""
    while (run := queue.get()) is not None and time.time() < deadline:
        try:
            answers.put({"id": run["id"], "run": run, **work(run)})
        except Exception:
            answers.put({"id": run["id"], "error": traceback.format_exc()})
    answers.put(None)


def _brief(answer: dict[str, Any]) -> str:
    values = {k: v for k, v in answer.items() if isinstance(v, float)}
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
