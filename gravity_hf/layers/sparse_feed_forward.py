"""A gated feed-forward layer of which every token uses some blocks of neurons only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.block_linear import IMPLEMENTATIONS, BlockWeights, block_feed_forward
from ..ops.block_linear_choice import choose_implementation
from .low_rank import LowRankLinear
from .neuron_selection import (
    ChoiceQuality,
    block_energy,
    blocks_kept,
    choice_loss,
    choice_quality,
    chosen_mask,
    top_blocks,
)

POLICIES = ("dense", "masked", "block")
_HOW = ("auto", *IMPLEMENTATIONS)


class SparseFeedForward(nn.Module):
    """`y = down(h)`, `h = activation(gate(x)) * up(x)`, over maps that are given.

    A small `predictor` scores blocks of `block_size` consecutive neurons from `x`; the `keep`
    highest are the token's choice. It depends on that token alone, so nothing that comes later
    changes it. The policy says what is done with it, and may be set at any time:

    - `"dense"`: nothing, all neurons count.
    - `"masked"`: the others are computed and then set to 0. In training the mask is
      straight-through: forward as above, backward as if the sigmoid of the scores stood in its
      place, so that the predictor learns from the loss of the model.
    - `"block"`: the others are not computed, where that has been measured to take less time
      (`ops.block_linear_choice`): the numbers of `"masked"` up to rounding, either way. While a
      predictor is trained it is `"masked"`, since what was skipped teaches it nothing.

    `impl` is how "block" is computed: "auto", or one of `ops.block_linear.IMPLEMENTATIONS`.

    Args:
        gate_proj, up_proj: maps `[..., hidden_size]` to `[..., intermediate_size]`.
        down_proj: back. `nn.Linear` and `LowRankLinear` can skip; any other map (an adapter's, a
            quantized one), and every map under autocast, is computed as under `"masked"`.
        activation: applied to the gate, elementwise.
        block_size: neurons of a block; divides `intermediate_size`.
        sparsity: share of the blocks that a token leaves out, in [0, 1).
        gate_rank: of the predictor.
        policy: see above.
        keep: blocks that a token uses, in place of `ceil((1 - sparsity) blocks)`.

    Raises:
        ValueError: sizes or a policy that cannot be.
    """

    def __init__(
        self,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
        *,
        activation: Callable[[Tensor], Tensor],
        hidden_size: int,
        intermediate_size: int,
        block_size: int,
        sparsity: float,
        gate_rank: int,
        policy: str = "dense",
        keep: int | None = None,
    ) -> None:
        check_sizes(intermediate_size, block_size, sparsity, gate_rank)
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation = activation
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.block_size, self.sparsity = block_size, sparsity
        self.blocks = intermediate_size // block_size
        self.keep = blocks_kept(sparsity, self.blocks) if keep is None else keep
        if not 1 <= self.keep <= self.blocks:
            raise ValueError(
                f"SparseFeedForward: keep: expected 1 to {self.blocks} blocks, got {keep!r}"
            )
        self.predictor = LowRankLinear(hidden_size, self.blocks, gate_rank, bias=False)
        self.policy = policy
        self.impl = "auto"

    @property
    def policy(self) -> str:
        """ "dense", "masked" or "block"."""
        return self._policy

    @policy.setter
    def policy(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ValueError(
                f"SparseFeedForward: policy: expected one of {', '.join(POLICIES)}, got {policy!r}"
            )
        self._policy = policy

    @property
    def impl(self) -> str:
        """How "block" is computed."""
        return self._impl

    @impl.setter
    def impl(self, impl: str) -> None:
        if impl not in _HOW:
            raise ValueError(
                f"SparseFeedForward: impl: expected one of {', '.join(_HOW)}, got {impl!r}"
            )
        self._impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same."""
        if self.policy == "dense":
            return self.down_proj(self.neurons(x))
        scores = self.scores(x)
        if self.policy == "block" and not (self.training and scores.requires_grad):
            how = self._how(x)
            if how is not None:
                return self._skipped(x, scores, how)
        return self._masked(self.neurons(x), scores)

    def forward_with_loss(
        self, x: Tensor, *, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and what the predictor is to learn, a scalar: see `choice_loss`.

        All neurons are computed, under every policy: the loss needs their energies. Its gradient
        reaches the predictor and nothing else. `token_mask` `[...]`: the tokens that it counts.
        """
        hidden, scores = self.neurons(x), self.scores(x)
        energy = block_energy(hidden, self.block_size)
        loss = choice_loss(scores, energy, self.keep, token_mask)
        if self.policy == "dense":
            return self.down_proj(hidden), loss
        return self._masked(hidden, scores), loss

    def neurons(self, x: Tensor) -> Tensor:
        """`h` `[..., intermediate_size]`, all of them."""
        return self.activation(self.gate_proj(x)) * self.up_proj(x)

    def scores(self, x: Tensor) -> Tensor:
        """The predictor's, `[..., blocks]`. `x` is not trained by them."""
        return self.predictor(x.detach())

    def choose(self, x: Tensor) -> Tensor:
        """The blocks of each token, `[..., keep]`, rising."""
        return top_blocks(self.scores(x), self.keep)

    @torch.no_grad()
    def quality(self, x: Tensor, token_mask: Tensor | None = None) -> ChoiceQuality:
        """How good the predictor's choice is for these inputs, as tensors."""
        energy = block_energy(self.neurons(x), self.block_size)
        return choice_quality(self.choose(x), energy, token_mask)

    def extra_repr(self) -> str:
        return (
            f"blocks={self.blocks} of {self.block_size}, keep={self.keep}, policy={self.policy!r}"
        )

    def _masked(self, hidden: Tensor, scores: Tensor) -> Tensor:
        mask = chosen_mask(top_blocks(scores, self.keep), self.blocks).unsqueeze(-1)
        blocks = hidden.unflatten(-1, (self.blocks, self.block_size))
        if self.training and scores.requires_grad:
            soft = scores.sigmoid().to(hidden.dtype).unsqueeze(-1)
            # The numbers of the mask, exactly: soft - soft is 0.
            kept = blocks * (mask.to(hidden.dtype) + (soft - soft.detach()))
        else:
            kept = blocks.masked_fill(~mask, 0.0)
        return self.down_proj(kept.flatten(-2))

    def _how(self, x: Tensor) -> str | None:
        """The implementation that skips; None where all neurons have to be computed, or where that
        takes no longer."""
        # Autocast casts what modules are called with; weights that are read it does not see.
        if torch.is_autocast_enabled(x.device.type) or not self.can_skip():
            return None
        if self.impl != "auto":
            return self.impl
        gate, up = output_factor(self.gate_proj), output_factor(self.up_proj)
        widths = (gate.in_features, up.in_features, input_factor(self.down_proj).out_features)
        return choose_implementation(
            x.device.type,
            x.dtype,
            tokens=x.numel() // x.shape[-1],
            width=max(widths),
            neurons=self.intermediate_size,
            block_size=self.block_size,
            keep=self.keep,
            traced=torch.compiler.is_compiling(),
            aligned=not any(width % 8 for width in widths),
        )

    def can_skip(self) -> bool:
        """Whether the maps are what they seem: not an adapter's, quantized, watched, sharded or
        offloaded; and nothing in the activation is trained."""
        read = [output_factor(self.gate_proj), output_factor(self.up_proj)]
        read += [input_factor(self.down_proj)]
        owners = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(map(_is_plain, read)) or any(map(_is_watched, owners)):
            return False
        # Its gradients would be lost: implementations see a function.
        inner = self.activation
        return not (
            isinstance(inner, nn.Module) and any(p.requires_grad for p in inner.parameters())
        )

    def _skipped(self, x: Tensor, scores: Tensor, how: str) -> Tensor:
        gate, up = output_factor(self.gate_proj), output_factor(self.up_proj)
        down = input_factor(self.down_proj)
        rows = x.reshape(-1, x.shape[-1])
        y = block_feed_forward(
            rows if gate is self.gate_proj else self.gate_proj.down(rows),
            rows if up is self.up_proj else self.up_proj.down(rows),
            BlockWeights(gate.weight, up.weight, down.weight, gate.bias, up.bias),
            top_blocks(scores, self.keep).reshape(-1, self.keep),
            block_size=self.block_size,
            activation=self.activation,
            impl=how,
        )
        if down is not self.down_proj:
            y = self.down_proj.up(y)
        elif down.bias is not None:
            y = y + down.bias
        return y.reshape(*x.shape[:-1], y.shape[-1])


def output_factor(linear: nn.Module) -> nn.Module:
    """The part of a map that holds its output neurons."""
    return linear.up if isinstance(linear, LowRankLinear) else linear


def input_factor(linear: nn.Module) -> nn.Module:
    """The part of a map that holds its input neurons."""
    return linear.down if isinstance(linear, LowRankLinear) else linear


def _is_plain(linear: nn.Module) -> bool:
    # Subclasses keep other things in `weight`.
    if type(linear) is not nn.Linear or _is_watched(linear):
        return False
    return type(linear.weight) is nn.Parameter and linear.weight.is_floating_point()


def _is_watched(module: nn.Module) -> bool:
    # A `forward` of the object's own is how accelerate brings offloaded weights, when it is called.
    hooks = (module._forward_hooks, module._forward_pre_hooks, vars(module).get("forward"))
    return any(map(bool, (*hooks, module._backward_hooks, module._backward_pre_hooks)))


def check_sizes(intermediate_size: int, block_size: int, sparsity: float, gate_rank: int) -> None:
    """Raises ValueError where a layer could not be built of these."""
    if block_size < 1 or intermediate_size % block_size:
        raise ValueError(
            f"SparseFeedForward: block_size: expected a divisor of intermediate_size "
            f"{intermediate_size}, got {block_size!r}"
        )
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"SparseFeedForward: sparsity: expected 0 <= sparsity < 1, got {sparsity!r}"
        )
    if gate_rank < 1:
        raise ValueError(f"SparseFeedForward: gate_rank: expected 1 or more, got {gate_rank!r}")
