"""The same conditions for every test: seeds, no network, no more threads than cores."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Read by huggingface_hub, matplotlib and OpenMP when they are imported, and by child processes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_XDIST_WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if not torch.cuda.is_available():
    # Read by triton when it is imported: kernels run in its interpreter, also on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if IS_XDIST_WORKER:
    # Each worker would otherwise start as many threads as the machine has cores.
    torch.set_num_threads(1)

# Deadlines measure the machine, not the code; in CI a failure must be the same on every run.
settings.register_profile("gravity_hf", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("gravity_hf")


@pytest.fixture(scope="session", autouse=True)
def _thawed_at_the_end() -> Iterator[None]:
    yield
    gc.unfreeze()  # else nanobind reports leaks when the process ends


@pytest.fixture(scope="module", autouse=True)
def _frozen(_thawed_at_the_end: None) -> None:
    """Trainer collects garbage at each start: half a second, if it looks through all modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Whole files to one worker: what a file's tests share is made once, not by every worker."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None
