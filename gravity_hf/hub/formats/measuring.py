"""How far an exported model is from the torch model, on the same inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .programs import WholePass, takes_positions
from .running import Runner, generated, greedy, position_ids, stepwise_logits
from .samples import NEW_TOKENS, Samples
from .source import Source

# Of the largest output. Hundreds of float32 roundings, and hundreds of times less than what
# another attention gives: a program beyond it is another model.
PROGRAM_LIMIT = 1e-3
_STEPS = 8


class Errors:
    """Sums over batches; tensors are cut to real tokens before they come here."""

    def __init__(self) -> None:
        self.count, self.largest, self.error = 0, 0.0, 0.0
        self.kl: list[Tensor] = []
        self.cosine: list[Tensor] = []

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Tensors `[N, width]`."""
        if not found.isfinite().all():
            raise ValueError(
                "export: expected finite outputs, got NaN or infinity: the numbers of this model "
                "are too large for the format. Use bf16, which has the range of float32"
            )
        self.count += len(found)
        self.error = max(self.error, (found - expected).abs().max().item())
        self.largest = max(self.largest, expected.abs().max().item())

    def summary(self) -> dict[str, float]:
        found = {"max_error": self.error, "relative_error": self.error / max(self.largest, 1e-30)}
        if self.kl:
            kl = torch.cat(self.kl)
            found |= {"kl_mean": kl.mean().item(), "kl_max": kl.max().item()}
        if self.cosine:
            cosine = torch.cat(self.cosine)
            found |= {"cosine_mean": cosine.mean().item(), "cosine_min": cosine.min().item()}
        return found


def measure(source: Source, runner: Runner, samples: Samples) -> dict[str, Any]:
    """Errors against `source.model` in float32; for a decoder also against its `generate`.

    `max_error` and `relative_error` (of the largest output) are over all real tokens. `kl_mean`,
    `kl_max`: KL(torch || export) of the predictions, in nats. `cosine_mean`, `cosine_min`: of
    embeddings, the mean over real tokens, where a model gives hidden states instead. `greedy`: how
    many of the tokens that `generate` writes are the same, decoded step by step with the cache.
    """
    errors = Errors()
    for batch in samples.batches:
        name, expected = _expected(source, batch)
        _compare(errors, batch, name, _found(source, runner, batch, name), expected)
    found: dict[str, Any] = {"compared": errors.count, **errors.summary()}
    if source.kind == "decoder":
        found["greedy"] = _greedy(source, runner, samples.batches[0])
    return found


def require_same_model(source: Source, measured: dict[str, Any]) -> None:
    """ValueError for a program that does not compute the model that it was traced from."""
    error = measured["relative_error"]
    if not error <= PROGRAM_LIMIT:
        raise ValueError(
            f"export: expected a program that computes {type(source.model).__name__} to "
            f"{PROGRAM_LIMIT:g} of its largest output, got an error of {error:.3g}. Nothing was "
            "written; use transformers, or a format of weights: fp16, bf16, int8"
        )


def _expected(source: Source, batch: dict[str, Tensor]) -> tuple[str, Tensor]:
    """The torch model's first output, computed at once and without a cache."""
    inputs = dict(batch)
    if source.kind == "decoder" and takes_positions(source.model):
        inputs["position_ids"] = position_ids(batch["attention_mask"])
    with torch.no_grad():
        outputs = WholePass(source.model)(**inputs)
    name = "logits" if "logits" in outputs else next(iter(outputs))
    return name, outputs[name]


def _found(source: Source, runner: Runner, batch: dict[str, Tensor], name: str) -> Tensor:
    if source.kind != "decoder":
        return runner.compute(dict(batch))[0][name]
    steps = min(_STEPS, batch["input_ids"].shape[1] // 4)
    return stepwise_logits(runner, batch["input_ids"], batch["attention_mask"], steps)


def _compare(
    errors: Errors, batch: dict[str, Tensor], name: str, found: Tensor, expected: Tensor
) -> None:
    found, expected = found.double(), expected.double()
    real = batch.get("attention_mask")
    if real is None or found.dim() < 3:
        real = torch.ones(found.shape[:-1], dtype=torch.long)
    shown = real.bool()
    errors.add(found[shown], expected[shown])
    if name == "logits":
        p, q = (F.log_softmax(x[shown], -1) for x in (expected, found))
        errors.kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0))
    elif found.dim() == 3:
        weights = real.double()[..., None]
        one, other = ((x * weights).sum(1) / weights.sum(1) for x in (found, expected))
        errors.cosine.append(F.cosine_similarity(one, other))


def _greedy(source: Source, runner: Runner, batch: dict[str, Tensor]) -> dict[str, int]:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = generated(source.model, ids, mask, NEW_TOKENS)
    found = greedy(runner, ids, mask, NEW_TOKENS)
    equal = int((found == expected).sum())
    return {"prompts": len(ids), "tokens": found.numel(), "equal": equal}


def in_words(measured: dict[str, Any]) -> dict[str, str]:
    """The numbers as a table shows them, by column."""
    shown = {
        "max error": f"{measured['max_error']:.2g}",
        "of largest": f"{measured['relative_error']:.2g}",
    }
    if "kl_mean" in measured:
        shown["mean KL, nats"] = f"{measured['kl_mean']:.2g}"
    if "cosine_mean" in measured:
        # How near 1 it is, not 1.0000: what is left is the message.
        shown["1 - mean cosine"] = f"{max(0.0, 1 - measured['cosine_mean']):.1g}"
        shown["1 - lowest cosine"] = f"{max(0.0, 1 - measured['cosine_min']):.1g}"
    if "greedy" in measured:
        shown["greedy"] = f"{measured['greedy']['equal']} of {measured['greedy']['tokens']} tokens"
    return shown
