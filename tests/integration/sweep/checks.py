"""The promises of a patched model, one check each."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf import load_gravity_model
from gravity_hf.integration.hosts import CLASS_PREFIX, gravity_modules, host_of, is_native
from gravity_hf.integration.support_table import (
    DOES_NOT_GENERATE,
    RAISED,
    REFUSED_TO_SAVE,
    WRONG,
)

from .inputs import gradient_target, tiny_inputs_of
from .outcomes import OK, Outcome, attempt, not_applicable, wrong
from .probe import JITTERS, MORE_JITTERS, Probe, in_budgets, probing
from .sight import SEED, Inputs, Sight, run, whole_model

NEW_TOKENS = 4
_ENDLESS = "is not finite"
# Seeds of inputs that a host is tried with beside its own.
_OTHER_BATCHES = range(2, 7)


class HostState(NamedTuple):
    """What `unpatch_gravity` must bring back, and what calibration must come near.

    `output` is what `sight` sees, `visible_output` the same with zeros where padding stands.
    """

    model_class: type
    config_class: type
    config: dict[str, Any]
    attention: str | None
    tensors: dict[str, Tensor]
    output: Tensor
    visible_output: Tensor
    sight: Sight = whole_model

    @classmethod
    def of(cls, model: PreTrainedModel, inputs: Inputs, sight: Sight = whole_model) -> HostState:
        config = model.config
        return cls(
            type(model),
            type(config),
            config.to_dict(),
            config._attn_implementation,
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            sight(model, inputs, False),
            sight(model, inputs, True),
            sight,
        )


def check_reached(probes: Mapping[str, Probe]) -> Outcome:
    if any(probe.calls for probe in probes.values()):
        return OK
    return wrong(f"none of {len(probes)} patched attention modules was called")


def check_correct(probes: Mapping[str, Probe]) -> Outcome:
    name, worst = max(
        ((name, probe.error) for name, probe in probes.items()), key=lambda item: item[1]
    )
    return OK if worst <= 1.0 else wrong(f"{name}: {worst:.3g} times the error budget")


def check_differs(host: Tensor, gravity: Tensor, probes: Mapping[str, Probe]) -> Outcome:
    if not torch.equal(host, gravity):
        return OK
    if not any(probe.choice for probe in probes.values()):
        return not_applicable("every query sees one key only, so all attention is the same")
    return wrong("the output is the host's, bit for bit")


def check_backward(model: PreTrainedModel, inputs: Inputs) -> Outcome:
    """Gradients of everything are finite, those of the masses what the reference says."""
    model.zero_grad()
    with torch.enable_grad(), probing(model) as probes:
        gradient_target(run(model, inputs)).backward()
    endless = _not_finite(model)
    if endless:
        return wrong(endless)
    outcomes = [_mass_gradient(model, name, probe) for name, probe in probes.items() if probe.calls]
    model.zero_grad()
    reached = [outcome for outcome in outcomes if outcome.kind != "not applicable"]
    return next((outcome for outcome in outcomes if outcome.failed), None) or (
        OK if reached else not_applicable("no gradient comes back to any attention module")
    )


def check_host_backward(model: PreTrainedModel, inputs: Inputs) -> Outcome:
    """Of an unpatched host: whether its own gradients are finite."""
    model.zero_grad()
    with torch.enable_grad():
        gradient_target(run(model, inputs)).backward()
    endless = _not_finite(model)
    model.zero_grad()
    return wrong(endless) if endless else OK


def is_endless(outcome: Outcome) -> bool:
    """Whether it failed by a gradient that is not finite."""
    return outcome.failed and outcome.reason.endswith(_ENDLESS)


def _not_finite(model: PreTrainedModel) -> str:
    """The first parameter whose gradient is not finite, in words; "" if there is none."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and not gradient.isfinite().all():
            return f"the gradient of {name} {_ENDLESS}"
    return ""


