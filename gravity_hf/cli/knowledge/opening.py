"""From folders to what the verbs about beliefs work on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import quiet_libraries
from ..hosts import DTYPES, load_tokenizer, require_causal

if TYPE_CHECKING:
    from ...knowledge.facts import Fact
    from ...knowledge.registry import Registry
    from ...knowledge.store import BeliefStore


def open_base(directory: Path, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """The causal language model in a folder, gravity or not, and its tokenizer.

    Raises:
        ValueError: no such folder, a model that does not write text, an unknown dtype.
    """
    import torch

    from ...integration.loading import load_host_or_gravity

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"DIR: expected a model folder with config.json, got {str(directory)!r}. Save a model "
            "there with save_pretrained, or make one with: gravity-hf convert MODEL OUT"
        )
    require_causal(directory, "beliefs")
    quiet_libraries()
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = load_host_or_gravity(str(directory), dtype=kind)
    if not hasattr(model, "generate") or not model.can_generate():
        raise ValueError(
            f"DIR: expected a causal language model, got {type(model).__name__}. Facts are taught "
            "as continuations of prompts"
        )
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(where).eval(), load_tokenizer(str(directory))


def open_store(
    directory: Path, beliefs: Path, device: str = "auto", dtype: str = "auto"
) -> BeliefStore:
    """The store in `beliefs`, on the model in `directory`, verified to be its base."""
    from ...knowledge.store import BeliefStore

    _require_store(beliefs)
    model, tokenizer = open_base(directory, device, dtype)
    return BeliefStore.open(beliefs, model, tokenizer)


def _require_store(beliefs: Path) -> None:
    """Before the model is loaded, which takes longer."""
    if not (beliefs / "manifest.json").is_file():
        raise ValueError(
            f"KB: expected a folder of beliefs, got {str(beliefs)!r}. Make one with: gravity-hf "
            "beliefs create DIR KB"
        )


def kept_registry(store: BeliefStore) -> Registry | None:
    """The store's registry, where it has one."""
    from ...knowledge.registry import Registry
    from ...knowledge.registry_files import FILE, FOLDER

    return Registry(store) if (store.path / FOLDER / FILE).is_file() else None


def forget_strangers(store: BeliefStore) -> None:
    """Take out of the registry what is no longer in force in the store."""
    registry = kept_registry(store)
    if registry is None:
        return
    for belief_id in registry.strangers():
        registry.unregister(belief_id)
    registry.save()


def chosen_facts(
    bank: str, relations: Sequence[str] | None = None, limit: int | None = None
) -> list[Fact]:
    """The facts of a bank or file, or those of some relations.

    Raises:
        ValueError: none has such a relation; and see `load_facts`.
    """
    from ...knowledge.facts import load_facts

    facts = load_facts(bank)
    known = sorted({fact.relation for fact in facts})
    if unknown := sorted(set(relations or ()) - set(known)):
        raise ValueError(f"--relation: expected one of {', '.join(known)}, got {unknown[0]!r}")
    chosen = [fact for fact in facts if not relations or fact.relation in relations]
    return chosen[:limit]
