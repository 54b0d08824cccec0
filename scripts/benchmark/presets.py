"""The rows of the table of targets, in one process."""

from __future__ import annotations

from collections.abc import Iterator

from problems import Case, Shape

MAIN = Shape(batch=4, heads=16, kv_heads=2, queries=4096, keys=4096, width=128)
NARROW = Shape(batch=4, heads=16, kv_heads=16, queries=2048, keys=2048, width=64)
LONG = Shape(batch=1, heads=16, kv_heads=2, queries=32768, keys=32768, width=128)
DECODING = Shape(batch=8, heads=32, kv_heads=4, queries=1, keys=32768, width=128)

_PEERS = ("sdpa", "sdpa_cudnn", "sdpa_flash", "flex_attention")
_DECODING_PEERS = (
    *(
        name + suffix
        for suffix in ("", "_packed")
        for name in ("sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient")
    ),
    "sdpa_expanded",
    "flex_attention",
)
_LAWS = ("force", "power")
_DISTANCES = ("euclidean", "lifted")


def table_cases() -> list[Case]:
    """Every row that `targets.attention_lines` reads, and the other implementations beside them."""
    return list(dict.fromkeys(_cases()))


def _cases() -> Iterator[Case]:
    for shape in (MAIN, NARROW):
        for work in ("forward", "backward"):
            for peer in _PEERS:
                yield Case(peer, "dot", "-", work, shape)
            for distance in _DISTANCES:
                for law in _LAWS:
                    yield Case("gravity_triton", law, distance, work, shape)
    # Launching its kernels takes a call of this size longer than running them: replays show those.
    for work in ("forward", "forward+backward"):
        for peer in ("sdpa", "sdpa_cudnn", "sdpa_flash"):
            yield Case(peer, "dot", "-", work, NARROW, "graph")
        for distance in _DISTANCES:
            for law in _LAWS:
                yield Case("gravity_triton", law, distance, work, NARROW, "graph")
    for name in ("gravity_triton", "gravity_eager", "gravity_reference"):
        for law in _LAWS:
            for work in ("forward", "backward", "forward+backward"):
                yield Case(name, law, "euclidean", work, MAIN)
    for name, works in (("chunked", ("forward", "backward")), ("flex", ("forward",))):
        for work in works:
            yield Case(f"gravity_{name}", "force", "euclidean", work, MAIN)
    yield Case("sdpa", "dot", "-", "forward", LONG)
    for law in _LAWS:
        yield Case("gravity_triton", law, "euclidean", "forward", LONG)
    for launch in ("graph", "eager"):
        for peer in _DECODING_PEERS:
            yield Case(peer, "dot", "-", "forward", DECODING, launch)
        for distance in _DISTANCES:
            for law in _LAWS:
                yield Case("gravity_triton", law, distance, "forward", DECODING, launch)
