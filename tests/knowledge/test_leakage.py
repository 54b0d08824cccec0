"""Leakage by second moments: the formula, streaming, null spaces."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gravity_hf.knowledge.delta import LowRankDelta, target_modules
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.leakage import SecondMoment, delta_leakage
from gravity_hf.knowledge.moments import prompt_moments, text_moments

TEXT = "The capital of France is Paris. Water boils at one hundred degrees. A byte has eight bits. "


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment_of(x: torch.Tensor, W: torch.Tensor) -> SecondMoment:
    count, features = x.shape
    kept = x / count**0.5 if count < features else x.T @ x / count
    return SecondMoment(kept, count, float((x @ W.T).double().square().sum(1).mean()))


def dense_leakage(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> float:
    """The definition, with the root of C, in float64."""
    x, W, A, B = (t.double() for t in (x, W, A, B))
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    root = vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T
    return float((B @ A @ root).norm() / (W @ root).norm())


class TestFormula:
    @pytest.mark.parametrize("count", [7, 200], ids=["rows", "dense"])
    def test_equals_a_dense_float64_computation(self, count: int) -> None:
        x, W, A, B = seeded(count, 24), seeded(16, 24, seed=1), seeded(3, 24, seed=2), seeded(16, 3)
        moment = moment_of(x, W)
        assert moment.is_dense == (count > 24)
        assert moment.leakage(A, B) == pytest.approx(dense_leakage(x, W, A, B), rel=1e-5)

    def test_is_the_relative_size_of_what_is_added(self) -> None:
        x, W = seeded(50, 24), seeded(16, 24, seed=1)
        A, B = seeded(2, 24, seed=2), seeded(16, 2, seed=3)
        added = (x @ A.T @ B.T).norm() / (x @ W.T).norm()
        assert moment_of(x, W).leakage(A, B) == pytest.approx(float(added), rel=1e-5)

    def test_update_that_reads_nothing_of_the_inputs_leaks_nothing(self) -> None:
        x, W, B = seeded(10, 24), seeded(16, 24, seed=1), seeded(16, 1)
        A = torch.linalg.svd(x, full_matrices=True).Vh[-1:]
        assert moment_of(x, W).leakage(A, B) < 1e-6

    def test_orthogonal_updates_still_leak_onto_each_others_inputs(self) -> None:
        """Why angles alone are not enough."""
        x, W, B = seeded(100, 24), seeded(16, 24, seed=1), seeded(16, 1)
        own, other = torch.eye(24)[:1], torch.eye(24)[1:2]
        assert float(own @ other.T) == 0
        assert moment_of(x, W).leakage(other, B) > 0.05

    def test_map_that_says_nothing_is_infinitely_disturbed(self) -> None:
        moment = moment_of(seeded(5, 8), torch.zeros(4, 8))
        assert moment.leakage(seeded(1, 8), seeded(4, 1)) == math.inf
        assert moment.leakage(seeded(1, 8), torch.zeros(4, 1)) == 0

    def test_only_maps_with_a_moment_are_reported(self) -> None:
        delta = LowRankDelta({n: (seeded(1, 24), seeded(16, 1)) for n in ("a", "b")})
        found = delta_leakage(delta, {"b": moment_of(seeded(5, 24), seeded(16, 24))})
        assert list(found) == ["b"]


class TestBusyDirections:
    @pytest.mark.parametrize("count", [12, 300], ids=["rows", "dense"])
    @pytest.mark.parametrize("quiet", [0.0, 0.02, 0.3])
    def test_outside_of_them_is_at_most_the_quiet_share(self, count: int, quiet: float) -> None:
        x = seeded(count, 24) * torch.logspace(0, -3, 24)
        moment = moment_of(x, seeded(16, 24, seed=1))
        busy = moment.busy(quiet).double()
        total = float(moment.matrix().trace())

        def share(directions: torch.Tensor) -> float:
            inside = (directions.T @ moment.matrix() @ directions).trace()
            return 1 - float(inside) / total

        assert share(busy) <= quiet + 1e-7  # what is kept is float32
        # And one fewer would not do: no capacity is spent for nothing.
        assert quiet == 0 or share(busy[:, :-1]) > quiet

    def test_rows_leave_the_rest_of_the_space_free(self) -> None:
        assert moment_of(seeded(5, 24), seeded(16, 24)).busy(0.0).shape == (24, 5)

    def test_inputs_of_zero_are_busy_nowhere(self) -> None:
        assert moment_of(torch.zeros(5, 24), seeded(16, 24)).busy(0.02).shape == (24, 0)


class TestMeasuring:
    def inputs(self, model: nn.Module, name: str, rows: list[list[int]]) -> torch.Tensor:
        """What the map got, without the first token of each row, float64."""
        seen: list[torch.Tensor] = []
        module = model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        with torch.no_grad():
            for row in rows:
                model(torch.tensor([row]))
        handle.remove()
        return torch.cat([x.reshape(-1, x.shape[-1])[1:] for x in seen]).double()

    def test_moments_of_text_equal_those_of_stored_inputs(self, llama, tokenizer) -> None:
        name = target_modules(llama, "all")[0]
        text = TEXT * 40
        found = text_moments(llama, tokenizer, [name], [text], tokens=900, progress=False)[name]
        ids = tokenizer(text)["input_ids"]
        pieces = [ids[i : i + 512] for i in range(0, len(ids), 512)]
        pieces = pieces[: next(i for i in range(9) if sum(map(len, pieces[:i])) - i >= 900)]
        x = self.inputs(llama, name, pieces)
        W = llama.get_submodule(name).weight.detach().double()
        assert found.is_dense and found.tokens == len(x) >= 900
        expected = x.T @ x / len(x)
        assert float((found.kept - expected).abs().max() / expected.abs().max()) < 1e-5
        energy = float((x @ W.T).square().sum(1).mean())
        assert found.output_energy == pytest.approx(energy, rel=1e-5)

    @pytest.mark.parametrize("host", ["llama", "gpt2", "gravity_llama"])
    def test_leakage_is_that_of_the_models_own_map(self, host, tokenizer, request) -> None:
        """Also of Conv1D, whose weight is transposed and whose bias is no part of `W x`."""
        model = copy.deepcopy(request.getfixturevalue(host))
        name = target_modules(model, "all")[-1]
        if host == "gpt2":
            torch.nn.init.normal_(model.get_submodule(name).bias)
        prompts = ["The capital of France is", "A byte has"]
        moment = prompt_moments(model, tokenizer, [name], prompts)[name]
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        x = self.inputs(model, name, rows)
        W = model.get_submodule(name).weight.detach()
        W = W.T if host == "gpt2" else W
        A, B = seeded(2, W.shape[1]), seeded(W.shape[0], 2, seed=1)
        assert moment.leakage(A, B) == pytest.approx(dense_leakage(x, W, A, B), rel=1e-4)

    def test_few_tokens_are_kept_as_rows(self, llama, tokenizer) -> None:
        name = target_modules(llama, "all")[0]
        moment = prompt_moments(llama, tokenizer, [name], ["The capital of France is"])[name]
        assert not moment.is_dense and moment.kept.shape == (moment.tokens, 64)

    def test_first_token_is_left_out_unless_it_is_the_only_one(self, llama, tokenizer) -> None:
        name = target_modules(llama, "all")[0]
        length = len(tokenizer("The capital of")["input_ids"])
        assert (
            prompt_moments(llama, tokenizer, [name], ["The capital of"])[name].tokens == length - 1
        )
        assert prompt_moments(llama, tokenizer, [name], ["The"])[name].tokens == 1

    def test_too_little_text_is_refused_with_what_was_found(self, llama, tokenizer) -> None:
        with pytest.raises(ValidationError, match="at least 20000 tokens"):
            text_moments(llama, tokenizer, target_modules(llama, "all"), [TEXT], progress=False)
        with pytest.raises(ValidationError, match="at least one prompt"):
            prompt_moments(llama, tokenizer, target_modules(llama, "all"), [])

    def test_model_is_left_as_it_was(self, tokenizer, llama) -> None:
        name = target_modules(llama, "all")[0]
        llama.train()
        try:
            prompt_moments(llama, tokenizer, [name], ["The capital of France is"])
            assert all(module.training for module in llama.modules())
        finally:
            llama.eval()
        assert not llama.get_submodule(name)._forward_hooks
