"""Arguments and options that several verbs about beliefs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelDir = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder of any causal language model.", show_default=False),
]
StoreDir = Annotated[
    Path, typer.Argument(metavar="KB", help="Folder of its beliefs.", show_default=False)
]
Key = Annotated[str, typer.Argument(metavar="KEY", help="Of a belief.", show_default=False)]
Keys = Annotated[
    list[str], typer.Argument(metavar="KEY...", help="Of beliefs.", show_default=False)
]
Bank = Annotated[
    str,
    typer.Argument(
        metavar="FACTS",
        help="A bank (chemistry, computing, general, invented) or a .jsonl or .json file.",
        show_default=False,
    ),
]
Relations = Annotated[
    list[str] | None,
    typer.Option("--relation", help="Only facts of this relation; may be given again."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first so many facts.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
NewKey = Annotated[
    str | None, typer.Option("--key", help="Key of the new belief.", show_default=False)
]
Aliases = Annotated[
    list[str] | None,
    typer.Option("--alias", help="Another answer that counts as right; may be given again."),
]
Source = Annotated[str, typer.Option(help="Where the fact is from.")]
