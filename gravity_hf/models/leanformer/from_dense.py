"""A LeanFormer of a dense host: its weights, maps of lower rank where that saves something."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...layers.calibration_inputs import calibration_batches
from ...layers.factorizing import (
    Factors,
    Rank,
    RankRule,
    factors_of,
    output_spectrum,
    rank_rules,
)
from ...layers.input_moments import mask_of, measure_inputs
from ..converting import some_of
from .causal_leanformer import LeanFormerForCausalLM
from .dense_hosts import check_host, config_from, map_names
from .first_choices import choices_from_inputs, choices_from_weights

# Of a LeanFormer alone.
_OWN_PARTS = (".mlp.predictor.", ".self_attn.screening.", "model.exit_head.")


def from_dense(
    host: nn.Module,
    rank: Rank = "energy:0.95",
    *,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    progress: bool | None = None,
    **settings: Any,
) -> LeanFormerForCausalLM:
    """A `LeanFormerForCausalLM` that computes what `host` does, as closely as its ranks allow.

    Each map is replaced by the one of lower rank that changes its outputs least on the inputs that
    `calibration` shows; without it, the one whose weights differ least, which is worse by far
    where inputs are uneven. Where two factors would be no smaller than the map it stays dense; at
    `rank="full"` all do, and the logits are the host's. The host is not changed, and shares no
    tensor with the result.

    All keys and all neurons are computed unless `settings` say otherwise:

        from_dense(host, calibration=texts, tokenizer=tokenizer, screening="learned",
                   attention_top_k=256, feed_forward_policy="block", feed_forward_sparsity=0.5)

    What chooses them is then made from the host: the screening looks along the directions in which
    keys differ most, the predictor is the best linear guess at the energy of blocks of neurons, of
    rank `gate_rank`. Both are for starting with; they learn in training.

    Args:
        host: a Llama, Mistral, Qwen2 or Qwen3 language model, in memory.
        rank: as in `gravity_hf.factorize`.
        calibration: texts, or model inputs as dicts of tensors; a few thousand tokens at least.
        tokenizer: of the host, for texts.
        progress: True or False; None shows bars on terminals only.
        settings: of `LeanFormerConfig`, those that the host does not say. Without them
            `screening="none"`, `feed_forward_policy="dense"`, `exit_heads=False`, `dropout=0`.

    Returns:
        The model, in evaluation, on the device and in the dtype of the host. Its ranks are in
        `config.rank_pattern`, by name; a map that is not there is dense.

    Raises:
        TypeError: another model; the error names those that can be, and what others can do.
        ValueError: a host that is quantised, offloaded or has adapters; ranks or settings that
            cannot be.
    """
    model = check_host(host)
    rules = rank_rules(rank, map_names(model.config))
    config_from(model, {}, settings)  # refuses settings before any work is done
    batches = []
    if calibration is not None:
        batches = calibration_batches("from_dense", calibration, tokenizer)
    factors = _factors(model, rules, batches, progress)
    ranks = {name: len(two.down) for name, two in factors.items()}
    lean = LeanFormerForCausalLM(config_from(model, ranks, settings))
    lean.to(device=model.device, dtype=model.dtype)
    _fill(lean, model, factors)
    if batches:
        choices_from_inputs(lean, batches, progress)
    else:
        choices_from_weights(lean)
    lean.generation_config = copy.deepcopy(model.generation_config)
    return lean.eval()


def _factors(
    host: PreTrainedModel,
    rules: Mapping[str, RankRule],
    batches: list[dict[str, Any]],
    progress: bool | None,
) -> dict[str, Factors]:
    """Of the maps that become smaller, by name."""
    maps: dict[str, Any] = {name: host.get_submodule(name) for name in map_names(host.config)}
    moments = None
    if batches and any(rule != RankRule() for rule in rules.values()):
        moments = measure_inputs(
            *("from_dense", host, maps, batches),
            real_tokens=mask_of,
            device=host.device,
            progress=progress,
        )
    hidden = None if progress is None else not progress
    found = {}
    for name, module in tqdm(maps.items(), desc="from_dense", unit="map", disable=hidden):
        try:
            spectrum = output_spectrum(module.weight, None if moments is None else moments[name])
        except ValueError as error:
            raise ValueError(f"from_dense: {name}: {error}") from error
        rank = rules[name].choose(spectrum, module.in_features, module.out_features)
        if rank is not None:
            found[name] = factors_of(module.weight, spectrum, rank)
    return found


def _fill(
    lean: LeanFormerForCausalLM, host: PreTrainedModel, factors: Mapping[str, Factors]
) -> None:
    """Give `lean` every tensor of the host, a map as its factors."""
    state: dict[str, Tensor] = {}
    for key, value in host.state_dict().items():
        name, _, kind = key.rpartition(".")
        if name not in factors:
            state[key] = value
        elif kind == "weight":
            state[f"{name}.down.weight"], state[f"{name}.up.weight"] = factors[name]
        else:
            state[f"{name}.up.{kind}"] = value
    # Loading copies, so that the two models share nothing.
    missing, unknown = lean.load_state_dict(state, strict=False)
    wrong = unknown + [key for key in missing if not any(part in key for part in _OWN_PARTS)]
    if wrong:
        raise ValueError(
            f"from_dense: host: expected the tensors of a plain {type(host).__name__}, got others "
            f"at {some_of(wrong)}. Load it with from_pretrained, unchanged"
        )
