"""The geolip companion: a spectral autoencoder whose codes are rigid frames on a sphere."""

from .. import register_classes
from ..publishing import route_pushes
from .address import Address
from .collating import GeolipCollator
from .configuration_companion import GeolipCompanionConfig
from .configuration_geolip import GEOLIP_PRESETS, GeolipConfig
from .configuration_prior import GeolipPriorConfig
from .features import extract_features
from .image_processing_geolip import GeolipImageProcessor
from .inputs import GeolipOutput
from .modeling_companion import GeolipCompanion
from .modeling_geolip import GeolipForReconstruction, GeolipModel
from .modeling_prior import GeolipPrior
from .pretrained_geolip import GeolipPreTrainedModel
from .procrustes import Alignment, align_frames
from .trigrams import GeolipByteTrigramProcessor
from .verdict import Verdict, compute_verdict

route_pushes(GeolipPreTrainedModel)
route_pushes(GeolipCompanion)
route_pushes(GeolipPrior)
register_classes(
    GeolipConfig, AutoModel=GeolipModel, AutoModelForPreTraining=GeolipForReconstruction
)
register_classes(GeolipCompanionConfig, AutoModel=GeolipCompanion)
register_classes(GeolipPriorConfig, AutoModel=GeolipPrior)

__all__ = [
    "GEOLIP_PRESETS",
    "Address",
    "Alignment",
    "GeolipByteTrigramProcessor",
    "GeolipCollator",
    "GeolipCompanion",
    "GeolipCompanionConfig",
    "GeolipConfig",
    "GeolipForReconstruction",
    "GeolipImageProcessor",
    "GeolipModel",
    "GeolipOutput",
    "GeolipPreTrainedModel",
    "GeolipPrior",
    "GeolipPriorConfig",
    "Verdict",
    "align_frames",
    "compute_verdict",
    "extract_features",
]
