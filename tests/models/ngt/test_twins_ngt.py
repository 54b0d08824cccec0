"""The dot-product twins: ordinary attention, with every way of telling where a token stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gravity_hf.models.ngt import NGTModel
from gravity_hf.models.ngt.dot_product import DotProductAttention, alibi_slopes
from gravity_hf.models.visibility import Visibility

from .ngt_cases import IDS, tiny

CAUSAL = Visibility(causal=True)


def twin(positions: str, **settings: object) -> NGTModel:
    return tiny(NGTModel, attention="dot_product", positions=positions, **settings)


def attention(positions: str, **settings: object) -> DotProductAttention:
    return twin(positions, **settings).layers[0].attn


def by_definition(attend: DotProductAttention, hidden: Tensor, bias: Tensor) -> Tensor:
    """Softmax over `q k^T / sqrt(d) + bias`, and `out_proj` of what it gathers."""
    maps = (attend.q_proj, attend.k_proj, attend.v_proj)
    q, k, v = (x(hidden).unflatten(-1, (2, 16)).transpose(1, 2) for x in maps)
    score = q @ k.transpose(-2, -1) / 4 + bias
    causal = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
    weights = score.masked_fill(~causal, float("-inf")).softmax(-1)
    return attend.out_proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("positions", ["none", "alibi"])
@torch.no_grad()
def test_attention_is_that_of_its_definition(positions: str) -> None:
    attend = attention(positions)
    torch.manual_seed(1)
    hidden = torch.randn(2, 9, 32)
    steps = torch.arange(9.0)
    slopes = torch.tensor([2.0**-4, 2.0**-8]) * (positions == "alibi")
    bias = slopes[:, None, None] * (steps - steps[:, None])
    known = by_definition(attend, hidden, bias)
    found = attend(hidden, None, CAUSAL)
    torch.testing.assert_close(found.output, known)
    assert found.weights is None
    weights = attend(hidden, None, CAUSAL, output_attentions=True).weights
    gathered = weights @ attend.v_proj(hidden).unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(attend.out_proj(gathered.transpose(1, 2).flatten(2)), known)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (8, [2.0**-n for n in range(1, 9)]),
        (1, [2.0**-8]),
        # Of four heads, and then the first and third of eight.
        (6, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]),
    ],
)
def test_slopes_of_alibi(heads: int, expected: list[float]) -> None:
    assert alibi_slopes(heads).tolist() == expected


@torch.no_grad()
def test_positions_tell_order() -> None:
    """Without them the last token of one layer does not know in what order the others came."""
    swapped = IDS[:, [2, 0, 1, *range(3, 9)]]
    for positions in ("learned", "sinusoidal", "alibi", "none"):
        model = twin(positions, num_hidden_layers=1)
        one, other = (model(ids).last_hidden_state[:, -1] for ids in (IDS, swapped))
        assert torch.allclose(one, other, atol=1e-6) == (positions == "none"), positions


def test_dropout_is_on_the_weights() -> None:
    """Over many draws the mean is the output without it."""
    attend = attention("alibi", dropout=0.5).train()
    attend.requires_grad_(False)
    torch.manual_seed(1)
    hidden = torch.randn(1, 4, 32).expand(4000, -1, -1)
    dropped = attend(hidden, None, CAUSAL).output
    plain = attend.eval()(hidden[:1], None, CAUSAL).output[0]
    assert dropped.std(0).mean() > 0.1
    torch.testing.assert_close(dropped.mean(0), plain, atol=0.05, rtol=0.0)


def test_twins_have_no_coordinates() -> None:
    model = twin("learned")
    assert not [name for name, _ in model.named_parameters() if "coord" in name or "mass" in name]
    with pytest.raises(ValueError, match="its dot-product twin, which has no coordinates"):
        model(IDS, output_coordinates=True)
