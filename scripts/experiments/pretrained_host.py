"""A causal language model from any folder as the host of an experiment, and text in its own tokens.

    python scripts/experiments/kv_cache.py --pretrained MODEL --text one.txt two.txt --device cuda

A text is cut in two: the first part is for calibration and for training on, of the rest losses are
measured. The word `stdlib` among the texts is the source of Python's standard library, of which
other files are held out. The weights are the same for all seeds: a seed chooses the windows, those
of seeds 0, 1 and 2 apart from each other, and what an experiment draws by lot.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_hosts import STDLIB, Host

# Held-out windows are dealt out to so many seeds.
SHARES = 3
LONGEST, QUICK_LENGTH = 8192, 192
# AdamW's, of all weights, where an experiment trains a host on.
RATE = 2e-4
_CHUNK, _DIGITS = 1 << 24, 16


@dataclass(frozen=True)
class PretrainedHost(Host):
    """`folder`: the model's, which nothing is written into; `kept`: the folder for what is learnt
    about it; `share`: of each text, how much is held out. `record`: as `recorded` makes it."""

    kept: Path = Path()
    share: float = 0.5

    @property
    def text(self) -> Any:
        return tokens(str(self.folder), self.files, self.share)

    @property
    def shelf(self) -> Path:
        return self.kept

    @property
    def unit(self) -> str:
        return "nats per token of held-out text"

    @property
    def heal_rate(self) -> float:
        return RATE

    def held_out(self, count: int, length: int | None = None) -> Any:
        """Ids `[<= count, length]`: this seed's of `SHARES` times as many, evenly spread."""
        windows = self._consecutive(SHARES * count, length or self.length)
        mine = list(range(self.seed % SHARES, len(windows), SHARES))
        if not mine:
            raise ValueError(
                f"--text: expected at least {SHARES} windows of {length or self.length} held-out "
                f"tokens, got {len(windows)}. Give more text, or lower --length"
            )
        return windows.__getitems__(mine)

    def described(self) -> dict[str, Any]:
        names = ("name", "parameters", "digest", "length", "text", "bytes_per_token")
        more = {"unit": self.unit, "apart": True, "held_out": self.share}
        return {**{name: self.record[name] for name in names}, **more}


def pretrained_at(
    folder: str | Path,
    files: Sequence[str],
    kept: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    length: int | None = None,
    share: float = 0.5,
    preset: str = "gpu",
) -> list[PretrainedHost]:
    """One host for each seed.

    Args:
        folder: of a causal language model and its tokenizer.
        files: texts; `"stdlib"` stands for the source of Python's standard library.
        kept: where a folder for what is learnt about the host may be made.
        length: tokens of a window; None: as many as the model takes, at most `LONGEST`, and
            `QUICK_LENGTH` of the preset "quick".
        share: of each text, what is held out.
        preset: written down, as that of a trained host is.

    Raises:
        ValueError: no model or text there, windows longer than the model takes, or a share that
            leaves a part empty.
    """
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise ValueError(
            f"--pretrained: expected a folder of a causal language model, got {str(folder)!r}, "
            "which has no config.json"
        )
    missing = [name for name in files if name != STDLIB and not Path(name).is_file()]
    if missing or not files:
        raise ValueError(f"--text: expected text files or {STDLIB}, got {missing or 'none'}")
    if not 0 < share < 1:
        raise ValueError(f"--held-out: expected a share between 0 and 1, got {share}")
    most = _most_tokens(place)
    length = length or (QUICK_LENGTH if preset == "quick" else min(LONGEST, most))
    if length > most:
        raise ValueError(f"--length: expected at most {most}, which the model takes, got {length}")
    record = recorded(place, tuple(files), share, length, preset)
    name = f"{record['name']}-{record['digest']}-{record['settings']['text']}"
    return [
        PretrainedHost(
            seed, place, length, record, tuple(files), Path(kept) / f"{name}-{seed}", share
        )
        for seed in seeds
    ]


def recorded(
    folder: Path, files: tuple[str, ...], share: float, length: int, preset: str
) -> dict[str, Any]:
    """What a result says of its host: name, parameters, digest of the weights, text."""
    text = tokens(str(folder), files, share)
    return {
        "name": folder.absolute().name or folder.resolve().name,
        "parameters": _parameters(folder),
        "digest": weights_digest(folder),
        "length": length,
        "text": text.description,
        "bytes_per_token": round(text.bytes_per_token, 4),
        "settings": {"preset": preset, "length": length, "text": text.digest, "held_out": share},
    }


@functools.cache
def tokens(folder: str, files: tuple[str, ...], share: float) -> Any:
    """The texts in the model's tokens: a `TokenStream`, made once."""
    from gravity_hf.training.corpus import load_corpus
    from gravity_hf.training.streams import make_stream
    from gravity_hf.training.text import read_text

    first, rest = [], []
    for name in files:
        if name == STDLIB:
            corpus = load_corpus(None, 100_000_000, 10_000_000)
            parts = [
                bytes(part.numpy()).decode("utf-8", "replace")
                for part in (corpus.train, corpus.validation)
            ]
        else:
            text = read_text(Path(name))
            cut = int(len(text) * (1 - share))
            parts = [text[:cut], text[cut:]]
        first.append(parts[0])
        rest.append(parts[1])
    named = ", ".join(name if name == STDLIB else Path(name).name for name in files)
    description = f"{named}, the last {share:.0%} of each file held out"
    if STDLIB in files:
        description += f", of {STDLIB} other files"
    made = make_stream(folder, "\n\n".join(first), "\n\n".join(rest), description)
    # Its own digest has the folder's path in it.
    digest = hashlib.sha256()
    for ids in (made.train, made.validation):
        digest.update(ids.numpy().tobytes())
    return dataclasses.replace(made, digest=digest.hexdigest()[:_DIGITS])


@functools.cache
def weights_digest(folder: Path) -> str:
    """The first digits of the SHA-256 of the files of weights, in the order of their
    names."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ValueError(f"--pretrained: expected weights in {folder}, found no *.safetensors")
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(_CHUNK):
                digest.update(part)
    return digest.hexdigest()[:_DIGITS]


@functools.cache
def _parameters(folder: Path) -> int:
    """Tied ones count once; nothing is loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return model.num_parameters()


def _most_tokens(folder: Path) -> int:
    from transformers import AutoConfig

    most = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    return int(most or LONGEST)
