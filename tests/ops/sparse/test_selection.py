"""Which keys a query looks at."""

import pytest
import torch
from ops.sparse.sparse_cases import (
    BATCH,
    KEY_HEADS,
    LENGTH,
    MASKS,
    WIDTH,
    budget,
    mask_of,
    vectors,
    visible,
)

from gravity_hf.ops.sparse import KeyBudget, block_means, select_keys
from gravity_hf.ops.sparse.selecting import _best, _best_of_ranks

BLOCKS = pytest.mark.parametrize("block", [1, 8])
METRICS = pytest.mark.parametrize("metric", ["dot", "distance"])
EVERY_MASK = pytest.mark.parametrize("name", MASKS)


def chosen(name="none", block=8, metric="dot", queries=LENGTH, **changes):
    q, k, _ = vectors(queries)
    mask = mask_of(name, queries)
    return select_keys(q, k, budget(block, **changes), metric=metric, mask=mask)


@BLOCKS
@EVERY_MASK
def test_no_query_sees_more_than_its_budget_or_what_is_hidden(name, block):
    mask = chosen(name, block).mask()
    assert mask.sum(-1).max() <= 40
    assert not (mask & ~visible(name)).any()


@BLOCKS
@EVERY_MASK
def test_a_query_sees_its_window_and_sinks(name, block):
    seen = visible(name).expand(-1, KEY_HEADS, -1, -1)
    mask = chosen(name, block).mask()
    key = torch.arange(LENGTH)
    last = torch.where(seen, key, -1).amax(-1, keepdim=True)
    first = torch.where(seen, key, LENGTH).amin(-1, keepdim=True)
    edges = seen & ((key > last - 10) | (key < first + 2))
    assert (mask | ~edges).all()


@BLOCKS
@pytest.mark.parametrize("name", ["none", "left", "right", "documents"])
def test_a_query_that_sees_few_keys_sees_all(name, block):
    for changes, most in (({}, 40), ({"min_length": 70}, 70)):
        seen = visible(name).expand(-1, KEY_HEADS, -1, -1)
        few = seen.sum(-1) <= most
        mask = chosen(name, block, **changes).mask()
        assert few.any() and not few.all()
        assert torch.equal(mask[few], seen[few])


