"""torch.export programs: the same numbers in a process that has torch alone, for every size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_within_budget
from hosts import logits
from hub.exported import (
    OTHER_MASSES,
    exact_and_peer,
    host,
    left_padded,
    save_gravity,
    tokens,
    with_other_masses,
    with_positions,
)
from torch import Tensor

from gravity_hf.hub.formats.export import export_gravity_model
from gravity_hf.hub.formats.torch_file import operators_beyond_core

FACTOR = 4.0
SIZES = [(1, 0, 1), (2, 0, 6), (3, 9, 1), (2, 5, 4)]

ELSEWHERE = """
import sys

# What a machine without these would say.
sys.modules["gravity_hf"] = sys.modules["transformers"] = None
import torch

cases, program, out = torch.load(sys.argv[1]), torch.export.load(sys.argv[2]).module(), []
with torch.no_grad():
    for ids, mask, positions, past in cases:
        B = len(ids)
        cache = [(torch.zeros(B, 2, 0, 8), torch.zeros(B, 2, 0, 8))]
        named = {"input_ids": ids[:, :past], "attention_mask": mask[:, :past]}
        if past:
            _, cache = program(**named, position_ids=positions[:, :past], past_key_values=cache)
        named = {"input_ids": ids[:, past:], "attention_mask": mask}
        logits, _ = program(**named, position_ids=positions[:, past:], past_key_values=cache)
        out.append(logits)
torch.save(out, sys.argv[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gravity("qwen2", tmp_path_factory.mktemp("torch") / "model")


@pytest.fixture(scope="module")
def file(folder) -> Path:
    out = folder.parent / "program"
    export_gravity_model(folder, out, format="torch", length=12, samples=4)
    return out / "model.pt2"


@pytest.fixture(scope="module")
def loaded(file) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The program, and what its extra file says."""
    more = {"gravity.json": ""}
    program = torch.export.load(file, extra_files=more)
    return program, json.loads(more["gravity.json"])


@pytest.fixture(scope="module")
def program(loaded) -> torch.export.ExportedProgram:
    return loaded[0]


def cases() -> list[tuple[Tensor, Tensor, Tensor, int]]:
    found = []
    for batch, past, length in SIZES:
        ids = tokens(batch, past + length)
        inputs = with_positions(ids, left_padded(torch.ones_like(ids)))
        found.append((*inputs.values(), past))
    return found


def test_a_decoder_runs_where_only_torch_is_installed(folder, file, tmp_path):
    """Prompts and steps of every size, padded, within the budget of float32."""
    torch.save(cases(), tmp_path / "cases.pt")
    arguments = [tmp_path / "cases.pt", file, tmp_path / "out.pt"]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt")
    for (ids, mask, _, past), actual in zip(cases(), found, strict=True):
        inputs, shown = with_positions(ids, mask), mask[:, past:].bool()
        exact, peer = (x[:, past:][shown] for x in exact_and_peer(folder, inputs))
        assert_within_budget("logits", actual[shown], exact, peer, factor=FACTOR)


def first_logits(program: torch.export.ExportedProgram, changed: float = 0.0) -> Tensor:
    """Of a prompt, by the program, with all `mass_log` higher by `changed` for this call."""
    module, ids = program.module(), tokens(2, 6)
    inputs = with_positions(ids, torch.ones_like(ids))
    nothing = torch.zeros(2, 2, 0, 8)
    masses = [p for n, p in module.named_parameters() if n.endswith("gravity.mass_log")]
    before = [mass.clone() for mass in masses]
    with torch.no_grad():
        for mass in masses:
            mass += changed
        found = module(**inputs, past_key_values=[(nothing, nothing)])[0]
        for mass, value in zip(masses, before, strict=True):
            mass.copy_(value)
    return found


def test_the_masses_are_parameters_of_the_program(folder, program):
    ids = tokens(2, 6)
    inputs = with_positions(ids, torch.ones_like(ids))
    actual = first_logits(program)
    exact, _ = exact_and_peer(folder, inputs)
    error = (actual - exact).abs().max()
    others = with_other_masses(folder, inputs)
    for other in (others, logits(host("qwen2"), inputs)):
        assert (actual - other).abs().max() > 1e3 * error
    changed = first_logits(program, OTHER_MASSES)
    assert (changed - others).abs().max() < 10 * error


def test_every_operator_is_core_aten(program):
    """So that ExecuTorch and other runtimes can take it; a custom one would be named here."""
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert len(called) > 50 and operators_beyond_core(program) == []

    class Custom(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    other = torch.export.export(Custom(), (torch.randn(1, 1, 4, 8),))
    assert operators_beyond_core(other) == ["aten.scaled_dot_product_attention.default"]


def test_the_file_says_that_it_is_gravity_and_with_what_settings(folder, loaded):
    config = json.loads((folder / "config.json").read_text())
    assert loaded[1]["model_type"] == config["model_type"] == "gravity_qwen2"
    assert json.loads(loaded[1]["gravity"]) == config["gravity"]


def test_the_file_says_nothing_of_the_machine_that_made_it(file):
    # Its parts are stored, not compressed.
    content = file.read_bytes()
    assert b"position_ids" in content
    for path in (Path(torch.__file__).parent, Path(__file__).parents[2]):
        assert str(path).encode() not in content
