"""The Lightweight Gravitational Transformer: masses per token, forces between positions."""

from .. import register_classes
from ..publishing import route_pushes
from .causal_lgt import LGTCausalLMOutput, LGTForCausalLM
from .classifiers_lgt import LGTForSequenceClassification, LGTForTokenClassification
from .configuration_lgt import LGT_PRESETS, LGTConfig
from .modeling_lgt import LGTModel, LGTModelOutput, LGTPreTrainedModel

route_pushes(LGTPreTrainedModel)
register_classes(
    LGTConfig,
    AutoModel=LGTModel,
    AutoModelForCausalLM=LGTForCausalLM,
    AutoModelForSequenceClassification=LGTForSequenceClassification,
    AutoModelForTokenClassification=LGTForTokenClassification,
)

__all__ = [
    "LGT_PRESETS",
    "LGTCausalLMOutput",
    "LGTConfig",
    "LGTForCausalLM",
    "LGTForSequenceClassification",
    "LGTForTokenClassification",
    "LGTModel",
    "LGTModelOutput",
    "LGTPreTrainedModel",
]
