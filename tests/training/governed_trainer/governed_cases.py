"""What the tests of governed training under Trainer share: a tiny Llama, random text, settings
under which groups converge within a few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gravity_hf.training.governed import (
    BudgetSettings,
    GovernedTraining,
    GovernorSettings,
    HierarchySettings,
)

VOCABULARY, LENGTH = 23, 8
# A group is converged after 6 steps, whatever its gradient.
EAGER = GovernorSettings(
    cooling_threshold=1.0,
    cooling_window=2,
    resume_threshold=1.0,
    converged_threshold=1.0,
    confirmation_window=2,
    update_threshold=None,
    reactivation_delta=1.0,
    warm_window=1,
    probe_interval=2,
)
NEVER = GovernorSettings(cooling_window=10**6)


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"max_position_embeddings": LENGTH, "attention_dropout": 0.1},
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | settings)))


class RandomText(Dataset):
    def __init__(self, rows: int = 32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    values = {
        **{"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"},
        **{"save_strategy": "no", "weight_decay": 0.1, "max_grad_norm": 0.5},
    }
    return TrainingArguments(str(folder), **{**values, **options})


def plain_trainer(model: torch.nn.Module, folder: Any, **options: Any) -> Trainer:
    return Trainer(model, arguments(folder, **options), train_dataset=RandomText())


def governed_trainer(
    governed: GovernedTraining, model: torch.nn.Module, folder: Any, *others: Any, **options: Any
) -> Trainer:
    args = arguments(folder, **options)
    return Trainer(
        model,
        args,
        train_dataset=RandomText(),
        eval_dataset=RandomText(8),
        callbacks=[*others, governed.callback()],
        optimizers=governed.optimizers(model, args),
    )


def small(**changes: Any) -> GovernedTraining:
    """With short windows."""
    settings: dict[str, Any] = {
        "governors": NEVER,
        "hierarchy": HierarchySettings(warmup_steps=2, patience_fraction=0.25),
        "budget": BudgetSettings(eval_window=2),
        "count_flops": False,
    }
    return GovernedTraining(**{**settings, **changes})


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
