"""Every size and count of the demonstration, in one frozen place."""

from __future__ import annotations

from dataclasses import dataclass

# What the calibrated and healed model may lose against the host with the same LoRA budget.
ACCEPTED_GAP = 0.02


@dataclass(frozen=True)
class DemoSettings:
    """The defaults fit four minutes on two CPU cores.

    Lengths and windows are in bytes, which are this host's tokens; losses in nats per byte.
    """

    seed: int = 0
    # Of the small model: its matrices gain little from a second one and wait for it on a busy
    # machine, and sums come out the same whatever the number of cores.
    threads: int = 1

    hidden_size: int = 192
    intermediate_size: int = 384
    layers: int = 3
    heads: int = 6
    key_value_heads: int = 2
    head_dim: int = 32

    length: int = 256
    host_steps: int = 1000
    host_batch: int = 2
    host_learning_rate: float = 3e-3

    softness: float = 1.0
    calibration_windows: int = 16

    heal_steps: int = 40
    heal_batch: int = 8
    heal_learning_rate: float = 2e-3
    rank: int = 8
    alpha: int = 16

    validation_windows: int = 64
    train_bytes: int = 8_000_000
    validation_bytes: int = 1_000_000

    encoder_paragraphs: int = 128
    encoder_tokens: int = 128
    encoder_softnesses: tuple[float, ...] = (0.0, 1.0, 4.0, 16.0)

    sample_bytes: int = 320


def demo_settings(seed: int, quick: bool) -> DemoSettings:
    """The full run, or a shorter one for a first look."""
    if not quick:
        return DemoSettings(seed=seed)
    return DemoSettings(
        seed=seed,
        host_steps=400,
        heal_steps=24,
        validation_windows=32,
        encoder_paragraphs=32,
        encoder_softnesses=(0.0, 1.0, 16.0),
    )