def _mass_gradient(model: PreTrainedModel, name: str, probe: Probe) -> Outcome:
    if probe.detached:
        return wrong(f"the output of {name} has no gradient")
    if not probe.has_gradient:
        return not_applicable("its output does not reach the target")
    actual = gravity_modules(model)[name].mass_log.grad
    exact, rounded = (probe.mass_gradient(dtype) for dtype in (torch.float64, torch.float32))
    nearby = [probe.mass_gradient(torch.float64, jitter=seed) for seed in range(JITTERS)]
    if actual is None:
        return wrong(f"the mass of {name} has no gradient")
    if exact.any() and not actual.any():
        return wrong(f"the gradient of the mass of {name} is 0, the reference's is not")
    error = in_budgets(actual, exact, rounded, *nearby)
    if error > 1.0:
        # One error of the float32 reference may be small by luck, and of thousands of modules some
        # meet that; its errors on neighbours of the inputs say how large they are. The budget is
        # the largest of all draws for every module: it only grows with them, so where the first
        # draws suffice, the others need not be made.
        seeds = range(JITTERS, MORE_JITTERS)
        nearby += [probe.mass_gradient(torch.float32, jitter=seed) for seed in seeds]
        error = in_budgets(actual, exact, rounded, *nearby)
    if error > 1.0:
        return wrong(f"the gradient of the mass of {name}: {error:.3g} times the error budget")
    return OK


def check_cached(model: PreTrainedModel, inputs: Inputs) -> Outcome:
    """In float32, or where that fails in float64: there no router or indexer falls the other way by
    a rounding, and what is left is the cache's fault."""
    if not model.can_generate():
        return not_applicable(DOES_NOT_GENERATE)
    outcome = _check_tokens(model, inputs)
    if outcome.kind != WRONG:
        return outcome
    exact = attempt(lambda: _check_tokens(*in_float64(model, inputs)))
    return OK if exact.passed else outcome


def check_host_cached(model: PreTrainedModel, inputs: Inputs, failed: Outcome) -> Outcome:
    """Of an unpatched host. What a patched model raised, its host may raise as well on other
    inputs, with which it generates other tokens; those are tried then."""
    outcome = attempt(lambda: check_cached(model, inputs))
    for seed in _OTHER_BATCHES if failed.kind == RAISED else ():
        if outcome.failed:
            break
        other = attempt(lambda seed=seed: check_cached(model, tiny_inputs_of(model, seed)))
        outcome = other if other == failed else outcome
    return outcome


def _check_tokens(model: PreTrainedModel, inputs: Inputs) -> Outcome:
    cached, uncached = (_greedy(model, inputs, use_cache) for use_cache in (True, False))
    if not isinstance(cached, Tensor):
        return not_applicable(f"generate returns {type(cached).__name__}, not tokens")
    if cached.shape != uncached.shape or not torch.equal(cached, uncached):
        ends = [tokens[:, -NEW_TOKENS:].tolist() for tokens in (cached, uncached)]
        return wrong(f"last tokens with a cache {ends[0]}, without {ends[1]}")
    return OK


