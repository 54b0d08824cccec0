"""Loading the model that a conversion starts from, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_host(
    name: str, dtype: str = "auto", device: str = "cpu", *, argument: str = "MODEL", **options: Any
) -> PreTrainedModel:
    """The model in the folder or Hub repository `name`, in the class that its config names.

    `argument`: what errors call the argument of the command line that named it.
    `options` go to `from_pretrained`; with a `device_map` among them the model stays where that
    puts it.
    """
    import torch
    import transformers

    from ..hub.own_models import is_own_config
    from ..integration.loading import load_host_or_gravity

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"{argument}: expected a model folder, there is none at {name!r}. Check the spelling"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument}: expected a model folder or the name of a model on the Hub, got {name!r} "
            f"({_first_sentence(error)}). Check the spelling, or download it first"
        ) from error
    if getattr(config, "gravity", None) is not None or config.model_type.startswith("gravity_"):
        raise ValueError(
            f"{argument}: expected a model with dot-product attention, {name!r} already is a "
            f"gravity model. Look at it with: gravity-hf status {name}"
        )
    if is_own_config(config):
        raise ValueError(
            f"{argument}: expected a model with dot-product attention, {name!r} is a "
            f"{config.model_type}, a model of this library: there is nothing to convert. Look at "
            f"it with: gravity-hf status {name}"
        )
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = load_host_or_gravity(name, dtype=kind, **options)
    return (model if "device_map" in options else model.to(device)).eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"MODEL: expected a tokenizer beside the model, got none in {name!r} "
            f"({_first_sentence(error)}). Save one there with tokenizer.save_pretrained, or "
            "calibrate in Python with your own batches: gravity_hf.calibrate(model, batches)"
        ) from error


def require_causal(folder: Path, verb: str) -> None:
    """Refuse a language model of our own that cannot continue a text by itself, such as one that
    sees the tokens which it would be asked for, and any that reads more than a text."""
    from ..hub.own_models import is_own_folder, own_config
    from ..integration.own_models import why_no_text

    if not is_own_folder(folder):
        return
    config = own_config(folder)
    reason = why_no_text(config)
    kind = (config.architectures or [""])[0]
    # One that reads a text and writes none is for the verb to take or to refuse.
    is_encoder = not kind.endswith("ForCausalLM") and not hasattr(config, "streams")
    if reason is not None and not is_encoder:
        raise ValueError(
            f"{verb}: expected a causal model that continues text, {str(folder)!r} holds {reason}. "
            f"Use it in Python: gravity_hf.load_gravity_model({str(folder)!r})"
        )


def require_text_model(model: PreTrainedModel) -> bool:
    """Whether `model` writes text (True) or only reads it (False); anything else is refused."""
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise ValueError(
            f"convert: expected a decoder or an encoder of text, got {type(model).__name__}, which "
            f"takes {model.main_input_name}. Convert it in Python: patch_with_gravity(model), then "
            "calibrate(model, batches) with batches of its own inputs"
        )
    return bool(model.can_generate())


def _first_sentence(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip().rstrip(".")
