"""Second moments of what maps get as inputs, while a model reads text: sums, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..integration.placement import execution_device
from ..layers.modes import in_evaluation
from ..ops.precision import exact_products
from .errors import ValidationError
from .fact_tokens import prompt_ids
from .leakage import SecondMoment
from .targets import base_model, in_out_features

# Tokens of unrelated text that a moment of a map is taken over at least.
ENOUGH_TOKENS = 20_000
# Tokens of one batch of text.
LENGTH = 512


def text_moments(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    texts: Sequence[str],
    *,
    tokens: int = ENOUGH_TOKENS,
    progress: bool | None = None,
) -> dict[str, SecondMoment]:
    """Second moments of the inputs of some maps, over unrelated running text.

    Args:
        model: a causal LM; put in evaluation meanwhile.
        names: of linear maps in it.
        texts: cut into pieces of 512 tokens; reading stops once enough were seen.
        tokens: how many are needed.
        progress: True or False; None shows a bar on terminals only.

    Raises:
        ValidationError: the texts have fewer tokens.
    """
    pieces = _pieces(tokenizer, texts, tokens)
    found = sum(max(piece.shape[1] - 1, 0) for piece in pieces)
    if found < tokens:
        raise ValidationError(
            f"text_moments: expected texts of at least {tokens} tokens besides the first of each "
            f"piece, got {found}. Pass more text, or lower tokens"
        )
    return _measured(model, names, pieces, progress, "moments of text")


def prompt_moments(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    prompts: Sequence[str],
) -> dict[str, SecondMoment]:
    """As `text_moments`, over the tokens of any number of prompts: those of one delta, say.

    Raises:
        ValidationError: no prompts, or one without tokens.
    """
    rows = [torch.tensor([prompt_ids(tokenizer, prompt)]) for prompt in dict.fromkeys(prompts)]
    if not rows:
        raise ValidationError("prompt_moments: expected at least one prompt, got none")
    return _measured(model, names, rows, False, "moments of prompts")


def _pieces(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[Tensor]:
    pieces: list[Tensor] = []
    seen = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=False)["input_ids"]
        for piece in ids.split(LENGTH, dim=1):
            if seen >= tokens:
                return pieces
            if piece.shape[1] > 1:
                pieces.append(piece)
                seen += piece.shape[1] - 1
    return pieces


def _measured(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Tensor],
    progress: bool | None,
    what: str,
) -> dict[str, SecondMoment]:
    model = base_model(model)
    device = execution_device(model)
    hidden = None if progress is None else not progress
    with _collecting(model, names) as sums, in_evaluation(model), torch.no_grad():
        body = _without_head(model, names)
        # One sequence at a time: no padding, whose inputs would count as well.
        for ids in tqdm(batches, desc=what, unit="batch", disable=hidden):
            body(input_ids=ids.to(device))
    return {name: sums[name].moment() for name in names}


def _without_head(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The decoder alone, where it has all of the maps: nobody reads the logits."""
    body = getattr(model, "base_model", model)
    inside = set(body.modules())
    return body if all(model.get_submodule(name) in inside for name in names) else model


@contextmanager
def _collecting(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Sums]]:
    modules = {name: model.get_submodule(name) for name in names}
    sums = {name: _Sums(in_out_features(module)[0]) for name, module in modules.items()}

    def hook(name: str) -> Any:
        def see(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            bias = getattr(module, "bias", None)
            sums[name].add(given[0], output if bias is None else output - bias)

        return see

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield sums


class _Sums:
    """Of one map: rows until there are as many as features, from then on their products."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.rows: list[Tensor] = []
        self.products: Tensor | None = None
        self.tokens = 0
        self.energy = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """`x` `[..., in]` of one sequence and what the map made of it, `[..., out]`.

        The first token of a sequence is left out: in many models it carries activations hundreds
        of times as large as all others ("massive activations", Sun et al. 2024), and the moment
        would be about nothing else.
        """
        x, y = _without_first(x.detach()).float(), _without_first(y.detach()).float()
        self.tokens += len(x)
        self.energy += float(y.double().square().sum())
        if self.products is None:
            self.rows.append(x.cpu())
            if self.tokens >= self.features:
                self.products = _products(torch.cat(self.rows))
                self.rows = []
        else:
            self.products += _products(x)

    def moment(self) -> SecondMoment:
        count = max(self.tokens, 1)
        if self.products is not None:
            kept = (self.products / count).float()
        else:
            kept = torch.cat(self.rows) / count**0.5
        return SecondMoment(kept, self.tokens, self.energy / count)


def _without_first(x: Tensor) -> Tensor:
    """`[n, features]`. A sequence of one token keeps it: it has no other."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[1:] if len(rows) > 1 else rows


def _products(x: Tensor) -> Tensor:
    with exact_products(x.device):
        return (x.mT @ x).double().cpu()
