"""What is timed must first be right: every provider against float64, at a short length."""

from __future__ import annotations

from dataclasses import replace

import torch
from problems import EPS, MASS, Case, Problem, Shape, make_problem, sharp_constants, visible
from providers import FORWARD_ONLY, attend, backend_of
from torch import Tensor

from gravity_hf.ops.reference import gravity_attention_reference

# Times the error of the plain computation in the same dtype.
FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
_SHORT, _SHORT_DECODING, _FEW = 200, 3000, 2


def check(
    case: Case,
    device: str,
    dtype: torch.dtype,
    mass: float = MASS,
    eps: float = EPS,
    with_gradients: bool = True,
) -> dict[str, str]:
    """For "forward" and "backward": "passed", "forward only", "not asked", or what is wrong.

    Two families of inputs: the constants that are timed, and constants under which scores differ.
    Fused kernels in half precision round the weights to the dtype of `v` before their product with
    it; so does the plain computation that sets the budget.
    """
    short = replace(case, shape=_short(case.shape))
    families = [(mass, eps)]
    if case.law != "dot":
        families.append(sharp_constants(case.law, case.shape.width))
    found = {"forward": "passed", "backward": "passed"}
    if case.provider in FORWARD_ONLY or not with_gradients:
        found["backward"] = "forward only" if case.provider in FORWARD_ONLY else "not asked"
    for constants in families:
        problem = make_problem(short, device, dtype, *constants)
        for name, run in (("forward", _forward_problem), ("backward", _backward_problem)):
            if found[name] == "passed":
                found[name] = run(case.provider, problem)
    return found


def _short(shape: Shape) -> Shape:
    batch = min(shape.batch, _FEW)
    if shape.queries == shape.keys:
        return replace(shape, batch=batch, queries=_SHORT, keys=_SHORT)
    return replace(shape, batch=batch, keys=max(_SHORT_DECODING, shape.queries))


def _forward_problem(provider: str, problem: Problem) -> str:
    with torch.no_grad():
        exact, peer = plain(problem.double()), plain(problem)
        try:
            with backend_of(provider):
                output = attend(provider, problem)
        except Exception as error:
            return first_line(error)
    return _compare("output", output, exact, peer, FORWARD_FACTOR, problem.q.dtype)


def _backward_problem(provider: str, problem: Problem) -> str:
    exact, peer = _gradients(None, problem.double()), _gradients(None, problem)
    try:
        with backend_of(provider):
            gradients = _gradients(provider, problem)
    except Exception as error:
        return first_line(error)
    names = ("dq", "dk", "dv", "dmass")
    for name, *tensors in zip(names, gradients, exact, peer, strict=False):
        verdict = _compare(name, *tensors, GRADIENT_FACTOR, problem.q.dtype)
        if verdict != "passed":
            return verdict
    return "passed"


def _gradients(provider: str | None, problem: Problem) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in problem.leaves()]
    q, k, v, *mass = leaves
    fresh = replace(problem, q=q, k=k, v=v, mass=mass[0] if mass else problem.mass)
    output = plain(fresh) if provider is None else attend(provider, fresh)
    return torch.autograd.grad(output, leaves, problem.cotangent)


def plain(problem: Problem) -> Tensor:
    """All scores in float32 (float64 for float64), weights rounded to the dtype of `v`."""
    shape, v = problem.shape, problem.v
    groups = shape.heads // shape.kv_heads
    if problem.law == "dot":
        dtype = torch.promote_types(v.dtype, torch.float32)
        keys = problem.k.to(dtype).repeat_interleave(groups, 1)
        score = problem.q.to(dtype) @ keys.mT / shape.width**0.5
        if shape.causal:
            seen = visible(shape.queries, shape.keys, v.device)
            score = score.masked_fill(~seen, -torch.inf)
        weights = score.softmax(-1)
    else:
        weights = gravity_attention_reference(
            problem.q,
            problem.k,
            v,
            problem.mass,
            eps=problem.eps,
            law=problem.law,
            key_radius_sq=problem.key_radius_sq,
            causal=shape.causal,
        ).weights
    return weights.to(v.dtype) @ v.repeat_interleave(groups, 1)


def _compare(
    name: str, actual: Tensor, exact: Tensor, peer: Tensor, factor: float, dtype: torch.dtype
) -> str:
    if not actual.isfinite().all():
        return f"{name}: not finite"
    unit = torch.finfo(dtype).eps * exact.abs().max().item()
    budget = factor * ((peer.double() - exact).abs().max().item() + unit)
    error = (actual.double() - exact).abs().max().item()
    return "passed" if error <= budget else f"{name}: error {error:.1e}, budget {budget:.1e}"


def first_line(error: Exception) -> str:
    """What an error says, short enough for a table."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
