"""What each way to run a model costs, and what it changes: times, memory, loss, agreement."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .cached_reading import following_logits, read_prompt
from .evaluation import model_conditions, require_fitting_ids
from .measures import evaluating
from .profiling_tiers import FULL, LEAN, Tier, applied, combined, in_dtype, new_cache, tiers_of
from .profiling_times import ProfileSettings, run_times

__all__ = ["ProfileSettings", "profile_model"]

MANIFEST_VERSION = 1
# Tokens read at once where only logits count.
_CHUNK = 16
_REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)


def profile_model(
    model: PreTrainedModel,
    ids: Tensor,
    settings: ProfileSettings | None = None,
    *,
    tiers: Iterable[str] | None = None,
    name: str = "",
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure every tier that changes something; the manifest, plain values for JSON.

    Every tier reads the same texts in the same way: a prompt at once, the rest from its cache. Its
    loss and its agreement with the full tier are of logits computed in that tier. A tier that the
    model cannot be run in, and one whose logits are those of the full tier to the last bit, is not
    listed but in `left_out`, with the reason. Runs of the tiers take turns.

    Args:
        model: causal, of any kind; comes back as it was.
        ids: `[tokens]`, of a text that the model has not learned.
        settings: lengths and counts; the prompt is shortened to what the model takes.
        tiers: names; None: all of `tiers_of`. The full one is measured in any case.
        name: of the model, for the manifest.
        progress: True or False; None shows a bar on terminals only.

    Returns:
        `tiers`: each with its settings, `prefill_ms` and `decode_ms` (p50, p95), tokens per second
        of both, `weight_bytes`, `cache_bytes`, `peak_bytes` (of CUDA's allocator, else of the
        process; None where nobody counts), `loss`, `perplexity`, `agreement`.

    Raises:
        ValueError: a model that is not causal, a tier that there is not, or too little text.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            f"profile: expected a causal model, which continues a text by itself, got "
            f"{type(model).__name__}"
        )
    settings = settings or ProfileSettings()
    tiers = None if tiers is None else list(tiers)
    wanted = _wanted(model, settings, tiers)
    windows = _windows(model, ids, settings)
    bar = tqdm(desc="profile", disable=None if progress is None else not progress)
    with evaluating(model), bar:
        kept, left_out = _qualities(model, wanted, windows, settings.tokens, bar)
        if tiers is not None:
            names = {FULL, *tiers}
            kept = [subject for subject in kept if subject.tier.name in names]
            left_out = [tier for tier in left_out if tier["name"] in names]
        timed = run_times([(x.tier, x.model) for x in kept], windows[:1], settings, bar)
    rows = [
        {**subject.tier.to_dict(), **subject.quality, **times}
        for subject, times in zip(kept, timed, strict=True)
    ]
    read = {"prompt_length": windows.shape[1] - settings.tokens, "windows": len(windows)}
    return {
        "version": MANIFEST_VERSION,
        "generated_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": name or type(model).__name__,
        "architecture": type(model).__name__,
        "settings": asdict(settings) | read,
        "tiers": rows,
        "left_out": left_out,
        "conditions": model_conditions(model),
    }


@dataclass
class _Subject:
    """A tier, the model in its dtype, and the quality of its logits."""

    tier: Tier
    model: PreTrainedModel
    quality: dict[str, Any]


def _wanted(
    model: PreTrainedModel, settings: ProfileSettings, names: list[str] | None
) -> list[Tier]:
    """The tiers to try: of "lean" all that it could be made of."""
    known = tiers_of(model, top_k=settings.top_k, exit_threshold=settings.exit_threshold)
    unknown = set(names or ()) - {tier.name for tier in known}
    if unknown:
        raise ValueError(
            f"profile: tiers: expected some of {[tier.name for tier in known]} for this model, got "
            f"{sorted(unknown)}"
        )
    if names is None or LEAN in names:
        return known
    return [tier for tier in known if tier.name in (FULL, *names)]


def _windows(model: PreTrainedModel, ids: Tensor, settings: ProfileSettings) -> Tensor:
    """`[windows, prompt + tokens]` from evenly spread places of the text."""
    known = getattr(model.config, "max_position_embeddings", None)
    length = settings.prompt_length + settings.tokens
    length = min(length, known or length)
    if length <= settings.tokens:
        raise ValueError(
            f"profile: tokens: expected fewer than the {length} positions of the model, got "
            f"{settings.tokens!r}"
        )
    if len(ids) < length:
        raise ValueError(
            f"profile: expected a text of at least {length} tokens, got {len(ids)}. Give a longer "
            "one, or a shorter prompt_length"
        )
    require_fitting_ids(model, ids)
    count = min(settings.windows, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts]).to(model.device)


def _qualities(
    model: PreTrainedModel, tiers: list[Tier], windows: Tensor, following: int, bar: Any
) -> tuple[list[_Subject], list[dict[str, str]]]:
    """Tiers whose logits differ from the full tier's, and why the others are left out."""
    kept: list[_Subject] = []
    left_out: list[dict[str, str]] = []
    models: dict[str | None, PreTrainedModel] = {None: model}
    full: Tensor | None = None
    for tier in tiers:
        if tier.name == LEAN:
            if len(kept) < 3:
                left_out.append({"name": LEAN, "reason": "there are no two tiers to combine"})
                continue
            tier = combined([subject.tier for subject in kept[1:]])
        try:
            if tier.dtype not in models:
                models[tier.dtype] = in_dtype(model, tier)
            logits = _logits(models[tier.dtype], tier, windows, following, bar)
        except _REFUSALS as error:
            if full is None:
                raise
            left_out.append({"name": tier.name, "reason": _first_line(error)})
            continue
        full = logits if full is None else full
        if kept and torch.equal(logits, full):
            left_out.append({"name": tier.name, "reason": "its logits are those of the full tier"})
            continue
        kept.append(_Subject(tier, models[tier.dtype], _quality(logits, full, windows)))
    return kept, left_out


def _logits(
    model: PreTrainedModel, tier: Tier, windows: Tensor, following: int, bar: Any
) -> Tensor:
    """`[windows, following - 1, V]` after the tokens that follow the prompts, on the CPU."""
    found = []
    with applied(model, tier):
        for window in windows.split(1):
            cache = new_cache(model, tier)
            read_prompt(model, window[:, :-following], cache)
            rest = window[:, -following:-1]
            found.append(following_logits(model, rest, cache, _CHUNK).cpu())
            bar.update()
    return torch.cat(found)


def _quality(logits: Tensor, full: Tensor, windows: Tensor) -> dict[str, Any]:
    targets = windows[:, -logits.shape[1] :].cpu()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    same = (logits.argmax(-1) == full.argmax(-1)).double().mean().item()
    return {"loss": loss, "perplexity": torch.tensor(loss).exp().item(), "agreement": same}


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
