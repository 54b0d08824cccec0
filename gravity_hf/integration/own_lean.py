"""What a LeanFormer is, in words; from its config, as no model is imported."""

from __future__ import annotations

from transformers import PreTrainedConfig

LEANFORMER = "leanformer"

_LAWS = {
    "power": "weights proportional to 1 / (d^2 + e)^g",
    "force": "softmax over g / (d^2 + e)",
}
_RANKS = {0: "dense maps"}


def leanformer_without_gravity(config: PreTrainedConfig) -> bool:
    """Whether it attends by dot products."""
    return bool(config.attention != "gravity")


def leanformer_in_words(config: PreTrainedConfig) -> tuple[str, ...]:
    """Its law, the keys, the neurons and the layers that it chooses, a line each."""
    return (
        _law(config),
        _keys(config),
        _neurons(config),
        _depth(config),
    )


def leanformer_sizes_in_words(config: PreTrainedConfig) -> str:
    """Layers, heads, width, ranks, and what can be read."""
    table = config.position == "learned"
    reach = f"{config.max_position_embeddings} positions" if table else "positions without end"
    attention = _RANKS.get(config.attention_rank, f"rank {config.attention_rank}")
    inner = _RANKS.get(config.feed_forward_rank, f"rank {config.feed_forward_rank}")
    return (
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, width "
        f"{config.hidden_size}, {attention} in attention and {inner} behind it, vocabulary "
        f"{config.vocab_size}, {reach}"
    )


def _law(config: PreTrainedConfig) -> str:
    if config.attention != "gravity":
        return "dot products, no gravity; causal"
    learned = ", learned per head" if config.learn_softening else ""
    softening = f"softening {config.softening_start:g} at the start{learned}"
    return f"law {config.gravity_law}: {_LAWS[config.gravity_law]}; causal, {softening}"


def _keys(config: PreTrainedConfig) -> str:
    if config.screening == "none":
        return "a token looks at every key"
    how = "by a screening that is learned" if config.screening == "learned" else "by the keys"
    one = "one by one" if config.attention_block == 1 else f"in blocks of {config.attention_block}"
    return (
        f"a token looks at {config.attention_top_k} keys at most, chosen {one} {how}; the last "
        f"{config.local_window} and the first {config.sink_tokens} are among them"
    )


def _neurons(config: PreTrainedConfig) -> str:
    if config.feed_forward_policy == "dense":
        return "a token uses all neurons"
    share, block = 1 - config.feed_forward_sparsity, config.feed_forward_block
    others = "computed, too" if config.feed_forward_policy == "masked" else "not computed"
    return f"a token uses {share:.3g} of the neurons, in blocks of {block}; the others are {others}"


def _depth(config: PreTrainedConfig) -> str:
    if not config.has_exits or config.exit_threshold is None:
        return "every token goes through all layers"
    return (
        f"a token may leave after {config.min_depth} layers, from a probability of "
        f"{config.exit_threshold:g} on"
    )
