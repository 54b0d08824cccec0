"""Coded deltas in files: one safetensors file each, checked again whenever it is read.

Beside the codes a file holds what its writer measured, the tier it promises, a SHA-256 of its
tensors, and a sketch of each exact update. So a reader can tell, without the exact delta, that
nothing was changed, that the promise is kept by what was measured, and - from the sketches - that
what was measured can be true of these codes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..runtime.encoding import parsed_json, strict_json
from .delta import LowRankDelta
from .delta_codec import FactorCodec
from .errors import IntegrityError, QuantizationError, UnsafeFileError
from .low_rank import relative_error
from .quantized_delta import (
    KINDS,
    SLACK,
    PrecisionReport,
    QuantizedDelta,
    Tier,
    tensor_sizes,
    tier_of,
)
from .store_files import LARGEST_DELTA, header_metadata, read_bytes, write_bytes

FORMAT = "gravity-delta-codes/1"
METADATA = "gravity_delta"
_LARGEST_DIMENSION, _MOST_MAPS = 1 << 20, 1 << 14
# Of the report: the file's size is known from the file.
_OUTSIDE = ("bytes", "bits_per_parameter")


class ReadDelta(NamedTuple):
    """A coded delta and its report, as a file has them."""

    delta: QuantizedDelta
    report: PrecisionReport


def serialized(
    delta: QuantizedDelta, report: PrecisionReport, beside: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of the file. The same delta gives the same bytes.

    Args:
        beside: other texts for the header of the file, by their names.
    """
    tensors = {name: tensor.contiguous() for name, tensor in delta.tensors().items()}
    described = {
        "format": FORMAT,
        "kind": delta.kind,
        "shapes": {name: list(shape) for name, shape in delta.shapes.items()},
        "codec": asdict(delta.codec),
        "tier": asdict(delta.tier),
        "embedding_width": delta.embedding_width,
        "report": {k: v for k, v in report.to_dict().items() if k not in _OUTSIDE},
        "sha256": _digest(tensors),
    }
    return safetensors.torch.save(tensors, {**(beside or {}), METADATA: strict_json(described)})


def parsed(data: bytes, where: str, *, exact: LowRankDelta | None = None) -> ReadDelta:
    """The inverse of `serialized`, with every check of `read_quantized`.

    Args:
        where: what error messages call the file.
    """
    described = _description(where, header_metadata(data, where))
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UnsafeFileError(f"{where}: expected a safetensors file, {error}") from error
    delta, report = _checked(where, tensors, described, len(data))
    require_tier(where, delta, report)
    if exact is not None:
        _require_close(where, delta, exact)
    return ReadDelta(delta, report)


def write_quantized(path: str | Path, delta: QuantizedDelta, report: PrecisionReport) -> int:
    """Write the file, whole or not at all, and give its size in bytes.

    Raises:
        OSError: the folder is missing or not writable.
    """
    data = serialized(delta, report)
    write_bytes(Path(path), data)
    return len(data)


def read_quantized(path: str | Path, *, exact: LowRankDelta | None = None) -> ReadDelta:
    """Read a coded delta and check again that it meets its tier.

    Args:
        exact: the delta that was coded, where it is at hand: then the error is measured against it.

    Raises:
        UnsafeFileError: not such a file, too large, of other tensors than it describes, or with
            numbers that are not finite.
        IntegrityError: tensors that are not as they were written.
        QuantizationError: a delta that does not meet its tier.
    """
    path = Path(path)
    return parsed(read_bytes(path, LARGEST_DELTA), path.name, exact=exact)


def require_tier(name: str, delta: QuantizedDelta, report: PrecisionReport) -> None:
    """Raise QuantizationError unless what is reported meets the tier and can be true."""
    tier, faults = delta.tier, []
    if not 0 <= report.rel_frobenius <= tier.frobenius:
        faults.append(f"reported error {report.rel_frobenius:.4f}, ceiling {tier.frobenius}")
    if report.routing_cosine is not None and not report.routing_cosine >= tier.routing_cosine:
        faults.append(
            f"reported routing cosine {report.routing_cosine:.4f}, floor {tier.routing_cosine}"
        )
    if report.angle is not None and not report.angle >= tier.angle:
        faults.append(f"reported angle {report.angle:.4f}, floor {tier.angle}")
    if (report.tier, report.bits) != (tier.number, delta.codec.bits) or not report.passed:
        faults.append("a report of another delta, or of one that did not pass")
    estimate = delta.estimated_error()
    if not estimate <= SLACK * tier.frobenius:
        faults.append(f"error by its sketches {estimate:.4f}, at most {SLACK * tier.frobenius:.4f}")
    if faults:
        raise QuantizationError(
            f"{name}: expected a delta that meets tier {tier.number}, got {'; '.join(faults)}. "
            "Code the exact delta again"
        )


