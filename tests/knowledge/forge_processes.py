"""Run by `test_forge_processes.py` in processes of their own: one forge, its result to a file."""

from __future__ import annotations

import json
import sys

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gravity_hf.knowledge.encoding import EncodingConfig
from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.forge import Forge, Validation
from gravity_hf.knowledge.registry import Registry
from gravity_hf.knowledge.store import BeliefStore


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{folder}/model")
    model = LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    assert isinstance(model.config, LlamaConfig)
    with open(f"{folder}/facts.json") as file:
        facts = [Fact.from_row(row) for row in json.load(file)]
    path = f"{folder}/kb-{accelerator.num_processes}"
    if accelerator.is_main_process:
        BeliefStore.create(path, model, tokenizer)
    accelerator.wait_for_everyone()
    registry = Registry(
        BeliefStore.open(path, model, tokenizer), 0.9, leakage_max=1e9, generic_max=1e9
    )
    forge = Forge(
        *(model, tokenizer, registry),
        rank=1,
        layers="all",
        facts_per_delta=1,
        steps=2,
        validation=Validation(0.0, 100.0),
        encoding=EncodingConfig(
            budget_fraction=0.5, generic_prompts=0, own_wordings=0, own_neighbours=0, locality=3.0
        ),
        round_size=3,
        accelerator=accelerator,
    )
    result = forge.run(facts, "t", progress=False)
    assert [forged.id for forged in result.deltas] == registry.ids
    assert {registry.store.get(forged.key).id for forged in result.deltas} == set(registry.ids)
    told = {
        forged.key: [[x.tolist() for x in pair] for pair in forged.delta.factors.values()]
        for forged in result.deltas
    }
    place = f"{folder}/result-{accelerator.num_processes}-{accelerator.process_index}.json"
    with open(place, "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    main(sys.argv[1])
