"""The Newton Gravity Transformer: tokens as particles with masses and coordinates that move."""

from .. import register_classes
from ..publishing import route_pushes
from .causal_ngt import NGTCausalLMOutput, NGTForCausalLM
from .configuration_ngt import NGT_PRESETS, NGTConfig
from .modeling_ngt import NGTModel, NGTModelOutput, NGTPreTrainedModel

route_pushes(NGTPreTrainedModel)
register_classes(NGTConfig, AutoModel=NGTModel, AutoModelForCausalLM=NGTForCausalLM)

__all__ = [
    "NGT_PRESETS",
    "NGTCausalLMOutput",
    "NGTConfig",
    "NGTForCausalLM",
    "NGTModel",
    "NGTModelOutput",
    "NGTPreTrainedModel",
]
