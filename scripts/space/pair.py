"""A host and its gravity twins, one for every setting of the dial, all on the host's own weights.

A twin is calibrated before anyone sees it and never changed afterwards: what one visitor turns
cannot reach another, and nothing is ever half calibrated.
"""

from __future__ import annotations

import copy
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from gravity_hf import (
    GravityConfig,
    calibrate,
    gravity_status,
    measure_attention,
    patch_with_gravity,
)
from gravity_hf.cli.pieces import Batches, padded_batches
from gravity_hf.config import DISTANCES, LAWS
from gravity_hf.training.text import embedded_english, prose_paragraphs

# A closed set: every twin is made at most once, so their number is bounded.
SOFTNESSES = (0.0, 1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)
# A map of more tokens could not be read, and would not be there within two seconds.
MOST_TOKENS = 64
_MOST_CHARACTERS = 2000
# More text hardly moves the constants, and whoever turns the dial waits for it.
_CALIBRATION_TEXTS, _CALIBRATION_TOKENS = 16, 48

Inputs = dict[str, Tensor]


class Unanswerable(ValueError):
    """An input that gets no answer; its message is for the visitor."""


@dataclass(frozen=True)
class Dial:
    """What a visitor can turn."""

    softness: float = 1.0
    law: str = "force"
    distance: str = "lifted"

    def __post_init__(self) -> None:
        for name, known in (("softness", SOFTNESSES), ("law", LAWS), ("distance", DISTANCES)):
            if getattr(self, name) not in known:
                raise Unanswerable(
                    f"{name}: expected one of {list(known)}, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True, eq=False)
class Maps:
    """Attention on one text, host and gravity: `[layers, heads, T, T]`, with what
    `measure_attention` finds for every head, `[layers, heads]`."""

    tokens: tuple[str, ...]
    host: Tensor
    gravity: Tensor
    contrast: Tensor
    kl: Tensor
    is_causal: bool


@dataclass(frozen=True, eq=False)
class Twin:
    """`calibration`: the summary of `CalibrationReport`."""

    model: PreTrainedModel
    calibration: dict[str, Any]


class Pair:
    """One host, as it was published, and its twins.

    Args:
        name: for people.
        folder: a causal language model or a text encoder, with its tokenizer.

    Raises:
        ValueError: no such model, or one whose layers cannot be shown head by head.
    """

    def __init__(self, name: str, folder: Path) -> None:
        config = _config_of(folder)
        self.name = name
        self.is_causal = any(a.endswith("ForCausalLM") for a in config.architectures or [])
        kind = AutoModelForCausalLM if self.is_causal else AutoModel
        # Eager attention is the one that hands out its weights.
        self.host = kind.from_pretrained(
            folder, local_files_only=True, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # One at a time: a twin under measurement must not answer somebody else.
        self.lock = threading.RLock()
        self._twins: dict[Dial, Twin] = {}
        self._calibration: Batches | None = None
        self.layers, self.heads = self._shape()

    def inputs(self, text: str, what: str = "text") -> Inputs:
        """Model inputs of one text.

        Raises:
            Unanswerable: an empty or overlong text.
        """
        if not text.strip():
            raise Unanswerable(f"The {what} is empty. Type a sentence, then press Compare.")
        if len(text) > _MOST_CHARACTERS:
            raise Unanswerable(
                f"The {what} is too long: at most {_MOST_CHARACTERS} characters, this one has "
                f"{len(text)}."
            )
        with self.lock:  # a tokenizer keeps the padding of its last call
            inputs = dict(self.tokenizer(text, return_tensors="pt"))
        tokens = inputs["input_ids"].shape[1]
        if tokens > MOST_TOKENS:
            raise Unanswerable(
                f"The {what} is too long: at most {MOST_TOKENS} tokens can be shown, this one has "
                f"{tokens}. Shorten it."
            )
        if self.is_causal:
            inputs.pop("token_type_ids", None)
        return inputs

    def twin(self, dial: Dial) -> Twin:
        """The host under gravity, at this setting; made on first use."""
        with self.lock:
            if dial not in self._twins:
                self._twins[dial] = self._calibrated(dial)
            return self._twins[dial]

    def maps(self, inputs: Inputs, twin: Twin, tokens: list[str]) -> Maps:
        """Attention weights of both on one text of `tokens`."""
        with self.lock, torch.no_grad():
            host, gravity = (
                torch.cat(model(**inputs, output_attentions=True).attentions).float()
                for model in (self.host, twin.model)
            )
            rows = measure_attention(twin.model, [inputs], progress=False).rows
        contrast, kl = (
            torch.tensor([row[name] for row in rows]).view(host.shape[:2])
            for name in ("contrast", "kl")
        )
        return Maps(tuple(tokens), host, gravity, contrast, kl, self.is_causal)

    def _calibrated(self, dial: Dial) -> Twin:
        if self._calibration is None:
            paragraphs = prose_paragraphs(embedded_english())
            texts = random.Random(0).sample(paragraphs, _CALIBRATION_TEXTS)
            # Texts of like length share a batch: less padding to compute.
            self._calibration = padded_batches(
                self.tokenizer, sorted(texts, key=len), _CALIBRATION_TOKENS
            )
        model = patch_with_gravity(_copy_on_same_weights(self.host), GravityConfig(law=dial.law))
        report = calibrate(model, self._calibration, dial.softness, dial.distance, progress=False)
        return Twin(model.eval(), report.summary())

    def _shape(self) -> tuple[int, int]:
        """Layers and heads; refuses hosts of which a layer has no attention to show."""
        trial = patch_with_gravity(_copy_on_same_weights(self.host), GravityConfig())
        status, layers = gravity_status(trial), self.host.config.num_hidden_layers
        if status.skipped or len(status.layers) != layers:
            raise ValueError(
                f"model: expected a text model with one attention module per layer, got "
                f"{type(self.host).__name__} with {len(status.layers)} convertible ones in "
                f"{layers} layers. Choose another host"
            )
        return layers, self.host.config.num_attention_heads


def _config_of(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model: expected the folder of a model, got {str(folder)!r} without config.json. "
            "Check the spelling"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type.startswith("gravity_"):
        raise ValueError(
            f"model: expected a host with dot-product attention, got {config.model_type}. The "
            "page converts the host itself: give the folder that this one was made from"
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"model: expected a causal language model or a text encoder, got the encoder-decoder "
            f"{config.model_type}. Choose another host"
        )
    return config


def _copy_on_same_weights(host: PreTrainedModel) -> PreTrainedModel:
    """New modules and a new config around the same tensors: a twin costs next to no memory."""
    shared = {id(tensor): tensor for tensor in (*host.parameters(), *host.buffers())}
    return copy.deepcopy(host, shared)
