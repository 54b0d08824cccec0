"""What host and gravity make of the same prompt: likenesses of sentences, or a continuation."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from pair import Dial, Inputs, Maps, Pair, Twin
from torch import Tensor, nn
from transformers import PreTrainedModel

from gravity_hf.training.measures import pooled_embeddings

# What the first text is compared with, beside the visitor's second one.
SENTENCES = (
    "A falling apple obeys the same law as the tides.",
    "Planets keep to their orbits around the sun.",
    "She paid the bill and left the restaurant.",
    "Bread needs time to rise before it is baked.",
)
NEW_TOKENS = 32
_LIKELIEST = 5
_LONGEST_LABEL = 14


@dataclass(frozen=True)
class Side:
    """One model's answer: bars as `(label, value in 0..1)`, and for a language model its text."""

    bars: tuple[tuple[str, float], ...]
    text: str | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """Everything that the page shows of one prompt.

    `likeness`: 1 where both agree. Encoders: cosine of the two embeddings of the text. Language
    models: the probability that both give to the same next tokens, mean over the prompt.
    `contrast`, `kl`: of this text, median and mean over the heads.
    `calibration`: the summary of the calibration.
    """

    dial: Dial
    model: str
    prompt: str
    host: Side
    gravity: Side
    likeness: float
    maps: Maps
    calibration: dict[str, Any]
    seconds: float

    @property
    def contrast(self) -> float:
        return statistics.median(self.maps.contrast.flatten().tolist())

    @property
    def kl(self) -> float:
        return self.maps.kl.mean().item()


def answer(pair: Pair, text: str, other: str, dial: Dial) -> Answer:
    """Both models on `text`; an encoder compares it with `other`, a language model goes on.

    Raises:
        Unanswerable: an empty or overlong text.
    """
    started = time.perf_counter()
    inputs = pair.inputs(text, "prompt" if pair.is_causal else "first sentence")
    if not pair.is_causal:
        pair.inputs(other, "second sentence")
    with pair.lock:
        twin = pair.twin(dial)
        if pair.is_causal:
            host, gravity, likeness = _continuations(pair, twin, inputs)
        else:
            host, gravity, likeness = _likenesses(pair, twin, [text, other, *SENTENCES])
        maps = pair.maps(inputs, twin, _labels(pair, inputs["input_ids"][0]))
    return Answer(
        dial=dial,
        model=pair.name,
        prompt=text,
        host=host,
        gravity=gravity,
        likeness=likeness,
        maps=maps,
        calibration=twin.calibration,
        seconds=time.perf_counter() - started,
    )


def _likenesses(pair: Pair, twin: Twin, texts: list[str]) -> tuple[Side, Side, float]:
    batch = dict(pair.tokenizer(texts, padding=True, return_tensors="pt"))
    host, gravity = (pooled_embeddings(model, [batch]) for model in (pair.host, twin.model))
    sides = [_likeness(embeddings, texts) for embeddings in (host, gravity)]
    return sides[0], sides[1], _cosine(host[0], gravity[0])


def _likeness(embeddings: Tensor, texts: list[str]) -> Side:
    pairs = zip(texts[1:], embeddings[1:], strict=True)
    return Side(tuple((text, _cosine(embeddings[0], other)) for text, other in pairs))


def _continuations(pair: Pair, twin: Twin, inputs: Inputs) -> tuple[Side, Side, float]:
    host, gravity = (_continuation(pair, model, inputs) for model in (pair.host, twin.model))
    shared = torch.minimum(host[1], gravity[1]).sum(-1).mean().item()
    return host[0], gravity[0], min(shared, 1.0)


def _continuation(pair: Pair, model: PreTrainedModel, inputs: Inputs) -> tuple[Side, Tensor]:
    """What the model writes, taking the likeliest token, and its probabilities `[T, vocabulary]`
    of the token after each of the prompt's."""
    with torch.no_grad():
        probabilities = model(**inputs, use_cache=False).logits[0].double().softmax(-1)
        written = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=pair.tokenizer.pad_token_id,
        )
    likeliest = probabilities[-1].topk(_LIKELIEST)
    labels = _labels(pair, likeliest.indices)
    bars = tuple(zip(labels, likeliest.values.tolist(), strict=True))
    new = written[0, inputs["input_ids"].shape[1] :]
    return Side(bars, pair.tokenizer.decode(new, skip_special_tokens=True)), probabilities


def _labels(pair: Pair, ids: Tensor) -> list[str]:
    """One line per token id `[T]`; a space is `·`, a line break `↵`, nothing to see `∅`."""
    texts = [pair.tokenizer.decode([token]) for token in ids.tolist()]
    shown = [text.replace(" ", "·").replace("\n", "↵").replace("\t", "→") for text in texts]
    return [
        "∅"
        if not text.isprintable() or not text
        else text
        if len(text) <= _LONGEST_LABEL
        else text[: _LONGEST_LABEL - 1] + "…"
        for text in shown
    ]


def _cosine(a: Tensor, b: Tensor) -> float:
    return nn.functional.cosine_similarity(a, b, dim=0).item()
