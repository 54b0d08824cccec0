"""Which software cannot run a gravity export, and what happens there: one table, from which cards
take their sentences and tests their promises."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Software:
    """`name` of it. `model`, `adapter`: what it does with a whole model or with an adapter; None
    where the question does not arise. `{model_type}` stands for the export's own type, `{name}` for
    the name."""

    name: str
    model: str | None
    adapter: str | None


_NO_ATTENTION = "has no gravity attention to put it on; not tried"
# vllm/model_executor/models/transformers sets `text_config._attn_implementation` to "vllm"; TGI's
# transformers_flash_causal_lm.py loads with `attn_implementation="tgi"`.
_OWN_ATTENTION = (
    "its published table of models does not name it; where it runs transformers' code instead, it "
    "names an attention of its own, which this model refuses. Not tried in {name} itself"
)

SOFTWARE = (
    Software(
        "transformers without this library",
        "refuses the model type `{model_type}`, and under the host's own class the file of weights "
        "that `config.json` names, whichever attention is asked for (given a config from "
        "elsewhere, that class runs dot products); with `trust_remote_code=True` it runs gravity, "
        "by the code beside the weights, and refuses any other `attn_implementation`",
        None,
    ),
    Software(
        "peft without this library",
        None,
        "refuses the adapter, whose type `GRAVITY_LORA` it does not know",
    ),
    Software(
        "llama.cpp (GGUF)",
        "its published table of models, by which it converts, does not name it, and its names of "
        "tensors have no place for masses: there is no GGUF file of this model. Not tried in "
        "llama.cpp itself",
        _NO_ATTENTION,
    ),
    Software("vLLM", _OWN_ATTENTION, _NO_ATTENTION),
    Software("TGI", _OWN_ATTENTION, _NO_ATTENTION),
)


# Of adapters that were saved before they had a type of their own.
_ORDINARY_LORA = (
    "puts this adapter, which an older gravity_hf saved as an ordinary LoRA, onto an unpatched "
    "host, without an error: load and save it again with gravity_hf"
)


def software_lines(saved: str, model_type: str, *, ordinary_lora: bool = False) -> list[str]:
    """One line per program that cannot run an export.

    Args:
        saved: `"model"` or `"adapter"`.
        model_type: the export's own, such as `gravity_qwen2`.
        ordinary_lora: an adapter whose files say that it is a LoRA like any other.
    """
    lines = []
    for software in SOFTWARE:
        what = software.adapter if saved == "adapter" else software.model
        if what is not None:
            if ordinary_lora and software.name.startswith("peft"):
                what = _ORDINARY_LORA
            said = what.format(model_type=model_type, name=software.name)
            lines.append(f"{software.name}: {said}.")
    return lines
