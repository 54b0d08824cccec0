"""What the tests of LGT training share: golden numbers, tiny models, random text, Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from gravity_hf.models.lgt import LGTConfig, LGTForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden" / "lgt"
VOCABULARY, LENGTH = 23, 8


def golden_numbers(case):
    return json.loads((GOLDEN / "training.json").read_text())[case]


def golden_tensors(prefix):
    tensors = load_file(GOLDEN / "training.safetensors")
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def tiny_lgt(**settings):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "dim_position": 8,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH,
    }  # fmt: skip
    return LGTForCausalLM(LGTConfig(**{**sizes, **settings}))


class RandomText(Dataset):
    def __init__(self, rows=32):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids}


def trainer_of(model, folder, *callbacks, kind=Trainer, extra=None, **options):
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", **options,
    }  # fmt: skip
    data = {"train_dataset": RandomText(), "eval_dataset": RandomText(8), **(extra or {})}
    args = TrainingArguments(folder, **arguments)
    return kind(model=model, args=args, callbacks=list(callbacks), **data)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
