"""Many deltas beside one model, each row of a batch with its own, and none of them elsewhere."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from knowledge.hooks import own_hooks
from torch import Tensor, nn
from transformers import PreTrainedModel

from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.errors import (
    DuplicateKeyError,
    IncompatibleBaseError,
    UnknownKeyError,
    ValidationError,
)

MakeDelta = Callable[..., LowRankDelta]
HOSTS = ["llama", "gravity_llama", "gpt2"]


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


@pytest.fixture
def bank(llama: PreTrainedModel, random_delta: MakeDelta) -> DeltaBank:
    """With the ids a, b, c, of ranks 1, 2, 3; c is on the first layer only."""
    bank = DeltaBank(llama)
    for seed, name in enumerate("abc"):
        where = {"layers": [0]} if name == "c" else {}
        bank.add(name, random_delta(llama, seed, rank=seed + 1, **where))
    return bank


def tokens(rows: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **arguments: object) -> Tensor:
    return model(input_ids=ids, **arguments).logits


@torch.no_grad()
def with_dense_updates(model: PreTrainedModel, deltas: list[LowRankDelta]) -> PreTrainedModel:
    """A copy whose weights have the updates added: what the deltas mean."""
    model = copy.deepcopy(model)
    for delta in deltas:
        for name in delta.factors:
            module = model.get_submodule(name)
            update = delta.update(name)
            module.weight += update.T if type(module).__name__ == "Conv1D" else update
    return model


def test_each_row_gets_the_sum_of_its_own_deltas(
    host: PreTrainedModel, random_delta: MakeDelta
) -> None:
    a, b = (random_delta(host, seed, rank=seed + 1) for seed in range(2))
    bank = DeltaBank(host)
    bank.add("a", a)
    bank.add("b", b)
    ids = tokens()
    with bank.routed([["a"], [], ["b", "a"]]):
        mixed = logits(host, ids)
    expected = [logits(with_dense_updates(host, own), ids) for own in ([a], [], [a, b])]
    for row, answer in enumerate(expected):
        torch.testing.assert_close(mixed[row], answer[row], atol=1e-5, rtol=1e-4)
    assert (mixed[0] - mixed[2]).abs().max() > 0.1


def test_equals_pefts_sum_of_adapters(llama: PreTrainedModel, random_delta: MakeDelta) -> None:
    peft = pytest.importorskip("peft")
    deltas = {name: random_delta(llama, seed, rank=2) for seed, name in enumerate("ab")}
    names = list(deltas["a"].factors)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=names)
    wrapped = peft.get_peft_model(copy.deepcopy(llama), config, adapter_name="a")
    wrapped.add_adapter("b", config)
    for adapter, delta in deltas.items():
        for name, (A, B) in delta.factors.items():
            module = wrapped.base_model.model.get_submodule(name)
            module.lora_A[adapter].weight.data.copy_(A)
            module.lora_B[adapter].weight.data.copy_(B)
    wrapped.base_model.set_adapter(["a", "b"])
    bank = DeltaBank(llama)
    for name, delta in deltas.items():
        bank.add(name, delta)
    inputs, sums = {}, {}

    def keep(name: str, into: dict[str, Tensor]) -> Callable[..., None]:
        return lambda module, args, output: into.__setitem__(name, output)

    handles = [
        wrapped.base_model.model.get_submodule(n).register_forward_hook(keep(n, sums))
        for n in names
    ]
    ids = tokens()
    expected = logits(wrapped.eval(), ids)
    with bank.routed([["a", "b"]]):
        # Registered after the bank's own hooks, so they see what those return.
        handles += [llama.get_submodule(n).register_forward_hook(keep(n, inputs)) for n in names]
        actual = logits(llama, ids)
    for handle in handles:
        handle.remove()
    first = names[0]  # its inputs are the same bits in both
    assert (inputs[first] - sums[first]).abs().max() <= 1e-6
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_order_of_ids_changes_no_bit(bank: DeltaBank, llama: PreTrainedModel) -> None:
    ids = tokens(1)
    outputs = []
    for row in (["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]):
        with bank.routed([row]):
            outputs.append(logits(llama, ids))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_rows_without_deltas_and_calls_outside_are_the_base(
    host: PreTrainedModel, random_delta: MakeDelta
) -> None:
    ids = tokens(4)
    base = logits(host, ids)
    bank = DeltaBank(host)
    bank.add("a", random_delta(host, 0, scale=1e3))
    with bank:
        assert torch.equal(logits(host, ids), base)
        with bank.routed([[], ["a"], [], ["a"]]):
            mixed = logits(host, ids)
            with bank.unrouted():
                assert torch.equal(logits(host, ids), base)
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    assert not torch.isclose(mixed[[1, 3]], base[[1, 3]]).all(-1).any()
    assert torch.equal(logits(host, ids), base)


def test_leaves_the_base_untouched(bank: DeltaBank, llama: PreTrainedModel) -> None:
    def snapshot() -> tuple[object, ...]:
        modules = [(name, id(module)) for name, module in llama.named_modules()]
        parameters = [(n, id(p), p.requires_grad) for n, p in llama.named_parameters()]
        return modules, parameters, list(llama.state_dict())

    weights = {name: value.clone() for name, value in llama.state_dict().items()}
    before = snapshot()
    with bank.routed([["a", "b"]]):
        logits(llama, tokens())
        assert snapshot() == before
    assert snapshot() == before
    assert all(torch.equal(value, weights[name]) for name, value in llama.state_dict().items())


def test_hooks_are_there_while_somebody_needs_them(bank: DeltaBank, llama: PreTrainedModel) -> None:
    assert own_hooks(llama) == 0
    with bank.routed([["a"]]):
        assert own_hooks(llama) == 2
    assert own_hooks(llama) == 0
    bank.attach()
    bank.attach()
    with bank, bank.routed([["a"]]):
        pass
    assert own_hooks(llama) == 2
    bank.detach()
    bank.detach()
    assert own_hooks(llama) == 0
    with pytest.raises(RuntimeError, match="stop"), bank:
        raise RuntimeError("stop")
    assert own_hooks(llama) == 0


def test_a_route_keeps_its_deltas_while_others_add_and_remove(
    bank: DeltaBank, llama: PreTrainedModel, random_delta: MakeDelta
) -> None:
    ids = tokens(1)
    with bank.routed([["a"]]):
        expected = logits(llama, ids)
        bank.remove("a")
        bank.add("a", random_delta(llama, 77))
        assert torch.equal(logits(llama, ids), expected)
        bank.remove("b")
        bank.remove("a")
        bank.remove("c")
        bank.detach()
        assert torch.equal(logits(llama, ids), expected)
    assert own_hooks(llama) == 0
    assert bank.ids() == []


def test_what_is_stored_is_a_copy(llama: PreTrainedModel, random_delta: MakeDelta) -> None:
    delta = random_delta(llama, 0)
    bank = DeltaBank(llama)
    bank.add("a", delta)
    with bank.routed(["a"]):
        expected = logits(llama, tokens(1))
    for A, _ in delta.factors.values():
        A.zero_()
    with bank.routed(["a"]):
        assert torch.equal(logits(llama, tokens(1)), expected)


def test_threads_with_different_beliefs_get_their_solo_answers(
    llama: PreTrainedModel, random_delta: MakeDelta
) -> None:
    count, calls = 12, 6
    bank = DeltaBank(llama)
    for seed in range(count):
        bank.add(f"id{seed:02}", random_delta(llama, seed, rank=1 + seed % 2))
    rows = [[[f"id{i:02}", f"id{(i * 5 + 1) % count:02}"], []] for i in range(count)]
    ids = [tokens(2, seed=i) for i in range(count)]

    def answer(i: int) -> Tensor:
        with bank.routed(rows[i]):
            return logits(llama, ids[i])

    solo = [answer(i) for i in range(count)]
    base = [logits(llama, x) for x in ids]
    together = threading.Barrier(count + 1, timeout=60)

    def many(i: int) -> list[Tensor]:
        together.wait()
        return [answer(i) for _ in range(calls)]

    def unrouted() -> list[Tensor]:
        together.wait()
        return [logits(llama, x) for x in base_ids]

    base_ids = ids[:calls]
    with ThreadPoolExecutor(count + 1) as pool:
        plain = pool.submit(unrouted)
        answers = list(pool.map(many, range(count)))
        assert all(torch.equal(x, y) for x, y in zip(plain.result(), base[:calls], strict=True))
    for i, own in enumerate(answers):
        assert all(torch.equal(x, solo[i]) for x in own), i
    assert not any(torch.equal(solo[0], other) for other in solo[1:])


def test_tasks_of_one_thread_do_not_see_each_others_rows(
    bank: DeltaBank, llama: PreTrainedModel
) -> None:
    ids = tokens(1)

    async def answer(name: str) -> Tensor:
        with bank.routed([name]):
            await asyncio.sleep(0)
            return logits(llama, ids)

    async def both() -> list[Tensor]:
        return await asyncio.gather(answer("a"), answer("b"))

    together = asyncio.run(both())
    for name, output in zip("ab", together, strict=True):
        with bank.routed([name]):
            assert torch.equal(output, logits(llama, ids))


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
def test_generate_with_cache_and_left_padding(
    host: PreTrainedModel, random_delta: MakeDelta, beams: int
) -> None:
    """A row of a padded batch continues as the model with the updates in its weights does."""
    bank, deltas = DeltaBank(host), {}
    for seed, name in enumerate("ab"):
        deltas[name] = random_delta(host, seed, scale=0.5)
        bank.add(name, deltas[name])
    ids = tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    with bank.routed([["a"], ["b"], []]):
        together = host.generate(input_ids=ids, attention_mask=mask, **settings)
    for row, own in enumerate(([deltas["a"]], [deltas["b"]], [])):
        dense = with_dense_updates(host, own)
        start = int((mask[row] == 0).sum())
        alone = dense.generate(
            input_ids=ids[row : row + 1, start:],
            attention_mask=mask[row : row + 1, start:],
            **settings,
        )
        length = alone.shape[1] - (6 - start)
        assert torch.equal(together[row, 6 : 6 + length], alone[0, 6 - start :])


def test_one_entry_serves_a_batch_of_any_size_and_copies_of_rows_share_theirs(
    bank: DeltaBank, llama: PreTrainedModel
) -> None:
    ids = tokens(4)
    with bank.routed([["a", "b"]]):
        every = logits(llama, ids)
    with bank.routed([["a", "b"]] * 4):
        assert torch.equal(logits(llama, ids), every)
    with bank.routed([["a"], ["b"]]):
        pairs = logits(llama, ids)
    with bank.routed([["a"], ["a"], ["b"], ["b"]]):
        torch.testing.assert_close(logits(llama, ids), pairs)


def test_weights_scale_deltas(
    bank: DeltaBank, llama: PreTrainedModel, random_delta: MakeDelta
) -> None:
    ids = tokens(2)
    bank.add("half", bank["a"].scaled(0.5))
    with bank.routed([["half"], []]):
        expected = logits(llama, ids)
    with bank.routed([["a"], []], weights=[[0.5], []]):
        torch.testing.assert_close(logits(llama, ids), expected)
    with bank.routed(["a", "b"], weights=[0.5, 0.0]):
        torch.testing.assert_close(logits(llama, ids), expected)


def test_positions_limit_where_deltas_apply(bank: DeltaBank, llama: PreTrainedModel) -> None:
    """Tokens before the first marked one keep the bits of the base: attention is causal."""
    ids = tokens(2)
    base = logits(llama, ids)
    positions = torch.zeros(2, 7, dtype=torch.bool)
    positions[:, 4:] = True
    with bank.routed(["a", "b"]):
        everywhere = logits(llama, ids)
    with bank.routed(["a", "b"], positions=positions):
        some = logits(llama, ids)
        with pytest.raises(ValidationError, match="positions: expected a mask for the tokens"):
            logits(llama, ids[:, :5])
    with bank.routed(["a", "b"], positions=torch.ones(2, 7, dtype=torch.bool)):
        assert torch.equal(logits(llama, ids), everywhere)
    assert torch.equal(some[:, :4], base[:, :4])
    assert not torch.isclose(some[:, 4:], base[:, 4:]).all(-1).any()
    assert not torch.isclose(some[:, 4:], everywhere[:, 4:]).all(-1).any()
    with pytest.raises(ValidationError, match=r"expected a mask \[2, T\], got \[1, 7\]"):
        bank.routed(["a", "b"], positions=positions[:1]).__enter__()


def test_on_a_model_wrapped_by_peft_and_while_its_adapters_come_and_go(
    llama: PreTrainedModel, random_delta: MakeDelta
) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(llama)
    delta = random_delta(model, 0)
    ids = tokens()
    with DeltaBank(model) as early:
        early.add("a", delta)
        with early.routed(["a"] * 3):
            plain = logits(model, ids)
        config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config).eval()
        late = DeltaBank(wrapped)
        late.add("a", delta)
        with early.routed(["a"] * 3):
            both = logits(wrapped, ids)
        with late.routed(["a"] * 3):
            assert torch.equal(logits(wrapped, ids), both)
        with late, wrapped.disable_adapter(), late.routed(["a"] * 3):
            torch.testing.assert_close(logits(wrapped, ids), plain)
        assert (both - logits(wrapped, ids)).abs().max() > 0.1
        assert (both - plain).abs().max() > 1e-3
        with late:
            unwrapped = wrapped.unload()
            with late.routed(["a"] * 3):
                assert torch.equal(logits(unwrapped, ids), plain)
    assert own_hooks(model) == 0


def test_under_autocast_the_update_is_computed_in_float32(
    llama: PreTrainedModel, random_delta: MakeDelta
) -> None:
    bank = DeltaBank(llama)
    bank.add("a", random_delta(llama, 0))
    name = next(iter(bank["a"].factors))
    module, (A, B) = llama.get_submodule(name), bank["a"].factors[name]
    x = torch.randn(2, 3, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        base = module(x)
        with bank.routed([["a"], []]):
            output = module(x)
    assert output.dtype == base.dtype == torch.bfloat16
    assert torch.equal(output[1], base[1])
    update = torch.nn.functional.linear(torch.nn.functional.linear(x[0], A), B)
    exact = (base[0].float() + update).to(torch.bfloat16)
    assert (output[0] != exact).float().mean() < 0.02  # a sum at the edge of a rounding step


def test_a_base_in_bfloat16_adds_before_its_one_rounding(
    llama: PreTrainedModel, random_delta: MakeDelta
) -> None:
    model = copy.deepcopy(llama).to(torch.bfloat16)
    bank = DeltaBank(model)
    bank.add("a", random_delta(model, 0))
    name = next(iter(bank["a"].factors))
    A, B = bank["a"].factors[name]
    x = torch.randn(1, 3, 64, dtype=torch.bfloat16)
    with torch.no_grad(), bank.routed(["a"]):
        output = model.get_submodule(name)(x)
    with torch.no_grad():
        exact = (model.get_submodule(name)(x).float() + x.float() @ A.T @ B.T).to(torch.bfloat16)
    assert A.dtype == torch.float32
    assert output.dtype == torch.bfloat16
    assert (output != exact).float().mean() < 0.02
    assert DeltaBank(model, dtype=torch.bfloat16)._placed(bank["a"]).nbytes() * 2 == bank.nbytes()


def test_on_an_offloaded_base_whose_weights_are_on_no_device_between_calls(
    llama: PreTrainedModel, random_delta: MakeDelta
) -> None:
    accelerate = pytest.importorskip("accelerate")
    delta = random_delta(llama, 0)
    expected_bank = DeltaBank(llama)
    expected_bank.add("a", delta)
    with expected_bank.routed([["a"], [], []]):
        expected = logits(llama, tokens())
    model = accelerate.cpu_offload(copy.deepcopy(llama), execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    bank = DeltaBank(model)
    bank.add("a", delta)
    assert all(A.device.type == "cpu" for A, _ in bank["a"].factors.values())
    with bank.routed([["a"], [], []]):
        assert torch.equal(logits(model, tokens()), expected)


def test_gradients_reach_trainable_deltas(llama: PreTrainedModel, random_delta: MakeDelta) -> None:
    """As they do through dense weights."""
    delta = random_delta(llama, 0, rank=2)
    factors = {n: tuple(nn.Parameter(x.clone()) for x in pair) for n, pair in delta.factors.items()}
    bank = DeltaBank(llama, trainable=True)
    bank.add("a", LowRankDelta(factors))
    ids = tokens(2)
    with bank.routed(["a", []]):
        llama(input_ids=ids).logits[0].square().sum().backward()
    dense = with_dense_updates(llama, [delta])
    dense(input_ids=ids).logits[0].square().sum().backward()
    for name, (A, B) in factors.items():
        gradient = dense.get_submodule(name).weight.grad
        torch.testing.assert_close(A.grad, B.detach().T @ gradient, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(B.grad, gradient @ A.detach().T, rtol=1e-3, atol=1e-3)
    llama.zero_grad()


def test_a_route_opened_in_inference_mode_is_good_for_training_too(
    bank: DeltaBank, llama: PreTrainedModel
) -> None:
    with torch.inference_mode():
        route = bank.routed(["a"])
        route.__enter__()
    x = torch.randn(1, 3, 64, requires_grad=True)
    llama.get_submodule(next(iter(bank["a"].factors)))(x).sum().backward()
    route.__exit__(None, None, None)
    assert x.grad is not None
    llama.zero_grad()


def test_refuses_what_it_cannot_do(
    bank: DeltaBank, llama: PreTrainedModel, random_delta: MakeDelta
) -> None:
    with pytest.raises(DuplicateKeyError, match="got 'a'"):
        bank.add("a", random_delta(llama, 9))
    with pytest.raises(UnknownKeyError, match="got 'zz'"):
        bank.remove("zz")
    with pytest.raises(UnknownKeyError, match="got 'zz'"):
        bank.routed([["a"], ["zz"]]).__enter__()
    with pytest.raises(ValidationError, match="every id once in a row"):
        bank.routed([["a", "a"]]).__enter__()
    with pytest.raises(ValidationError, match="one for each id"):
        bank.routed([["a", "b"]], weights=[[1.0]]).__enter__()
    with pytest.raises(ValidationError, match="got none"):
        bank.routed([]).__enter__()
    with (
        bank.routed([["a"], ["b"]]),
        pytest.raises(ValidationError, match="expected a batch of 2 rows or a multiple of it"),
    ):
        logits(llama, tokens(3))
    wrong = LowRankDelta({"model.layers.0.mlp.down_proj": (torch.ones(1, 5), torch.ones(32, 1))})
    with pytest.raises(IncompatibleBaseError):
        bank.add("wrong", wrong)
    assert bank.ids() == ["a", "b", "c"]
    assert "a" in bank and len(bank) == 3 and own_hooks(llama) == 0
