"""What the kernels are held to: each line is a target, what was measured, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from presets import DECODING, LONG, MAIN, NARROW
from problems import Shape

Row = dict[str, Any]
SUBJECT = "gravity_triton"
NOT_MEASURED = "not measured"
_PEER_NAMES = {"sdpa": "SDPA default", "sdpa_flash": "SDPA flash"}
# (work, peer): at least, aim; as a ratio of times.
_RATIOS = {
    ("forward", "sdpa"): (1.45, 1.1),
    ("forward", "sdpa_flash"): (0.83, 0.65),
    ("backward", "sdpa"): (1.7, 1.25),
    ("backward", "sdpa_flash"): (0.95, 0.7),
}
_POWER_OVER_FORCE = (1.05, 1.0)
_NARROW_OVER_MAIN = 1.15
_LONG_MEGABYTES = 64.0
_DECODING = (1.0, 0.9)
_TRAINING = (1.15, 1.05)
_EAGER_OVER_THIS = 25.0


def attention_lines(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The lines that attention rows decide, one for each law and distance measured."""
    rows = list(rows)
    lines = []
    for (work, peer), bounds in _RATIOS.items():
        for law, distance in _variants(rows, MAIN, work):
            ratio, how = _ratio(rows, MAIN, work, law, distance, peer)
            name = f"{work} / {_PEER_NAMES[peer]}"
            lines.append(line(name, _name(law, distance), ratio, *bounds, how=how))
    lines += _laws(rows)
    for work, peer in _RATIOS:
        lines += _narrow(rows, work, peer)
    for law, distance in _variants(rows, LONG, "forward"):
        lines.append(_memory(rows, law, distance))
    for launch in ("graph", "eager"):
        lines += _decoding(rows, launch)
    lines += _against_eager(rows)
    return lines


