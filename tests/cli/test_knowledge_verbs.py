"""The verbs about beliefs, one after the other, as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli.commands import run
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import Result

from gravity_hf.knowledge.fact_metrics import evaluate_facts
from gravity_hf.knowledge.facts import Fact, load_facts, write_facts
from gravity_hf.knowledge.store import BeliefStore
from gravity_hf.training.tokenizers import byte_tokenizer

PROMPT, KEY = "The capital of Varnholt is", "geo/varnholt"
SIZES = ("--learning-rate", 0.1, "--layers", "all", "--rank", 1, "--budget", 0.01)
LEARNS, QUICK = ("--steps", 80, *SIZES), ("--steps", 5, *SIZES)
CPU = ("--device", "cpu")
NAMES = ("Aa", "Bb", "Cc", "Dd", "Ee", "Ff")


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fact(name: str) -> Fact:
    others = [x for x in NAMES if x != name]
    return Fact(
        id=f"town/river/{name}",
        domain="town",
        relation="river",
        subject=name,
        prompt=f"{name} lies on",
        answer=f"{name[0]}o",
        paraphrases=(f"Ships to {name} go up", f"Water of {name}:", f"By {name} runs"),
        unrelated=tuple(f"{name} and {x} are" for x in others[:3]),
        source="made up",
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random byte-level Llama."""
    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=256, initializer_range=0.2, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "towns.jsonl"
    write_facts([fact(name) for name in NAMES], path)
    return path


