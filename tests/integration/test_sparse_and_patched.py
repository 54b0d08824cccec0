"""Patched with gravity first, then sparse: what the status says, and the other order."""

from __future__ import annotations

import pytest
from integration.sparse_cases import sparse_host

from gravity_hf import densify_attention, gravity_status, patch_with_gravity


def test_status_tells_that_a_patched_host_is_sparse():
    model = sparse_host("force")
    status = gravity_status(model)
    assert status.patched and status.implementation == "sparse"
    densify_attention(model)
    status = gravity_status(model)
    assert status.patched and status.implementation != "sparse"


def test_a_sparse_host_is_not_patched_before_it_is_dense_again():
    model = sparse_host("qwen2")
    with pytest.raises(RuntimeError, match="densify_attention"):
        patch_with_gravity(model)
    assert not gravity_status(model).patched
    densify_attention(model)
    assert gravity_status(patch_with_gravity(model)).patched
