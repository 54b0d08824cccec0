"""LoRA on patched models: what trains, what is saved, what comes back, what is refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from transformers import TrainingArguments

from gravity_hf import (
    GravityTrainer,
    calibrate,
    gravity_lora,
    gravity_param_groups,
    gravity_status,
    load_gravity_adapter,
    load_gravity_model,
    patch_with_gravity,
    unpatch_gravity,
)
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.training.lora import host_lora


def calibrated(family="qwen2"):
    model = patch_with_gravity(tiny_host(family))
    calibrate(model, [tiny_inputs(family)])
    return model


def trained(family="qwen2", steps=3):
    """A few real steps, so that LoRA and masses differ from where they started."""
    model = gravity_lora(calibrated(family), r=4).train()
    optimizer = torch.optim.AdamW(gravity_param_groups(model, 1e-2))
    inputs = tiny_inputs(family)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "family, projections",
    [
        ("qwen2", 4),
        ("gpt2", 2),
        ("bert", 4),
        ("phi3", 2),
        ("gpt_neox", 2),
    ],
)
def test_lora_sits_on_the_attention_projections_and_gravity_trains(family, projections):
    model = gravity_lora(calibrated(family))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trainable if "lora_" not in n} == {
        n for n in trainable if n.endswith(("mass_log", "softening_log"))
    }
    assert sum("lora_A" in n for n in trainable) == 3 * projections
    assert sum(n.endswith("modules_to_save.default.mass_log") for n in trainable) == 3
    assert not any("mlp" in n or "intermediate" in n or "lm_head" in n for n in trainable)


def test_training_moves_masses_softenings_and_lora():
    model = trained()
    start = calibrated()
    for name, module in gravity_modules(model.get_base_model()).items():
        before = start.get_submodule(name).gravity
        assert not torch.equal(module.mass_log, before.mass_log)
        assert not torch.equal(module.softening_log, before.softening_log)
        assert torch.equal(module.key_radius_sq, before.key_radius_sq)


def test_an_adapter_restores_the_patch_on_a_fresh_base(tmp_path):
    """F12: as an ordinary LoRA peft itself would load it and drop the masses."""
    model, inputs = trained(), tiny_inputs("qwen2")
    model.save_pretrained(tmp_path)
    restored = load_gravity_adapter(tiny_host("qwen2"), tmp_path)
    assert torch.equal(logits(restored, inputs), logits(model, inputs))
    status, base_status = gravity_status(restored), gravity_status(model)
    assert status.config == base_status.config and status.layers == base_status.layers
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "gravity" in config and config["peft_type"] == "GRAVITY_LORA"


def test_an_adapter_from_before_it_had_a_type_of_its_own_still_loads(tmp_path):
    model, inputs = trained(), tiny_inputs("qwen2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "LORA"}))
    restored = load_gravity_adapter(tiny_host("qwen2"), tmp_path)
    assert torch.equal(logits(restored, inputs), logits(model, inputs))
    restored.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["peft_type"] == "GRAVITY_LORA"


def test_the_adapter_of_a_host_stays_an_ordinary_one(tmp_path):
    host_lora(tiny_host("qwen2")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    peft.PeftModel.from_pretrained(tiny_host("qwen2"), tmp_path)


def test_an_unpatched_base_is_refused_where_the_patch_may_not_be_restored(tmp_path):
    trained(steps=1).save_pretrained(tmp_path)
    base, inputs = tiny_host("qwen2"), tiny_inputs("qwen2")
    before = logits(base, inputs)
    with pytest.raises(RuntimeError, match="expected a patched base, got Qwen2ForCausalLM"):
        load_gravity_adapter(base, tmp_path, patch=False)
    assert torch.equal(logits(base, inputs), before)


def test_an_adapter_goes_onto_a_base_patched_alike_and_no_other(tmp_path):
    model, inputs = trained(), tiny_inputs("qwen2")
    model.save_pretrained(tmp_path)
    alike = load_gravity_adapter(calibrated(), tmp_path)
    assert torch.equal(logits(alike, inputs), logits(model, inputs))
    with pytest.raises(ValueError, match="expected a base patched with"):
        load_gravity_adapter(patch_with_gravity(tiny_host("qwen2")), tmp_path)


def test_an_adapter_folder_loads_with_its_base(tmp_path):
    tiny_host("qwen2").save_pretrained(tmp_path / "base")
    base = patch_with_gravity(type(tiny_host("qwen2")).from_pretrained(tmp_path / "base"))
    calibrate(base, [tiny_inputs("qwen2")])
    model = gravity_lora(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded, inputs = load_gravity_model(tmp_path / "adapter"), tiny_inputs("qwen2")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_an_adapter_without_masses_is_refused_before_any_change(tmp_path):
    import safetensors.torch

    trained(steps=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: v for k, v in tensors.items() if "mass" not in k}, file)
    base = tiny_host("qwen2")
    with pytest.raises(ValueError, match="expected masses for every converted layer"):
        load_gravity_adapter(base, tmp_path)
    assert not gravity_modules(base)


def test_an_ordinary_adapter_is_refused(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(tiny_host("qwen2"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an ordinary LoRA adapter"):
        load_gravity_adapter(tiny_host("qwen2"), tmp_path)


def test_merging_gives_a_plain_gravity_model_that_saves_and_reloads(tmp_path):
    model, inputs = trained(), tiny_inputs("qwen2")
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = load_gravity_model(tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))


def test_a_disabled_adapter_gives_the_base_s_masses_back():
    model, inputs = trained(), tiny_inputs("qwen2")
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(calibrated(), inputs))


@pytest.mark.parametrize("wrong", [
    lambda: gravity_lora(tiny_host("qwen2")),
    lambda: patch_with_gravity(peft.get_peft_model(tiny_host("qwen2"), peft.LoraConfig(
        target_modules=["q_proj"]))),
    lambda: calibrate(gravity_lora(calibrated()), [tiny_inputs("qwen2")]),
    lambda: unpatch_gravity(gravity_lora(calibrated())),
])  # fmt: skip
def test_a_wrong_order_is_refused_with_the_right_one(wrong):
    with pytest.raises(RuntimeError, match=r"order|unload"):
        wrong()


def test_gravity_has_its_own_learning_rate_group_and_no_decay():
    model = gravity_lora(calibrated())
    groups = gravity_param_groups(model, 1e-3, weight_decay=0.1)
    *weights, gravity = groups
    assert gravity["lr"] == pytest.approx(3e-2) and gravity["weight_decay"] == 0.0
    assert len(gravity["params"]) == 6 and all(p.dim() == 1 for p in gravity["params"])
    assert {g["lr"] for g in weights} == {1e-3} and weights[0]["weight_decay"] == 0.1
    grouped = sum(len(group["params"]) for group in groups)
    assert grouped == sum(p.requires_grad for p in model.parameters())


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = tiny_inputs("qwen2", batch=1, seed=index)["input_ids"][0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_under_trainer_and_saves_the_whole_adapter(checkpointing, tmp_path):
    model = gravity_lora(calibrated())
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_steps=4, logging_steps=1, gradient_checkpointing=checkpointing,
        disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    trainer = GravityTrainer(model=model, args=arguments, train_dataset=Dataset())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates[-1] == pytest.approx(0.3) and set(rates[:-1]) == {1e-2}
    assert trainer.optimizer.param_groups[-1]["weight_decay"] == 0.0
    inputs = tiny_inputs("qwen2")
    restored = load_gravity_adapter(tiny_host("qwen2"), tmp_path / "checkpoint-4")
    assert torch.equal(logits(restored, inputs), logits(model.eval(), inputs))


def test_trainer_goes_on_from_a_checkpoint_of_an_adapter(tmp_path):
    def train(steps, **resume):
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to=[], use_cpu=True, save_steps=2, disable_tqdm=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        model = gravity_lora(calibrated())
        trainer = GravityTrainer(model=model, args=arguments, train_dataset=Dataset())
        trainer.train(**resume)
        return model.eval()

    inputs = tiny_inputs("qwen2")
    whole = logits(train(4), inputs)
    resumed = train(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed, inputs), whole, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_and_lora_give_the_same_gradients():
    def gradients(checkpointing):
        base = calibrated()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model = gravity_lora(base).train()
        inputs = tiny_inputs("qwen2")
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert any(g.abs().max() > 0 for n, g in plain.items() if "mass_log" in n)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
