"""Exports are timed in turns."""

from __future__ import annotations

from gravity_hf.hub.formats.latency import interleaved


def test_every_call_is_first_in_one_of_the_turns() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    found = interleaved(calls, 0.0)
    assert "".join(called) == "abc" + "abc" + "bca" + "cab"
    assert {latency.calls for latency in found.values()} == {3}
