"""What was measured of a geolip, in plain words."""

from __future__ import annotations

from ...integration.own_geolip import DRIFT, MECHANISMS, number_in_words
from ...models.geolip.verdict import Verdict

__all__ = ["verdict_in_words"]


def verdict_in_words(verdict: Verdict) -> list[str]:
    """Sentences, one a line: reconstruction, frames beside random ones, what attention does."""
    inside = "inside" if verdict.in_envelope else "outside"
    deviation = number_in_words(verdict.frame_deviation, "+.4f")
    lines = [
        f"Of {verdict.tokens:,} tokens that it was not trained on, a reconstruction has a cosine "
        f"of {verdict.recon_cosine:.4f} with what was to be found, and a squared error of "
        f"{verdict.recon_mse:.4f}.",
        f"Frames: mean deviation {deviation}, {inside} the envelope of "
        f"+-{verdict.dev_critical:.3f}; farthest {verdict.frame_deviation_absmax:.3f}; "
        f"{verdict.frac_in_envelope:.1%} of them inside. Of random frames "
        f"{verdict.random_frac_in_envelope:.1%} are.",
        f"The lens keeps angles to {verdict.lens_angle_error:.0e}.",
    ]
    if verdict.mean_alpha is None:
        return [*lines, "There are no spectral layers: tokens do not see each other."]
    gain = number_in_words(verdict.coordination_gain, "+.2%")
    lines.append(
        f"Mechanism {verdict.mechanism}: {MECHANISMS[verdict.mechanism]}. The loss changes by "
        f"{gain}; alpha is {verdict.mean_alpha:.4f}, and was {verdict.alpha_init:.4f} at the start."
    )
    return [*lines, f"Drift: {DRIFT}."] if verdict.alpha_drift else lines