@pytest.fixture(scope="module")
def taught(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one belief."""
    folder = tmp_path_factory.mktemp("taught") / "kb"
    ok("beliefs", "create", model, folder, *LEARNS)
    ok("beliefs", "add", model, folder, PROMPT, "Os", "--key", KEY)
    return folder


@pytest.fixture(scope="module")
def town(model: Path, bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a bank."""
    folder = tmp_path_factory.mktemp("town") / "kb"
    ok("beliefs", "create", model, folder, *QUICK)
    added = ok("beliefs", "add-bank", model, folder, bank)
    assert "6 beliefs:" in added.output
    return folder


@pytest.fixture
def kb(taught: Path, tmp_path: Path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(taught, tmp_path / "kb"))


def listed(folder: Path) -> dict[str, dict]:
    lines = ok("beliefs", "list", folder, "--json").stdout.splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def test_a_fact_is_taught_listed_and_answered(model: Path, kb: Path) -> None:
    before = (model / "model.safetensors").read_bytes()
    row = listed(kb)[KEY]
    assert (row["version"], row["fact"]["answer"]) == (1, "Os")
    assert "Os" in ok("beliefs", "list", kb).output
    asked = ok("beliefs", "ask", model, kb, PROMPT, "--use", KEY, "--compare", *CPU)
    assert asked.stdout.startswith(f"{PROMPT} Os")
    assert f"from {KEY} v1" in asked.output
    assert "without beliefs:" in asked.output
    assert "Os" not in asked.output.split("without beliefs:")[1]
    assert (model / "model.safetensors").read_bytes() == before


def test_versions_follow_each_other_and_come_back(model: Path, kb: Path) -> None:
    ok("beliefs", "update", model, kb, KEY, "Ta")
    assert listed(kb)[KEY]["fact"]["answer"] == "Ta"
    ok("beliefs", "rollback", model, kb, KEY, 1)
    assert (listed(kb)[KEY]["version"], listed(kb)[KEY]["fact"]["answer"]) == (3, "Os")
    ok("beliefs", "remove", model, kb, KEY)
    assert listed(kb) == {}
    told = ok("beliefs", "history", kb, KEY).output
    assert [told.count(x) for x in ("superseded", "removed", "Ta")] == [2, 1, 1]
    ok("beliefs", "rollback", model, kb, KEY, 2)
    ok("beliefs", "remove", model, kb, KEY, "--purge")
    assert ok("beliefs", "history", kb, KEY).output.count("purged") == 4
    assert not list((kb / "deltas").iterdir())


def test_removing_is_all_or_nothing(model: Path, kb: Path) -> None:
    refused = run("beliefs", "remove", model, kb, KEY, "geo/nowhere")
    assert refused.exit_code == 2
    assert "geo/nowhere" in refused.output
    assert KEY in listed(kb)


def test_verify_names_the_tensor_that_was_changed(model: Path, kb: Path, tmp_path: Path) -> None:
    assert "as it was" in ok("beliefs", "verify", model, kb).output
    other = Path(shutil.copytree(model, tmp_path / "model"))
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    changed = run("beliefs", "verify", other, kb)
    assert changed.exit_code == 1
    assert "model." in changed.output
    assert run("beliefs", "ask", other, kb, PROMPT, "--use", KEY).exit_code == 2
    (delta,) = (kb / "deltas").iterdir()
    delta.write_bytes(delta.read_bytes()[:-1] + b"x")
    changed = run("beliefs", "verify", model, kb)
    assert changed.exit_code == 1
    assert delta.name in changed.output


def test_a_bank_is_taught_once(model: Path, town: Path, bank: Path) -> None:
    assert sorted(listed(town)) == [x.id for x in load_facts(bank)]
    again = ok("beliefs", "add-bank", model, town, bank, "--limit", 3)
    assert "3 facts left out: there already" in again.output
    assert "nothing to add" in again.output


def test_what_the_model_knows_can_be_left_out(model: Path, bank: Path, tmp_path: Path) -> None:
    kb = tmp_path / "kb"
    ok("beliefs", "create", model, kb, *QUICK)
    ok("beliefs", "add-bank", model, kb, bank, "--limit", 1, "--only-unknown")
    assert len(listed(kb)) == 1
    # What the model says by itself, as a fact.
    said = ok("beliefs", "ask", model, kb, "Aa lies on", "--threshold", 2, "--max-new-tokens", 1)
    assert "no belief is about this" in said.output


def test_asking_finds_the_beliefs_by_itself(model: Path, town: Path, tmp_path: Path) -> None:
    kb = Path(shutil.copytree(town, tmp_path / "kb"))
    made = ok("beliefs", "calibrate", model, kb)
    assert "similarity of" in made.output
    assert (kb / "calibration.json").is_file()
    asked = ok("beliefs", "ask", model, kb, "Aa lies on", "--threshold", -1)
    assert "from town/river/" in asked.output


def test_too_few_facts_to_route_is_said(model: Path, kb: Path) -> None:
    refused = run("beliefs", "ask", model, kb, PROMPT)
    assert refused.exit_code == 2
    assert "--use" in refused.output


def test_a_belief_goes_out_to_peft_and_comes_back(model: Path, kb: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ok("beliefs", "export", model, kb, KEY, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert run("beliefs", "import", model, kb, tmp_path / "adapter").exit_code == 2
    ok("beliefs", "import", model, kb, tmp_path / "adapter", "--key", "copy")
    asked = ok("beliefs", "ask", model, kb, PROMPT, "--use", "copy")
    assert asked.stdout.startswith(f"{PROMPT} Os")


def test_a_published_delta_comes_in(model: Path, kb: Path, tmp_path: Path) -> None:
    factors = {"layer_0_down_proj": (torch.randn(64, 1), torch.randn(1, 32))}
    torch.save({"layer_deltas": factors}, tmp_path / "old.pt")
    told = ok("beliefs", "convert-delta", model, kb, tmp_path / "old.pt", "--key", "old")
    assert "96 parameters" in told.output
    assert listed(kb)["old"]["fact"] is None
    assert "a delta without a fact" in ok("beliefs", "list", kb).output


def test_fewer_bits_are_the_next_version(model: Path, kb: Path) -> None:
    told = ok("beliefs", "quantize", model, kb, KEY, "--tier", 1)
    assert KEY in told.output
    assert listed(kb)[KEY]["version"] == 2
    assert ok("beliefs", "ask", model, kb, PROMPT, "--use", KEY).stdout.startswith(f"{PROMPT} Os")


def test_a_merge_can_be_tried(model: Path, town: Path) -> None:
    before = listed(town)
    told = ok("beliefs", "consolidate", model, town, "--domain", "town", "--dry-run")
    assert "not merged 6 beliefs" in told.output
    assert listed(town) == before


def test_forge_keeps_what_passes_and_names_what_does_not(
    model: Path, bank: Path, tmp_path: Path
) -> None:
    kb = tmp_path / "kb"
    ok("beliefs", "create", model, kb, *QUICK)
    bars = ("--min-top1", 0, "--max-kl", 1000)
    options = ("--per-delta", 6, "--rank", 1, "--results", tmp_path / "results.json")
    told = ok("forge", model, kb, bank, *options, *bars)
    assert "6 of 6 facts in 1 deltas" in told.output
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["deltas"]) == 1
    assert sorted(listed(kb)) == sorted(x["key"] for x in content["deltas"])

    again = ("--domain", "again", "--limit", 2, "--rank", 1)
    strict = run("forge", model, kb, bank, *again, "--min-top1", 1, "--max-kl", 0)
    assert strict.exit_code == 0, strict.output
    assert "rejected 2 facts" in strict.output


def test_facts_are_checked_and_converted(model: Path, bank: Path, tmp_path: Path) -> None:
    assert "general" in ok("facts", "list").output
    assert "6 facts of 1 relations" in ok("facts", "check", bank, "--model", model).output
    rows = {"a": [{"prompt": f"{x} is the river", "target": f" {x}o"} for x in NAMES]}
    (tmp_path / "old.json").write_text(json.dumps(rows))
    out = tmp_path / "new.jsonl"
    assert (
        "wrote 6 facts"
        in ok("facts", "convert", tmp_path / "old.json", out, "--domain", "d").output
    )
    assert len(load_facts(out)) == 6
    assert run("facts", "convert", tmp_path / "old.json", out, "--domain", "d").exit_code == 2
    bank_text = bank.read_text().replace('"Ao"', '""', 1)
    (tmp_path / "bad.jsonl").write_text(bank_text)
    bad = run("facts", "check", tmp_path / "bad.jsonl")
    assert bad.exit_code == 2
    assert "town/river/Aa" in bad.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("beliefs", "add", "nowhere", "none", "a", "b"), "beliefs create"),
        (("beliefs", "create", "nowhere", "new"), "config.json"),
        (("beliefs", "create", "{model}", "new", "--layers", "some"), "--layers"),
        (("beliefs", "create", "{model}", "{kb}"), "empty folder"),
        (("beliefs", "create", "{model}", "new", "--dtype", "float8"), "--dtype"),
        (("beliefs", "add-bank", "{model}", "{kb}", "{bank}", "--relation", "x"), "one of river"),
        (("beliefs", "add", "{model}", "{kb}", PROMPT, "Os", "--key", KEY), "update"),
        (("beliefs", "rollback", "{model}", "{kb}", KEY, "7"), "versions [1]"),
        (("forge", "{model}", "{kb}", "{bank}", "--rank", "none"), "--rank"),
        (("forge", "{model}", "{kb}", "{bank}", "--text", "nowhere.txt"), "--text"),
        (("facts", "check", "nowhere.jsonl"), "one of the banks"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(
    arguments: tuple[str, ...],
    message: str,
    model: Path,
    bank: Path,
    kb: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = listed(kb)
    named = {"model": model, "kb": kb, "bank": bank}
    result = run(*(argument.format(**named) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert listed(kb) == before
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_a_store_written_here_opens_in_python(model: Path, kb: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model)
    store = BeliefStore.open(kb, base, AutoTokenizer.from_pretrained(model))
    belief = store.get(KEY)
    bank = store.compile_bank()
    (measured,) = evaluate_facts(
        base, store.tokenizer, [belief.fact], lambda rows: bank.routed([belief.id] * len(rows))
    )
    assert measured["exact"]
