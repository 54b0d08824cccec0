"""Where the tokens of a text are in every layer of a model that gives them coordinates."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..training.measures import evaluating
from .space import limits_of, principal_components

MOST_TOKENS = 256
_ASKED_BY = "output_coordinates"


@dataclass(frozen=True, eq=False)
class Coordinates:
    """`tokens`: their texts `[T]`. `masses` `[T]`. `layers` `[N + 1, T, C]`: coordinates that the
    first of N layers attends with, then those after each layer. On the CPU, float32."""

    tokens: tuple[str, ...]
    masses: Tensor
    layers: Tensor


@dataclass(frozen=True, eq=False)
class Projection:
    """Coordinates in three dimensions.

    `points` `[N + 1, T, 3]`: principal components of all layers together, each layer minus its
    mean, since a common shift changes no distance. They are the same directions in every layer, so
    that a token can be followed. `explained` `[N + 1, 3]`: share of each layer's own variance.
    """

    points: Tensor
    explained: Tensor

    @property
    def limits(self) -> Tensor:
        """Ends of the axes `[3, 2]`, the same for all layers, and of one scale."""
        return limits_of(self.points.flatten(0, 1))

    def axis_titles(self, layer: int) -> list[str]:
        shares = enumerate(self.explained[layer].tolist(), 1)
        return [f"PC{number} ({100 * share:.0f} %)" for number, share in shares]


def gives_coordinates(model_class: type[nn.Module], config: PreTrainedConfig) -> bool:
    """Whether models of this class and config return coordinates and masses when asked."""
    # The dot-product twins of such a model are of its class.
    is_twin = bool(getattr(config, "is_twin", False))
    return _ASKED_BY in inspect.signature(model_class.forward).parameters and not is_twin


def has_coordinates(model: nn.Module) -> bool:
    """Whether a model, wrapped by peft or not, returns coordinates and masses when asked."""
    base = _unwrapped(model)
    return gives_coordinates(type(base), base.config)


def collect_coordinates(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int = MOST_TOKENS
) -> Coordinates:
    """Coordinates and masses of the first tokens of `text`, as many as the model's window allows.

    Args:
        model: one whose output has `layer_coordinates` and `masses`, wrapped by peft or not. Its
            mode stays as it is.
        tokenizer: the model's.
        text: of at least two tokens.
        max_tokens: how many are read at most.

    Raises:
        TypeError: the model gives no coordinates.
        ValueError: less than two tokens, or tokens that the model does not know.
    """
    base = _unwrapped(model)
    if not has_coordinates(model):
        raise TypeError(
            "collect_coordinates: expected a model whose tokens have coordinates, such as "
            f"NGTForCausalLM with attention='gravity', got {type(base).__name__} without. "
            "gravity-hf figures draws what converted models have instead"
        )
    ids = _ids(base, tokenizer, text, max_tokens)
    device = next(base.parameters()).device
    with evaluating(model):
        output = model(input_ids=ids[None].to(device), use_cache=False, output_coordinates=True)
    return Coordinates(
        tuple(tokenizer.decode([number]) for number in ids.tolist()),
        output.masses[0].float().cpu(),
        torch.stack([layer[0].float().cpu() for layer in output.layer_coordinates]),
    )


def project(coordinates: Coordinates) -> Projection:
    """Three principal components; where there are fewer, the rest is 0."""
    layers = coordinates.layers.double()
    centred = layers - layers.mean(1, keepdim=True)
    found = principal_components(centred.flatten(0, 1))
    points = centred @ found.directions.T
    # Tokens that are all in one place vary in no direction.
    whole = centred.square().sum((1, 2)).clamp(min=1e-300)
    return Projection(points, points.square().sum(1) / whole[:, None])


def weighed(masses: Tensor, low: float, high: float) -> Tensor:
    """Areas between `low` for the lightest token and `high` for the heaviest, `[T]`; halfway where
    all weigh the same."""
    least, most = masses.min(), masses.max()
    share = (masses - least) / (most - least) if most > least else torch.full_like(masses, 0.5)
    return low + (high - low) * share


def _unwrapped(model: nn.Module) -> Any:
    unwrap: Any = getattr(model, "get_base_model", None)  # a PeftModel's
    return model if unwrap is None else unwrap()


def _ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> Tensor:
    window = getattr(model.config, "max_position_embeddings", None)
    length = most if window is None else min(most, window)
    options = {"truncation": True, "max_length": length, "return_tensors": "pt"}
    ids: Tensor = tokenizer(text, **options)["input_ids"][0]
    if len(ids) < 2:
        raise ValueError(
            f"collect_coordinates: expected text of at least 2 tokens, got {len(ids)}. Give more"
        )
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if int(ids.max()) >= known:
        raise ValueError(
            f"collect_coordinates: expected token ids below {known}, the model's vocabulary, got "
            f"{int(ids.max())}. Use the model's own tokenizer"
        )
    return ids.long()
