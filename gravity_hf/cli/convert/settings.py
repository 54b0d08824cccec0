"""The settings of a conversion: dataclasses that become flags, YAML keys and fingerprints alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ...config import GravityConfig
from ...training.data_arguments import DataArguments
from ...training.recipe import TrainingOptions
from ..steps.parsing import parse_settings

STEPS = (
    *("load", "patch", "calibrate", "transfer", "lora", "control", "merge", "evaluate"),
    *("save", "figures", "card"),
)
SKIPPABLE = (
    *("calibrate", "transfer", "lora", "control", "merge", "evaluate"),
    *("figures", "card"),
)


def _help(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
    """What is converted, and to where."""

    model: str = _help("", "Model folder or Hub name of the host.")
    out: str = _help("", "Folder to write. Its subfolder work holds the finished steps.")
    work: str | None = _help(None, "Folder for the finished steps. Default: OUT/work.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _help(
        "auto", "Of the weights; auto takes the checkpoint's own."
    )
    device: str = _help("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    force: bool = _help(False, "Start anew: replace the model in OUT, forget finished steps.")
    skip: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Steps to leave out: {', '.join(SKIPPABLE)}. "
            "Without merge LoRA is saved as an adapter."
        },
    )
    base_model: str | None = _help(
        None, "The host's name on the Hub, for the card, where `model` is a folder."
    )
    figures: bool = _help(True, "Draw figures for the card, where matplotlib is installed.")


@dataclass
class GravityArguments:
    """The law, and how its constants come from data."""

    law: Literal["force", "power"] = _help("force", "M^2/(d^2+eps), or weights (d^2+eps)^(-M^2).")
    distance: Literal["lifted", "euclidean"] = _help(
        "lifted", "lifted: keys get one more coordinate, which puts them on a sphere."
    )
    mass_per: Literal["query_head", "kv_head", "layer"] = _help(
        "query_head", "What has a mass of its own."
    )
    layers: str | None = _help(None, "Which attention layers, such as 0,1,5-8. Default: all.")
    implementation: str = _help("auto", "How the operator is computed; auto chooses.")
    softness: float = _help(1.0, "0: bare gravity. Large: near the host, hardly gravity.")
    max_kl: float | None = _help(
        None, "Instead of softness: each head gets the least that keeps KL to the host below this."
    )
    fit: bool = _help(False, "Refine mass and softening of each head by KL to the host.")
    samples: int = _help(16, "Pieces of text to calibrate on.")


@dataclass
class TransferArguments:
    """Masses and softenings trained until attention answers as the host's does."""

    transfer_steps: int = _help(0, "Optimiser steps; 0 leaves the step out.")
    transfer_mode: Literal["layerwise", "end_to_end"] = _help(
        "layerwise", "layerwise: every layer sees the host's states; end_to_end: its own."
    )
    transfer_outputs: float = _help(1.0, "Factor of the loss on attention outputs.")
    transfer_weights: float = _help(0.0, "Factor of the loss on attention weights.")
    transfer_logits: float = _help(0.0, "Factor of the loss on logits (end_to_end).")
    transfer_learning_rate: float = _help(
        1e-3, "Of masses and softenings, before GravityTrainer scales it."
    )


@dataclass
class LoraArguments:
    """LoRA on the attention projections, masses and softenings with it."""

    lora_steps: int = _help(0, "Optimiser steps; 0 leaves the step out.")
    lora_rank: int = _help(8, "Rank of the LoRA matrices.")
    lora_alpha: int = _help(16, "LoRA updates are scaled by alpha / rank.")
    lora_dropout: float = _help(0.0, "Dropout on the LoRA input.")
    lora_learning_rate: float = _help(2e-4, "Of the LoRA weights.")
    distillation: float = _help(
        0.0, "Factor of the host's logits beside the loss on the text; 0 leaves them out."
    )
    temperature: float = _help(1.0, "Of the distillation.")
    anneal_to: float | None = _help(
        None, "Lower the softness to this while LoRA trains; None keeps it."
    )
    control: bool = _help(
        True, "Also give the untouched host the same LoRA, for an honest comparison."
    )
    merge: bool = _help(True, "Merge LoRA into the weights; otherwise an adapter is saved.")


@dataclass
class EvaluationArguments:
    """What is measured on text that nothing was fitted to."""

    stride: int | None = _help(
        None, "Tokens between windows. Default: the window length, no overlap."
    )
    evaluation_samples: int = _help(64, "Windows of held-out text, at most.")
    prompts: list[str] = field(
        default_factory=list, metadata={"help": "Texts for the finished model to continue."}
    )
    prompt_tokens: int = _help(64, "How many tokens it writes after each.")


@dataclass
class ConversionSettings:
    """Everything together. `check` comes before any work."""

    model: ModelArguments = field(default_factory=ModelArguments)
    gravity: GravityArguments = field(default_factory=GravityArguments)
    transfer: TransferArguments = field(default_factory=TransferArguments)
    lora: LoraArguments = field(default_factory=LoraArguments)
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)
    data: DataArguments = field(default_factory=DataArguments)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def to_dict(self) -> dict[str, Any]:
        """All settings, flat, as the keys of a YAML file."""
        return {key: value for part in asdict(self).values() for key, value in part.items()}

    def config(self) -> GravityConfig:
        """Settings of the patch. The distance is set by the calibration: lifted radii exist only
        once keys were seen."""
        return GravityConfig(
            law=self.gravity.law,
            mass_per=self.gravity.mass_per,
            layers=parse_layers(self.gravity.layers),
            implementation=self.gravity.implementation,
        )

    @property
    def trains(self) -> bool:
        """Whether any step needs data to train on."""
        return bool(self.active({"transfer", "lora"}))

    def active(self, steps: set[str]) -> set[str]:
        """Those of `steps` that are to run, as far as the settings alone tell."""
        off = set(self.model.skip)
        if not self.transfer.transfer_steps:
            off.add("transfer")
        if not self.lora.lora_steps or "lora" in off:
            off |= {"lora", "control", "merge"}
        if not self.lora.control:
            off.add("control")
        if not self.lora.merge:
            off.add("merge")
        if not self.model.figures:
            off.add("figures")
        return steps - off


def parse_conversion(arguments: list[str], **options: Any) -> ConversionSettings:
    """The settings from a command line: flags, or a YAML file and flags; see `parse_settings`."""
    kinds = tuple(part.default_factory for part in fields(ConversionSettings))
    return ConversionSettings(*parse_settings(kinds, arguments, **options))


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """`"0,2-4"` is `(0, 2, 3, 4)`; None stays None."""
    if text is None:
        return None
    chosen: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            chosen += range(int(first), int(last or first) + 1)
    except ValueError:
        chosen = []
    if not chosen:
        raise ValueError(f"--layers: expected indices such as 0,2-4, got {text!r}")
    return tuple(chosen)
