"""Profiles: every tier is really run as it says, and one that changes nothing is not listed."""

from __future__ import annotations

import hashlib
import itertools
import json

import pytest
import torch
from hosts import tiny_host
from integration.running import gravity_host

from gravity_hf import LeanFormerConfig, LeanFormerForCausalLM
from gravity_hf.training import profiling, profiling_times
from gravity_hf.training.cached_reading import following_logits
from gravity_hf.training.peak_memory import PeakMemory
from gravity_hf.training.profiling import ProfileSettings, profile_model
from gravity_hf.training.profiling_manifest import (
    check_place,
    folder_digest,
    read_manifest,
    select_tier,
)
from gravity_hf.training.profiling_tiers import applied, new_cache, tiers_of

# Long enough a prompt for the packed cache to pack a block.
SETTINGS = ProfileSettings(136, 6, runs=1, windows=2, top_k=32, exit_threshold=0.5)
LENGTHS = {"max_position_embeddings": 256}
IDS = torch.arange(700) * 31 % 89 + 3


def lean() -> LeanFormerForCausalLM:
    torch.manual_seed(0)
    config = LeanFormerConfig(
        **{"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
        **{"intermediate_size": 64, "attention_rank": 8, "feed_forward_rank": 8, "screen_dim": 4},
        **{"attention_top_k": 12, "local_window": 4, "sink_tokens": 1, "gate_rank": 4},
        **{"feed_forward_block": 8, "min_depth": 1, "initializer_range": 0.3, **LENGTHS},
    )
    return LeanFormerForCausalLM(config).eval()


MODELS = {
    "lean": lean,
    "qwen2": lambda: tiny_host("qwen2", **LENGTHS),
    "gravity": lambda: gravity_host("qwen2", **LENGTHS),
}


@pytest.fixture(scope="module")
def manifests():
    found = {}
    for name, make in MODELS.items():
        model = make()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found[name] = profile_model(model, IDS, SETTINGS, name=name, progress=False)
        # It comes back as it was.
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert model.dtype == torch.float32 and not _attends_sparsely(model, name)
    return found


def _attends_sparsely(model, name) -> bool:
    return name != "lean" and any(hasattr(x, "attention_policy") for x in model.modules())


OF_HOSTS = ["full", "sparse-attention", "half", "packed-cache", "lean"]
OF_LEAN = [*OF_HOSTS[:2], "sparse-feed-forward", "early-exit", *OF_HOSTS[2:]]


@pytest.mark.parametrize(
    "name, names", [("lean", OF_LEAN), ("qwen2", OF_HOSTS), ("gravity", OF_HOSTS)]
)
def test_every_tier_that_a_model_has_is_measured(manifests, name, names):
    manifest = manifests[name]
    assert [tier["name"] for tier in manifest["tiers"]] == names and not manifest["left_out"]
    assert manifest["settings"]["prompt_length"] == 136 and manifest["model"] == name
    for tier in manifest["tiers"]:
        assert 0 < tier["decode_ms"]["p50"] <= tier["decode_ms"]["p95"]
        assert tier["prefill_ms"]["p50"] > 0 and tier["decode_tokens_per_s"] > 0
        assert tier["cache_bytes"] > 0 and tier["weight_bytes"] > 0
    json.dumps(manifest)


@pytest.mark.parametrize("name", MODELS)
def test_tiers_differ_in_what_they_save_and_in_what_they_compute(manifests, name):
    tiers = {tier["name"]: tier for tier in manifests[name]["tiers"]}
    full = tiers["full"]
    assert full["agreement"] == 1.0
    assert len({tier["loss"] for tier in tiers.values()}) == len(tiers)
    assert tiers["half"]["weight_bytes"] < 0.6 * full["weight_bytes"]
    assert tiers["packed-cache"]["cache_bytes"] < full["cache_bytes"]
    assert tiers["lean"]["cache_bytes"] < tiers["half"]["cache_bytes"]
    assert tiers["lean"]["description"] == " + ".join(n for n in tiers if n not in ("full", "lean"))


def test_the_loss_of_the_full_tier_is_the_loss_of_the_model(manifests):
    model = tiny_host("qwen2", **LENGTHS)
    starts = [0, len(IDS) - 142]
    windows = torch.stack([IDS[start : start + 142] for start in starts])
    with torch.no_grad():
        logits = model(windows).logits[:, 136:-1]
    targets = windows[:, 137:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert manifests["qwen2"]["tiers"][0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    "prompt, idle",
    [(40, "packed-cache"), (24, "sparse-attention")],
    ids=["nothing to pack", "no more keys than are chosen"],
)
def test_a_tier_that_changes_no_logit_is_left_out(prompt, idle):
    settings = ProfileSettings(prompt, 6, runs=1, windows=1, top_k=32)
    model = tiny_host("qwen2", **LENGTHS)
    manifest = profile_model(model, IDS, settings, tiers=[idle, "half"], progress=False)
    reason = "its logits are those of the full tier"
    assert manifest["left_out"] == [{"name": idle, "reason": reason}]
    assert [x["name"] for x in manifest["tiers"]] == ["full", "half"]


def test_a_tier_that_a_model_refuses_is_left_out_with_the_reason():
    """Window layers keep what they have: nothing would be packed."""
    settings = ProfileSettings(20, 4, runs=1, windows=1, top_k=32)
    manifest = profile_model(tiny_host("mistral"), IDS, settings, progress=False)
    reasons = {x["name"]: x["reason"] for x in manifest["left_out"]}
    assert "nothing would be packed" in reasons["packed-cache"]


def test_a_tier_is_undone_when_reading_fails():
    model = lean()
    tier = tiers_of(model, exit_threshold=0.5)[-1]
    with pytest.raises(ValueError, match="chunk"), applied(model, tier):
        following_logits(model, IDS[None, :8], new_cache(model, tier), 0)
    assert model.config.exit_threshold is None
    assert {x.policy for x in model.modules() if hasattr(x, "predictor")} == {"dense"}


def test_unknown_tiers_and_short_texts_are_refused():
    model = tiny_host("qwen2")
    with pytest.raises(ValueError, match=r"expected some of \['full', .* got \['early-exit'\]"):
        profile_model(model, IDS, SETTINGS, tiers=["early-exit"])
    with pytest.raises(ValueError, match="a text of at least 128 tokens, got 50"):
        profile_model(model, IDS[:50], SETTINGS)
    with pytest.raises(ValueError, match="runs: expected at least 1"):
        ProfileSettings(runs=0)
    with pytest.raises(ValueError, match="expected a causal model"):
        profile_model(tiny_host("bert"), IDS, SETTINGS)


def test_a_clock_that_ticks_is_what_times_are_made_of(monkeypatch):
    """Prompts and tokens are told apart, the first run is not counted."""
    # A second from look to look in the first run of both tiers, a prompt and four tokens each.
    ticks = itertools.accumulate(itertools.chain([1.0] * 20, itertools.repeat(0.001)))
    monkeypatch.setattr(profiling_times.time, "perf_counter", lambda: next(ticks))
    settings = ProfileSettings(10, 4, runs=2, windows=1)
    manifest = profile_model(tiny_host("qwen2"), IDS, settings, tiers=["half"], progress=False)
    for tier in manifest["tiers"]:
        assert tier["prefill_ms"]["p50"] == pytest.approx(1.0)
        assert tier["decode_tokens_per_s"] == pytest.approx(1000.0)
        assert tier["prefill_tokens_per_s"] == pytest.approx(10_000.0)


def _tier(name: str, ms: float, loss: float, agreement: float, peak: int | None) -> dict:
    return {
        "name": name, "decode_ms": {"p50": ms}, "loss": loss, "agreement": agreement,
        "peak_bytes": peak,
    }  # fmt: skip


MANIFEST = {
    "tiers": [
        _tier("full", 9.0, 2.0, 1.0, 900),
        _tier("a", 4.0, 2.1, 0.97, 500),
        _tier("b", 3.0, 2.1, 0.95, None),
        _tier("c", 1.0, 2.5, 0.80, 400),
    ]
}


@pytest.mark.parametrize(
    "bounds, chosen",
    [
        ({}, "full"),
        ({"max_latency_ms": 5.0}, "b"),
        ({"max_latency_ms": 5.0, "min_quality": 0.96}, "a"),
        ({"max_latency_ms": 2.0}, "c"),
        ({"max_latency_ms": 2.0, "min_quality": 0.9}, None),
        ({"max_peak_bytes": 600}, "a"),
    ],
    ids=str,
)
def test_the_best_tier_within_the_bounds_is_chosen(bounds, chosen):
    tier = select_tier(MANIFEST, **bounds)
    assert (None if tier is None else tier["name"]) == chosen


def test_a_manifest_belongs_to_the_folder_that_it_was_made_of(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"one")
    for name in (".hidden", "README.md", "profile_cuda.json", "checkpoint-2/weights"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never mind")
    digest = folder_digest(folder)
    expected = b"weights\0" + hashlib.sha256(b"one").digest()
    assert digest == hashlib.sha256(expected).hexdigest()
    file = folder / "profile.json"
    file.write_text(json.dumps({"version": profiling.MANIFEST_VERSION, "digest": digest}))
    assert read_manifest(file, folder)["digest"] == digest
    (folder / "weights").write_bytes(b"two")
    with pytest.raises(ValueError, match="has changed since"):
        read_manifest(file, folder)
    file.write_text("[]")
    with pytest.raises(ValueError, match="manifest of version"):
        read_manifest(file)
    with pytest.raises(ValueError, match="expected a manifest"):
        read_manifest(tmp_path / "nowhere.json")


@pytest.mark.parametrize("name, refused", [("profile_cpu.json", False), ("tiers.json", True)])
def test_a_manifest_in_the_models_folder_is_no_part_of_it(tmp_path, name, refused):
    if refused:
        with pytest.raises(ValueError, match="profile: --out: expected a name such as"):
            check_place(tmp_path / name, tmp_path)
        return
    before = folder_digest(tmp_path)
    check_place(tmp_path / name, tmp_path)
    (tmp_path / name).write_text("{}")
    assert folder_digest(tmp_path) == before


def test_a_threshold_of_nothing_lets_all_tokens_leave():
    tiers = {tier.name: tier for tier in tiers_of(lean(), exit_threshold=0.0)}
    assert tiers["early-exit"].exit_threshold == 0.0


def test_the_peak_of_a_process_is_seen_and_starts_again():
    with PeakMemory("cpu") as large:
        torch.ones(64 * 2**20, dtype=torch.uint8)
    with PeakMemory("cpu") as small:
        pass
    if large.above is None or small.above is None:
        pytest.skip("nobody counts the memory of a process here")
    assert large.above > 60 * 2**20 > small.above
