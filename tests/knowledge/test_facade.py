"""What the package offers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gravity_hf import knowledge


@pytest.mark.parametrize("name", knowledge.__all__)
def test_public_name_resolves(name):
    assert getattr(knowledge, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = knowledge.no_such_name


def test_the_store_needs_neither_peft_nor_a_server():
    code = (
        "import sys, gravity_hf.knowledge.store, gravity_hf.knowledge.bank; "
        "print([n for n in ('peft', 'fastapi', 'datasets', 'triton') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip().splitlines()[-1] == "[]", result.stderr
