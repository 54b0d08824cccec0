"""What the linear maps of a host get as inputs, measured over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..layers.calibration_inputs import calibration_batches
from ..layers.input_moments import InputMoments, mask_of, measure_inputs
from .placement import execution_device


def input_second_moments(
    model: PreTrainedModel,
    names: Iterable[str],
    calibration: Iterable[Any],
    *,
    tokenizer: Any = None,
    progress: bool | None = None,
    caller: str = "input_second_moments",
) -> InputMoments:
    """`E[x x^T]` `[in, in]`, float64, of the inputs of linear modules, in one pass over the data.

    Padding (`attention_mask`, of a decoder that has an encoder `decoder_attention_mask` or labels
    of -100) is left out. Maps that share their input share one sum.

    Args:
        model: a host, patched or not; in evaluation and without gradients meanwhile.
        names: of its modules.
        calibration: texts, or model inputs as dicts of tensors; a few thousand tokens at least, and
            better ten times as many as the widest map has inputs.
        tokenizer: of the model, for texts.
        progress: True or False; None shows a bar on terminals only.
        caller: the function that errors name.

    Raises:
        ValueError: no data, or a module that none of it reached.
        AttributeError: a name that the model has no module of.
    """
    modules = {name: model.get_submodule(name) for name in names}
    batches = calibration_batches(caller, calibration, tokenizer)
    return measure_inputs(
        caller,
        model,
        modules,
        batches,
        real_tokens=_real_tokens_of(model),
        device=execution_device(model),
        progress=progress,
    )


def _reads_encoder(name: str) -> bool:
    """Whether a map of an encoder-decoder gets tokens of the encoder: its own, and keys and values
    that the decoder looks at."""
    if "decoder" not in name:
        return name != "lm_head"
    *place, last = name.lower().split(".")
    crosses = any(word in part for part in place for word in ("encoder_att", "encdec", "cross"))
    return crosses and last.removesuffix("_proj") in ("k", "v", "key", "value")


def _real_tokens_of(model: PreTrainedModel) -> Any:
    if not getattr(model.config, "is_encoder_decoder", False):
        return mask_of

    def real_tokens(inputs: Mapping[str, Any], name: str) -> Tensor | None:
        if _reads_encoder(name):
            return mask_of(inputs)
        mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
        if mask is None and "decoder_input_ids" not in inputs and isinstance(labels, Tensor):
            return labels != -100
        return mask_of({"attention_mask": mask})

    return real_tokens
