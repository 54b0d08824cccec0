"""Forward and backward of `softmax(score(q'k'^T)) v`, one block of scores at a time.

`q'` `[B, H, Tq, E]` and `k'` `[B, N, Tk, E]` are queries and keys augmented so that their product
is the softened squared distance (`chunked.augment`); the last column of `k'` is ones. Memory is
linear in length: scores exist for one block at a time, `[b, n, G, rows, keys]`, and the backward
computes them again. Formulas: README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Block, Sizes, cut, iterate_blocks, mask_5d
from .precision import exact_products


@dataclass(frozen=True)
class Problem:
    """One call of the operator. All floating tensors but the mask share one dtype.

    strength: `M^2`, times query masses where there are any, `[B|1, H, Tq|1]`. floor: the smallest
    softened distance, eps, `[H]`. key_term: factor (force) or summand (power) of the score
    `[B, H, Tk]`. seed: int64 `[1]`, of the dropout. The rest as in `api.gravity_attention`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    strength: Tensor
    floor: Tensor
    key_term: Tensor | None
    mask: Tensor | None
    seed: Tensor | None
    law: str
    causal: bool
    dropout_p: float

    @property
    def sizes(self) -> Sizes:
        batch, heads, queries, _ = self.q.shape
        _, key_heads, keys, _ = self.k.shape
        return Sizes(batch, key_heads, heads // key_heads, queries, keys)

    def rows_of(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a per-query tensor `[B|1, H, Tq|1, ...]`: `[b|1, n, G, rows|1, ...]`."""
        tensor = tensor.unflatten(1, self.sizes[1:3])
        return cut(tensor, block.batch, block.heads, slice(None), block.rows)

    def keys_of(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a per-key tensor `[B, N, Tk, ...]` as `[b * n, keys, ...]`; a view, where the
        tensor is contiguous."""
        return tensor[block.batch, block.heads, block.window.keys].flatten(0, 1)

    def key_columns(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a per-head, per-key tensor `[B, H, Tk]`: `[b, n, G, 1, keys]`."""
        tensor = tensor.unflatten(1, self.sizes[1:3]).unsqueeze(3)
        return tensor[block.batch, block.heads, :, :, block.window.keys]

    def blocks(self) -> Iterator[Block]:
        mask = None if self.mask is None else mask_5d(self.mask, self.sizes)
        return iterate_blocks(self.sizes, mask, self.causal, self.q.device, self.q.dtype)

    def generator(self) -> torch.Generator | None:
        """Restarted by forward and backward: both draw the same numbers, block after block."""
        if self.seed is None:
            return None
        return torch.Generator(self.q.device).manual_seed(int(self.seed))

    def keep(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Dropout factors: 0, or `1 / (1 - p)`."""
        kept = 1.0 - self.dropout_p
        return torch.empty_like(like).bernoulli_(kept, generator=generator).div_(kept)

    def softened(self, block: Block) -> Tensor:
        """`q'k'^T`: squared distance plus eps, not yet clamped; rounding can leave it below eps."""
        queries = self.rows_of(self.q, block)
        keys = self.keys_of(self.k, block)
        product = torch.bmm(stack(queries), keys.mT)
        return product.view(*queries.shape[:-1], keys.shape[1])

    def floor_of(self, block: Block) -> Tensor:
        return self.floor.view(1, *self.sizes[1:3], 1, 1)[:, block.heads]

    def weights(self, block: Block, softened: Tensor, *, in_place: bool) -> Tensor:
        """Softmax weights from clamped softened distances, which `in_place` overwrites."""
        out = softened if in_place else torch.empty_like(softened)
        strength = self.rows_of(self.strength, block).unsqueeze(-1)
        key = None if self.key_term is None else self.key_columns(self.key_term, block)
        if self.law == "power":
            torch.log(softened, out=out).mul_(-strength)
            if key is not None:
                out.add_(key)
        else:
            torch.div(strength, softened, out=out)
            if key is not None:
                out.mul_(key)
        if block.window.bias is not None:
            out[..., block.window.bias_keys].add_(block.window.bias)
        return torch.softmax(out, -1, out=out)


def stack(tensor: Tensor) -> Tensor:
    """`[b, n, G, rows, x]` as `[b * n, G * rows, x]`: heads that share a key head, stacked."""
    return tensor.flatten(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class DecodingProblem(Problem):
    """Few queries: q and k as they are, `query_term` `[B, H, Tq, 1]` (with eps) and `kappa`
    `[B, N, Tk, 1]` beside them, so that a long key cache is not copied for one token."""

    query_term: Tensor
    kappa: Tensor

    def softened(self, block: Block) -> Tensor:
        queries = self.rows_of(self.q, block)
        keys, kappa = self.keys_of(self.k, block), self.keys_of(self.kappa, block)
        product = torch.baddbmm(kappa.mT, stack(queries), keys.mT, alpha=-2.0)
        product = product.view(*queries.shape[:-1], keys.shape[1])
        return product.add_(self.rows_of(self.query_term, block))


def attention_forward(problem: Problem) -> Tensor:
    """Output `[B, H, Tq, Dv]`."""
    output = problem.q.new_zeros(*problem.q.shape[:3], problem.v.shape[3])
    generator = problem.generator()
    with exact_products(problem.q.device):
        for block in problem.blocks():
            softened = problem.softened(block)
            torch.maximum(softened, problem.floor_of(block), out=softened)
            weights = problem.weights(block, softened, in_place=True)
            if problem.dropout_p > 0:
                weights.mul_(problem.keep(weights, generator))
            result = torch.bmm(stack(weights), problem.keys_of(problem.v, block))
            result = result.view(*weights.shape[:-1], -1)
            if block.window.dead is not None:
                result.masked_fill_(block.window.dead, 0.0)
            problem.rows_of(output, block).copy_(result)
    return output


def attention_backward(grad: Tensor, problem: Problem, mask_needs_grad: bool) -> list[Tensor]:
    """Gradients of q', k', v, strength, floor, key_term and mask; empty where there is nothing."""
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
    grad_strength, grad_floor = q.new_zeros(q.shape[:3]), q.new_zeros(problem.floor.shape)
    grad_key = q.new_zeros(0 if problem.key_term is None else problem.key_term.shape)
    grad_mask = q.new_zeros(mask.shape if mask is not None and mask_needs_grad else 0)
    generator = problem.generator()
    with exact_products(q.device):
        for block in problem.blocks():
            softened = problem.softened(block)
            floor = problem.floor_of(block)
            clamped = _below(softened, floor)
            torch.maximum(softened, floor, out=softened)
            weights = problem.weights(block, softened, in_place=False)

            grad_out = problem.rows_of(grad, block)
            if block.window.dead is not None:
                grad_out = grad_out.masked_fill(block.window.dead, 0.0)
            grad_out = stack(grad_out)
            grad_s = torch.bmm(grad_out, problem.keys_of(v, block).mT).view(weights.shape)
            kept = weights
            if problem.dropout_p > 0:
                keep = problem.keep(weights, generator)
                kept = keep * weights
                grad_s.mul_(keep)
            problem.keys_of(grad_v, block).baddbmm_(stack(kept).mT, grad_out)
            # grad_s becomes weights * (grad_s - sum_j weights * grad_s).
            torch._softmax_backward_data(grad_s, weights, -1, q.dtype, grad_input=grad_s)
            if mask is not None and mask_needs_grad:
                part = mask_5d(grad_mask, problem.sizes)
                slices = (block.batch, block.heads, slice(None), block.rows, block.window.keys)
                part = cut(part, *slices)
                part += grad_s.sum_to_size(part.shape)

            _through_score(problem, block, grad_s, softened, weights, grad_strength, grad_key)
            # dL/d(softened distance) is grad_s times a factor of the row, which is applied to the
            # narrow sides of the products instead of the block.
            turn = -problem.rows_of(problem.strength, block).unsqueeze(-1)
            if clamped is not None:
                lost = torch.where(clamped, grad_s * turn, 0.0).sum((0, 3, 4))
                grad_floor.view(problem.sizes[1:3])[block.heads] += lost
                grad_s.masked_fill_(clamped, 0.0)
            turned = stack(problem.rows_of(q, block) * turn)
            problem.keys_of(grad_k, block).baddbmm_(stack(grad_s).mT, turned)
            result = torch.bmm(stack(grad_s), problem.keys_of(k, block))
            part = problem.rows_of(grad_q, block)
            result = result.view(part.shape)
            # Ones in k' make the last column a row sum, of terms that nearly cancel: a reduction
            # loses fewer digits of it than a product does.
            torch.sum(grad_s, -1, out=result[..., -1])
            torch.mul(result, turn, out=part)
    grad_strength = grad_strength.sum_to_size(problem.strength.shape)
    if mask is not None:
        grad_mask = grad_mask.to(mask.dtype)
    return [grad_q, grad_k, grad_v, grad_strength, grad_floor, grad_key, grad_mask]


def _below(softened: Tensor, floor: Tensor) -> Tensor | None:
    """Where the distance will be clamped; None where a CPU sees at a glance that it is nowhere."""
    if softened.device.type == "cpu" and bool(softened.amin() >= floor.amax()):
        return None
    return softened < floor


def _through_score(
    problem: Problem,
    block: Block,
    grad_s: Tensor,
    softened: Tensor,
    spare: Tensor,
    grad_strength: Tensor,
    grad_key: Tensor,
) -> None:
    """`grad_s` from dL/dscore to dL/d(softened distance) over minus strength, in place; adds to the
    gradients of strength and key term. `spare` is overwritten."""
    strength_rows = problem.rows_of(grad_strength, block)
    if problem.law == "power":
        # score = -strength ln(softened) + key
        torch.mul(torch.log(softened, out=spare), grad_s, out=spare)
        strength_rows.copy_(spare.sum(-1).neg_())
        if problem.key_term is not None:
            problem.key_columns(grad_key, block).add_(grad_s.sum(3, keepdim=True))
        grad_s.div_(softened)
        return
    # score = strength key / softened
    grad_s.div_(softened)
    if problem.key_term is not None:
        strength = problem.rows_of(problem.strength, block).unsqueeze(-1)
        torch.mul(grad_s, strength, out=spare)
        problem.key_columns(grad_key, block).add_(spare.sum(3, keepdim=True))
        grad_s.mul_(problem.key_columns(problem.key_term, block))
    strength_rows.copy_(grad_s.sum(-1))
    grad_s.div_(softened)
