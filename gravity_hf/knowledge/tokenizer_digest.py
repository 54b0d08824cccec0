"""A digest of a tokenizer: of everything that decides which ids a text becomes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..runtime.encoding import parsed_json

# Of tokenizer.json. Not truncation and padding, which calls set; the version changes nothing.
_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256, hex; the same after saving and loading, and after any call.

    A tokenizer in Python alone has no `tokenizer.json`: of it the vocabulary, the special tokens
    and the bytes of its files count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = parsed_json(backend.to_str())
        return _hashed({part: _normal(content.get(part)) for part in _PARTS})
    files = {
        name: hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for name in getattr(tokenizer, "vocab_files_names", {})
        if (path := getattr(tokenizer, name, None)) and Path(path).is_file()
    }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _hashed({"vocabulary": tokenizer.get_vocab(), "special": special, "files": files})


def _normal(part: Any) -> Any:
    """Merges as pairs: versions of the library write them as text or as pairs."""
    merges = part.get("merges") if isinstance(part, dict) else None
    if merges and isinstance(merges[0], str):
        return {**part, "merges": [merge.split(" ", 1) for merge in merges]}
    return part


def _hashed(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
