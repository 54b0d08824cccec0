"""Texts in turn are those of `generate`, whatever else is being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.server.decoding import Decoder, Text
from gravity_hf.knowledge.server.lanes import Caller, Lane

HOSTS = ["llama", "gravity_llama", "gpt2"]
TOKENS = 7


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def bank(host: Any, random_delta: Callable[..., Any]) -> DeltaBank:
    bank = DeltaBank(host)
    for number in range(4):
        bank.add(str(number), random_delta(host, number))
    return bank


def prompt(number: int) -> list[int]:
    """Lengths differ."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, 300, (3 + 4 * number,), generator=generator).tolist()


def generated(host: Any, bank: DeltaBank, ids: list[int], beliefs: list[str]) -> list[int]:
    row = torch.tensor([ids])
    with bank.routed([beliefs]):
        output = host.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=TOKENS, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return output[0, len(ids) :].tolist()


def write_all(decoder: Decoder, texts: Sequence[Text], every: int) -> None:
    """Begin one text after the other, `every` steps apart, so that they join a running batch."""
    waiting, step = list(texts), 0
    while waiting or len(decoder):
        if waiting and step % every == 0:
            text = waiting.pop(0)
            text.take(decoder.start(text))
        for rows, logits in decoder.step():
            assert isinstance(logits, Tensor), logits
            for row, own in zip(rows, logits, strict=True):
                row.take(own)
                if row.finish_reason:
                    decoder.stop(row)
        step += 1


@pytest.mark.parametrize("batch_rows", [1, 3])
def test_texts_beside_each_other_are_those_of_generate(
    host: Any, bank: DeltaBank, batch_rows: int
) -> None:
    rows = [(prompt(n), [str(n)] if n < 4 else []) for n in range(5)]
    texts = [Text(ids, TOKENS, beliefs=beliefs) for ids, beliefs in rows]
    with closing(Decoder(Caller(host), bank.routed, batch_rows)) as decoder:
        write_all(decoder, texts, every=2)
    alone = [generated(host, bank, ids, beliefs) for ids, beliefs in rows]
    assert [text.written for text in texts] == alone
    assert generated(host, bank, rows[1][0], []) != alone[1], "beliefs change nothing"


@pytest.fixture
def lane(host: Any, bank: DeltaBank) -> Iterator[Callable[[int], Lane]]:
    """`lane(capacity)`."""
    lanes = []

    def make(capacity: int) -> Lane:
        lanes.append(Lane(Caller(host), bank.routed, capacity))
        return lanes[-1]

    yield make
    for one in lanes:
        one.close()


def test_logits_of_a_lane_depend_on_company_by_rounding_only(lane: Callable[[int], Lane]) -> None:
    ids = [prompt(n) for n in range(3)]
    apart = []
    for n in range(3):
        own = lane(1)
        own.join(n, ids[n], [str(n)])
        apart.append(own.step([[*ids[n], 7]])[0])
    shared = lane(3)
    for n in range(3):
        shared.join(n, ids[n], [str(n)])
    together = shared.step([[*row, 7] for row in ids])
    scale = max(row.abs().max() for row in apart)
    error = max((a - b).abs().max() for a, b in zip(apart, together, strict=True))
    assert error <= 64 * torch.finfo(torch.float32).eps * scale


def test_alone_in_its_lane_a_text_has_the_bits_it_has_without_others(
    host: Any, bank: DeltaBank, lane: Callable[[int], Lane]
) -> None:
    ids, alone = prompt(3), lane(1)
    first, second = alone.join("a", ids, ["1"]), alone.step([[*ids, 9]])
    with closing(Decoder(Caller(host), bank.routed, 1)) as decoder:
        for n in (0, 2):
            other = Text(prompt(n), 50, beliefs=[str(n)])
            other.take(decoder.start(other))
        text = Text(ids, 50, beliefs=["1"])
        assert torch.equal(decoder.start(text), first)
        text.written.append(9)
        logits = next(own for rows, own in decoder.step() if text in rows)
        assert torch.equal(logits, second)


def test_rows_that_leave_take_their_cache_and_padding_with_them(
    lane: Callable[[int], Lane],
) -> None:
    shared, alone = lane(2), lane(1)
    for own in (shared, alone):
        own.join("short", prompt(0), ["0"])
    shared.join("long", prompt(5), ["1"])
    assert shared._cache.get_seq_length() == len(prompt(5)) and not shared.has_room()
    shared.leave("long")
    assert shared._cache.layers[0].keys.shape[0] == 1
    assert shared._cache.get_seq_length() == len(prompt(0)) and shared.has_room()
    # Nothing was computed with the long one: even the bits are those without it.
    assert torch.equal(shared.step([[*prompt(0), 5]]), alone.step([[*prompt(0), 5]]))


def test_closed_it_leaves_no_hook_on_the_model(
    host: Any, bank: DeltaBank, lane: Callable[[int], Lane]
) -> None:
    own = lane(1)
    own.join("a", prompt(0), ["0"])
    assert bank._handles
    own.close()
    assert not bank._handles and own.has_room()


def test_a_lane_that_fails_takes_no_other_with_it(llama: Any) -> None:
    bank = DeltaBank(llama)
    good, bad = Text(prompt(0), 5), Text(prompt(1), 5)
    with closing(Decoder(Caller(llama), bank.routed, 1)) as decoder:
        for text in (good, bad):
            text.take(decoder.start(text))
        bad.written[-1] = 10**6  # no such token
        outcomes = {rows[0]: outcome for rows, outcome in decoder.step()}
    assert isinstance(outcomes[bad], Exception) and isinstance(outcomes[good], Tensor)
