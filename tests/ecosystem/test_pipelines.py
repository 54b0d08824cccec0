"""`pipeline(...)` and the Auto classes take gravity models, patched or saved, like any host."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from ecosystem.folders import WORDS, byte_decoder, calibrated, counted_calls, word_tokenizer
from hosts import tiny_host, tiny_inputs
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline
from transformers.models.auto import modeling_auto

from gravity_hf import gravity_status, patch_with_gravity
from gravity_hf.integration import hosts as gravity_hosts
from gravity_hf.training.tokenizers import byte_tokenizer


def pixel_processor() -> Any:
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    return kind(size={"height": 16, "width": 16})


def encoder(class_name: str) -> PreTrainedModel:
    """A tiny BERT for another task."""
    config = tiny_host("bert", num_labels=3).config
    model = getattr(transformers, class_name)(config).eval()
    return calibrated(model, tiny_inputs("bert", batch=4))


# task -> (the patched model, what reads its input, the input, options of the call)
TASKS: dict[str, tuple[Any, ...]] = {
    "text-generation": (
        byte_decoder,
        byte_tokenizer,
        "fall",
        {"max_new_tokens": 3, "do_sample": False},
    ),
    "fill-mask": (
        lambda: encoder("BertForMaskedLM"),
        word_tokenizer,
        "the [MASK] falls",
        {"targets": WORDS[:3]},
    ),
    "feature-extraction": (lambda: encoder("BertModel"), word_tokenizer, "the apple falls", {}),
    "text-classification": (
        lambda: encoder("BertForSequenceClassification"),
        word_tokenizer,
        "the moon falls",
        {"top_k": None},
    ),
    "image-classification": (
        lambda: calibrated(tiny_host("vit"), tiny_inputs("vit")),
        pixel_processor,
        "image",
        {"top_k": 5},
    ),
}


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What pipelines log: among other things that they do not support a class."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.pipelines.base")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def numbers(output: Any) -> list[Any]:
    """The leaves of a pipeline's output."""
    if isinstance(output, dict):
        output = list(output.values())
    return [x for item in output for x in numbers(item)] if isinstance(output, list) else [output]


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_gives_the_same_for_the_patched_model_and_the_saved_folder(
    task: str, complaints: list[str], tmp_path: Path
) -> None:
    make_model, make_reader, given, options = TASKS[task]
    model, reader = make_model(), make_reader()
    if given == "image":
        Image = pytest.importorskip("PIL.Image")
        pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        given = Image.fromarray(pixels)
    named = {"image_processor" if task.startswith("image") else "tokenizer": reader}
    with counted_calls(model) as calls:
        patched = pipeline(task, model=model, device="cpu", **named)(given, **options)
    assert len(set(calls)) == model.config.num_hidden_layers

    model.save_pretrained(tmp_path)
    reader.save_pretrained(tmp_path)
    from_folder = pipeline(task, model=str(tmp_path), device="cpu")
    assert type(from_folder.model) is type(model)
    loaded = from_folder(given, **options)
    for one, two in zip(numbers(patched), numbers(loaded), strict=True):
        assert one == (pytest.approx(two, abs=1e-5) if isinstance(two, float) else two)
    assert not [line for line in complaints if "not supported" in line]


def test_every_task_class_of_a_host_loads_a_saved_gravity_model(tmp_path: Path) -> None:
    encoder("BertForMaskedLM").save_pretrained(tmp_path)
    loaded = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        known = mapping is not None and transformers.BertConfig in mapping
        if name.startswith("AutoModel") and known:
            loaded[name] = auto.from_pretrained(tmp_path)
            host = mapping[transformers.BertConfig].__name__
            assert type(loaded[name]).__name__ == f"Gravity{host}"
            assert gravity_status(loaded[name]).patched, name
    assert len(loaded) >= 8


def test_where_an_auto_class_has_several_classes_for_a_host_all_of_them_are_gravity_s() -> None:
    """Once the host's own classes were registered there, and would have run as dot product."""
    config = gravity_hosts.gravity_config_class(transformers.FunnelConfig)
    names = [cls.__name__ for cls in modeling_auto.MODEL_MAPPING[config]]
    assert names == ["GravityFunnelModel", "GravityFunnelBaseModel"]


def test_text_written_by_a_pipeline_is_that_of_generate(tmp_path: Path) -> None:
    model, tokenizer = byte_decoder(), byte_tokenizer()
    how = {"max_new_tokens": 5, "do_sample": False}
    text = "apples fall"
    (said,) = pipeline("text-generation", model=model, tokenizer=tokenizer)(text, **how)
    ids = model.generate(**tokenizer(text, return_tensors="pt"), **how)
    assert said["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert isinstance(model, transformers.Qwen2ForCausalLM)
    assert type(model).__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert AutoModelForCausalLM._model_mapping[type(model.config)] is type(model)


def test_a_pipeline_complains_about_a_gravity_model_of_another_task(complaints: list[str]) -> None:
    pipeline("text-classification", model=byte_decoder(), tokenizer=byte_tokenizer(), device="cpu")
    assert any("GravityQwen2ForCausalLM" in line and "not supported" in line for line in complaints)


def test_a_speech_model_under_gravity_writes_its_text_and_is_not_read_as_ctc() -> None:
    """Once the pipeline, which knows such models by the name of their class, took it for CTC."""
    twos = (
        "encoder_layers",
        "decoder_layers",
        "encoder_attention_heads",
        "decoder_attention_heads",
    )
    config = transformers.WhisperConfig(
        vocab_size=256,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **dict.fromkeys(twos, 2),
    )
    model = patch_with_gravity(transformers.WhisperForConditionalGeneration(config).eval())
    hearing = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    readers = {"feature_extractor": hearing, "tokenizer": byte_tokenizer()}
    listener = pipeline("automatic-speech-recognition", model=model, device="cpu", **readers)
    assert listener.type == "seq2seq"
    sound = np.random.default_rng(0).normal(size=16000).astype("float32")
    with counted_calls(model) as calls:
        heard = listener(sound, generate_kwargs={"max_new_tokens": 3, "num_beams": 1})
    assert len(set(calls)) == 6  # encoder, decoder and cross attention of two layers each
    features = hearing(sound, sampling_rate=16000, return_tensors="pt")["input_features"]
    ids = model.generate(features, max_new_tokens=3, num_beams=1)
    assert heard["text"] == byte_tokenizer().decode(ids[0], skip_special_tokens=True)
