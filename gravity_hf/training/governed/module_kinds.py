"""Groups of a model whose family has no taxonomy, by the kinds of its modules."""

from __future__ import annotations

import re

from torch import nn

from .taxonomy import plain_name

# By parts of a parameter's path, in this order; the first that fits decides.
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"^(mlp|ffn?|ff_?\w*|feed_?forward|experts?|fc\d*|intermediate|dense_\w+|w[123])$",
    re.IGNORECASE,
)
_NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
_GATE = re.compile(r"^(gate|router|predictor)$", re.IGNORECASE)
_EXITING = re.compile(r"^(v|v_proj|value\w*|o_proj|out|out_proj|c_proj|dense|output|wo|wv)$")
_HEAD = re.compile(r"^(\w*_head|score|classifier|cls|qa_outputs|embed_out|output_projection)$")


def owners_by_kind(model: nn.Module) -> dict[str, str]:
    """By parameter, the group its module makes it belong to: `embeddings`, `attention_routing`,
    `gates`, `layer_norms`, `output_head`, `attention_output`, `ff_projections` or `other`.

    A matrix that holds queries, keys and values together is routing as a whole.
    """
    modules = dict(model.named_modules())
    head = _output_head(model)
    return {
        name: _kind(plain_name(name).split("."), modules[name.rpartition(".")[0]], head)
        for name, _ in model.named_parameters()
    }


def _kind(path: list[str], module: nn.Module, head: nn.Module | None) -> str:
    parents = path[:-1]
    if module is head or (parents and _HEAD.match(parents[0])):
        return "output_head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "Norm" in type(module).__name__ or any(map(_NORM.search, parents[-1:])):
        return "layer_norms"
    # The deepest part that says anything.
    for depth in range(len(parents) - 1, -1, -1):
        part, inside = parents[depth], parents[depth + 1 :]
        if _GATE.match(part) and not any(map(_ATTENTION.search, parents)):
            return "gates"
        if _ATTENTION.search(part):
            return "attention_output" if any(map(_EXITING.match, inside)) else "attention_routing"
        if _FEED_FORWARD.match(part):
            return "ff_projections"
    # BERT's name for the second map of a feed-forward; in attention the walk has ended before.
    return "ff_projections" if "output" in parents else "other"


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    try:
        return find() if find is not None else None
    except (AttributeError, NotImplementedError):
        return None
