"""A geolip beside a host: it reads hidden states, and may write to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from ...layers.modes import in_evaluation
from .companion_call import (
    GeolipCompanionOutput,
    content_mask,
    host_inputs,
    run_reading,
    run_writing,
)
from .companion_hosts import layer_index, layers_of
from .companion_loading import (
    check_before_loading,
    checked_host,
    config_beside,
    config_of,
    host_of,
    named_host,
    new_host,
)
from .companion_writing import GatedWrite
from .configuration_companion import GeolipCompanionConfig
from .configuration_geolip import GeolipConfig
from .feature_statistics import FeatureStatistics, feature_statistics
from .modeling_geolip import GeolipModel, GeolipOutput

if TYPE_CHECKING:
    from .verdict import Verdict


class _Beside(NamedTuple):
    """What the geolip made of hidden states, and which tokens are content, bool `[B, T]`."""

    geolip: GeolipOutput
    mask: Tensor


class GeolipCompanion(PreTrainedModel):
    """A geolip that stands beside a host and reads the hidden states of one of its layers.

    The host is frozen and in evaluation, unless `config.train_host`; it is named in the config and
    lies in no file of the companion. It is `host`; without one the companion cannot run, but can be
    saved.

    State: `geolip.*`, see `GeolipModel`; `writer.*`, see `GatedWrite`, where something is written.
    """

    config: GeolipCompanionConfig
    config_class = GeolipCompanionConfig
    supports_gradient_checkpointing = True
    # Trainer would hand the number of labels through to the host.
    accepts_loss_kwargs = False

    def __init__(self, config: GeolipCompanionConfig, host: PreTrainedModel | None = None) -> None:
        """`host` belongs to the companion from then on: it is frozen, and in evaluation."""
        encoder = None if host is None else checked_host(config, host)
        super().__init__(config)
        self.geolip = GeolipModel(config.geolip)
        self.writer: GatedWrite | None = None
        if config.write != "none":
            gated, modes = config.write == "residual", config.geolip.lens_dim
            self.writer = GatedWrite(modes, config.hidden_size, gated=gated)
        self.host: PreTrainedModel | None = None
        if encoder is None and config.train_host and config.host_config is not None:
            self.host = new_host(config)
        self.post_init()
        encoder = self.host if encoder is None else encoder
        if encoder is not None:
            self._keep(encoder)

    @classmethod
    def from_host(
        cls,
        host: str | PreTrainedModel,
        geolip: str | GeolipConfig | GeolipModel | None = None,
        *,
        read_layer: int = -1,
        write: str = "none",
        causal: bool = False,
        train_host: bool = False,
        tokenizer: Any = None,
        special_token_ids: Iterable[int] | None = None,
        host_revision: str | None = None,
    ) -> GeolipCompanion:
        """A new companion of a host.

        Args:
            host: a model, or what `AutoModel` loads it by. Of an encoder-decoder the encoder.
            geolip: a preset, `"base"` for None; settings, whose patch_dim is the host's width; or a
                trained geolip, of which a copy is taken.
            read_layer, write, causal, train_host: as in `GeolipCompanionConfig`.
            tokenizer: of the host, for the ids of its special tokens, or else
            special_token_ids: these. With neither all tokens but padding are content.
            host_revision: of the host's name.

        Raises:
            TypeError: no transformers model.
            ValueError: the host and what is asked for do not go together.
        """
        if isinstance(host, str):
            host = named_host(host, host_revision)
        settings = geolip.config if isinstance(geolip, GeolipModel) else geolip
        options = {"read_layer": read_layer, "write": write, "train_host": train_host}
        config = config_beside(
            host,
            settings,
            causal=causal,
            tokenizer=tokenizer,
            special_token_ids=special_token_ids,
            host_revision=host_revision,
            **options,
        )
        companion = cls(config, host)
        if isinstance(geolip, GeolipModel):
            companion.geolip.load_state_dict(geolip.state_dict())
        # Not the host: it may be spread over several devices.
        for part in (companion.geolip, companion.writer):
            if part is not None:
                part.to(host.device)
        return companion

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        host: PreTrainedModel | None = None,
        load_host: bool = True,
        **options: Any,
    ) -> Any:
        """As of any model; then its host is loaded by its name.

        Args:
            host: is taken instead; of the type and width that the companion was made beside, which
                is checked before anything is loaded.
            load_host: False: no host is loaded, and `attach_host` gives one later.

        Raises:
            ValueError: another host, or none beside a companion that names none.
        """
        config = config_of(pretrained_model_name_or_path, options)
        if host is not None or load_host:
            check_before_loading(config, host, options)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **options)
        companion = loaded[0] if isinstance(loaded, tuple) else loaded
        if host is None and load_host and not config.train_host:
            host = host_of(config, options)
        if host is not None:
            companion.attach_host(host)
        return loaded

    def attach_host(self, host: PreTrainedModel) -> None:
        """Stand beside `host`, in the place of another one, if there is one.

        Raises:
            TypeError: no transformers model.
            ValueError: not the host of this companion.
        """
        self._keep(checked_host(self.config, host))

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """As of any model: config.json, which names the host, and the weights, without the host's
        unless `config.train_host`."""
        self._leave_host_out()
        return super().save_pretrained(save_directory, *args, **options)

    def train(self, mode: bool = True) -> GeolipCompanion:
        super().train(mode)
        if self.host is not None and not self.config.train_host:
            self.host.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        return_loss: bool = True,
        output_frames: bool = False,
        **others: Any,
    ) -> GeolipCompanionOutput:
        """Run the host, and the companion beside it.

        Args:
            input_ids, token_type_ids, position_ids, inputs_embeds, pixel_values, others: what the
                host takes; no cache is, with which a companion would see the last tokens only.
                Of a host with a head also labels, whose loss is added. A Trainer keeps a column
                `labels` of a data set with TrainingArguments(label_names=["labels"]) only.
            attention_mask: `[B, T]`, 0 for padding.
            return_loss: of the reconstruction.
            output_frames: also return frames.

        Raises:
            RuntimeError: there is no host.
            ValueError: a cache, labels without a head, a mask of other dimensions.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            **others,
        }
        host = self._attached()
        inputs = host_inputs(host, given)
        layer = layer_index(host.config, self.config.read_layer)
        reads: list[_Beside] = []

        def beside(hidden: Tensor) -> Tensor:
            """What is written: `hidden`, or more."""
            reads.append(self._beside(hidden, inputs, return_loss, output_frames))
            if self.config.write != "residual":
                return hidden
            return self.writer(hidden, reads[0].geolip.omega_attended, reads[0].mask)

        if self.config.write == "residual" and layer < layers_of(host.config):
            outputs = run_writing(host, layer, inputs, beside)
            written = outputs.get("last_hidden_state")
        else:
            outputs, hidden = run_reading(host, layer, inputs)
            changed, last = beside(hidden), outputs.get("last_hidden_state")
            written = changed if self.config.write == "residual" else last
        return self._output(reads[0], written, outputs)

    @torch.no_grad()
    def read(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """What the companion reads of an input of the host: hidden states `[B, T, C]`, float32, and
        which of the tokens are content, bool `[B, T]`."""
        host = self._attached()
        taken = host_inputs(host, inputs)
        with in_evaluation(host):
            layer = layer_index(host.config, self.config.read_layer)
            _, hidden = run_reading(host, layer, taken)
        return hidden.float(), content_mask(self.config, hidden, taken)

    def fit_statistics(self, loader: Iterable[Mapping[str, Any]]) -> FeatureStatistics:
        """Store what features are normalised with: the statistics of the content tokens of inputs
        of the host, in one pass.

        Args:
            loader: inputs of the host, by their names; labels are not read.

        Raises:
            ValueError: a geolip with `feature_norm="none"`, or no content.
        """
        kind = self.config.geolip.feature_norm
        if kind == "none":
            raise ValueError(
                "fit_statistics: expected a geolip that normalises features, got "
                "feature_norm='none'. Make it with 'zscore' or 'whiten'"
            )
        rows = (hidden[mask] for hidden, mask in self._reads(loader))
        found = feature_statistics(rows, kind)
        self.geolip.set_feature_statistics(found.mean, found.std, found.whitening)
        return found

    def verdict(self, loader: Iterable[Mapping[str, Any]], **options: Any) -> Verdict:
        """What can be measured of the geolip on inputs of the host; see `compute_verdict`. Its
        `to_dict()` as `config.geolip.verdict` is saved, and stands in the model card."""
        reads = self._reads(loader)
        batches = ({"patches": hidden, "attention_mask": mask} for hidden, mask in reads)
        return self.geolip.verdict(batches, **options)

    def get_input_embeddings(self) -> nn.Module:
        return self._attached().get_input_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GatedWrite) and module.gate is not None:
            init.zeros_(module.gate)
        elif isinstance(module, nn.Linear):
            # As torch makes it.
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)

    def _attached(self) -> PreTrainedModel:
        if self.host is None:
            raise RuntimeError(
                "GeolipCompanion: expected a host to run beside, got none. Call "
                "companion.attach_host(host)"
            )
        return self.host

    def _keep(self, host: PreTrainedModel) -> None:
        if not self.config.train_host:
            host.requires_grad_(False)
        self.host = host
        self.main_input_name = host.main_input_name
        self._leave_host_out()
        self.train(self.training)

    def _leave_host_out(self) -> None:
        """Of files, by the names that the host's weights have now."""
        if self.host is not None and not self.config.train_host:
            names = self.host.state_dict(keep_vars=True)
            self._keys_to_ignore_on_save = {f"host.{name}" for name in names}

    def _beside(
        self, hidden: Tensor, inputs: dict[str, Any], return_loss: bool, output_frames: bool
    ) -> _Beside:
        read = hidden if self.config.train_host else hidden.detach()
        read = read.to(self.geolip.feature_mean.device, torch.float32)
        mask = content_mask(self.config, read, inputs)
        labels = read if return_loss else None
        out = self.geolip.forward_patches(read, mask, labels, output_frames)
        return _Beside(out, mask)

    def _reads(self, loader: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._attached().device
        for batch in loader:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            yield self.read(**{name: value.to(device) for name, value in inputs.items()})

    def _output(
        self, beside: _Beside, written: Tensor | None, outputs: ModelOutput
    ) -> GeolipCompanionOutput:
        out, mask = beside
        loss, own = out.loss, outputs.get("loss")
        if own is not None:
            loss = own if loss is None else own + loss.to(own.device)
        tokens = None
        if self.config.write == "omega_tokens":
            tokens = self.writer.tokens(out.omega_attended, mask)
        return GeolipCompanionOutput(
            loss=loss,
            last_hidden_state=written,
            logits=outputs.get("logits"),
            omega=out.omega,
            omega_attended=out.omega_attended,
            frame=out.frame,
            reconstruction=out.reconstruction,
            recon_cosine=out.recon_cosine,
            reconstruction_loss=out.loss,
            feature_mask=mask,
            omega_tokens=tokens,
            omega_mask=None if tokens is None else mask,
            host_outputs=outputs,
        )


__all__ = ["GeolipCompanion", "GeolipCompanionOutput"]
