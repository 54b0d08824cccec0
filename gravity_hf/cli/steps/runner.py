"""Runs steps one after the other, on one process or several, and none of them twice."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed

from .processes import join_processes
from .work import Step, WorkFolder


@dataclass
class Runner:
    """What steps share. Each command adds its own settings.

    `out`: where the result goes. `work`: what is finished. `processes`: accelerate's PartialState,
    or what stands for it. `device`: of this process. `command`: how to repeat the call. `seed`:
    every step begins with it. `named`: steps that the user left out by name.
    """

    out: Path
    work: WorkFolder
    processes: Any
    device: str
    console: Console
    command: str
    seed: int
    named: tuple[str, ...]

    @cached_property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.processes.is_main_process)

    @property
    def use_cpu(self) -> bool:
        return self.device == "cpu"

    def say(self, text: str, **style: Any) -> None:
        """One line on the screen, of the main process only."""
        if self.is_main:
            self.console.print(text, markup=False, **style)

    def result(self, step: str) -> dict[str, Any] | None:
        """What a step found; None where it was left out or is not finished."""
        return None if step in self.work.skipped else self.work.record(step)

    def run(self) -> None:
        """Every step that is not finished under today's settings, in order."""
        for step in self.work.steps:
            self._run_step(step)

    def _run_step(self, step: Step) -> None:
        name, work = step.name, self.work
        self.processes.wait_for_everyone()
        if name in work.skipped:
            if name in self.named:
                self.say(f"{name}: left out", style="dim")
            return
        record = work.record(name)
        is_there = record is not None and (step.is_intact is None or step.is_intact(self, record))
        why = "its files are not all there" if record is not None else work.why_not_finished(name)
        # Everyone has looked before anyone writes.
        self.processes.wait_for_everyone()
        if is_there:
            self.say(f"{name}: finished before", style="dim")
            return
        self.say(name if why is None else f"{name}, again: {why}")
        started = time.perf_counter()
        if self.is_main:
            work.open(step)
        if step.together:
            self.processes.wait_for_everyone()
        result: dict[str, Any] = {}
        if step.together or self.is_main:
            # A step begins the same way whether or not others ran before it in this process.
            set_seed(self.seed)
            result = step.run(self, work.building(name))
        if self.is_main:
            work.close(step, result, time.perf_counter() - started)
        self.processes.wait_for_everyone()
        # Models and trainers refer to themselves in circles; the next step needs their memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def choose_device(wanted: str) -> tuple[Any, str]:
    """The processes of this run, and the device of this one. `auto` is a GPU where there is one."""
    processes = join_processes(wanted == "cpu")
    if wanted != "auto":
        return processes, wanted
    return processes, str(processes.device)
