"""Run as a process in which gravity_hf cannot be imported: everything that might run an export with
dot products is tried, and what came of it is printed as JSON, name -> [error or "ran", words]."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

RAN = "ran"
# Attention that a caller may ask for.
NAMES = ("sdpa", "eager", "flash_attention_2", "runtime")
IDS = torch.tensor([[5, 6, 7, 8]])


def foreign_attention(
    module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> Any:
    """What a runtime registers under a name of its own."""
    raise SystemExit("a runtime's own attention was called on a gravity model")


class Attempts(dict[str, list[str]]):
    def add(self, name: str, attempt: Callable[[], Any]) -> Any:
        try:
            result = attempt()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
            self[name] = [type(error).__name__, str(error)]
            return None
        self[name] = [RAN, type(result).__name__]
        return result


def try_models(attempts: Attempts, folders: dict[str, Path]) -> None:
    model, tower = folders["model"], folders["towers"]
    host = transformers.Qwen2ForCausalLM
    untrusting = {"trust_remote_code": False}
    attempts.add("auto config", lambda: AutoConfig.from_pretrained(model, **untrusting))
    attempts.add("auto class", lambda: AutoModelForCausalLM.from_pretrained(model, **untrusting))
    attempts.add(
        "auto class, no code", lambda: AutoModelForCausalLM.from_pretrained(folders["bare"])
    )
    attempts.add("host's class", lambda: host.from_pretrained(model))
    attempts.add("host's base class", lambda: transformers.Qwen2Model.from_pretrained(model))
    attempts.add(
        "host's config", lambda: host(transformers.Qwen2Config.from_pretrained(str(model)))
    )
    attempts.add("tower's class", lambda: transformers.CLIPVisionModel.from_pretrained(tower))
    attempts.add(
        "host's type in config.json",
        lambda: AutoModelForCausalLM.from_pretrained(folders["retyped"]),
    )
    attempts.add(
        "host's class, a config of its own",
        lambda: host.from_pretrained(
            model, config=transformers.Qwen2Config.from_pretrained(folders["base"])
        ),
    )
    attempts.add(
        "host's config under sdpa, no weights",
        lambda: host(transformers.Qwen2Config.from_pretrained(model, attn_implementation="sdpa")),
    )
    for name in NAMES:
        chosen = {"attn_implementation": name}
        try_named(attempts, "host's class", host, model, name)
        try_named(attempts, "host's base class", transformers.Qwen2Model, model, name)
        try_named(attempts, "tower's class", transformers.CLIPVisionModel, tower, name)
        try_named(attempts, "host's type in config.json", AutoModel, folders["retyped"], name)
        attempts.add(
            f"Auto class, host's config under {name}",
            lambda chosen=chosen: AutoModelForCausalLM.from_pretrained(
                model, config=transformers.Qwen2Config.from_pretrained(model, **chosen)
            ),
        )
        attempts.add(
            f"remote code under {name}",
            lambda chosen=chosen: AutoModelForCausalLM.from_pretrained(
                model, trust_remote_code=True, **chosen
            ),
        )


def try_named(attempts: Attempts, what: str, cls: Any, folder: Path, name: str) -> None:
    """`cls` told to run the attention `name`: by argument, and by the config that it is given."""
    chosen = {"attn_implementation": name}
    attempts.add(f"{what} under {name}", lambda: cls.from_pretrained(folder, **chosen))
    read = getattr(cls, "config_class", None) or AutoConfig
    attempts.add(
        f"{what}, config under {name}",
        lambda: cls.from_pretrained(folder, config=read.from_pretrained(folder, **chosen)),
    )


def try_remote_code(attempts: Attempts, folders: dict[str, Path]) -> None:
    """The code beside the weights, while it has gravity and after somebody took it away."""

    def named(folder: Path) -> Any:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config.get_text_config()._attn_implementation = "runtime"
        return AutoModel.from_config(config, trust_remote_code=True)

    attempts.add("name in the config", lambda: named(folders["model"]))
    attempts.add("name in the text part's config", lambda: named(folders["towers"]))
    model = AutoModelForCausalLM.from_pretrained(folders["model"], trust_remote_code=True).eval()
    attempts.add("remote code", lambda: model(IDS))
    attempts.add("remote code, towers", lambda: _towers(folders["towers"]))
    attempts.add(
        "remote code, older export",
        lambda: AutoModelForCausalLM.from_pretrained(folders["older"], trust_remote_code=True)(IDS),
    )
    model.save_pretrained(folders["again"])
    attempts.add(
        "host's class, saved again",
        lambda: transformers.Qwen2ForCausalLM.from_pretrained(folders["again"]),
    )
    for name in NAMES:
        try_named(
            attempts,
            "host's class, saved again",
            transformers.Qwen2ForCausalLM,
            folders["again"],
            name,
        )
    attempts.add("set_attn_implementation", lambda: model.set_attn_implementation("sdpa"))
    compiled = torch.compile(model, backend="eager")
    attempts.add("compiled", lambda: compiled(IDS))
    for name in ("sdpa", "eager", "runtime"):
        model.config._attn_implementation = name
        attempts.add(f"{name} written into the config", lambda: model(IDS))
        attempts.add(f"{name}, base model", lambda: model.model(IDS))
        attempts.add(f"{name}, compiled", lambda: compiled(IDS))
        attempts.add(f"{name}, generate", lambda: model.generate(IDS, max_new_tokens=1))


def _towers(folder: Path) -> Any:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return model(input_ids=IDS, pixel_values=torch.zeros(1, 3, 16, 16))


def try_adapters(attempts: Attempts, folders: dict[str, Path]) -> None:
    adapter, base = folders["adapter"], folders["base"]
    host = transformers.Qwen2ForCausalLM.from_pretrained(base)
    attempts.add("PeftConfig", lambda: peft.PeftConfig.from_pretrained(adapter))
    attempts.add("LoraConfig", lambda: peft.LoraConfig.from_pretrained(adapter))
    attempts.add("PeftModel", lambda: peft.PeftModel.from_pretrained(host, adapter))
    attempts.add("PeftMixedModel", lambda: peft.PeftMixedModel.from_pretrained(host, adapter))
    attempts.add("load_adapter", lambda: host.load_adapter(str(adapter)))
    attempts.add("Auto class on an adapter", lambda: AutoModelForCausalLM.from_pretrained(adapter))
    attempts.add(
        "AutoPeftModel", lambda: peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    )
    attempts.add("pipeline", lambda: transformers.pipeline("text-generation", model=str(adapter)))
    touched = [name for name, _ in host.named_modules() if "lora" in name]
    attempts["modules of the host that were touched"] = [RAN, str(len(touched))]


def main() -> None:
    sys.modules["gravity_hf"] = None
    transformers.AttentionInterface.register("runtime", foreign_attention)
    folders = {name: Path(path) for name, path in json.loads(sys.argv[1]).items()}
    attempts = Attempts()
    try_models(attempts, folders)
    try_adapters(attempts, folders)
    try_remote_code(attempts, folders)
    known = [name for name in transformers.CONFIG_MAPPING if name.startswith("gravity")]
    attempts["gravity types that transformers knows"] = [RAN, str(len(known))]
    sys.stdout.write("\n" + json.dumps(attempts))


if __name__ == "__main__":
    main()
