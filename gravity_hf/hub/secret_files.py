"""Files that must not be published: programs in disguise, passwords and tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

# Formats that run code when they are opened, or that transformers opens with pickle.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5")

# A whole name: words such as "token" are part of many names that have nothing to hide.
_OWNER = r"((hf|hub|hugging_?face|git_?(hub|lab)|gh|open_?ai|wandb|aws|access|auth|api|my)[._-]?)?"
_SECRET_NAME = re.compile(
    rf"({_OWNER}(token|secrets?|passw(or)?ds?|credentials?|(api|secret|access)[._-]?keys?)"
    r"|id_(rsa|dsa|ecdsa|ed25519))(\.(txt|json|ya?ml|toml|ini|cfg|env))?"
    r"|.*\.(pem|key|p12|pfx)",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
# A placeholder such as hf_xxxx has few different characters, a token has not.
_FEWEST_CHARACTERS = 10
# Tensors and pictures, large and without text.
_NO_TEXT = (".safetensors", ".onnx", ".png", ".jpg", ".jpeg", ".gif", ".webp")
_BLOCK = 2**20
_LONGEST_TOKEN = 256


def refuse_unsafe(folder: Path, files: Iterable[PurePosixPath]) -> None:
    """Refuse files of `folder` (paths relative to it) that others must not get.

    Raises:
        ValueError: a pickle, or what by its name or its content is a secret.
    """
    for relative in files:
        _refuse_by_name(folder, relative)
        token = None if relative.suffix.lower() in _NO_TEXT else _token_in(folder / relative)
        if token is not None:
            raise ValueError(
                f"{folder}: expected nothing secret, got {relative} with a Hub token in it "
                f"({token[:6]}...). Remove it there, and revoke the token in the settings of your "
                "account on the Hub if others could read the file"
            )


def _refuse_by_name(folder: Path, relative: PurePosixPath) -> None:
    if relative.suffix.lower() in PICKLES:
        raise ValueError(
            f"{folder}: expected safetensors only, got {relative}: a file of this kind can run "
            "code on the machine of whoever loads it. Move it out of the folder; weights are "
            "written by model.save_pretrained"
        )
    if _SECRET_NAME.fullmatch(relative.name):
        raise ValueError(
            f"{folder}: expected nothing secret, got {relative}, which by its name holds a "
            "password or a token. Move it out of the folder, or rename it"
        )


def _token_in(file: Path) -> str | None:
    """The first Hub token in a file of any length."""
    rest = b""
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            text = rest + block
            for match in _SECRET_TEXT.finditer(text):
                if len(set(match[0].lower())) >= _FEWEST_CHARACTERS:
                    return match[0].decode()
            rest = text[-_LONGEST_TOKEN:]
    return None