def in_float64(model: PreTrainedModel, inputs: Inputs) -> tuple[PreTrainedModel, Inputs]:
    """Copies of a model and of its inputs."""
    copy = deepcopy(model).double()
    copy.set_experts_implementation("eager")  # the others know no float64
    floating = {
        name: value.double()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return copy, {**inputs, **floating}


@torch.no_grad()
def _greedy(model: PreTrainedModel, inputs: Inputs, use_cache: bool) -> Any:
    given = {name: value for name, value in inputs.items() if name not in _NOT_FOR_GENERATE}
    known = model.generation_config
    if not model.config.is_encoder_decoder:
        given = {name: v for name, v in given.items() if not name.startswith("decoder_")}
    elif known.decoder_start_token_id is None and known.bos_token_id is None:
        given["decoder_start_token_id"] = 0
    # A generated placeholder of an image would ask for one more image.
    placeholders = _placeholder_tokens(model.config.to_dict())
    if placeholders:
        given["suppress_tokens"] = placeholders
    torch.manual_seed(SEED)
    return model.generate(
        **given, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, use_cache=use_cache
    )


def _placeholder_tokens(config: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens in whose place a config lets images, sounds and their like stand."""
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= set(_placeholder_tokens(value))
        elif isinstance(value, int) and name.endswith(("_token_id", "_token_index")):
            found |= set() if name.startswith(_TEXT_TOKENS) else {value}
    return sorted(found)


_TEXT_TOKENS = ("bos", "eos", "pad", "decoder_start", "forced", "sep", "cls", "mask", "unk")
_NOT_FOR_GENERATE = ("labels", "use_cache", "decoder_input_ids", "decoder_attention_mask")


def check_reloaded(model: PreTrainedModel, inputs: Inputs) -> Outcome:
    """Of a patched model; `check_host_reloaded` is the same of the host."""
    if not is_native(host_of(type(model))):
        return _refused_to_save(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = load_gravity_model(folder)
    if not type(again).__name__.startswith(CLASS_PREFIX):
        return wrong(f"loaded as {type(again).__name__}")
    return check_same_model(model, again, inputs)


def _refused_to_save(model: PreTrainedModel) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except ValueError as error:
            return not_applicable(f"{REFUSED_TO_SAVE}: {str(error).split(',')[0]}")
    return wrong("saved a class that transformers could not find again")


def check_host_reloaded(model: PreTrainedModel, inputs: Inputs) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        again = type(model).from_pretrained(folder)
    return check_same_model(model, again, inputs)


def check_same_model(model: PreTrainedModel, again: PreTrainedModel, inputs: Inputs) -> Outcome:
    if type(again) is not type(model):
        return wrong(f"saved {type(model).__name__}, loaded {type(again).__name__}")
    difference = _differing(model.state_dict(), again.state_dict())
    if difference:
        return wrong(f"after loading {difference}")
    before, after = whole_model(model, inputs), whole_model(again.eval(), inputs)
    # Equal weights elsewhere in memory: kernels that look at alignment round differently.
    if not torch.allclose(before, after, rtol=0.0, atol=1e-5 * _largest(before), equal_nan=True):
        return wrong(f"the output differs by {_largest(before - after):.3g}")
    return OK


def check_unpatched(model: PreTrainedModel, inputs: Inputs, host: HostState) -> Outcome:
    """Of a model that was unpatched, or that was refused and so never patched."""
    if type(model) is not host.model_class or type(model.config) is not host.config_class:
        return wrong(f"the class is {type(model).__name__} with {type(model.config).__name__}")
    if model.config._attn_implementation != host.attention:
        return wrong(f"the attention is {model.config._attn_implementation!r}")
    changed = _changed(host.config, model.config.to_dict(), type(model))
    if changed:
        return wrong(f"the config has other {', '.join(changed)}")
    difference = _differing(host.tensors, model.state_dict())
    if difference:
        return wrong(difference)
    return (
        OK if same(host.sight(model, inputs, False), host.output) else wrong("the output differs")
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; what is not a number is the same as itself."""
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], model_class: type) -> list[str]:
    """Keys of a config that differ, but for what `save_pretrained` itself writes into it."""
    saved = {"architectures": [model_class.__name__], "dtype": "float32"}
    keys = dict.fromkeys([*before, *now])
    return [k for k in keys if before.get(k) != now.get(k) and now.get(k) != saved.get(k, saved)]


def _differing(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> str:
    """The first difference of two state dicts in words; "" if there is none."""
    if expected.keys() != actual.keys():
        return f"the tensors are others, such as {min(expected.keys() ^ actual.keys())}"
    for name, tensor in expected.items():
        if tensor.dtype != actual[name].dtype or not same(tensor, actual[name]):
            return f"{name} differs"
    return ""


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0
