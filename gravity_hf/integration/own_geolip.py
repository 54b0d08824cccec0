"""What a geolip, a companion and a prior are, in words; from their configs, as no model is
imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

GEOLIP, COMPANION, PRIOR = "geolip", "geolip_companion", "geolip_prior"
GEOLIPS = (GEOLIP, COMPANION, PRIOR)

_LENSES = {"fixed": "fixed, drawn by seed {seed}", "learned": "learned, orthonormal at every step"}
_LAWS = {
    "power": "weights proportional to 1 / (d^2 + e)^g",
    "force": "softmax over g / (d^2 + e)",
}
_WRITES = {
    "none": "it reads, and writes nothing back",
    "residual": "it writes back through a gate that starts closed",
    "omega_tokens": "it makes tokens of the spectra, for a cross-attention that follows",
}
MECHANISMS = {
    "A": "attention between tokens is used: with spectra of another sample in the place of the "
    "other tokens' own, the loss rises",
    "B": "no use of attention between tokens is shown: with spectra of another sample in the place "
    "of the other tokens' own the loss hardly rises, or alpha stayed near its start",
}
DRIFT = "alpha rose although it hardly matters which other tokens there are, which is drift"


def without_gravity(config: PreTrainedConfig) -> bool:
    """Whether nothing in such a model attends by distances."""
    if config.model_type == PRIOR:
        return True
    inner = config.geolip if config.model_type == COMPANION else config
    return bool(inner.spectral_attention != "gravity" or not inner.use_spectral)


def geolip_in_words(config: PreTrainedConfig) -> tuple[str, ...]:
    """Lens, attention and bounds of a geolip, a line each; whose companion, whose prior it is."""
    if config.model_type == COMPANION:
        return _companion(config)
    if config.model_type == PRIOR:
        of = config.geolip_name_or_path or "a geolip that is not named"
        return (f"a prior over codes: draws frames, which the decoder of {of} makes something of",)
    return (
        f"lens of {config.lens_dim} x {config.base_dim}, {_lens(config)}; signs {config.lens_sign}",
        _attention(config),
        f"envelope +-{config.envelope_coeff * config.base_dim**0.5:.3g} radians around the angles "
        "of uniform directions",
    )


def geolip_sizes_in_words(config: PreTrainedConfig) -> str:
    """What it reads, its frames, layers and widths."""
    if config.model_type == COMPANION:
        return geolip_sizes_in_words(config.geolip)
    if config.model_type == PRIOR:
        return (
            f"codes of {config.num_tokens} tokens with frames of {config.num_rows} x "
            f"{config.base_dim}, {config.num_hidden_layers} layers, width {config.hidden_size}"
        )
    inputs = f"features of width {config.patch_dim}"
    if config.patch_size is not None:
        inputs = f"patches of {config.patch_size} x {config.patch_size} x {config.num_channels}"
    return (
        f"{inputs}, frames of {config.num_rows} x {config.base_dim}, width {config.hidden_size}, "
        f"{spectral_layers(config)}"
    )


def spectral_layers(config: PreTrainedConfig) -> str:
    """How many there are, and of how many heads."""
    if not config.use_spectral:
        return "no spectral layers"
    count, heads = config.num_spectral_layers, config.num_attention_heads
    return f"{count} spectral layer{'' if count == 1 else 's'} of {heads} heads"


def verdict_in_words(verdict: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What was recorded of such a model, a line each; that nothing was."""
    if not verdict:
        return ("no verdict is recorded: what it does was not measured",)
    deviation = (
        f"deviation of the frames, mean {_number(verdict, 'frame_deviation', '+.4f')}, farthest "
        f"{_number(verdict, 'frame_deviation_absmax', '.4f')}, "
        f"{_share(verdict, 'frac_in_envelope')} inside the envelope; random frames: "
        f"{_share(verdict, 'random_frac_in_envelope')}"
    )
    lines = [f"cosine of reconstruction {_number(verdict, 'recon_cosine', '.4f')}", deviation]
    if verdict.get("mean_alpha") is not None:
        lines.append(
            f"alpha {_number(verdict, 'mean_alpha', '.4f')} in the mean, "
            f"{_number(verdict, 'alpha_init', '.4f')} at the start; gain of attention "
            f"{_number(verdict, 'coordination_gain', '.4f')}"
        )
    named = verdict.get("mechanism")
    if named in MECHANISMS:
        lines.append(f"mechanism {named}: {MECHANISMS[named]}")
    if verdict.get("alpha_drift"):
        lines.append(DRIFT)
    return tuple(lines)


def number_in_words(value: Any, form: str) -> str:
    """A number in a format; one that is 0 in it has no minus."""
    text = format(value, form)
    return text if set(text) - set("-0.%") else text.lstrip("-")


def _companion(config: PreTrainedConfig) -> tuple[str, ...]:
    kept = "are in this folder, as it was trained, too" if config.train_host else "are elsewhere"
    return (
        f"companion of {config.host_name_or_path or 'a host that is not named'} "
        f"({config.host_model_type or 'of a type that is not said'}), whose weights {kept}",
        f"reads layer {config.read_layer}; {_WRITES.get(config.write, config.write)}",
        *geolip_in_words(config.geolip),
    )


def _lens(config: PreTrainedConfig) -> str:
    return _LENSES[config.lens_mode].format(seed=config.lens_seed)


def _attention(config: PreTrainedConfig) -> str:
    if not config.use_spectral:
        return "no attention between tokens"
    sight = "causal" if config.is_causal else "sees both ways"
    kind = "dot products of spectra"
    if config.spectral_attention == "gravity":
        kind = f"gravity between spectra, law {config.gravity_law}: {_LAWS[config.gravity_law]}"
    return f"{kind}; {sight}; alpha below {config.max_alpha:g}"


def _number(verdict: Mapping[str, Any], key: str, form: str) -> str:
    value = verdict.get(key)
    return "not recorded" if value is None else number_in_words(value, form)


def _share(verdict: Mapping[str, Any], key: str) -> str:
    value = verdict.get(key)
    return "not recorded" if value is None else f"{100 * value:.1f} %"
