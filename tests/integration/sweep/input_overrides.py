"""Model types whose inputs cannot be read off their config, one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from integration.sweep import input_pictures, input_sounds
from integration.sweep.input_scene import BATCH, LENGTH, Scene

Inputs = dict[str, Any]


def _decision_transformer(scene: Scene) -> Inputs:
    return {
        "states": scene.normal(BATCH, LENGTH, scene.number("state_dim")),
        "actions": scene.normal(BATCH, LENGTH, scene.number("act_dim")),
        "rewards": scene.normal(BATCH, LENGTH, 1),
        "returns_to_go": scene.normal(BATCH, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).expand(BATCH, -1),
        "attention_mask": scene.ones(BATCH, LENGTH),
    }


def _blt_local_encoder(scene: Scene) -> Inputs:
    patches = torch.arange(LENGTH).div(3, rounding_mode="floor").expand(BATCH, -1)
    return {"input_ids": scene.tokens(BATCH, LENGTH), "num_patches": 3, "patch_ids": patches}


def _blt_local_decoder(scene: Scene) -> Inputs:
    width = scene.number("hidden_size_global", "hidden_size")
    return {
        "inputs_embeds": scene.normal(BATCH, LENGTH, scene.number("hidden_size")),
        "patch_embeds": scene.normal(BATCH, 3, width),
    }


def _jev(scene: Scene) -> Inputs:
    return {
        "input_ids": scene.tokens(1, LENGTH),
        "marks": torch.tensor([[4, LENGTH]]),
        "num_options": torch.tensor([[1, 1]]),
        "question_type_ids": torch.tensor([[0, 1]]),
    }


def _gemma4_assistant(scene: Scene) -> Inputs:
    """One state, beside the keys and values of the model that it assists, of each kind of layer."""
    layers = [layer.self_attn for layer in scene.model.model.layers]
    heads = scene.number("num_attention_heads", room="text")
    shared = {}
    for layer in layers:
        shape = (BATCH, heads // layer.num_key_value_groups, LENGTH, layer.head_dim)
        shared[layer.layer_type] = scene.normal(*shape), scene.normal(*shape)
    width = 2 * scene.number("backbone_hidden_size")
    return {"inputs_embeds": scene.normal(BATCH, 1, width), "shared_kv_states": shared}


def _muse_glimmer_assistant(scene: Scene) -> Inputs:
    """States of the model that it assists, then the block to denoise, which sees all of them."""
    width, sources = scene.number("hidden_size"), len(scene.config.target_layer_ids)
    return {
        "noise_embeds": scene.normal(BATCH, 4, width),
        "context_hidden_states": scene.normal(BATCH, LENGTH, sources * width),
        # Made by hand: the model's own mask counts the states only where a cache announces them.
        "attention_mask": torch.zeros(BATCH, 1, 4, LENGTH + 4),
    }


def _xmod(scene: Scene) -> Inputs:
    ids = scene.tokens(BATCH, LENGTH)
    languages = torch.zeros(BATCH, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "lang_ids": languages}


def _rag(scene: Scene) -> Inputs:
    documents = scene.number("n_docs")
    context = scene.tokens(BATCH * documents, LENGTH)
    return {
        "input_ids": scene.tokens(BATCH, LENGTH),
        "decoder_input_ids": scene.tokens(BATCH, LENGTH),
        "context_input_ids": context,
        "context_attention_mask": torch.ones_like(context),
        "doc_scores": scene.normal(BATCH, documents),
    }


# model type -> what it takes in place of what the general rules make.
OVERRIDES: dict[str, Callable[[Scene], Inputs]] = {
    "blt_local_decoder": _blt_local_decoder,
    "blt_local_encoder": _blt_local_encoder,
    "clap": input_sounds.clap,
    "clap_audio_model": input_sounds.clap,
    "colqwen2": input_pictures.colqwen2,
    "csm": input_sounds.csm,
    "decision_transformer": _decision_transformer,
    "depth_pro": input_pictures.larger,
    "dia_decoder": input_sounds.channels_of_tokens,
    "diffusion_gemma": input_pictures.diffusion_gemma,
    "efficientloftr": input_pictures.pair,
    "florence_vision": input_pictures.image_as_states,
    "gemma4_assistant": _gemma4_assistant,
    "gemma4_unified_assistant": _gemma4_assistant,
    "glm_image": input_pictures.glm_image,
    "jev": _jev,
    "molmo2": input_pictures.molmo2,
    "molmo2_adapter": input_pictures.molmo2_adapter,
    "moshi_depth": input_sounds.moshi_depth,
    "muse_glimmer_assistant": _muse_glimmer_assistant,
    "musicgen": input_sounds.musicgen,
    "musicgen_decoder": input_sounds.musicgen_decoder,
    "musicgen_melody": input_sounds.musicgen,
    "musicgen_melody_decoder": input_sounds.musicgen_decoder,
    "neucodec": input_sounds.neucodec,
    "omdet-turbo": input_pictures.omdet,
    "oneformer": input_pictures.oneformer,
    "phi4_multimodal": input_pictures.phi4_multimodal,
    "phi4_multimodal_audio": input_sounds.phi4_audio,
    "pi0": input_pictures.pi0,
    "pp_ocrv5_mobile_rec": input_pictures.tall_strip,
    "qwen2_5_omni_dit": input_sounds.dit,
    "qwen2_5_omni_talker": input_sounds.talker,
    "qwen2_audio": input_sounds.qwen2_audio,
    "qwen3_omni_moe_talker_code_predictor": input_sounds.code_predictor,
    "rag": _rag,
    "sam3": input_pictures.boxed_image,
    "sam3_detr_decoder": input_pictures.sam3_decoder,
    "sam3_detr_encoder": input_pictures.sam3_encoder,
    "sam3_lite_text": input_pictures.boxed_image,
    "sam3_lite_text_detr_decoder": input_pictures.sam3_decoder,
    "sam3_lite_text_detr_encoder": input_pictures.sam3_encoder,
    "sam3_lite_text_mask_decoder": input_pictures.sam3_masks,
    "sam3_mask_decoder": input_pictures.sam3_masks,
    "segformer": input_pictures.large,
    "unlimited_ocr_vision_encoder": input_pictures.ocr_patches,
    "voxtral_realtime": input_sounds.voxtral_realtime,
    "voxtral_realtime_text": input_sounds.voxtral_text,
    "xclip_vision_model": input_pictures.xclip_vision,
    "xcodec2": input_sounds.neucodec,
    "xmod": _xmod,
}


def override_of(scene: Scene) -> Inputs | None:
    """The inputs of an overridden model type; None for every other type."""
    make = OVERRIDES.get(scene.config.model_type)
    return None if make is None else make(scene)
