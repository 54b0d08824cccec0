"""Names of the files beside a model's own that an exported folder may hold."""

from __future__ import annotations

RESULTS_FILE = "results.json"
CALIBRATION_FILE = "calibration.json"
CARD_FILE = "README.md"
FIGURES_FOLDER = "figures"
