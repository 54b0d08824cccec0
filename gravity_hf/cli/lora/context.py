"""What the steps of a LoRA run share: settings, data, and the model to train."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ...integration.autos import MODEL_TYPE_PREFIX
from ...integration.loading import MASS_LOG_NAMES, load_gravity_model
from ..hosts import load_host, load_tokenizer, require_text_model
from ..steps.runner import Runner
from ..steps.states import restore_gravity_state
from .settings import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...training.data import PreparedData


@dataclass
class LoraContext(Runner):
    """A runner of LoRA steps."""

    settings: LoraSettings

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings.run.model)

    @cached_property
    def is_host(self) -> bool:
        """Whether the model has dot-product attention and is converted first."""
        name = self.settings.run.model
        if any(Path(name, file).is_file() for file in MASS_LOG_NAMES):
            return False
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError):
            return True  # load_host says what is wrong
        return not config.model_type.startswith(MODEL_TYPE_PREFIX)

    def data_for(self, model: PreTrainedModel) -> PreparedData:
        from ...training.data import prepare_data
        from ...training.packing import require_packable

        if self.settings.data.packing == "documents":
            require_packable(model)
        return prepare_data(
            self.tokenizer,
            self.settings.data,
            max_positions=getattr(model.config, "max_position_embeddings", None),
            vocabulary=model.get_input_embeddings().num_embeddings,
        )

    def base(self) -> PreTrainedModel:
        """The model as loaded: a gravity model, or the host that is to become one."""
        run, options = self.settings.run, self._quantization()
        if self.is_host:
            model = load_host(run.model, run.dtype, self.device, **options)
        else:
            kind = "auto" if run.dtype == "auto" else getattr(torch, run.dtype)
            model = load_gravity_model(run.model, dtype=kind, **options).eval()
            if not options:
                model = model.to(self.device)
        if not require_text_model(model):
            raise ValueError(
                f"MODEL: expected a model that writes text, got {type(model).__name__}. Heal an "
                "encoder with: gravity-hf convert MODEL OUT --lora-steps ..."
            )
        return model

    def patched(self) -> PreTrainedModel:
        """The gravity model to train, as the step `load` left it."""
        model = self.base()
        if self.is_host:
            restore_gravity_state(model, self.work.folder("load"))
        return model

    def _quantization(self) -> dict[str, Any]:
        if not self.settings.run.qlora:
            return {}
        from transformers import BitsAndBytesConfig

        kind = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if self.settings.training.bf16 else torch.float32,
        )
        return {"quantization_config": kind, "device_map": {"": self.device}}
