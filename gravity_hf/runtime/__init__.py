"""The runtime of a gravity model: what it did, what its forces were, and how it may grow."""

from __future__ import annotations

import importlib

# Public name -> the module that defines it.
_EXPORTS = {
    "LGTVictorOSModule": ".lgt_module",
    "Ledger": ".ledger",
    "LedgerEntry": ".ledger",
    "LedgerError": ".ledger_file",
    "LedgerKey": ".ledger_key",
    "LedgerReport": ".verification",
    "MirrorLayer": ".mirror",
    "MirrorReport": ".mirror_report",
    "VictorOSBaseModule": ".modules",
    "VictorOSModuleMetadata": ".modules",
    "apply_architecture_change": ".growth",
    "key_from_environment": ".ledger_key",
    "propose_architecture_change": ".growth",
    "read_ledger": ".ledger",
    "registered_modules": ".modules",
    "verify": ".verification",
    "victoros_module": ".modules",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
