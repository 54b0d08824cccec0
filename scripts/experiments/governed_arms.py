"""The arms of the experiment on governed training: what is trained, and how it is governed."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

MODELS = ("leanformer", "llama")
PLAIN, GOVERNED = "plain", "governed"
# Each leaves something of `governed` out, or is the library's defaults in its place.
ABLATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no_hierarchy": {"hierarchy": None},
    "no_budget": {"budget": None},
    "no_freezing": {"freeze": False},
    "rates_only": {"hierarchy": None, "freeze": False},
    "freezing_only": {"hierarchy": None, "budget": None},
}
# Plain training that is given what a governed arm had: its average rate, its share of frozen
# arithmetic at random, its arithmetic in fewer steps, its time. The arm whose it is:
MATCHED = {
    "rate_matched": GOVERNED,
    "budget_rate_matched": "rates_only",
    "random_freezing": GOVERNED,
    "equal_flops": GOVERNED,
    "equal_time": GOVERNED,
}
ARMS = (PLAIN, GOVERNED, *ABLATIONS, *MATCHED)
# What three or four minutes of a GPU are enough for.
FEW_ARMS = (PLAIN, GOVERNED, "rates_only", "freezing_only", "random_freezing", "equal_flops")

_LEAN = {
    "attention": "dot_product",
    "sink_tokens": 2,
    "local_window": 8,
    "feed_forward_block": 8,
    "gate_rank": 4,
    "screen_dim": 8,
}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        **{"steps": 400, "rows": 8, "length": 64, "rate": 3e-3, "validation_windows": 64},
        "train_bytes": 4_000_000,
        "overrides": {
            "leanformer": {
                **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
                **{"intermediate_size": 96, "attention_rank": 12, "feed_forward_rank": 12},
                "attention_top_k": 32,
                **_LEAN,
            },
            "llama": {
                **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
                **{"num_key_value_heads": 2, "intermediate_size": 96},
                "tie_word_embeddings": True,
            },
        },
    },
    "gpu": {
        **{"steps": 300, "rows": 64, "length": 256, "rate": 2e-3, "validation_windows": 256},
        "train_bytes": 100_000_000,
        "overrides": {
            "leanformer": {
                **{"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
                **{"intermediate_size": 768, "attention_rank": 64, "feed_forward_rank": 64},
                **{**_LEAN, "attention_top_k": 64, "local_window": 32, "screen_dim": 16},
            },
            "llama": {
                **{"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
                **{"num_key_value_heads": 2, "intermediate_size": 768},
                "tie_word_embeddings": True,
            },
        },
    },
}
PRESETS["quick"] = {
    **PRESETS["cpu"],
    **{"steps": 8, "rows": 2, "length": 16, "validation_windows": 4, "train_bytes": 1_000_000},
}


def settings_of(arm: str, steps: int) -> dict[str, Any] | None:
    """What `GovernedTraining.from_dict` takes for an arm that is governed; None for the others.

    Windows are fractions of the run, as the defaults are meant for runs of thousands of steps. The
    thresholds of `governed` are such that groups converge within it; those of `defaults` are the
    library's.
    """
    if arm != GOVERNED and arm not in ABLATIONS:
        return None
    window = max(2, steps // 20)
    governors: dict[str, Any] = {
        **{"cooling_window": 2 * window, "confirmation_window": 2 * window, "ema_decay": 0.95},
        "probe_interval": 2 * window,
    }
    if arm != "defaults":
        governors |= {
            **{"cooling_threshold": 0.5, "resume_threshold": 0.6, "converged_threshold": 0.45},
            **{"reactivation_delta": 0.5, "update_threshold": None},
        }
    return {
        "governors": governors,
        "hierarchy": {"warmup_steps": window},
        "budget": {"eval_window": window},
        # Every arm is evaluated at the same steps, and nothing is written.
        **{"evaluation": None, "audit": None, "count_flops": False},
        **ABLATIONS.get(arm, {}),
    }


class RandomFreezing(TrainerCallback):
    """Freezes groups by a schedule that knows nothing of the training.

    Args:
        members: parameters by group.
        schedule: for each window of `window` steps, the groups that are frozen in it.
        window: optimiser steps.
    """

    def __init__(self, members: dict[str, Any], schedule: list[set[str]], window: int) -> None:
        self.members, self.schedule, self.window = members, schedule, window

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from gravity_hf.training.governed.freezing import freeze_all_but

        place = min(state.global_step // self.window, len(self.schedule) - 1)
        freeze_all_but(self.members, set(self.members) - self.schedule[place])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from gravity_hf.training.governed.freezing import freeze_all_but

        freeze_all_but(self.members, set(self.members))


def random_schedule(
    savings: dict[str, float], wanted: float, windows: int, seed: int
) -> list[set[str]]:
    """Groups frozen in each window, drawn until the mean saving of a window is `wanted`.

    Args:
        savings: of arithmetic, by the group that is frozen.
        wanted: mean over all windows, in the unit of `savings`.
        windows: how many.
        seed: of the draw.
    """
    import random

    draw = random.Random(seed)
    pairs = [(window, group) for window in range(windows) for group in sorted(savings)]
    draw.shuffle(pairs)
    schedule: list[set[str]] = [set() for _ in range(windows)]
    left = wanted * windows
    for window, group in pairs:
        # One group learns in every window, and no window goes further than half of its saving over.
        fits = len(schedule[window]) < len(savings) - 1 and savings[group] <= 2 * left
        if fits and savings[group] > 0:
            schedule[window].add(group)
            left -= savings[group]
    return schedule


class Clock(TrainerCallback):
    """Seconds from the first step to the end, evaluations left out: of the process on a CPU, which
    other work on the machine adds little to; of the wall on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0
        self._started: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._started is None:
            self._started = self._now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer has decided by now whether it evaluates after this step.
        if control.should_evaluate:
            self._stop()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._started is not None:
            self.seconds += self._now() - self._started
            self._started = None

    def _now(self) -> float:
        import time

        import torch

        if self.device != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()
