"""Where a delta begins: with rows of `A` that answer to a fact's subject and to little else.

A feed-forward's map back to the residual stream recalls what is known of a subject at the
subject's last token; its input there is the key (Meng et al. 2022, "Locating and Editing Factual
Associations in GPT"). As there, a key is whitened by what the map sees in other text, so that
`A x` is near zero elsewhere. Unlike there, this is only the beginning: both factors are trained.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .bank_routing import innermost
from .fact_rows import prompt_row, row_batch, row_batches, scored_logits
from .facts import Fact
from .generic_prompts import GENERIC_PROMPTS
from .targets import base_model

# Of the squared length of an input: how much of a direction may be in other text too.
_RIDGE = 0.1
# Of a row's size: noise of the seed, which tells rows with one key apart.
_NOISE = 0.05
_NOBODY = Fact(id="", domain="", relation="", subject="", prompt="", answer="")


@dataclass(frozen=True)
class MapStates:
    """What one map gets and gives at some tokens: `x [n, in]` and `y [n, out]`, float32."""

    x: Tensor
    y: Tensor


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of the maps in this thread's calls inside; of several calls the last."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    thread = threading.get_ident()

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if threading.get_ident() == thread:
                seen[name] = (args[0].detach(), output.detach())

        return hook

    with ExitStack() as stack:
        for name in names:
            module = innermost(base_model(model).get_submodule(name))
            handle = module.register_forward_hook(keep(name))
            stack.callback(handle.remove)
        yield seen


def whitened_rows(keys: Tensor, others: Tensor) -> Tensor:
    """Rows `a` with `a . key = 1` for their own key, and small for `others`: `[k, in]`, float32.

    `a ~ (X'X + ridge I)^-1 key` with `X = others [n, in]`, in float64; solved among tokens or among
    features, whichever are fewer.
    """
    keys, others = keys.double(), others.double()
    ridge = _RIDGE * others.square().sum(-1).median()
    if others.shape[0] < others.shape[1]:
        inside = torch.linalg.solve(_with_ridge(others @ others.mT, ridge), others @ keys.mT)
        rows = keys - inside.mT @ others
    else:
        rows = torch.linalg.solve(_with_ridge(others.mT @ others, ridge), keys.mT).mT
    return (rows / (rows * keys).sum(-1, keepdim=True)).float()


def _with_ridge(gram: Tensor, ridge: Tensor) -> Tensor:
    gram.diagonal().add_(ridge)
    return gram


def initial_A(keys: Tensor, others: Tensor, size: float, rank: int, noise: Tensor) -> Tensor:
    """The first factor: `[rank, in]`.

    Args:
        keys: `[k, in]`; row `j` answers to key `j`, and to keys `j + rank`, ... where there are
            more keys than rows. Where there are fewer, they come again.
        others: `[n, in]`, inputs at tokens of other text.
        size: what a row answers to its key: the typical size of the map's outputs, so that a
            change of `B` by 0.1 changes them by a tenth, whatever the model's scale.
        noise: `[rank, in]`, of unit variance.
    """
    rows = whitened_rows(keys, others)
    if len(rows) < rank:
        rows = rows.repeat(-(-rank // len(rows)), 1)[:rank]
    else:
        rows = torch.stack([rows[j::rank].mean(0) for j in range(rank)])
    rows = rows * size
    scale = rows.square().mean(-1, keepdim=True).sqrt()
    return rows + _NOISE * scale * noise.to(rows)


@torch.no_grad()
def generic_inputs(model: nn.Module, tokenizer: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """What the maps get at the tokens of everyday prompts: name -> `[n, in]`, float32."""
    rows = [prompt_row(tokenizer, _NOBODY, prompt) for prompt in GENERIC_PROMPTS]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for chosen in row_batches(rows, len(rows)):
        batch = row_batch(model, [rows[i] for i in chosen])
        with recorded(model, names) as seen:
            scored_logits(model, batch)
        is_token = batch.inputs["attention_mask"].flatten().bool()
        for name, (x, _) in seen.items():
            found[name].append(x.reshape(len(is_token), -1)[is_token.to(x.device)].float())
    return {name: torch.cat(inputs) for name, inputs in found.items()}
