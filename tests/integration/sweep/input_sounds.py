"""Inputs of model types that hear or speak, where the general rules do not find them."""

from __future__ import annotations

from typing import Any

import torch
from integration.sweep.input_scene import BATCH, LENGTH, Scene

Inputs = dict[str, Any]


def clap(scene: Scene) -> Inputs:
    bins = scene.number("num_mel_bins", room="audio")
    frames = scene.number("spec_size", room="audio") * 4
    longer = torch.zeros(BATCH, 1, dtype=torch.bool)
    made = {"input_features": scene.normal(BATCH, 1, frames, bins), "is_longer": longer}
    words = {"input_ids": scene.tokens(BATCH, LENGTH)} if "input_ids" in scene.accepts else {}
    return {**made, **words}


def csm(scene: Scene) -> Inputs:
    # The labels make the depth decoder run; codes in place of text keep the text from the codec.
    books = scene.number("num_codebooks")
    codes = scene.tokens(BATCH, LENGTH, books, vocabulary=scene.number("vocab_size") - 2)
    mask = scene.ones(BATCH, LENGTH)
    return {"input_ids": codes, "attention_mask": mask, "labels": codes}


def channels_of_tokens(scene: Scene) -> Inputs:
    channels = scene.number("num_channels")
    return {
        "input_ids": scene.tokens(BATCH, LENGTH, channels, vocabulary=scene.number("vocab_size")),
        "encoder_hidden_states": scene.normal(BATCH, 5, scene.number("cross_hidden_size")),
    }


def musicgen_decoder(scene: Scene) -> Inputs:
    books = scene.number("num_codebooks")
    ids = scene.tokens(BATCH * books, LENGTH, vocabulary=scene.number("vocab_size"))
    states = scene.normal(BATCH, 5, scene.number("hidden_size"))
    return {"input_ids": ids, "encoder_hidden_states": states}


def musicgen(scene: Scene) -> Inputs:
    books = scene.config.decoder.num_codebooks
    text = {"input_ids": scene.tokens(BATCH, LENGTH), "attention_mask": scene.ones(BATCH, LENGTH)}
    codes = scene.tokens(BATCH * books, LENGTH, vocabulary=scene.config.decoder.vocab_size)
    made: Inputs = {**text, "decoder_input_ids": codes}
    if "input_features" in scene.accepts:
        made["input_features"] = scene.normal(BATCH, 8, scene.config.num_chroma)
    return made


def talker(scene: Scene) -> Inputs:
    ids = scene.tokens(BATCH, LENGTH)
    return {
        "input_ids": ids,
        "thinker_reply_part": scene.normal(BATCH, 1, scene.number("embedding_size")),
    }


def code_predictor(scene: Scene) -> Inputs:
    return {"inputs_embeds": scene.normal(BATCH, 3, scene.number("hidden_size"))}


def dit(scene: Scene) -> Inputs:
    mel, codes = scene.number("mel_dim"), scene.number("num_embeds")
    frames = 4 * scene.number("repeats", default=2)
    return {
        "hidden_states": scene.normal(BATCH, frames, mel),
        "condition_vector": scene.normal(BATCH, frames, mel),
        "speaker_embedding": scene.normal(BATCH, frames, scene.number("enc_emb_dim")),
        "quantized_code": scene.tokens(BATCH, 4, vocabulary=codes),
        "time_step": torch.tensor(0.5),
    }


def moshi_depth(scene: Scene) -> Inputs:
    length = min(LENGTH, scene.number("num_codebooks"))
    ids = scene.tokens(BATCH, length, vocabulary=scene.number("audio_vocab_size", "vocab_size"))
    return {"input_ids": ids, "last_hidden_state": scene.normal(BATCH, length, _input_size(scene))}


def _input_size(scene: Scene) -> int:
    return scene.number("input_size", "hidden_size")


def neucodec(scene: Scene) -> Inputs:
    bins = scene.number("feature_projection_input_dim", room="semantic")
    return {
        "input_values": scene.normal(BATCH, 1, 8 * 320),
        "input_features": scene.normal(BATCH, 8, bins),
    }


def phi4_audio(scene: Scene) -> Inputs:
    frames = scene.normal(BATCH, 64, scene.number("input_size"))
    return {"hidden_states": frames, "mask": scene.ones(BATCH, 64).bool()}


def qwen2_audio(scene: Scene) -> Inputs:
    audio = scene.config.audio_config
    frames = 2 * audio.max_source_positions
    count = ((frames - 1) // 2 - 1) // 2 + 1
    ids = scene.tokens(BATCH, LENGTH + count)
    ids[:, 4 : 4 + count] = scene.config.audio_token_id
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": scene.normal(BATCH, audio.num_mel_bins, frames),
        "feature_attention_mask": scene.ones(BATCH, frames),
    }


def voxtral_text(scene: Scene) -> Inputs:
    condition = scene.normal(BATCH, 1, scene.number("hidden_size"))
    return {"input_ids": scene.tokens(BATCH, LENGTH), "t_cond": condition}


def voxtral_realtime(scene: Scene) -> Inputs:
    """Eight frames of sound under each token: the two are added, not put in a row."""
    bins = scene.number("num_mel_bins", room="audio")
    ids = scene.tokens(BATCH, LENGTH)
    return {"input_ids": ids, "input_features": scene.normal(BATCH, bins, 8 * LENGTH)}
