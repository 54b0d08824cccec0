"""One model type built small, patched, and held to every promise."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from gravity_hf import patch_with_gravity, unpatch_gravity
from gravity_hf.integration.hosts import settings_of
from gravity_hf.integration.sites import find_attention_sites, find_own_attention
from gravity_hf.integration.support_table import NOT_APPLICABLE, PROMISES, SupportRecord

from . import checks, nearness
from .categories import category_of
from .configs import NotBuilt, tiny_model
from .inputs import NoInputs, tiny_inputs_of
from .outcomes import (
    OK,
    Outcome,
    attempt,
    collapsed,
    in_words,
    not_applicable,
    raised,
    status_of,
    unless_the_host,
)
from .probe import Probe, probing
from .sight import AttentionOutputs, shows_attention, whole_model

_MODEL_SEED, _INPUTS_SEED = 0, 1
_BLIND = (
    "compared at the outputs of the attention modules: the model's own output is the same bit for "
    "bit also when those of the host are multiplied by -2"
)
# What `patch_with_gravity` and a refusing forward pass raise by design.
_REFUSALS = (TypeError, ValueError, RuntimeError)


def examine(model_type: str) -> SupportRecord:
    """What holds for a model type, on one tiny random model in float32 and one batch."""
    try:
        model = tiny_model(model_type, _MODEL_SEED)
    except NotBuilt as error:
        return _record(model_type, None, "not built", str(error))
    return examine_model(model_type, model)


def examine_model(model_type: str, model: PreTrainedModel) -> SupportRecord:
    """As `examine`, of a model that is there already."""
    model = model.eval()
    try:
        find_attention_sites(model)
    except TypeError:
        return _record(model_type, model, "no routed attention", _own_attention_of(model))
    except ValueError:
        pass  # the refusal is patch_with_gravity's to make
    try:
        inputs = tiny_inputs_of(model, _INPUTS_SEED)
        whole_model(model, inputs)  # some hosts make buffers in their first forward pass
        host = checks.HostState.of(model, inputs)
    except NoInputs as error:
        return _record(model_type, model, "no inputs", str(error))
    except Exception as error:  # whatever a host raises on inputs that were guessed
        return _record(model_type, model, "no inputs", f"the host fails: {in_words(error)}")
    if not host.output.isfinite().all():
        return _record(model_type, model, "no inputs", "the host's own output is not finite")
    examination = _Examination(model_type, model, inputs, host)
    record = examination.record()
    if not examination.is_blind or "unpatched" not in record.kept:
        return record
    if settings_of(model) is not None:
        unpatch_gravity(model)
    host = checks.HostState.of(model, inputs, AttentionOutputs(examination.reached))
    return _Examination(model_type, model, inputs, host, (_BLIND,)).record()


class _Examination:
    """The promises in order, on a host that runs."""

    def __init__(
        self,
        model_type: str,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        host: checks.HostState,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.model_type, self.model, self.inputs, self.host = model_type, model, inputs, host
        self.outcomes: dict[str, Outcome] = {}
        self.probes: dict[str, Probe] = {}
        self.nearness: nearness.Nearness | None = None
        self.notes = list(notes)
        self.is_blind = False

    @property
    def reached(self) -> list[str]:
        """Names of the attention modules that attended by gravity."""
        return [name for name, probe in self.probes.items() if probe.calls]

    def record(self) -> SupportRecord:
        refusal = self._patch()
        if refusal:
            return self._finished("refused", refusal)
        self._forward()
        if self.outcomes["reached"].passed:
            self._while_patched()
        self._unpatch()
        if self.outcomes["reached"].passed and self.outcomes["unpatched"].passed:
            self._against_the_host()
        for name in PROMISES:
            self.outcomes.setdefault(name, not_applicable("not tried, see the others"))
        if self.outcomes["reached"].passed and self.outcomes["differs"].kind == NOT_APPLICABLE:
            # Nothing was seen to fail, for nothing could: that is no pass.
            return self._finished("no inputs", self.outcomes["differs"].reason)
        return self._finished(*status_of(self.outcomes))

    def _patch(self) -> str:
        """The refusal, if the model is refused and left as it was."""
        try:
            patch_with_gravity(self.model)
        except _REFUSALS as error:
            untouched = self._unpatched()
            if untouched.passed:
                return str(error)
            self.outcomes["patched"] = raised(error)
        except Exception as error:  # no refusal: it broke
            self.outcomes["patched"] = raised(error)
        else:
            self.outcomes["patched"] = OK
        return ""

    def _forward(self) -> None:
        """Gravity with and without an observer; sets reached, correct and differs."""
        if not self.outcomes["patched"].passed:
            self.outcomes["reached"] = not_applicable("not patched")
            return
        try:
            with probing(self.model) as self.probes:
                whole_model(self.model, self.inputs)
            output = self.host.sight(self.model, self.inputs, False)
        except Exception as error:  # whatever a model raises is the finding
            self.outcomes["reached"] = raised(error)
            return
        self.outcomes["reached"] = checks.check_reached(self.probes)
        if self.outcomes["reached"].passed:
            self.outcomes["correct"] = checks.check_correct(self.probes)
            self.outcomes["differs"] = checks.check_differs(self.host.output, output, self.probes)
        if self.outcomes.get("differs", OK).failed and self.host.sight is whole_model:
            self.is_blind = not shows_attention(self.model, self.inputs, self.host.output)

    def _while_patched(self) -> None:
        model, inputs = self.model, self.inputs
        self.outcomes["backward"] = attempt(lambda: checks.check_backward(model, inputs))
        self.outcomes["cached"] = attempt(lambda: checks.check_cached(model, inputs))
        self.outcomes["reloaded"] = attempt(lambda: checks.check_reloaded(model, inputs))
        self.outcomes["host"] = attempt(lambda: nearness.check_host(model, inputs, self.host))

    def _unpatch(self) -> None:
        if not self.outcomes["patched"].passed:
            return

        def unpatched() -> Outcome:
            unpatch_gravity(self.model)
            return self._unpatched()

        self.outcomes["unpatched"] = attempt(unpatched)

    def _unpatched(self) -> Outcome:
        return checks.check_unpatched(self.model, self.inputs, self.host)

    def _against_the_host(self) -> None:
        """What failed, on the host; then the calibrated model beside it."""
        model, inputs = self.model, self.inputs
        if self.outcomes["cached"].failed:
            cached = checks.check_host_cached(model, inputs, self.outcomes["cached"])
            self.outcomes["cached"] = unless_the_host(self.outcomes["cached"], cached)
        if self.outcomes["reloaded"].failed:
            reloaded = attempt(lambda: checks.check_host_reloaded(model, inputs))
            self.outcomes["reloaded"] = unless_the_host(self.outcomes["reloaded"], reloaded)
        if checks.is_endless(self.outcomes["backward"]):
            backward = attempt(lambda: checks.check_host_backward(model, inputs))
            self.outcomes["backward"] = unless_the_host(self.outcomes["backward"], backward)
        host = self.host
        try:
            calibration = nearness.Calibration(
                model, inputs, host.visible_output, self.reached, host.sight
            )
        except Exception as error:  # whatever a model raises is the finding
            self.outcomes["calibrated"] = raised(error)
            return
        self.nearness = calibration.nearness
        self.outcomes["calibrated"] = attempt(calibration.check_calibrated)
        self.notes += [calibration.note] if calibration.note else []
        self.outcomes["converges"] = attempt(calibration.check_converges)

    def _finished(self, status: str, reason: str) -> SupportRecord:
        rest = [name for name in self.probes if name not in self.reached]
        near = {} if self.nearness is None else self.nearness._asdict()
        near = {name: round(value, 6) for name, value in near.items()}
        return _record(
            self.model_type,
            self.model,
            status,
            reason,
            promises={name: str(self.outcomes[name]) for name in PROMISES if name in self.outcomes},
            reached=collapsed(self.reached),
            not_reached=collapsed(rest),
            cosine=near.get("lowest"),
            whole_cosine=near.get("whole"),
            near_rows=near.get("near_rows"),
            notes=tuple(self.notes),
        )


def _own_attention_of(model: PreTrainedModel) -> str:
    own = sorted({type(model.get_submodule(name)).__name__ for name in find_own_attention(model)})
    return f"computes attention on its own: {', '.join(own)}" if own else "has no attention"


def _record(
    model_type: str, model: PreTrainedModel | None, status: str, reason: str, **found: Any
) -> SupportRecord:
    own: tuple[str, ...] = ()
    if model is not None:
        names = find_own_attention(model)
        own = tuple(dict.fromkeys(type(model.get_submodule(name)).__name__ for name in names))
    return SupportRecord(
        model_type=model_type,
        category=category_of(model_type, model),
        model="" if model is None else type(model).__name__.removeprefix(checks.CLASS_PREFIX),
        status=status,
        reason=" ".join(reason.split()),
        own_attention=own,
        **found,
    )
