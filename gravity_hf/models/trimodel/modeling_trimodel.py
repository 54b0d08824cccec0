"""The tri-model: three LGT streams, fused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from ...layers.fusion import STREAMS, CrossGravitationalFusion
from ...layers.modes import in_evaluation
from ..checkpointing import refuse_reentrant
from .configuration_trimodel import TriModelConfig
from .diagnostics import StreamWatch, snapshot_of, statistics

_IGNORED = -100


@dataclass
class TriModelOutput(ModelOutput):
    """What a tri-model gives.

    loss: where labels were given. last_hidden_state: `[B, M, output_dim]`, M being the longest
    stream's length. world_hidden_state, self_hidden_state, env_hidden_state: `[B, N_s, d]`, what
    each stream is before the fusion. stream_masses: `[B, 3]`, of world, self, env. fusion_G: `[]`,
    `|G|`. diagnostics: where `output_diagnostics` asks.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    world_hidden_state: Tensor | None = None
    self_hidden_state: Tensor | None = None
    env_hidden_state: Tensor | None = None
    stream_masses: Tensor | None = None
    fusion_G: Tensor | None = None  # noqa: N815 (the published name)
    diagnostics: dict[str, Any] | None = None


class Streams(NamedTuple):
    """`hidden`: of world, self, env `[B, N_s, d]`; `masks` `[B, N_s]` or None, 1 = token."""

    hidden: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]


class TriPreTrainedModel(PreTrainedModel):
    """What tri-models share. Streams initialise themselves, the rest as torch does."""

    config: TriModelConfig
    config_class = TriModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LGTBlock", "CrossGravitationalFusion"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True

    def _set_gradient_checkpointing(self, *args: Any, **options: Any) -> None:
        refuse_reentrant(args, options)
        super()._set_gradient_checkpointing(*args, **options)

    def record_streams(self) -> None:
        """Write into the config what its streams have become: they can grow on their own."""
        base, streams = self.base_model, {}
        for name in STREAMS:
            live = base.stream(name).config
            grown = {key: getattr(live, key) for key in ("curvature", "num_hidden_layers")}
            streams[name] = {**(self.config.streams or {})[name], **grown}
        self.config.streams = streams

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        """As every `PreTrainedModel`; streams come back as they have grown."""
        self.record_streams()
        return super().save_pretrained(*args, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, nn.Embedding):
            # As published, unless the head that reads it is this matrix.
            init.normal_(module.weight, std=0.02 if self.config.tie_word_embeddings else 1.0)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CrossGravitationalFusion):
            init.constant_(module.G, float(self.config.fusion_gravitational_constant))


