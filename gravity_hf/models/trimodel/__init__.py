"""Three Lightweight Gravitational Transformers that read each other: world, self, environment."""

from .. import register_classes
from .causal_trimodel import TriModelForCausalLM
from .configuration_trimodel import DEFAULT_STREAMS, TriModelConfig
from .modeling_trimodel import TriModel, TriModelOutput, TriPreTrainedModel

register_classes(TriModelConfig, AutoModel=TriModel, AutoModelForCausalLM=TriModelForCausalLM)

__all__ = [
    "DEFAULT_STREAMS",
    "TriModel",
    "TriModelConfig",
    "TriModelForCausalLM",
    "TriModelOutput",
    "TriPreTrainedModel",
]
