"""LeanFormer: a decoder of low-rank maps that chooses keys, neurons and depth for each token."""

from .. import register_classes
from .causal_leanformer import LeanFormerCausalLMOutput, LeanFormerForCausalLM
from .configuration_leanformer import LEANFORMER_PRESETS, LeanFormerConfig
from .exit_fitting import ExitReport, fit_exit_threshold, measure_exits
from .modeling_leanformer import (
    LeanFormerModel,
    LeanFormerModelOutput,
    LeanFormerPreTrainedModel,
)

register_classes(
    LeanFormerConfig, AutoModel=LeanFormerModel, AutoModelForCausalLM=LeanFormerForCausalLM
)

__all__ = [
    "LEANFORMER_PRESETS",
    "ExitReport",
    "LeanFormerCausalLMOutput",
    "LeanFormerConfig",
    "LeanFormerForCausalLM",
    "LeanFormerModel",
    "LeanFormerModelOutput",
    "LeanFormerPreTrainedModel",
    "fit_exit_threshold",
    "measure_exits",
]
