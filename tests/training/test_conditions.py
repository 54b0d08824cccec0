"""Conditions of a measurement."""

from __future__ import annotations

import json

from gravity_hf.training.conditions import run_conditions


def test_conditions_name_device_versions_command_and_commit(monkeypatch):
    monkeypatch.setenv("GRAVITY_HF_COMMIT", "abc123")
    known = json.loads(json.dumps(run_conditions("cpu")))
    assert known["commit"] == "abc123"
    assert known["versions"].keys() == {"torch", "transformers", "python"}
    assert "cores" in known["device"] and known["command"].startswith("python ")


def test_outside_of_git_there_is_no_commit(monkeypatch):
    monkeypatch.delenv("GRAVITY_HF_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "commit" not in run_conditions("cpu")