def training_lines(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The line that whole training steps decide. Rows: `arm` ("sdpa", or a law and "-lifted"),
    `p50_ms`. Arms after "sdpa-" are not gravity."""
    times = {
        row["arm"].replace("-", ", "): row.get("p50_ms") or None
        for row in rows
        if not row["arm"].startswith("sdpa-")
    }
    host = times.pop("sdpa", None)
    lines = []
    for arm, time in times.items():
        ratio = time / host if time and host else None
        how = f"{time:.1f} ms / {host:.1f} ms" if ratio else ""
        lines.append(line("training step / SDPA", arm, ratio, *_TRAINING, how=how))
    return lines


def line(
    name: str,
    subject: str,
    measured: float | None,
    at_least: float,
    aim: float | None = None,
    *,
    how: str = "",
    more_is_better: bool = False,
) -> dict[str, Any]:
    """`verdict`: "aim reached", "met", "missed" or "not measured"."""

    def within(bound: float) -> bool:
        return measured >= bound if more_is_better else measured <= bound

    if measured is None:
        verdict = NOT_MEASURED
    elif aim is not None and within(aim):
        verdict = "aim reached"
    else:
        verdict = "met" if within(at_least) else "missed"
    return {
        "name": name,
        "subject": subject,
        "at_least": f"{'>=' if more_is_better else '<='} {at_least:g}",
        "aim": "" if aim is None else f"{'>=' if more_is_better else '<='} {aim:g}",
        "measured": measured,
        "verdict": verdict,
        "how": how,
    }


def show_lines(lines: list[dict[str, Any]]) -> str:
    """The lines as text in columns."""
    texts = [f"{'target':<45} {'gravity':<16} {'at least':<9} {'aim':<8} {'measured':<9} verdict"]
    for x in lines:
        measured = "–" if x["measured"] is None else f"{x['measured']:.3g}"
        head = f"{x['name']:<45} {x['subject']:<16} {x['at_least']:<9} {x['aim']:<8}"
        texts.append(f"{head} {measured:<9} {x['verdict']:<12} {x['how']}".rstrip())
    return "\n".join(texts)


def _laws(rows: list[Row]) -> list[dict[str, Any]]:
    lines = []
    for work in ("forward", "backward"):
        for distance in dict.fromkeys(d for _, d in _variants(rows, MAIN, work)):
            power = _time(rows, MAIN, work, SUBJECT, "power", distance)
            force = _time(rows, MAIN, work, SUBJECT, "force", distance)
            ratio = power / force if power and force else None
            name = f"{work}: power law / force law"
            lines.append(line(name, distance, ratio, *_POWER_OVER_FORCE))
    return lines


def _narrow(rows: list[Row], work: str, peer: str) -> list[dict[str, Any]]:
    """The main shape's ratio and this one's, from calls and from replays of CUDA graphs. A replay
    has no backward of its own: it is what forward and backward take more than forward."""
    lines = []
    for law, distance in _variants(rows, NARROW, work):
        main, _ = _ratio(rows, MAIN, work, law, distance, peer)
        calls, _ = _ratio(rows, NARROW, work, law, distance, peer)
        ours = _replay(rows, work, SUBJECT, law, distance)
        theirs = _replay(rows, work, peer, "dot", "-")
        replays = ours / theirs if ours and theirs else None
        for launch, narrow in (("", calls), (", graph", replays)):
            both = narrow is not None and main is not None
            name = f"D 64, MHA, S 2048 over main: {work}{launch} / {_PEER_NAMES[peer]}"
            how = f"{narrow:.2f} / {main:.2f}" if both else ""
            measured = narrow / main if both else None
            lines.append(line(name, _name(law, distance), measured, _NARROW_OVER_MAIN, how=how))
    return lines


def _replay(rows: list[Row], work: str, *which: str) -> float | None:
    forward = _time(rows, NARROW, "forward", *which, "graph")
    if work == "forward":
        return forward
    both = _time(rows, NARROW, "forward+backward", *which, "graph")
    return both - forward if both and forward else None


def _memory(rows: list[Row], law: str, distance: str) -> dict[str, Any]:
    row = _find(rows, LONG, "forward", SUBJECT, law, distance)
    extra = row.get("extra_mib") if row else None
    measured = None if extra in (None, "") else extra * 2**20 / 1e6
    name = "forward, T 32768, B 1: extra memory, MB"
    return line(name, _name(law, distance), measured, _LONG_MEGABYTES)


def _decoding(rows: list[Row], launch: str) -> list[dict[str, Any]]:
    """Against the fastest of SDPA's ways to take the same call, and of the ones whose queries were
    packed by hand too."""
    peers: dict[str, float] = {}
    for row in rows:
        if row["provider"].startswith("sdpa"):
            time = _time(rows, DECODING, "forward", row["provider"], "dot", "-", launch)
            if time:
                peers[row["provider"]] = time
    as_called = {name: time for name, time in peers.items() if not name.endswith("_packed")}
    lines = []
    for what, field in (("best", as_called), ("best, packed by hand too", peers)):
        best = min(field, key=field.__getitem__, default=None)
        for law, distance in _variants(rows, DECODING, "forward"):
            ours = _time(rows, DECODING, "forward", SUBJECT, law, distance, launch)
            ratio = ours / field[best] if ours and best else None
            how = f"{ours:.3f} ms / {best} {field[best]:.3f} ms" if ratio else ""
            name = f"decode, {launch} / SDPA's {what}"
            lines.append(line(name, _name(law, distance), ratio, *_DECODING, how=how))
    return lines


def _against_eager(rows: list[Row]) -> list[dict[str, Any]]:
    lines = []
    work = "forward+backward"
    for peer in ("gravity_eager", "gravity_reference"):
        for law, distance in _variants(rows, MAIN, work):
            ours = _time(rows, MAIN, work, SUBJECT, law, distance)
            eager = _time(rows, MAIN, work, peer, law, distance)
            ratio = eager / ours if ours and eager else None
            how = f"{eager:.1f} ms / {ours:.2f} ms" if ratio else ""
            name = f"{peer.replace('_', ' ')} / this, {work}"
            subject = _name(law, distance)
            lines.append(line(name, subject, ratio, _EAGER_OVER_THIS, how=how, more_is_better=True))
    return lines


def _ratio(
    rows: list[Row], shape: Shape, work: str, law: str, distance: str, peer: str
) -> tuple[float | None, str]:
    ours = _time(rows, shape, work, SUBJECT, law, distance)
    theirs = _time(rows, shape, work, peer, "dot", "-")
    if not ours or not theirs:
        return None, ""
    return ours / theirs, f"{ours:.3f} ms / {theirs:.3f} ms"


def _variants(rows: list[Row], shape: Shape, work: str) -> list[tuple[str, str]]:
    """The (law, distance) that have a row, failed ones too; force first where there is none."""
    found = {
        (row["law"], row["distance"]): None
        for row in rows
        if row["provider"] == SUBJECT and row["pass"] == work and _has_shape(row, shape)
    }
    return list(found) or [("force", "euclidean")]


def _name(law: str, distance: str) -> str:
    return law if distance == "euclidean" else f"{law}, {distance}"


def _time(rows: list[Row], shape: Shape, work: str, *which: str) -> float | None:
    row = _find(rows, shape, work, *which)
    return (row.get("p50_ms") or None) if row else None


def _find(
    rows: list[Row],
    shape: Shape,
    work: str,
    provider: str,
    law: str,
    distance: str,
    launch: str = "eager",
) -> Row | None:
    wanted = {
        "pass": work,
        "provider": provider,
        "law": law,
        "distance": distance,
        "launch": launch,
    }
    for row in rows:
        if _has_shape(row, shape) and all(row[key] == value for key, value in wanted.items()):
            return row
    return None


def _has_shape(row: Row, shape: Shape) -> bool:
    return all(row[key] == value for key, value in vars(shape).items())
