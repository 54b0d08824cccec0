"""Tiny hosts of every kind, inputs for them, and companions whose writing can be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from gravity_hf import GeolipCompanion, GeolipConfig, GravityConfig, patch_with_gravity

VOCABULARY, WIDTH, LAYERS = 40, 16, 2
PAD, UNKNOWN, CLS, SEP = 0, 1, 2, 3
SPECIAL = [PAD, CLS, SEP]
IDS = torch.tensor([[CLS, 9, 17, 5, 30, 22, SEP], [CLS, 11, 8, SEP, PAD, PAD, PAD]])
MASK = (IDS != PAD).long()
CONTENT = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0]]).bool()
INNER, LAST = 1, -1
GEOLIP: dict[str, Any] = {"patch_dim": WIDTH, "num_rows": 8, "hidden_size": 16}
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_TEXT = {"vocab_size": VOCABULARY, **_SIZES}
_PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _bert(**settings: Any) -> PreTrainedModel:
    return BertModel(BertConfig(**{**_TEXT, "max_position_embeddings": 32, **settings}))


def _gpt2() -> PreTrainedModel:
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
    ids = {"bos_token_id": SEP, "eos_token_id": SEP}
    return GPT2Model(GPT2Config(vocab_size=VOCABULARY, **sizes, **ids))


def _t5() -> PreTrainedModel:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": LAYERS, "num_heads": 2}
    return T5Model(T5Config(vocab_size=VOCABULARY, **sizes))


HOSTS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "qwen2": lambda: Qwen2Model(Qwen2Config(**_TEXT, num_key_value_heads=1)),
    "t5": _t5,
    "vit": lambda: ViTModel(ViTConfig(**_SIZES, image_size=8, patch_size=4)),
    "gravity_bert": lambda: patch_with_gravity(_bert(), GravityConfig()),
}
CAUSAL = ["gpt2", "qwen2"]


def host_named(name: str, **settings: Any) -> PreTrainedModel:
    """In evaluation. Weights are larger than usual, so that layers feel what reaches them."""
    torch.manual_seed(0)
    host = HOSTS[name](**settings).eval()
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.dim() == 2:
                parameter *= 4
    return host


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": _PIXELS}
    return {"input_ids": IDS, "attention_mask": MASK}


def companion_of(
    host: str | PreTrainedModel, *, gate: float | None = None, **options: Any
) -> GeolipCompanion:
    """A new companion, in evaluation; `gate` opens its writing."""
    name = host if isinstance(host, str) else ""
    model = host_named(name) if isinstance(host, str) else host
    torch.manual_seed(1)
    options = {"special_token_ids": SPECIAL, "causal": name in CAUSAL, **options}
    small = GeolipConfig(**GEOLIP, is_causal=options["causal"])
    companion = GeolipCompanion.from_host(model, options.pop("geolip", small), **options).eval()
    if gate is not None:
        with torch.no_grad():
            companion.writer.gate.fill_(gate)
    return companion


@torch.no_grad()
def last_state(companion: GeolipCompanion, **inputs: Tensor) -> Tensor:
    return companion(**inputs).last_hidden_state


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Of whole words, with a `[CLS]` before and a `[SEP]` after them, as BERT's."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*names, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]", **named)
