"""An export as it was before `config.json` named a file of weights that is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gravity_hf.integration.guards import WEIGHTS_KEY


def save_older(export: Path, folder: Path) -> Path:
    shutil.copytree(export, folder)
    config = json.loads((folder / "config.json").read_text())
    del config[WEIGHTS_KEY]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
