"""What a choice keeps of dense attention, and a screening that learns to keep more."""

import pytest
import torch
from ops.sparse.sparse_cases import (
    HEADS,
    KEY_HEADS,
    LENGTH,
    WIDTH,
    budget,
    mask_of,
    score_of,
    vectors,
    visible,
)

from gravity_hf.layers.screening import Screening
from gravity_hf.ops.sparse import (
    DotProduct,
    screening_loss,
    select_keys,
    selection_statistics,
)


def statistics(name="none", **options):
    q, k, _ = vectors()
    selection = select_keys(q, k, budget(), metric="dot", mask=mask_of(name))
    given = {"screen_dim": 4, "rows": None, **options}
    return selection, selection_statistics(q, k, DotProduct(0.7), selection, **given)


@pytest.mark.parametrize("name", ["none", "left", "documents"])
def test_recall_is_the_dense_mass_of_what_is_selected(name):
    selection, found = statistics(name)
    q, k, _ = vectors()
    seen = visible(name)
    scores = (0.7 * q @ k.repeat_interleave(2, 1).mT).masked_fill(~seen, -1e30)
    weights = scores.softmax(-1) * seen
    kept = (weights * selection.mask().repeat_interleave(2, 1)).sum(-1)
    alive = seen.any(-1).expand(-1, HEADS, -1)
    expected = (kept * alive).sum((0, 2)) / alive.sum((0, 2))
    torch.testing.assert_close(found.recall, expected)


def test_pairs_are_counted_and_screening_is_paid_for():
    selection, found = statistics()
    pairs = LENGTH * (LENGTH + 1) / 2
    fraction = selection.mask().sum() / (2 * KEY_HEADS * pairs)
    torch.testing.assert_close(found.pair_fraction, fraction)
    # 4 of 8 dimensions, for 2 query heads at once and 8 keys at once.
    torch.testing.assert_close(found.cost_fraction, fraction + 4 / 8 / 2 / 8)


def test_drawn_rows_stand_for_all():
    whole = statistics()[1]
    drawn = statistics(rows=100, generator=torch.Generator().manual_seed(0))[1]
    torch.testing.assert_close(drawn.recall, whole.recall, atol=0.1, rtol=0.0)
    assert not torch.equal(drawn.recall, whole.recall)


@pytest.mark.parametrize("score", ["dot", "power", "lifted"])
def test_a_student_that_sees_what_its_teacher_sees_has_no_loss(score):
    q, k, _ = vectors()
    # Heads of a group alike: the mean of their weights is the weight of their mean.
    q = q[:, ::2].repeat_interleave(2, 1)
    score = score_of(score)
    if not isinstance(score, DotProduct):
        score.mass.fill_(0.9)
        score.softening.fill_(0.4)
    for name in ("none", "left", "documents"):
        loss = screening_loss(q, k, q, k, score, mask=mask_of(name), rows=LENGTH)
        assert abs(loss) < 1e-5
        assert screening_loss(q, k, q, 0.2 * k, score, mask=mask_of(name), rows=LENGTH) > 1e-3


def test_the_loss_trains_the_screening_and_nothing_else():
    torch.manual_seed(0)
    q, k, _ = (x.requires_grad_() for x in vectors())
    # Weights as peaked as those of trained heads are.
    score, screening = DotProduct(3.0), Screening(HEADS, KEY_HEADS, WIDTH, 2)

    def recall():
        with torch.no_grad():
            selection = select_keys(*screening(q, k), budget(1), metric="dot")
        return selection_statistics(q, k, score, selection, rows=None).recall.mean()

    before, optimizer = recall(), torch.optim.Adam(screening.parameters(), 0.05)
    for _ in range(30):
        loss = screening_loss(q, k, *screening(q, k), score)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert recall() > before + 0.01
    assert q.grad is None and k.grad is None
