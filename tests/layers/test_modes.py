"""A model comes out of an evaluation as it went in."""

from __future__ import annotations

import pytest
from torch import nn

from gravity_hf.layers.modes import in_evaluation


def test_every_module_gets_back_the_mode_that_it_had_though_an_error_ends_it() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout())).train()
    model[1][0].eval()  # a frozen part
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), in_evaluation(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
