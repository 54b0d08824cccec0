"""What the test of DDP runs in two processes: `torchrun --nproc_per_node 2 THIS FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist
from accelerate.state import PartialState
from safetensors.torch import save_file
from training.governed_trainer.governed_cases import (
    EAGER,
    governed_trainer,
    small,
    state_of,
    tiny_llama,
)

from gravity_hf.training.governed import HierarchySettings

ROWS, STEPS = 4, 8


def trained(folder: Path, processes: int = 1, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model and its report."""
    model = tiny_llama(attention_dropout=0.0)
    hierarchy = HierarchySettings(warmup_steps=2, patience_fraction=0.25)
    governed = small(governors=EAGER, hierarchy=hierarchy)
    rows = {"per_device_train_batch_size": ROWS // processes, "max_steps": STEPS}
    governed_trainer(governed, model, folder, **rows, **options).train()
    return model, governed.report()


def main(folder: Path) -> None:
    PartialState(cpu=True, backend="gloo")
    model, report = trained(folder, processes=2, ddp_backend="gloo")
    rank = dist.get_rank()
    save_file(state_of(model), folder / f"model-{rank}.safetensors")
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    try:
        trained(folder, processes=2, ddp_backend="gloo", ddp_find_unused_parameters=False)
        refused = ""
    except ValueError as error:
        refused = str(error)
    (folder / f"refused-{rank}.txt").write_text(refused)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
