"""Shared by the tests of the command line: how to call it, and the smallest demonstration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner, Result

from gravity_hf.cli.demo.results import DemoResults
from gravity_hf.cli.demo.settings import DemoSettings
from gravity_hf.cli.main import app

TINY = DemoSettings(
    hidden_size=48,
    intermediate_size=64,
    layers=2,
    head_dim=8,
    length=32,
    host_steps=12,
    heal_steps=3,
    heal_batch=2,
    calibration_windows=4,
    validation_windows=4,
    encoder_paragraphs=3,
    encoder_tokens=32,
    encoder_softnesses=(1.0,),
    sample_bytes=12,
)


def run(*arguments: object) -> Result:
    """The command line with these arguments, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@dataclass(frozen=True)
class DemoRun:
    results: DemoResults
    out: Path
    screen: str
