"""What a push would upload, said before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import constants

from .input_files import is_processor_file, is_tokenizer_file
from .stale import STALE

_UNITS = ("B", "kB", "MB", "GB", "TB")
_WHATS = {
    "config.json": "config",
    "alphas.safetensors": "alpha over the training",
    "deviations.json": "deviations of the frames over the training",
    "adapter_config.json": "adapter config with the gravity block",
    "generation_config.json": "generation settings",
    "modeling_gravity.py": "code for loading without gravity_hf",
    "README.md": "model card",
    "results.json": "what was measured",
    "calibration.json": "calibration report",
    "calibration.txt": "calibration report",
}


@dataclass(frozen=True)
class PlannedFile:
    """`path`: in the repository. `size`: in bytes. `what`: for people."""

    path: str
    size: int
    what: str


@dataclass(frozen=True)
class UploadPlan:
    """What one push sends, in one commit; `print(plan)` shows it as a table.

    Attributes:
        repo_id: as it was given; without a namespace the Hub takes the user's own.
        revision: branch or `refs/pr/N`; None is the main branch.
        create_pr: whether the commit opens a pull request.
        private: whether a new repository is private; None leaves it to the Hub.
        files: what is uploaded, by path.
        deletions: what would be deleted, None where the Hub was not asked.
        notices: what somebody who pushes should know.
    """

    repo_id: str
    revision: str | None
    create_pr: bool
    private: bool | None
    files: tuple[PlannedFile, ...]
    deletions: tuple[str, ...] | None
    notices: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.files)

    def __str__(self) -> str:
        width = max((len(file.path) for file in self.files), default=0)
        lines = [f"{self.repo_id} ({self._where()}), one commit:"]
        for file in self.files:
            lines.append(f"  {file.path:<{width}}  {size_in_words(file.size):>9}  {file.what}")
        lines.append(f"  {len(self.files)} files, {size_in_words(self.total_bytes)}")
        lines.append(f"  deleted: {self._deletions()}")
        return "\n".join([*lines, *(f"  note: {notice}" for notice in self.notices)])

    def _where(self) -> str:
        branch = self.revision or constants.DEFAULT_REVISION
        parts = [f"a pull request against {branch}" if self.create_pr else branch]
        if self.private is not None:
            parts.append("private" if self.private else "public")
        return ", ".join(parts)

    def _deletions(self) -> str:
        if self.deletions is None:
            return (
                "unknown, the Hub was not asked; what this push does not replace of these goes in "
                f"the same commit: {STALE}"
            )
        return ", ".join(self.deletions) or "nothing"


def what_is(path: str) -> str:
    """What a file of an export is, for people."""
    name = path.rpartition("/")[2]
    if path in _WHATS:
        return _WHATS[path]
    if path.endswith(".safetensors"):
        return "adapter and masses" if name.startswith("adapter_") else "weights"
    if path.endswith(".safetensors.index.json"):
        return "which weights are in which file"
    if path.startswith("figures/"):
        return "titles of the figures" if path.endswith(".json") else "figure"
    if is_tokenizer_file(path):
        return "tokenizer"
    if is_processor_file(path):
        return "processor"
    return "other"


def size_in_words(size: int) -> str:
    """`size` bytes in the unit that leaves at most three digits; 1 kB is 1000 bytes."""
    value = float(size)
    for unit in _UNITS[:-1]:
        if value < 1000:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {_UNITS[-1]}"