class TriModel(TriPreTrainedModel):
    """Streams of the world, the self and the environment; each is read by the two others.

    `output_proj(final_norm([world; self; env]))` of the fused streams, side by side on the
    channels; shorter ones end with zeros.

    State: `embed_tokens.weight` `[V, d]` unless `vocab_size` is None; `{world,self,env}_model.*`,
    each an `LGTModel`; `fusion.*`; `final_norm.*` `[3d]`; `output_proj.*`.
    """

    main_input_name = "world_input_ids"

    def __init__(self, config: TriModelConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens: nn.Module | None = None
        if config.vocab_size is None:
            self.main_input_name = "world_inputs_embeds"
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        for name in STREAMS:
            stream = AutoModel.from_config(
                config.stream_config(name), attn_implementation=config._attn_implementation
            )
            setattr(self, f"{name}_model", stream)
        self.fusion = CrossGravitationalFusion(
            width,
            config.num_attention_heads,
            float(config.fusion_gravitational_constant),
            float(config.dropout),
            use_gate=config.use_gate,
        )
        self.final_norm = nn.LayerNorm(3 * width)
        self.output_proj = nn.Linear(3 * width, config.output_width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def stream(self, name: str) -> PreTrainedModel:
        """The LGT of `"world"`, `"self"` or `"env"`."""
        return getattr(self, f"{name}_model")

    @can_return_tuple
    def forward(
        self,
        world_input_ids: Tensor | None = None,
        self_input_ids: Tensor | None = None,
        env_input_ids: Tensor | None = None,
        world_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        env_attention_mask: Tensor | None = None,
        world_inputs_embeds: Tensor | None = None,
        self_inputs_embeds: Tensor | None = None,
        env_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_diagnostics: bool = False,
    ) -> TriModelOutput:
        """The fused streams, `last_hidden_state` `[B, M, output_dim]`.

        Args:
            world_input_ids, self_input_ids, env_input_ids: `[B, N_s]`; lengths may differ. Or else
            world_inputs_embeds, self_inputs_embeds, env_inputs_embeds: `[B, N_s, d]`.
            world_attention_mask, self_attention_mask, env_attention_mask: `[B, N_s]`, 0 = padding,
                which no stream sees and no mean counts; outputs there are of no meaning.
            labels: int64 `[B, M]`: cross-entropy over `output_dim` classes, -100 left out; or
                floats `[B, M, output_dim]`: mean squared error where the longest stream, or any
                other, has a token.
            output_diagnostics: also return what the attention of every stream did.

        Raises:
            ValueError: a stream without input, or inputs that do not fit.
        """
        ids = (world_input_ids, self_input_ids, env_input_ids)
        embeds = (world_inputs_embeds, self_inputs_embeds, env_inputs_embeds)
        masks = (world_attention_mask, self_attention_mask, env_attention_mask)
        watches = None
        if output_diagnostics:
            watches = {name: StreamWatch(self.stream(name)) for name in STREAMS}
        hidden = tuple(
            self._run(name, ids[i], embeds[i], masks[i], watches) for i, name in enumerate(STREAMS)
        )
        streams = Streams(hidden, masks)
        fused = self._fused(streams)
        masses = self.fusion.masses(*fused.sources)
        last = self.output_proj(self.final_norm(torch.cat(fused.streams, dim=-1)))
        diagnostics = None
        if watches is not None:
            diagnostics = {name: watches[name].report(hidden[i]) for i, name in enumerate(STREAMS)}
            mean, std = statistics(last)
            constant = float(self.fusion.G.detach().abs())
            fusion = {"world_G": constant, "fused_mean": mean, "fused_std": std}
            diagnostics["fusion"] = fusion
        return TriModelOutput(
            loss=None if labels is None else self._loss(last, labels, streams),
            last_hidden_state=last,
            world_hidden_state=hidden[0],
            self_hidden_state=hidden[1],
            env_hidden_state=hidden[2],
            stream_masses=torch.stack(masses, dim=-1),
            fusion_G=self.fusion.G.abs(),
            diagnostics=diagnostics,
        )

    def embed(self, name: str, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """A stream's input `[B, N, d]`, of token ids or of itself."""
        if ids is None and embeds is not None:
            return embeds
        if ids is None or embeds is not None:
            got = "neither" if ids is None else "both"
            raise ValueError(
                f"{name}: expected {name}_input_ids or {name}_inputs_embeds, got {got}. Every "
                "stream needs one token at least; hide it with an attention mask of zeros"
            )
        if self.embed_tokens is None:
            raise ValueError(
                f"{name}_input_ids: expected {name}_inputs_embeds [B, N, d], as this model has no "
                "vocabulary (vocab_size is None), got token ids"
            )
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(
                f"{name}_input_ids: expected integers [B, N], got {ids.dtype} {tuple(ids.shape)}"
            )
        return self.embed_tokens(ids.long())

    def get_tri_snapshot(
        self, world_input: Tensor, self_input: Tensor, env_input: Tensor
    ) -> dict[str, Any]:
        """What the streams and their fusion do with an input, in evaluation mode.

        Every module's training mode is put back. Keys as published: `world_snapshot`,
        `self_snapshot`, `env_snapshot`, `fusion_diagnostics`.

        Args:
            world_input, self_input, env_input: token ids `[B, N_s]` or embeddings `[B, N_s, d]`.
        """
        inputs: dict[str, Tensor] = {}
        for name, value in zip(STREAMS, (world_input, self_input, env_input), strict=True):
            kind = "inputs_embeds" if value.is_floating_point() else "input_ids"
            inputs[f"{name}_{kind}"] = value
        with torch.no_grad(), in_evaluation(self):
            found = self(**inputs, output_diagnostics=True, return_dict=True).diagnostics
        snapshots = {f"{name}_snapshot": snapshot_of(self, name, found[name]) for name in STREAMS}
        return {**snapshots, "fusion_diagnostics": found["fusion"]}

    def _run(
        self,
        name: str,
        ids: Tensor | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        watches: dict[str, StreamWatch] | None,
    ) -> Tensor:
        inputs = self.embed(name, ids, embeds)
        stream = self.stream(name)
        if watches is None:
            return stream(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        with watches[name]:
            return stream(inputs_embeds=inputs, attention_mask=mask).last_hidden_state

    def _fused(self, streams: Streams) -> _Fused:
        longest = max(x.shape[1] for x in streams.hidden)
        if not self.config.mask_padding:
            # Zeros for a shorter stream, and nothing that says that they are none of its tokens.
            hidden = tuple(_filled(x, longest) for x in streams.hidden)
            masks = tuple(
                None if mask is None else _filled(mask, longest, 1) for mask in streams.masks
            )
            fused = tuple(self.fusion.fuse(name, hidden, masks) for name in STREAMS)
            return _Fused(fused, (hidden, masks))
        fused = tuple(
            _filled(_kept(self.fusion.fuse(name, *streams), mask), longest)
            for name, mask in zip(STREAMS, streams.masks, strict=True)
        )
        return _Fused(fused, (streams.hidden, streams.masks))

    def _loss(self, output: Tensor, labels: Tensor, streams: Streams) -> Tensor:
        width = self.config.output_width
        if labels.is_floating_point():
            if labels.shape != output.shape:
                raise ValueError(
                    f"labels: expected {tuple(output.shape)}, those of the output, got "
                    f"{tuple(labels.shape)}"
                )
            real = _somewhere(streams, output.shape[1])[..., None]
            squares = (output - labels).square() * real
            return squares.sum() / (real.sum() * width).clamp(min=1)
        if labels.shape != output.shape[:2]:
            raise ValueError(
                f"labels: expected {tuple(output.shape[:2])}, a class for every token of the "
                f"longest stream, got {tuple(labels.shape)}"
            )
        return F.cross_entropy(
            output.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED
        )


class _Fused(NamedTuple):
    """`streams`: fused, all of the longest one's length; `sources`: hidden states and masks that
    their masses are of."""

    streams: tuple[Tensor, ...]
    sources: tuple[tuple, tuple]


def _filled(x: Tensor, length: int, value: float = 0.0) -> Tensor:
    """`[B, N, ...]` as `[B, length, ...]`."""
    missing = length - x.shape[1]
    return F.pad(x, (*(0, 0) * (x.dim() - 2), 0, missing), value=value) if missing else x


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` with zeros at padding, so that it does not matter what stood there."""
    return x if mask is None else x * (mask != 0).unsqueeze(-1).to(x.dtype)


def _somewhere(streams: Streams, length: int) -> Tensor:
    """Bool `[B, M]`: places at which a stream has a token."""
    real = [
        x.new_ones(x.shape[:2]) if mask is None else (mask != 0).to(x.dtype)
        for x, mask in zip(*streams, strict=True)
    ]
    return torch.stack([_filled(x, length) for x in real]).sum(0) > 0
