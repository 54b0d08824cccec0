"""Settings of a companion: beside which host, what it reads there and what it writes back."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..settings import settle_names
from .configuration_geolip import GeolipConfig

WRITES = ("none", "residual", "omega_tokens")


@strict
class GeolipCompanionConfig(PreTrainedConfig):
    """Settings of a geolip beside a host. The host itself is named, not kept.

    Args:
        geolip: settings of the geolip, whose `patch_dim` is the width of the host's hidden states;
            a dict becomes a `GeolipConfig`. None: a tiny one of 768 dimensions.
        host_name_or_path: what `AutoModel.from_pretrained` loads the host by. None: it must be
            given.
        host_revision: branch, tag or commit of that name. None: the main branch.
        host_model_type: a host of another type is refused. None: not said, none is.
        host_config: of a host that is trained and kept, see `train_host`; None otherwise.
        read_layer: index of the hidden states that are read, and written to: 0 is what the first
            block reads, -1 what the host ends in, `last_hidden_state`.
        write: `"none"`; `"residual"`: `h + tanh(gate) W(omega_attended)`, with a gate that starts
            at 0; or `"omega_tokens"`: `W(omega_attended)` as tokens beside those of the host.
        causal: the host is causal, and so are the spectral layers: no token sees a later one.
        train_host: the host is trained, too, and lies in the companion's own files.
        special_token_ids: of tokens that are no content: they are neither read nor written.
        prefix_tokens: how many tokens a host that reads images has before those of the patches;
            they are neither read nor written.

    Raises:
        ValueError: an unknown name.
        StrictDataclassError: a value outside its range, of a wrong type, or that does not go with
            another.
    """

    model_type = "geolip_companion"
    keys_to_ignore_at_inference = [
        *("omega", "omega_attended", "frame", "lens_frame", "recon_cosine", "feature_mask"),
        *("reconstruction", "reconstruction_loss", "omega_tokens", "omega_mask", "host_outputs"),
    ]

    geolip: dict[str, Any] | GeolipConfig | None = None
    host_name_or_path: str | None = None
    host_revision: str | None = None
    host_model_type: str | None = None
    host_config: dict[str, Any] | None = None
    read_layer: int = -1
    write: str = "none"
    causal: bool = False
    train_host: bool = False
    special_token_ids: list[int] | None = None
    prefix_tokens: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.geolip is None:
            self.geolip = GeolipConfig(patch_dim=768, is_causal=self.causal)
        elif not isinstance(self.geolip, GeolipConfig):
            given = {"is_causal": self.causal, **self.geolip}
            given.pop("model_type", None)
            self.geolip = GeolipConfig(**given)
        super().__post_init__(**settle_names(self, kwargs))

    def to_diff_dict(self) -> dict[str, Any]:
        # Of the geolip, too, without what it has from transformers and never set.
        output = super().to_diff_dict()
        output["geolip"] = self.geolip.to_diff_dict()
        output["geolip"].pop("transformers_version", None)
        return output

    @property
    def hidden_size(self) -> int | None:
        """Of the host."""
        return self.geolip.patch_dim

    def validate_architecture(self) -> None:
        """Called by `@strict` after construction."""
        _expect(self.write in WRITES, "write", f"one of {list(WRITES)}", self.write)
        expected = "settings with a patch_dim, the host's hidden_size"
        _expect(self.geolip.patch_dim is not None, "geolip", expected, None)
        _expect(self.geolip.patch_size is None, "geolip", "settings without images", "patch_size")
        if self.causal and not self.geolip.is_causal:
            expected = "is_causal=True in it beside causal=True, as no token may see later ones"
            _expect(False, "geolip", expected, "is_causal=False")
        _expect(self.prefix_tokens >= 0, "prefix_tokens", "a number >= 0", self.prefix_tokens)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"GeolipCompanionConfig.{name}: expected {expected}, got {got!r}")


__all__ = ["GeolipCompanionConfig"]
