"""Which kind of model a model type is, from transformers' own tables; imports no model."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# In this order: a table that says more about a model stands before one that says less, for BERT is
# listed as a causal LM too, and an audio encoder before a causal LM as sequence to sequence.
_TABLES = {
    "multimodal": ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "VISUAL_QUESTION_ANSWERING"),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_SPECTROGRAM"),
    "text encoder": ("MASKED_LM",),
    "causal LM": ("CAUSAL_LM",),
    "vision": (
        "IMAGE_CLASSIFICATION",
        "VIDEO_CLASSIFICATION",
        "OBJECT_DETECTION",
        "UNIVERSAL_SEGMENTATION",
        "SEMANTIC_SEGMENTATION",
        "DEPTH_ESTIMATION",
        "KEYPOINT_DETECTION",
        "KEYPOINT_MATCHING",
        "MASK_GENERATION",
        "BACKBONE",
        "ZERO_SHOT_OBJECT_DETECTION",
    ),
    "audio": ("CTC", "RNNT", "TDT", "AUDIO_CLASSIFICATION", "AUDIO_XVECTOR", "TEXT_TO_WAVEFORM"),
}
# What parts of models take, and what they are called.
_INPUTS = {"pixel": "vision", "image": "vision", "patches": "vision"}
_INPUTS |= {"input_values": "audio", "input_features": "audio", "audio": "audio"}
_WORDS = {"vision": "vision", "image": "vision", "sam": "vision", "sam2": "vision"}
_WORDS |= {"sam3": "vision", "audio": "audio", "vit": "vision", "vqgan": "vision"}


def all_model_types() -> list[str]:
    """Every model type that transformers knows, sorted."""
    return sorted(CONFIG_MAPPING_NAMES)


def category_of(model_type: str, model: PreTrainedModel | None = None) -> str:
    """One of `support_table.CATEGORIES`; parts of models are known by what they take."""
    for category, tables in _TABLES.items():
        if any(model_type in _listed(table) for table in tables):
            return category
    taken = str(getattr(model, "main_input_name", ""))
    for word, category in _INPUTS.items():
        if word in taken:
            return category
    words = model_type.replace("-", "_").split("_")
    return next((_WORDS[word] for word in words if word in _WORDS), "other")


def _listed(table: str) -> set[str]:
    return set(getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", ()))
