"""peft: beliefs on models that already have adapters, and adapters in peft's own files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hosts import tiny_host
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gravity_hf.knowledge.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.errors import (
    DuplicateKeyError,
    IncompatibleBaseError,
    KnowledgeError,
    UnsafeFileError,
    ValidationError,
)
from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.peft_adapters import adapted, export_adapter
from gravity_hf.knowledge.residual_delta import ResidualDelta
from gravity_hf.knowledge.store import BeliefStore
from gravity_hf.knowledge.targets import base_model

peft = pytest.importorskip("peft")

INPUTS = torch.arange(3, 27).view(3, 8)


@torch.no_grad()
def logits(model):
    return model(input_ids=INPUTS).logits


def with_lora(model, seed=5):
    """A user's own adapter on the model, with an effect, on some of the maps, on others, and with
    a module of its own."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        target_modules=["down_proj", "q_proj"], modules_to_save=["norm"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight *= 2
    return model


def state_of(model):
    """Everything that an adapter could leave behind."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    base = base_model(model)
    configs = sorted(getattr(base, "peft_config", {}))
    active = [(m.active_adapters, m.disable_adapters) for m in model.modules() if is_peft(m)]
    return modules, parameters, configs, sorted(vars(base)), active


def is_peft(module):
    kinds = peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper
    return isinstance(module, kinds)


@pytest.mark.parametrize("host", ["llama", "gravity_llama", "gpt2"])
def test_adapters_add_what_the_dense_update_adds(host, request, random_delta):
    model = request.getfixturevalue(host)
    delta = random_delta(model, 1, rank=2)
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for name in delta.factors:
            weight = edited.get_submodule(name).weight
            update = delta.update(name)
            weight += update if weight.shape == update.shape else update.T
    before = state_of(model)
    with adapted(model, delta):
        got = logits(model)
    torch.testing.assert_close(got, logits(edited), rtol=1e-4, atol=1e-4)
    assert (got - logits(model)).abs().max() > 0.1
    assert state_of(model) == before


def test_adapters_of_the_user_stay_active_and_stay(llama, random_delta):
    model = with_lora(copy.deepcopy(llama))
    delta = random_delta(llama, 1)
    with_theirs, before = logits(model), state_of(model)
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name in delta.factors:
            merged.base_model.model.get_submodule(name).base_layer.weight += delta.update(name)
    with adapted(model, delta):
        torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), with_theirs) and state_of(model) == before
    assert model.active_adapters == ["default"]


def test_beliefs_work_where_the_users_adapters_are_switched_off(llama, random_delta):
    base, delta = copy.deepcopy(llama), random_delta(llama, 1)
    with adapted(base, delta):
        expected = logits(base)
    model = with_lora(base)
    with model.disable_adapter():
        with adapted(model, delta):
            torch.testing.assert_close(logits(model), expected)
        assert torch.equal(logits(model), logits(llama))
    assert not torch.equal(logits(model), logits(llama))


def test_merged_adapters_are_refused(llama, random_delta):
    model = with_lora(copy.deepcopy(llama))
    model.merge_adapter()
    with (
        pytest.raises(KnowledgeError, match="unmerge_adapter"),
        adapted(model, random_delta(llama, 1)),
    ):
        pass


def test_one_inside_another_is_their_sum(llama, random_delta):
    first, second = random_delta(llama, 1), random_delta(llama, 2, layers=[1])
    before = state_of(llama)
    with adapted(llama, LowRankDelta.sum([first, second])):
        expected = logits(llama)
    with adapted(llama, first):
        alone = logits(llama)
        with adapted(llama, second):
            torch.testing.assert_close(logits(llama), expected)
        assert torch.equal(logits(llama), alone)
    assert state_of(llama) == before


def test_the_model_is_as_it_was_after_an_error(llama, random_delta, monkeypatch):
    before = state_of(llama)
    with pytest.raises(ZeroDivisionError), adapted(llama, random_delta(llama, 1)):
        _ = 1 / 0
    assert state_of(llama) == before
    monkeypatch.setattr("gravity_hf.knowledge.peft_adapters._fill", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError), adapted(llama, random_delta(llama, 1)):
        pass
    assert state_of(llama) == before


def test_a_half_precision_base_gets_float32_factors(llama, random_delta):
    model = copy.deepcopy(llama).to(torch.bfloat16)
    delta = random_delta(model, 1)
    before = logits(model)
    with adapted(model, delta):
        layer = model.get_submodule(next(iter(delta.factors)))
        assert {p.dtype for n, p in layer.named_parameters() if "lora" in n} == {torch.float32}
        assert logits(model).dtype == torch.bfloat16
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def assert_in_force_and_gone(store, model):
    """The belief "a" by peft and by bank, and the base as it was after both."""
    before = logits(model)
    with store.active(["a"]):
        by_peft = logits(model)
    with store.compile_bank().routed([[store.get("a").id]]):
        torch.testing.assert_close(logits(model), by_peft)
    assert (by_peft - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)
    store.verify()


def test_a_quantised_base_is_restored(tmp_path, random_delta):
    hqq = pytest.importorskip("hqq.core.quantize")
    model = tiny_host("llama", num_hidden_layers=2)
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
    for layer in model.model.layers:
        layer.mlp.down_proj = hqq.HQQLinear(
            layer.mlp.down_proj, settings, compute_dtype=torch.float32, device="cpu"
        )
    store = BeliefStore.create(tmp_path / "kb", model)
    store.add_delta("a", random_delta(model, 1))
    assert_in_force_and_gone(store, model)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_quantised_by_bitsandbytes_is_pinned_before_its_first_call(
    bits, tmp_path, random_delta
):
    """On a CPU that library changes four-bit weights when they are first used."""
    pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    size = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    tiny_host("qwen2", **size).save_pretrained(tmp_path / "host")

    def load():
        config = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "host", quantization_config=config, device_map="cpu"
        ).eval()

    model = load()
    store = BeliefStore.create(tmp_path / "kb", model)
    store.add_delta("a", random_delta(model, 1))
    assert_in_force_and_gone(store, model)
    assert BeliefStore.open(store.path, load()).keys() == ["a"]


def test_maps_in_two_factors_take_adapters(random_delta):
    from gravity_hf.layers.low_rank import LowRankLinear

    model = tiny_host("llama", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.mlp.down_proj = LowRankLinear(64, 48, rank=8, bias=False)
    delta = random_delta(model, 1)
    before = logits(model)
    with adapted(model, delta):
        assert (logits(model) - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)


@pytest.fixture
def store(tmp_path, llama, random_delta):
    store = BeliefStore.create(tmp_path / "kb", llama)
    first, second = random_delta(llama, 1, layers=[0]), random_delta(llama, 2, rank=3, layers=[1])
    fact = Fact("a", "d", "r", "s", "The capital of France is", "Paris", aliases=("paris",))
    store.add_delta("a", LowRankDelta.sum([first, second]), {"note": "é"}, fact, {"kl": 0.5})
    return store


def test_exported_adapters_come_back_bit_for_bit(store, tmp_path):
    store.export_peft("a", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    old = store.get("a")
    with pytest.raises(DuplicateKeyError):
        store.import_peft(tmp_path / "out")
    store.remove("a")
    new = store.import_peft(tmp_path / "out")
    assert (new.key, new.version, new.fact) == ("a", 2, old.fact)
    assert (new.metadata, new.report) == (old.metadata, old.report)
    for name, pair in old.delta.factors.items():
        assert all(map(torch.equal, pair, new.delta.factors[name]))


def test_peft_loads_what_is_exported(store, tmp_path, llama):
    store.export_peft("a", tmp_path / "out")
    with store.active(["a"]):
        expected = logits(llama)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "out").eval()
    assert torch.equal(logits(loaded), expected)


def test_exports_need_a_folder_of_their_own_and_a_lora(store, tmp_path, llama):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValidationError, match="something in it"):
        store.export_peft("a", tmp_path / "out")
    blocks = ResidualDelta({"model.layers.0": (torch.ones(1, 32), torch.ones(32, 1))})
    with pytest.raises(ValidationError, match="no LoRA does"):
        export_adapter(llama, blocks, tmp_path / "blocks", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kb", "out"]


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_somebody_else_does_what_it_did(tmp_path, llama, rslora):
    """Trained elsewhere: other scales, other ranks of some maps."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=24,
        use_rslora=rslora,
        target_modules=["down_proj", "q_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 3},
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    store = BeliefStore.create(tmp_path / "kb", llama)
    with pytest.raises(ValidationError, match="key="):
        store.import_peft(tmp_path / "theirs")
    store.import_peft(tmp_path / "theirs", "b")
    with store.active(["b"]):
        torch.testing.assert_close(logits(llama), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(store, tmp_path):
    store.export_peft("a", tmp_path / "out")
    return tmp_path / "out"


def edit(folder, **changes):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "LORA"),
        ({"peft_type": "GRAVITY_LORA"}, "LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["gravity"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": 7}, "rank"),
        ({"lora_alpha": "8"}, "positive"),
        ({"lora_alpha": 1e400}, "finite"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "names of maps"),
        ({"rank_pattern": [1]}, "object"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_that_are_no_plain_lora_are_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(UnsafeFileError, match=message):
        read_adapter(folder)


def test_tensors_that_are_not_the_factors_are_refused(folder):
    file = folder / WEIGHTS_FILE
    tensors = load_file(file)
    name = next(iter(tensors))
    for wrong in (
        {**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)},
        {n: x for n, x in tensors.items() if n != name},
        {**tensors, name: tensors[name] * torch.nan},
        {**tensors, name: tensors[name].long()},
        {},
    ):
        save_file(wrong, file)
        with pytest.raises(UnsafeFileError):
            read_adapter(folder)
    file.write_bytes(b"\x80\x04junk")
    with pytest.raises(UnsafeFileError, match="safetensors"):
        read_adapter(folder)


def test_pickles_are_refused(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(UnsafeFileError, match=r"\.bin, which could run code"):
        read_adapter(folder)


def test_adapters_of_another_base_are_refused(folder, tmp_path, gpt2):
    other = BeliefStore.create(tmp_path / "other", gpt2)
    with pytest.raises(IncompatibleBaseError, match="down_proj"):
        other.import_peft(folder, "b")
    assert len(other) == 0


def test_without_peft_the_error_says_what_to_do(llama, random_delta, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(KnowledgeError, match="compile_bank"),
        adapted(llama, random_delta(llama, 1)),
    ):
        pass
