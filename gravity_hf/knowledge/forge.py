"""Batches of facts into deltas that are validated, kept apart, and registered, or none of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from .digest import compute_digest
from .encoding import EncodingConfig
from .encoding_rows import training_rows
from .errors import IntegrityError, ValidationError
from .facts import Fact
from .forge_batches import batches_of
from .forge_results import ForgedDelta, ForgeResult, Rejected
from .forge_run import ForgeRun, ForgeSettings
from .forge_sharing import Sharing
from .forge_strategies import FREE, PROJECTED, RANKS, Ladder, layer_strategies
from .registry import Registry
from .targets import base_model, chosen_layers, decoder_layers
from .validation import Validation

__all__ = ["Forge", "ForgeResult", "ForgedDelta", "Rejected", "Validation"]

ORTHOGONALITIES = ("projected", "penalty", "check")


class Forge:
    """Makes deltas of several facts each, for one registry.

        forge = Forge(model, tokenizer, Registry(store), rank=4)
        result = forge.run(load_facts("chemistry"), domain="chemistry", unrelated_text=texts)
        result.deltas, result.rejected

    A delta is registered only if it passed its validation and the registry's checks; what failed is
    reported with every attempt. If anything raises, nothing of the run is registered or stored.

    Args:
        model: a causal LM, the registry's; it stays as it is, which is checked by digest.
        registry: where deltas are registered; those of a store's registry become its beliefs.
        rank: of the update of each map; `"search"` for the smallest of 1, 2, 4, 8, 16 that passes;
            or the ranks to search.
        layers: `"auto"` from five in the middle to all as validations fail; or numbers, or a word
            of `target_modules`.
        facts_per_delta: how many facts share one.
        steps, learning_rate: of training; None: those of `encoding`.
        orthogonality: `"projected"`: factors are orthogonal to all that is registered at every
            step of training. `"penalty"`: every step takes a share of an overlap
            away. `"check"`: only the registry's checks.
        validation: the bar.
        encoding: further settings of training.
        round_size: batches that are trained side by side, each confined to a slice of its own of
            the input features, so that they are orthogonal to each other too. Processes of an
            accelerator share a round.
        accelerator: of `accelerate`. The result does not depend on how many processes it has.
        quiet: share of others' input energy that a null space may hold.
        penalty: with `"penalty"`, the share of an overlap that each step takes away, in (0, 1].
        most_attempts: of training for one batch.

    Raises:
        ValidationError: settings that mean nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        registry: Registry,
        rank: int | str | Sequence[int] = 4,
        layers: str | Sequence[int] = "auto",
        facts_per_delta: int = 10,
        steps: int | None = None,
        learning_rate: float | None = None,
        orthogonality: str = "projected",
        validation: Validation | None = None,
        *,
        encoding: EncodingConfig | None = None,
        round_size: int = 1,
        accelerator: Any = None,
        quiet: float = 0.02,
        penalty: float = 0.1,
        most_attempts: int = 12,
    ) -> None:
        if registry.model is not base_model(model):
            raise ValidationError("forge: expected the registry's own model, got another")
        if orthogonality not in ORTHOGONALITIES:
            raise ValidationError(
                f"forge: orthogonality: expected {', '.join(ORTHOGONALITIES)}, got "
                f"{orthogonality!r}"
            )
        for name, value in (
            ("facts_per_delta", facts_per_delta),
            ("round_size", round_size),
            ("most_attempts", most_attempts),
        ):
            if type(value) is not int or value < 1:
                raise ValidationError(f"forge: {name}: expected at least 1, got {value!r}")
        if not 0 < penalty <= 1:
            raise ValidationError(f"forge: penalty: expected a share in (0, 1], got {penalty!r}")
        changes = {"steps": steps, "learning_rate": learning_rate}
        encoding = (encoding or EncodingConfig()).with_changes(
            **{name: value for name, value in changes.items() if value is not None}
        )
        space = PROJECTED if orthogonality == "projected" else FREE
        self.model, self.tokenizer, self.registry = model, tokenizer, registry
        self.facts_per_delta = facts_per_delta
        self.settings = ForgeSettings(
            ladder=Ladder(_layers(model, layers), _ranks(rank), space),
            encoding=encoding,
            validation=validation or Validation(),
            sharing=Sharing(accelerator),
            round_size=round_size,
            quiet=quiet,
            penalty=penalty if orthogonality == "penalty" else 0.0,
            most_attempts=most_attempts,
        )

    def run(
        self,
        facts: Sequence[Fact],
        domain: str,
        *,
        unrelated_text: Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> ForgeResult:
        """Deltas for `facts`, in batches in their order.

        Args:
            domain: becomes part of the beliefs' keys.
            unrelated_text: running text of 20 000 tokens or more, that deltas must not disturb.
                Without it, leakage on unrelated text is judged only at maps where the registry has
                measured it already.
            progress: True or False; None shows a bar on terminals only.

        Raises:
            ValidationError: no facts, the same twice, too few prompts to train and judge by, or an
                answer that the tokenizer cannot write.
            DuplicateKeyError: these very facts have a delta.
            IntegrityError: the base changed meanwhile.
        """
        started = time.monotonic()
        settings = self.settings
        settings.validation.check_facts(
            facts, settings.encoding.training_paraphrases, settings.encoding.training_unrelated
        )
        for fact in facts:
            training_rows(self.tokenizer, fact, settings.encoding)
        first = settings.ladder.first()
        batches = batches_of(facts, domain, self.facts_per_delta, first, self._taken_keys())
        run = ForgeRun(self.model, self.tokenizer, self.registry, settings, unrelated_text)
        before = compute_digest(self.model).root
        run.train(batches, progress)
        if compute_digest(self.model).root != before:
            raise IntegrityError(
                "forge: expected the base as it was before, got another: something changed it "
                "meanwhile. Nothing was registered; load the base again",
                ["base"],
            )
        run.commit(domain)
        return ForgeResult(tuple(run.forged), tuple(run.rejected), time.monotonic() - started)

    def _taken_keys(self) -> set[str]:
        store = self.registry.store
        return set(self.registry.ids) if store is None else set(store.keys())


def _layers(model: nn.Module, layers: str | Sequence[int]) -> list[Any]:
    count = len(decoder_layers(model))
    if layers == "auto":
        return list(layer_strategies(count))
    return [tuple(chosen_layers(count, layers))]


def _ranks(rank: int | str | Sequence[int]) -> list[int]:
    if rank == "search":
        return list(RANKS)
    if isinstance(rank, str):
        raise ValidationError(f"forge: rank: expected numbers or 'search', got {rank!r}")
    return [rank] if isinstance(rank, int) else list(rank)
