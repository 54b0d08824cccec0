"""A small encoder with its tokenizer, for experiments on features."""

from __future__ import annotations

from pathlib import Path

WIDTH = 24


def save_tiny_encoder(folder: Path) -> Path:
    """A BERT of 24 numbers a token, whose tokens are characters."""
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=WIDTH, **sizes)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder
