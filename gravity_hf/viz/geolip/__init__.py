"""Figures of a geolip: spectra, alphas, deviations of frames, and reconstructions."""

from __future__ import annotations

from .samples import HISTORY_FILE, SAMPLES_FILE, AlphaCurves, read_history, read_samples
from .writing import write_geolip_figures, write_geolip_folder_figures

__all__ = [
    "HISTORY_FILE",
    "SAMPLES_FILE",
    "AlphaCurves",
    "read_history",
    "read_samples",
    "write_geolip_figures",
    "write_geolip_folder_figures",
]
