"""Settings of the framework-free training loop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of `TrainingLoop`. A step is one batch, also where gradients are accumulated.

    Attributes:
        max_steps: of one `fit`.
        eval_every: steps between evaluations, the first right after the first step; 0: none.
        log_every: steps between `train_step` lines in the ledger; 0: none.
        checkpoint_every: steps between checkpoints; 0: none.
        checkpoint_dir: folder of the checkpoints.
        use_bekenstein_penalty: whether the term is in the loss.
        use_meta_curvature: whether evaluation moves curvatures. Off by default, as it is a rule of
            thumb that changes the model.
        meta_curvature_lr: how far.
        meta_curvature_smoothing: weight of the past losses in what a new one is compared with.
        grad_accumulation_steps: batches for one optimiser step.
        bekenstein_every: steps between charges of the term, from the first on; published: 10.
        bekenstein_floor: entropy below which nothing is charged, nats; None: none, as published.
        diagnostics_every: steps between measurements of the forces in `fit`; 0: none.
        progress: a bar in the terminal; None: where there is one.
    """

    max_steps: int = 10000
    eval_every: int = 500
    log_every: int = 50
    checkpoint_every: int = 1000
    checkpoint_dir: str = "checkpoints"
    use_bekenstein_penalty: bool = True
    use_meta_curvature: bool = False
    meta_curvature_lr: float = 0.01
    grad_accumulation_steps: int = 1
    meta_curvature_smoothing: float = 0.7
    bekenstein_every: int = 1
    bekenstein_floor: float | None = 0.0
    diagnostics_every: int = 10
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"TrainingConfig.{name}: expected an integer of {least} or more, got {value!r}"
                )


_LEAST = {
    "max_steps": 0,
    "eval_every": 0,
    "log_every": 0,
    "checkpoint_every": 0,
    "grad_accumulation_steps": 1,
    "bekenstein_every": 1,
    "diagnostics_every": 0,
}
