"""TRL's SFTTrainer on patched models: whole, with LoRA, and with several documents in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.folders import (
    all_differ,
    byte_decoder,
    byte_host,
    masses,
    saved_decoder,
)
from hosts import logits, tiny_inputs
from peft import LoraConfig

from gravity_hf import (
    GravityTrainer,
    gravity_lora,
    gravity_param_groups,
    load_gravity_adapter,
    load_gravity_model,
)
from gravity_hf.training.tokenizers import byte_tokenizer

pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

TEXTS = ["an apple falls", "the moon also falls, all the time", "so do we"]


def sft(model: Any, folder: Path, kind: type = SFTTrainer, **options: Any) -> Any:
    trainer_options = {
        name: options.pop(name) for name in ("peft_config", "optimizers") if name in options
    }
    settings = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "max_length": 64,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return kind(
        model=model,
        args=SFTConfig(output_dir=str(folder), **{**settings, **options}),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=byte_tokenizer(),
        **trainer_options,
    )


def test_a_step_moves_every_mass_and_the_saved_model_loads(tmp_path: Path) -> None:
    model = byte_decoder()
    before = masses(model)
    trainer = sft(model, tmp_path)
    trainer.train()
    assert all_differ(before, masses(model))
    trainer.save_model(str(tmp_path / "out"))
    loaded = load_gravity_model(tmp_path / "out")
    inputs = tiny_inputs("qwen2")
    assert type(loaded).__name__ == "GravityQwen2ForCausalLM"
    assert torch.equal(logits(loaded, inputs), logits(model.eval(), inputs))


def test_a_folder_given_by_name_is_trained_under_gravity(tmp_path: Path) -> None:
    trainer = sft(str(saved_decoder(tmp_path / "model")), tmp_path)
    before = masses(trainer.model)
    trainer.train()
    assert all_differ(before, masses(trainer.model))


def test_gravity_s_own_learning_rate_comes_by_inheritance_or_by_an_optimizer(
    tmp_path: Path,
) -> None:
    class Both(GravityTrainer, SFTTrainer):
        """TRL's trainer with gravity's optimiser groups."""

    inherited = sft(byte_decoder(), tmp_path, Both).create_optimizer()
    model = byte_decoder()
    own = torch.optim.AdamW(gravity_param_groups(model, 1e-2))
    given = sft(model, tmp_path, optimizers=(own, None)).create_optimizer()
    for optimizer in (inherited, given):
        assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.3)
        assert optimizer.param_groups[-1]["weight_decay"] == 0


def test_an_adapter_trains_masses_too_and_loads_on_a_fresh_host(tmp_path: Path) -> None:
    model = gravity_lora(byte_decoder(), r=4)
    before = masses(model)
    trainer = sft(model, tmp_path)
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(before, masses(model), strict=True)]
    # peft keeps an untouched original beside every trained copy.
    assert sum(moved) == len(moved) // 2
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = load_gravity_adapter(byte_host(), tmp_path / "adapter")
    inputs = tiny_inputs("qwen2")
    torch.testing.assert_close(logits(loaded.eval(), inputs), logits(model.eval(), inputs))


def test_a_plain_peft_config_freezes_the_masses_and_its_adapter_is_not_taken_for_ours(
    tmp_path: Path,
) -> None:
    model = byte_decoder()
    before = masses(model)
    plain = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = sft(model, tmp_path, peft_config=plain)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, masses(model), strict=True))
    trainer.save_model(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="ordinary LoRA"):
        load_gravity_adapter(byte_host(), tmp_path / "adapter")


@pytest.mark.parametrize(
    "packing",
    [
        {"packing": True, "packing_strategy": "bfd"},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"padding_free": True, "max_length": None},
    ],
    ids=lambda packing: packing.get("packing_strategy", "padding_free"),
)
def test_packed_documents_do_not_see_each_other(packing: dict[str, Any], tmp_path: Path) -> None:
    model = byte_decoder()
    trainer = sft(model, tmp_path, per_device_train_batch_size=3, **packing)
    (batch,) = trainer.get_train_dataloader()
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    trainer.compute_loss(model.train(), dict(batch))
    hook.remove()
    # What decides it: positions that begin anew, no mask, and no cache, all of which TRL sets.
    assert seen[0]["use_cache"] is False and "attention_mask" not in seen[0]
    ids, positions = batch["input_ids"], batch["position_ids"]
    starts = (positions[0] == 0).nonzero()[:, 0].tolist()
    assert len(starts) == len(TEXTS)
    given = {key: value for key, value in batch.items() if key != "labels"}
    together = logits(model.eval(), given, use_cache=False)
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        alone = logits(model, {"input_ids": ids[:, start:end]})
        torch.testing.assert_close(together[:, start:end], alone, atol=1e-5, rtol=1e-4)


def test_wrapped_packing_makes_one_text_of_its_documents(tmp_path: Path) -> None:
    """TRL's other strategy hides nothing, from gravity or any other attention."""
    model = byte_decoder()
    wrapped = sft(model, tmp_path, packing=True, packing_strategy="wrapped")
    batch = next(iter(wrapped.get_train_dataloader()))
    assert "position_ids" not in batch and bool(batch["attention_mask"].all())
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    changed = {**given, "input_ids": given["input_ids"].clone()}
    changed["input_ids"][:, 0] += 1
    apart = (logits(model.eval(), given) - logits(model, changed)).abs()
    assert apart[:, -1].max() > 1e-4