@METRICS
@BLOCKS
def test_the_blocks_whose_means_score_best_are_chosen(block, metric):
    q, k, _ = vectors(dtype=torch.float64)
    mask = select_keys(q, k, budget(block), metric=metric).mask()
    query = q.unflatten(1, (KEY_HEADS, -1)).mean(2)
    for i in (60, 101, LENGTH - 1):
        starts = [u for u in range(0, i + 2 - block, block) if u <= i - 10 and u + block > 2]
        means = torch.stack([k[:, :, u : u + block].mean(2) for u in starts], 2)
        gap = (query[:, :, i, None] - means).square().sum(-1)
        scores = -gap if metric == "distance" else (query[:, :, i, None] * means).sum(-1)
        best = scores.topk((40 - 12) // block).indices
        expected = torch.zeros(BATCH, KEY_HEADS, LENGTH, dtype=torch.bool)
        expected[..., i - 9 : i + 1] = expected[..., :2] = True
        for b, g in torch.cartesian_prod(torch.arange(BATCH), torch.arange(KEY_HEADS)).tolist():
            for place in best[b, g].tolist():
                expected[b, g, starts[place] : starts[place] + block] = True
        assert torch.equal(mask[:, :, i], expected)


def test_equal_blocks_go_to_the_later_one():
    q, k, _ = vectors()
    k = k[:, :, :1].expand_as(k)
    mask = select_keys(q, k, budget(8), metric="dot").mask()[0, 0, 149]
    # 3 blocks before the window, the latest of which reaches into it.
    assert mask.nonzero().flatten().tolist() == [0, 1, *range(120, 150)]


def test_ranks_and_scores_choose_the_same():
    scores = torch.randn(3, 2, 40, 30, generator=torch.Generator().manual_seed(0))
    choosable = torch.rand(3, 1, 40, 30, generator=torch.Generator().manual_seed(1)) > 0.7
    plain, ranks = (f(scores.clone(), choosable, 9).sort().values for f in (_best, _best_of_ranks))
    assert torch.equal(plain, ranks)


def test_ties_of_one_row_change_no_order_in_another():
    """Outputs are summed up in the order of the blocks: another order has other bits."""
    scores = torch.randint(9, (1, 1, 200, 40), generator=torch.Generator().manual_seed(0)).float()
    scores[..., :9] += 20.0
    choosable = torch.ones(1, 1, 200, 40, dtype=torch.bool)
    clear = _best(scores.clone(), choosable, 9)
    scores[:, :, -1] = 1.0
    unclear = _best(scores.clone(), choosable, 9)
    assert torch.equal(unclear[:, :, :-1], clear[:, :, :-1])
    assert unclear[0, 0, -1].sort().values.tolist() == list(range(31, 40))


@BLOCKS
def test_a_left_padded_row_chooses_as_it_would_alone(block):
    q, k, _ = vectors()
    hidden = LENGTH // 4
    padded = chosen("left", block).mask()[1:, :, hidden:, hidden:]
    alone = select_keys(q[1:, :, hidden:], k[1:, :, hidden:], budget(block), metric="dot").mask()
    assert torch.equal(padded, alone)


@METRICS
@BLOCKS
@pytest.mark.parametrize("name", ["none", "left"])
def test_a_decoding_step_chooses_as_the_prefill_does(name, block, metric):
    q, k, _ = vectors()
    mask, whole = mask_of(name), chosen(name, block, metric).mask()
    for i in (30, 77, 120):
        cut = None if mask is None else mask[:, : i + 1]
        query, keys = q[:, :, i : i + 1], k[:, :, : i + 1]
        step = select_keys(query, keys, budget(block), metric=metric, mask=cut)
        assert torch.equal(step.mask(), whole[:, :, i : i + 1, : i + 1])
        if name == "none":
            kept = {"means": block_means(keys, block)}
            step = select_keys(query, keys, budget(block), metric=metric, **kept)
            assert torch.equal(step.mask(), whole[:, :, i : i + 1, : i + 1])


def test_blocks_of_kept_means_are_counted_from_the_first_key():
    q, k, _ = vectors()
    mask, origin = mask_of("left"), torch.zeros(1, dtype=torch.int64)
    given = {"metric": "dot", "mask": mask}
    expected = select_keys(q, k, budget(), origin=origin, **given).mask()
    kept = select_keys(q, k, budget(), means=block_means(k, 8), **given).mask()
    assert torch.equal(kept, expected)
    assert not torch.equal(kept, select_keys(q, k, budget(), **given).mask())


@BLOCKS
def test_a_static_cache_chooses_as_one_that_ends_with_its_keys(block):
    q, k, _ = vectors(9)
    longer = torch.cat([k, torch.full_like(k[:, :, :50], 100.0)], 2)
    positions = torch.arange(LENGTH - 9, LENGTH)
    mask = torch.zeros(BATCH, 1, 9, LENGTH + 50, dtype=torch.bool)
    mask[..., :LENGTH] = visible("none", 9)
    expected = select_keys(q, k, budget(block), metric="dot").mask()
    for given in ({"positions": positions}, {"mask": mask}):
        static = select_keys(q, longer, budget(block), metric="dot", **given).mask()
        assert torch.equal(static[..., :LENGTH], expected)
        assert not static[..., LENGTH:].any()


@pytest.mark.parametrize("window", [10, 3])
@BLOCKS
@EVERY_MASK
def test_no_later_token_changes_a_choice(name, block, window):
    """A block that reaches beyond a query, as behind a window shorter than it, is not chosen."""
    q, k, _ = vectors()
    before = chosen(name, block, window=window).mask()
    for j in (3, 70, 149):
        other_q, other_k = q.clone(), k.clone()
        other_q[:, :, j:] *= -5.0
        other_k[:, :, j:] *= -5.0
        few = budget(block, window=window)
        after = select_keys(other_q, other_k, few, metric="dot", mask=mask_of(name))
        assert torch.equal(after.mask()[:, :, :j], before[:, :, :j])


@BLOCKS
@EVERY_MASK
def test_indices_name_every_selected_key_once(name, block):
    selection = chosen(name, block, queries=40)
    index, meant = selection.indices()
    count = torch.zeros(BATCH, KEY_HEADS, 40, LENGTH, dtype=torch.int64)
    count.scatter_add_(3, index, meant.long())
    assert torch.equal(count, selection.mask().long())


def test_a_budget_of_window_and_sinks_chooses_nothing():
    mask = chosen(top_k=12, window=10, sinks=2).mask()
    assert mask[:, :, 149].sum(-1).unique().tolist() == [12]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"top_k": 0}, "KeyBudget.top_k: expected an integer >= 1, got 0"),
        ({"window": 0}, "KeyBudget.window: expected an integer >= 1, got 0"),
        ({"block_size": 2.0}, "KeyBudget.block_size: expected an integer >= 1, got 2.0"),
        ({"top_k": 60}, "at least window [+] sinks, which it includes"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        KeyBudget(**wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"metric": "cosine"}, "metric: expected one of"),
        ({"mask": torch.ones(BATCH, 7)}, "mask: expected broadcastable to"),
        ({"positions": torch.arange(3)}, "positions: expected"),
        ({"origin": torch.zeros(5, dtype=torch.int64)}, "origin: expected"),
        ({"screen_k": torch.zeros(BATCH, 3, LENGTH, WIDTH)}, "screen_k: expected"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong, words):
    q, k, _ = vectors()
    given = {"screen_q": q, "screen_k": k, "budget": budget(), "metric": "dot", **wrong}
    with pytest.raises(ValueError, match=words):
        select_keys(**given)
