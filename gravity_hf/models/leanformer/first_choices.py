"""What chooses keys and neurons in a LeanFormer that was made of a host, before it has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from ...layers.factorizing import factors_of, output_spectrum
from ...layers.input_moments import mask_of
from ...layers.low_rank import LowRankLinear
from ...layers.modes import in_evaluation
from ...layers.neuron_selection import block_energy
from ...layers.screening import Screening
from ...layers.sparse_feed_forward import SparseFeedForward
from ...layers.sparsity_policy import sparsity

# Of the mean eigenvalue of the inputs' second moment, in a regression on them.
_RIDGE = 1e-3
# Keys of a layer whose principal axes are taken: enough for a head, little to hold.
_KEYS = 1 << 14


def choices_from_weights(model: nn.Module) -> None:
    """Let each predictor guess by the gates: the mean row of a block, in as many dimensions as it
    has. All that can be said without inputs."""
    for mlp in _parts(model, SparseFeedForward):
        gate: Any = mlp.gate_proj
        rows = gate.weight.detach().double().unflatten(0, (mlp.blocks, mlp.block_size)).mean(1)
        _set_predictor(mlp.predictor, rows, None)


def choices_from_inputs(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], progress: bool | None = None
) -> None:
    """Fit predictors and screenings to what they are given in one pass over `batches`.

    A predictor becomes the linear map of its rank that guesses best which share of a token's energy
    is in each block, a screening the principal axes of the keys. Everything is computed meanwhile.
    """
    shares = {mlp: _Shares(mlp) for mlp in _parts(model, SparseFeedForward)}
    keys = [_Keys(screening) for screening in _parts(model, Screening)]
    device = next(model.parameters()).device
    hidden = None if progress is None else not progress
    with ExitStack() as stack, torch.no_grad(), in_evaluation(model):
        attention = "dense" if model.config.screening != "none" else None
        stack.enter_context(sparsity(model, feed_forward="dense", attention=attention))
        for mlp, share in shares.items():
            stack.callback(mlp.register_forward_pre_hook(share).remove)
        for batch in tqdm(batches, desc="from_dense: choices", unit="batch", disable=hidden):
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            inputs.pop("labels", None)
            real = mask_of(inputs)
            for share in shares.values():
                share.real = real
            # A cache holds what the layers' screenings are given.
            cache = DynamicCache(config=model.config) if keys else None
            model(**inputs, past_key_values=cache, use_cache=cache is not None)
            for seen, layer in zip(keys, cache.layers if cache else (), strict=True):
                seen.add(layer.keys, real)
    for mlp, share in shares.items():
        _set_predictor(mlp.predictor, share.regression(), share.moment())
    for seen in keys:
        seen.screening.fit_principal(torch.cat(seen.kept, 1)[None])


class _Shares:
    """Of one feed-forward layer: inputs, and what share of the energy each block has for them."""

    def __init__(self, mlp: SparseFeedForward) -> None:
        self.mlp = mlp
        self.real: Tensor | None = None
        self.inputs, self.cross = torch.zeros(()), torch.zeros(())
        self.count = 0

    def __call__(self, mlp: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].reshape(-1, given[0].shape[-1])
        x = x if self.real is None else x[self.real.flatten()]
        energy = block_energy(self.mlp.neurons(x), self.mlp.block_size).double()
        share = energy / energy.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        rows = x.double()
        self.inputs = self.inputs.to(rows) + rows.mT @ rows
        self.cross = self.cross.to(rows) + share.mT @ rows
        self.count += len(rows)

    def moment(self) -> Tensor:
        """`E[x x^T]` `[d, d]`."""
        return self.inputs / self.count

    def regression(self) -> Tensor:
        """`[blocks, d]`: the linear map of least squares from inputs to shares."""
        moment = self.moment()
        level = _RIDGE * moment.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        moment = moment + level * torch.eye(len(moment)).to(moment)
        return torch.linalg.solve(moment, (self.cross / self.count).mT).mT


class _Keys:
    """The keys `[G, n, head_dim]` of one layer, without padding."""

    def __init__(self, screening: Screening) -> None:
        self.screening = screening
        self.kept: list[Tensor] = []

    def add(self, keys: Tensor, real: Tensor | None) -> None:
        """`keys` `[B, G, T, head_dim]`, `real` `[B, T]`."""
        rows = keys.transpose(0, 1).flatten(1, 2)
        rows = rows if real is None else rows[:, real.flatten()]
        room = _KEYS - sum(x.shape[1] for x in self.kept)
        if room > 0:
            self.kept.append(rows[:, :room].clone())


def _set_predictor(predictor: LowRankLinear, rows: Tensor, moment: Tensor | None) -> None:
    """`rows` `[blocks, d]`, in the predictor's rank, scaled to scores of about one."""
    spectrum = output_spectrum(rows, moment)
    two = factors_of(rows, spectrum, predictor.rank)
    size = (spectrum.energies.sum() / len(rows)).sqrt()
    scale = float(size) ** -0.5 if size > 0 else 1.0
    with torch.no_grad():
        predictor.down.weight.copy_(two.down * scale)
        predictor.up.weight.copy_(two.up * scale)


def _parts(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]
