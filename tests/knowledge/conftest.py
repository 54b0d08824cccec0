"""Tiny models and a tokenizer, made once: every test leaves them as it found them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.knowledge.delta import LowRankDelta, in_out_features, target_modules

VOCABULARY = 300
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WORDS = (
    "The capital of France is Paris. The symbol of gold is Au. A byte has eight bits. "
    "Water boils at one hundred degrees. The largest planet is Jupiter. Who wrote Hamlet? "
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; pads on the left; adds nothing by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([_WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def make_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """Two layers, 32 wide, in evaluation; weights large enough for answers to differ."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        **_TOKENS,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="session")
def gravity_llama() -> PreTrainedModel:
    """The Llama with gravity attention in both layers."""
    model = make_llama()
    return patch_with_gravity(model, GravityConfig()).eval()


@pytest.fixture(scope="session")
def gpt2() -> GPT2LMHeadModel:
    """Its linear maps are Conv1D, its embeddings tied."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        **_TOKENS,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Twenty-four different ones."""
    things = ("France", "gold", "a byte", "water", "the planet", "Hamlet")
    starts = ("The capital of", "Tell me about", "What is the symbol of", "Who knows")
    return [f"{start} {thing}" for start in starts for thing in things]


@pytest.fixture(scope="session")
def random_delta() -> Callable[..., LowRankDelta]:
    """`random_delta(model, seed, rank=1, scale=0.3, **target_modules' arguments)`."""

    def make(
        model: PreTrainedModel, seed: int, rank: int = 1, scale: float = 0.3, **where: object
    ) -> LowRankDelta:
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name in target_modules(model, **where):
            width_in, width_out = in_out_features(model.get_submodule(name))
            A = torch.randn(rank, width_in, generator=generator) * scale
            factors[name] = (A, torch.randn(width_out, rank, generator=generator) * scale)
        return LowRankDelta(factors)

    return make
