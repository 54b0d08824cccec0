"""A server of answers with beliefs: own endpoints, OpenAI's, and a page."""

from __future__ import annotations

import importlib

# Public name -> the module that defines it; nothing heavy is imported before it is used.
_EXPORTS = {
    "ServerSettings": ".settings",
    "KnowledgeBase": ".knowledge_base",
    "create_app": ".app",
    "open_knowledge": ".opening",
    "serve": ".running",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
