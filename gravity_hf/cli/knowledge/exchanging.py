"""`gravity-hf beliefs export | import | convert-delta`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import make_console
from .arguments import Device, Dtype, Key, ModelDir, NewKey, StoreDir
from .opening import open_store


def export(
    directory: ModelDir,
    beliefs: StoreDir,
    key: Key,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Write KEY as a LoRA adapter that peft loads on the same model.

    Example:

        gravity-hf beliefs export model kb geo/varnholt varnholt-adapter
    """
    open_store(directory, beliefs, device, dtype).export_peft(key, out)
    make_console().print(
        f"wrote {out}: peft.PeftModel.from_pretrained(model, {str(out)!r})", markup=False
    )


def import_adapter(
    directory: ModelDir,
    beliefs: StoreDir,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of a LoRA adapter.", show_default=False)
    ],
    key: NewKey = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Add a plain LoRA adapter of peft (safetensors only) as a belief.

    Example:

        gravity-hf beliefs import model kb varnholt-adapter
    """
    belief = open_store(directory, beliefs, device, dtype).import_peft(folder, key)
    make_console().print(f"added {belief.key}", markup=False)


def convert_delta(
    directory: ModelDir,
    beliefs: StoreDir,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A published .delta or .pt file.", show_default=False),
    ],
    key: NewKey = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Add a published delta as a belief. Its pickles are read as plain tensors; none is executed.

    Which base it was made for cannot be checked, only whether its sizes fit.

    Example:

        gravity-hf beliefs convert-delta model kb gold.delta --key chemistry/gold
    """
    belief = open_store(directory, beliefs, device, dtype).import_published(file, key)
    kind = "residual stream" if belief.delta.kind != "low_rank" else "linear maps"
    make_console().print(
        f"added {belief.key}: {belief.delta.parameters()} parameters on the {kind}", markup=False
    )
