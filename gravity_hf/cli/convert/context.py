"""What the steps share: the settings, the data, and the model as it was after any step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..hosts import load_host, load_tokenizer, require_text_model
from ..steps.runner import Runner
from ..steps.states import restore_gravity_state
from .data import ConversionData, conversion_data
from .settings import ConversionSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The steps that leave gravity tensors, the latest first.
_GRAVITY_STATES = ("transfer", "calibrate", "patch")


@dataclass
class Context(Runner):
    """A runner of conversion steps."""

    settings: ConversionSettings

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings.model.model)

    @cached_property
    def data(self) -> ConversionData:
        host = self.result("load")
        if host is None:
            raise RuntimeError("convert: expected the step 'load' to be finished")
        return conversion_data(self.settings, self.tokenizer, host)

    @property
    def writes(self) -> bool:
        """Whether the host writes text (True) or only reads it (False)."""
        record = self.result("load")
        return bool(record and record["writes"])

    def host(self) -> PreTrainedModel:
        """The host, fresh from where it lies."""
        settings = self.settings.model
        model = load_host(settings.model, settings.dtype, self.device)
        require_text_model(model)
        return model

    def gravity_at(self, step: str) -> PreTrainedModel:
        """The patched model with the gravity tensors that it had after `step`, without LoRA."""
        states = _GRAVITY_STATES[_GRAVITY_STATES.index(step) :]
        latest = next(name for name in states if name not in self.work.skipped)
        return restore_gravity_state(self.host(), self.work.folder(latest))

    def healed(self) -> Any:
        """The model after LoRA as a PeftModel, or after the last step before it."""
        if "lora" in self.work.skipped:
            return self.gravity_at("transfer")
        # Imported here because peft is optional.
        from ...integration.adapters import load_gravity_adapter

        return load_gravity_adapter(self.host(), self.work.folder("lora")).eval()

    def final(self) -> Any:
        """What is saved: LoRA merged into the weights, unless an adapter was asked for."""
        model = self.healed()
        return model if "merge" in self.work.skipped else model.merge_and_unload().eval()
