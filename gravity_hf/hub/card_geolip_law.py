"""What a geolip computes, with its own numbers, and what it is not claimed to do."""

from __future__ import annotations

from typing import Any

from ..models.geolip import GeolipConfig
from .card_geolip_verdict import data_of


def law_text(settings: GeolipConfig) -> str:
    """The formulas, with the sizes of this model in them."""
    rows, base, lens = settings.num_rows, settings.base_dim, settings.lens_dim
    lines = [
        f"M      = rows of Encoder(x), each of length 1      [{rows}, {base}], frame of a token",
        f"M_lens = M E^T,  E^T E = 1                         [{rows}, {lens}], {_lens(settings)}",
        f"S_j    = |column j of M_lens|                      [{lens}], omega",
    ]
    if settings.use_spectral:
        lines.append(
            f"S     <- S (1 + alpha tanh(A(LN(S))))              {settings.num_spectral_layers} "
            f"times; 0 < alpha < {settings.max_alpha:g}"
        )
    lines.append("x'     = Decoder(M_lens S)                         column j times S_j")
    return "\n".join(lines)


def constants(settings: GeolipConfig) -> str:
    """What the letters are."""
    what = "a feature vector of a host" if settings.patch_size is None else "a patch of an image"
    said = [f"x: a token, {what}{'' if settings.feature_norm == 'none' else ', normalised'}."]
    turned = {"Rows": settings.frame_sign, "Lifted rows": settings.lens_sign}
    said += [
        f"{rows} are turned so that their first coordinate that is not 0 is positive."
        for rows, sign in turned.items()
        if sign == "canon"
    ]
    if settings.use_spectral:
        kind = "attention by dot products"
        if settings.spectral_attention == "gravity":
            kind = f"gravity, law {settings.gravity_law}, by distances between spectra"
        sight = "to itself and those before it" if settings.is_causal else "in both directions"
        said.append(
            f"A: {kind} between the tokens of a sample, {settings.num_attention_heads} heads, "
            f"{sight}, without positions, with a map after it. alpha: learned, one per mode and "
            f"layer, {settings.alpha_start:.4g} at the start."
        )
    return " ".join(said)


def limits(facts: dict[str, Any]) -> list[str]:
    """Markdown sentences: what the numbers above do not say, and what was not tried."""
    settings: GeolipConfig = facts["settings"]
    return [
        *_rigidity(facts),
        *_attention(facts),
        "That an encoder into many dimensions needs this lens to train is not claimed: a wide "
        "sphere without a lens was not shown to fail.",
        "That this is a good autoencoder is not claimed. A linear code of the same size (PCA) can "
        "be nearer to its input; here it was not compared with one.",
        *_lens_limits(settings),
        *_published(facts),
        *_inputs(facts),
    ]


def _rigidity(facts: dict[str, Any]) -> list[str]:
    verdict = facts["verdict"] or {}
    said = [
        "That the lens keeps angles, and that every row has length 1, holds by construction, for "
        "any weights: it is no result of training."
    ]
    share = verdict.get("random_frac_in_envelope")
    if share is not None:
        said.append(
            f"Frames inside the envelope are no achievement: of random frames of this size "
            f"{share:.1%} lie inside, too. To lie there says that frames did not collapse."
        )
    return said


def _attention(facts: dict[str, Any]) -> list[str]:
    settings, verdict = facts["settings"], facts["verdict"] or {}
    if not settings.use_spectral:
        return ["Tokens do not see each other: every one is reconstructed from itself alone."]
    said = []
    gain = verdict.get("coordination_gain")
    if gain is not None and gain < settings.engage_gain:
        said.append(
            "Attention between tokens did next to nothing for this task; a model without spectral "
            "layers may do as well."
        )
    elif gain is None:
        said.append("Whether attention between tokens helps it was not measured.")
    if not settings.is_causal and settings.patch_size is None:
        said.append(
            "It sees both ways: beside a causal host, or for writing text, it would see what is to "
            "come."
        )
    return said


def _lens_limits(settings: GeolipConfig) -> list[str]:
    need = settings.base_dim * (settings.base_dim + 1) // 2
    said = []
    if settings.lens_dim < need:
        said.append(
            f"Omega has {settings.lens_dim} numbers, fewer than the {need} of the products of the "
            "frame's columns: it does not determine them."
        )
    elif settings.lens_dim > need:
        said.append(
            f"More than {need} modes add nothing to what omega says of a frame: the rest is "
            "redundancy."
        )
    if settings.lens_mode == "learned":
        said.append("That a learned lens is better than the fixed one is not claimed.")
    return said


def _published(facts: dict[str, Any]) -> list[str]:
    # Of weights that come from elsewhere they may be what the config has.
    if facts["training"] is None:
        return []
    return [
        "Numbers that others published for models of this kind are not repeated here, and were not "
        "measured again."
    ]


def _inputs(facts: dict[str, Any]) -> list[str]:
    data, done = data_of(facts), "measured" if facts["verdict"] else "trained"
    what = "images" if facts["settings"].patch_size is not None else "features"
    if data is None:
        return [f"Which {what} it was trained on is not recorded."]
    return [f"It was {done} on {what} of this kind alone: {data}."]


def _lens(settings: GeolipConfig) -> str:
    return "learned" if settings.lens_mode == "learned" else f"fixed, seed {settings.lens_seed}"