def _require_close(name: str, delta: QuantizedDelta, exact: LowRankDelta) -> None:
    used = delta.dequantize()
    if list(used.factors) != list(exact.factors):
        raise QuantizationError(
            f"{name}: expected the maps {', '.join(exact.factors)}, got {', '.join(used.factors)}"
        )
    for module, pair in exact.to("cpu").factors.items():
        error = relative_error(pair, used.factors[module])
        if not error <= delta.tier.frobenius:
            raise QuantizationError(
                f"{name}: expected an error of at most {delta.tier.frobenius} (tier "
                f"{delta.tier.number}), got {error:.4f} at {module}. Code the exact delta again"
            )


def _description(name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of the header, with the keys it must have."""
    expected = {"format", "kind", "shapes", "codec", "tier", "embedding_width", "report", "sha256"}
    try:
        described = parsed_json(metadata[METADATA])
    except (KeyError, TypeError, ValueError) as error:
        raise UnsafeFileError(
            f"{name}: expected a coded delta ({FORMAT}), got a file without its description"
        ) from error
    if not isinstance(described, dict) or set(described) != expected:
        raise UnsafeFileError(
            f"{name}: expected a description with {', '.join(sorted(expected))}, got another"
        )
    if described["format"] != FORMAT:
        raise UnsafeFileError(
            f"{name}: expected format {FORMAT}, got {described['format']!r}. It may need a newer "
            "version"
        )
    return described


def _checked(
    name: str, tensors: dict[str, Tensor], described: dict[str, Any], size: int
) -> ReadDelta:
    try:
        shapes = _shapes(described["shapes"])
        codec = FactorCodec(**described["codec"])
        tier = tier_of(Tier(**described["tier"]))
        report = _report(described["report"], shapes, size)
        width = described["embedding_width"]
        if type(width) is not int or not 0 <= width <= _LARGEST_DIMENSION:
            raise ValueError(f"embedding_width {width!r}")
        if described["kind"] not in KINDS:
            raise ValueError(f"kind {described['kind']!r}")
        expected = tensor_sizes(shapes, codec, width)
    except (TypeError, ValueError, KeyError) as error:
        raise UnsafeFileError(f"{name}: a description that makes no sense: {error}") from error
    _require_tensors(name, tensors, expected)
    if _digest(tensors) != described["sha256"]:
        raise IntegrityError(
            f"{name}: expected tensors with SHA-256 {described['sha256']}, got others. The file "
            "was changed; take it from its source again",
            [name],
        )
    delta = QuantizedDelta(
        shapes, codec, tier, **tensors, embedding_width=width, kind=described["kind"]
    )
    return ReadDelta(delta, report)


def _shapes(described: object) -> dict[str, tuple[int, int, int]]:
    if not isinstance(described, dict) or not 0 < len(described) <= _MOST_MAPS:
        raise ValueError("shapes")
    for name, shape in described.items():
        fits = isinstance(shape, list) and len(shape) == 3
        if not fits or not all(type(n) is int and 0 < n <= _LARGEST_DIMENSION for n in shape):
            raise ValueError(f"shape of {name}: {shape!r}")
    return {name: tuple(described[name]) for name in sorted(described)}


def _report(
    described: object, shapes: dict[str, tuple[int, int, int]], size: int
) -> PrecisionReport:
    known = {f.name for f in fields(PrecisionReport)} - set(_OUTSIDE)
    if not isinstance(described, dict) or set(described) != known:
        raise ValueError("report")
    for name in ("rel_frobenius", "rel_frobenius_total", "routing_cosine", "angle"):
        value = described[name]
        missing = value is None and name in ("routing_cosine", "angle")
        if not missing and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"report: {name} {value!r}")
    tried = tuple((int(bits), str(book), float(error)) for bits, book, error in described["tried"])
    report = PrecisionReport(**{**described, "tried": tried}, bytes=size, bits_per_parameter=0.0)
    parameters = sum(rank * (width_in + out) for rank, width_in, out in shapes.values())
    return replace(report, bits_per_parameter=8 * size / parameters)


def _require_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    if set(tensors) != set(expected):
        raise UnsafeFileError(
            f"{name}: expected the tensors {', '.join(sorted(expected))}, got "
            f"{', '.join(sorted(tensors))}"
        )
    for key, (dtype, shape) in expected.items():
        got = tensors[key]
        if (got.dtype, tuple(got.shape)) != (dtype, shape) or not got.isfinite().all():
            raise UnsafeFileError(
                f"{name}: {key}: expected finite {dtype} {list(shape)}, got {got.dtype} "
                f"{list(got.shape)}{'' if got.isfinite().all() else ' with NaN or infinities'}"
            )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
