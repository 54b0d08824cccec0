"""scripts/convert.py as it is started: killed and started again, wrong calls, several processes."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli.conversions import convert, flags, losses, ran, rows, save_decoder, tensors

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert.py"
# One thread, as `convert` of the tests takes: sums in another order end in other bits.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Long enough to be killed on the way; dropout, so that the random numbers must go on, too.
LONG = {"transfer_steps": 60, "lora_steps": 60, "lora_dropout": 0.1, "control": False}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("host") / "decoder")


@pytest.fixture(scope="module")
def uninterrupted(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    convert(host, out, **LONG)
    return out


def kill_in(step: str, host: Path, out: Path) -> tuple[Path, str]:
    """Start the script, kill it (SIGKILL) once `step` has a checkpoint; that step's folder, and
    what the script had printed."""
    folder = out / "work" / f".{step}"
    command = [sys.executable, "-u", str(SCRIPT), *flags(host, out, **LONG)]
    with (out.parent / f"{step}.txt").open("w+") as screen:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=screen)
        try:
            for _ in wait(300):
                assert process.poll() is None, "ended before it could be killed"
                if list(folder.glob("checkpoint-*/trainer_state.json")):
                    break
        finally:
            process.kill()
            process.wait()
        screen.seek(0)
        printed = screen.read()
    assert folder.is_dir() and not (out / "work" / step).exists(), "killed too late"
    assert not (out / "config.json").exists()
    return folder, printed


def wait(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.01)
    raise AssertionError(f"nothing happened in {seconds} s")


def assert_same_end(out: Path, other: Path) -> None:
    """Every loss and every tensor of adapter, masses and model, bit for bit."""
    assert losses(out) == losses(other)
    found, expected = tensors(out), tensors(other)
    assert found.keys() == expected.keys()
    assert any("work/lora" in name for name in expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


def test_killed_in_every_training_it_ends_bit_for_bit_as_if_it_had_not_been(
    host: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Killed in transfer, then in LoRA. It goes on once from that checkpoint, and once with it cut
    off in the writing."""
    out = tmp_path / "out"
    kill_in("transfer", host, out)
    folder, screen = kill_in("lora", host, out)
    assert ran(screen) == ["transfer", "lora"]
    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)

    _, screen = convert(host, out, **LONG)
    assert ran(screen)[0] == "lora"
    assert_same_end(out, uninterrupted)

    newest = max(
        (damaged / folder.relative_to(out)).glob("checkpoint-*"),
        key=lambda path: int(path.name.split("-")[1]),
    )
    with (newest / "adapter_model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    convert(host, damaged, **LONG)
    assert_same_end(damaged, uninterrupted)


def test_an_error_is_one_line_and_leaves_nothing(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [str(SCRIPT), *flags(host, tmp_path / "out", samples=100_000)]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: samples: expected at least 100000")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_give_what_one_gives_and_save_it_whole(host: Path, tmp_path: Path) -> None:
    """DDP over gloo: half the batch on each; one process writes."""
    one, two = tmp_path / "one", tmp_path / "two"
    convert(host, one, batch_size=2, prompts=[])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--standalone", str(SCRIPT), *flags(host, two, batch_size=1, prompts=[])]
    done = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Saved to") == 1
    found, expected = tensors(two), tensors(one)
    assert found.keys() == expected.keys()
    # Whole tensors: Adam turns the rounding of a gradient near zero into a step of its own size,
    # so that single elements say nothing. Another order of the data moves adapters by far more.
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    for key, row in rows_of(one).items():
        assert rows_of(two)[key]["loss"] == pytest.approx(row["loss"], abs=1e-5)


def rows_of(out: Path) -> dict[str, dict]:
    import json

    return rows(json.loads((out / "results.json").read_text()))
