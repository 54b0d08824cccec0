"""lm-evaluation-harness measures gravity models, by its own command and offline."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.commands import run
from ecosystem.folders import byte_decoder, byte_host, calibrated, saved_decoder
from hosts import logits, tiny_host, tiny_inputs

from gravity_hf import (
    LeanFormerConfig,
    LeanFormerForCausalLM,
    LGTConfig,
    LGTForCausalLM,
    gravity_lora,
    load_gravity_model,
    unpatch_gravity,
)
from gravity_hf.cli.lm_eval import _with_model
from gravity_hf.training.tokenizers import byte_tokenizer

pytest.importorskip("lm_eval")
pytest.importorskip("requests")

QUESTIONS = [
    {"question": "The apple", "choices": ["falls", "sings"], "answer": 0},
    {"question": "The moon", "choices": ["falls too", "is green"], "answer": 0},
    {"question": "The tree", "choices": ["stands", "runs"], "answer": 1},
]
TASK = """
task: falls
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task of three questions."""
    place = tmp_path_factory.mktemp("tasks")
    file = place / "falls.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (place / "falls.yaml").write_text(TASK.format(file=file))
    return place


def log_likelihood(model: torch.nn.Module, question: str, choice: str) -> float:
    """Of the choice's bytes after the question, from the model's logits."""
    ids = torch.tensor([byte_tokenizer()(f"{question} {choice}")["input_ids"]])
    of_next = logits(model, {"input_ids": ids})[0, :-1].log_softmax(-1)
    taken = of_next.gather(1, ids[0, 1:, None])[:, 0]
    return taken[len(question) - 1 :].sum().item()


def test_the_command_s_scores_are_those_of_the_model_s_own_logits(
    folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    where = ("--tasks", "falls", "--include_path", tasks, "--output_path", tmp_path / "out")
    how = ("--device", "cpu", "--log_samples")
    result = run("lm-eval", "--model_args", f"pretrained={folder}", *where, *how)
    assert result.exit_code == 0, result.output

    (report,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())
    assert results["config"]["model"] == "gravity-hf"
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    scored = [json.loads(line) for line in samples.read_text().splitlines()]
    model = load_gravity_model(folder)
    right = 0
    for sample, doc in zip(scored, QUESTIONS, strict=True):
        assert sample["doc"] == doc
        got = [float(response[0]) for response in sample["filtered_resps"]]
        own = [log_likelihood(model, doc["question"], choice) for choice in doc["choices"]]
        assert got == pytest.approx(own, rel=1e-4)
        right += own.index(max(own)) == doc["answer"]
    assert results["results"]["falls"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    # The host without gravity would have scored otherwise.
    host = log_likelihood(unpatch_gravity(model), QUESTIONS[0]["question"], "falls")
    assert abs(host - float(scored[0]["filtered_resps"][0][0])) > 1e-2


def test_an_lgt_is_measured_by_its_own_logits(tmp_path: Path) -> None:
    from gravity_hf.training.lm_evaluation import GravityLM

    model = lgt()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    measured = GravityLM(pretrained=str(tmp_path), device="cpu")
    assert measured.max_length == 32
    # The second text is longer than the model, and loses its beginning.
    for question in ("The apple", "The apple on the very long branch"):
        (found,) = measured.loglikelihood([request(question, " falls")])
        ids = torch.tensor([byte_tokenizer()(f"{question} falls")["input_ids"][-33:]])
        of_next = logits(model, {"input_ids": ids[:, :-1]})[0].log_softmax(-1)
        taken = of_next.gather(1, ids[0, 1:, None])[-len(" falls") :]
        assert found[0] == pytest.approx(taken.sum().item(), rel=1e-4)
    assert isinstance(GravityLM(model, tokenizer=byte_tokenizer(), device="cpu").model, type(model))


def request(question: str, choice: str) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", doc={}, arguments=(question, choice), idx=0)


def lgt(**settings: Any) -> LGTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    places = {"dim_position": 4, "max_position_embeddings": 32}
    return LGTForCausalLM(LGTConfig(vocab_size=256, **(sizes | places | settings))).eval()


def lean(**settings: Any) -> LeanFormerForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    inner = {"intermediate_size": 32, "attention_rank": 4, "feed_forward_rank": 4, "gate_rank": 2}
    keys = {"attention_top_k": 8, "local_window": 4, "sink_tokens": 1, "feed_forward_block": 8}
    places = {"screen_dim": 4, "max_position_embeddings": 32, "min_depth": 1}
    settings = sizes | inner | keys | places | settings
    return LeanFormerForCausalLM(LeanFormerConfig(vocab_size=256, **settings)).eval()


@pytest.mark.parametrize("attention", ["dot_product", "gravity"])
def test_a_leanformer_is_measured_by_its_own_logits(attention: str, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from gravity_hf.training.lm_evaluation import GravityLM

    model = lean(attention=attention)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([byte_tokenizer()("The apple on its branch falls")["input_ids"]])
    of_next = logits(model, {"input_ids": ids[:, :-1]})[0].log_softmax(-1)
    expected = of_next.gather(1, ids[0, 1:, None])[-len(" falls") :].sum().item()
    # Its keys are few here: with all of them the number would be another.
    dense = lean(attention=attention, attention_top_k=32)
    dense.load_state_dict(model.state_dict())
    of_next = logits(dense, {"input_ids": ids[:, :-1]})[0].log_softmax(-1)
    assert abs(of_next.gather(1, ids[0, 1:, None])[-6:].sum().item() - expected) > 1e-4
    for measured in (
        GravityLM(pretrained=str(tmp_path), device="cpu"),
        HFLM(pretrained=str(tmp_path), device="cpu"),
        HFLM(pretrained=model, tokenizer=byte_tokenizer(), device="cpu"),
    ):
        (found,) = measured.loglikelihood([request("The apple on its branch", " falls")])
        assert found[0] == pytest.approx(expected, rel=1e-4)


def test_own_models_that_continue_no_text_are_refused(tmp_path: Path) -> None:
    from gravity_hf.training.lm_evaluation import GravityLM

    ahead = lgt(is_causal=False)
    ahead.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for given in (str(tmp_path), ahead):
        with pytest.raises(ValueError, match="is_causal=False"):
            GravityLM(given, tokenizer=byte_tokenizer(), device="cpu")


def test_an_adapter_s_folder_is_measured_with_its_base_and_its_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    from gravity_hf.training.lm_evaluation import GravityLM

    adapted = gravity_lora(load_gravity_model(folder))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path)
    measured = GravityLM(pretrained=str(tmp_path), device="cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = logits(adapted.eval(), {"input_ids": ids})
    torch.testing.assert_close(measured._model_call(ids), expected)
    assert measured.tok_encode("ab") == [97, 98]


def test_a_plain_host_is_refused_from_a_folder_and_as_an_object(tmp_path: Path) -> None:
    from gravity_hf.training.lm_evaluation import GravityLM

    byte_host().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for given in (str(tmp_path), byte_host()):
        with pytest.raises(ValueError, match="expected a gravity model"):
            GravityLM(pretrained=given, tokenizer=byte_tokenizer(), device="cpu")


def test_an_encoder_is_refused_because_its_logits_predict_no_next_token(tmp_path: Path) -> None:
    from gravity_hf.training.lm_evaluation import GravityLM

    calibrated(tiny_host("bert"), tiny_inputs("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="writes text"):
        GravityLM(pretrained=str(tmp_path), tokenizer=byte_tokenizer(), device="cpu")


@pytest.mark.parametrize("option", ["peft", "delta", "gguf_file", "autogptq"])
def test_other_ways_of_loading_weights_are_refused(option: str) -> None:
    from gravity_hf.training.lm_evaluation import GravityLM

    with pytest.raises(ValueError, match=f"expected no {option}"):
        GravityLM(pretrained=byte_decoder(), **{option: "somewhere"})


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        (["--tasks", "a"], ["run", "--model", "gravity-hf", "--tasks", "a"]),
        (["run", "--tasks", "a"], ["run", "--model", "gravity-hf", "--tasks", "a"]),
        (["--model", "hf", "--tasks", "a"], ["--model", "hf", "--tasks", "a"]),
        (["run", "--config", "c.yaml"], ["run", "--config", "c.yaml"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["-h"], ["-h"]),
    ],
)
def test_a_run_without_a_model_is_gravity_s_and_all_else_is_passed_on(
    given: list[str], passed_on: list[str]
) -> None:
    assert _with_model(given, "gravity-hf") == passed_on


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str, *args: Any) -> Any:
        return None if name == "lm_eval" else real(name, *args)

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", find)
    result = run("lm-eval", "--tasks", "falls")
    assert result.exit_code == 2
    assert "pip install lm-eval" in result.output
