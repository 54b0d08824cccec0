"""Whether a program is being exported, as `torch.export` and `torch.onnx.export` do."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, asked outside the tracer.

    In the graphs of `torch.compile` some versions of torch answer it with True whatever is done
    with them (2.11 does, 2.13 does not), and a compiled model would run what exports are made of:
    scores of all pairs at once.
    """
    return torch.compiler.is_exporting()


# What torch.compiler.assume_constant_result sets. The decorator itself imports the compiler, and
# with it triton: over a second at every import of the operator.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
