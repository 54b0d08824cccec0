"""Inputs of model types that see, where the general rules do not find them."""

from __future__ import annotations

from typing import Any

import torch
from integration.sweep.input_scene import BATCH, LENGTH, Scene

Inputs = dict[str, Any]


def oneformer(scene: Scene) -> Inputs:
    length = scene.number("task_seq_len", default=77)
    tasks = scene.tokens(BATCH, length, vocabulary=scene.number("text_encoder_vocab_size"))
    return {"pixel_values": scene.normal(BATCH, 3, *scene.size()), "task_inputs": tasks}


def omdet(scene: Scene) -> Inputs:
    classes, tasks = scene.tokens(4, LENGTH), scene.tokens(BATCH, LENGTH)
    return {
        "pixel_values": scene.normal(BATCH, 3, *scene.size()),
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 2]),
    }


def sam3_encoder(scene: Scene) -> Inputs:
    width = scene.number("hidden_size")
    return {
        "vision_features": [scene.normal(BATCH, width, 4, 4)],
        "text_features": scene.normal(BATCH, 5, width),
        "vision_pos_embeds": [scene.normal(BATCH, width, 4, 4)],
    }


def sam3_decoder(scene: Scene) -> Inputs:
    width = scene.number("hidden_size")
    return {
        "vision_features": scene.normal(BATCH, 16, width),
        "text_features": scene.normal(BATCH, 5, width),
        "vision_pos_encoding": scene.normal(BATCH, 16, width),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


def sam3_masks(scene: Scene) -> Inputs:
    width = scene.number("hidden_size")
    sides = [4 * 2**n for n in range(scene.number("num_upsampling_stages", default=3))]
    return {
        "decoder_queries": scene.normal(BATCH, 6, width),
        "backbone_features": [scene.normal(BATCH, width, n, n) for n in reversed(sides)],
        "encoder_hidden_states": scene.normal(BATCH, 16, width),
        "prompt_features": scene.normal(BATCH, 5, width),
    }


def molmo2_adapter(scene: Scene) -> Inputs:
    return {
        "image_features": scene.normal(BATCH, 8, _first_in(scene)),
        "pooled_patches_idx": torch.arange(16).reshape(4, 4),
    }


def _first_in(scene: Scene) -> int:
    linear = next(m for m in scene.model.modules() if isinstance(m, torch.nn.Linear))
    return linear.in_features


def image_as_states(scene: Scene) -> Inputs:
    return {"hidden_states": scene.normal(BATCH, 3, *scene.size())}


def colqwen2(scene: Scene) -> Inputs:
    """Patches padded to one length for every row, unlike those of Qwen2-VL."""
    vision = scene.config.vlm_config.vision_config
    flat = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merge = vision.spatial_merge_size
    ids = scene.tokens(BATCH, LENGTH + 2)
    ids[:, 3:5] = scene.config.vlm_config.image_token_id
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": scene.normal(BATCH, 2 * merge * merge, flat),
        "image_grid_thw": torch.tensor([[1, 2 * merge, merge]] * BATCH),
    }


def glm_image(scene: Scene) -> Inputs:
    """A picture to read, then the grid of one to be made, in each row."""
    vision, config = scene.config.vision_config, scene.config
    ids = scene.tokens(BATCH, LENGTH + 4)
    ids[:, 3] = config.image_start_token_id
    ids[:, 4:8] = config.image_token_id
    ids[:, 8] = config.image_end_token_id
    ids[:, -1] = config.image_start_token_id
    flat = 3 * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": scene.normal(BATCH * 4, flat),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2 * BATCH),
        "images_per_sample": torch.tensor([2] * BATCH),
    }


def phi4_multimodal(scene: Scene) -> Inputs:
    """One picture of a global view and one tile, and one sound, in each row."""
    vision, audio = scene.config.vision_config, scene.config.audio_config
    side, patches = vision.image_size, vision.image_size // vision.patch_size
    base = (patches + patches % 2) // 2
    frames = 8 * audio.time_reduction
    sounds = frames // audio.time_reduction
    pictures = 2 * base * (base + 1) + 1
    parts = [
        scene.tokens(BATCH, 3),
        torch.full((BATCH, pictures), vision.image_token_id),
        torch.full((BATCH, sounds), audio.audio_token_id),
        scene.tokens(BATCH, 2),
    ]
    ids = torch.cat(parts, 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_pixel_values": scene.normal(BATCH, 2, 3, side, side),
        "image_sizes": torch.tensor([[vision.crop_size, vision.crop_size]] * BATCH),
        "image_attention_mask": scene.ones(BATCH, 2, patches, patches),
        "audio_input_features": scene.normal(BATCH, frames, audio.input_size),
        "audio_embed_sizes": torch.tensor([sounds] * BATCH),
    }


def pi0(scene: Scene) -> Inputs:
    vision, config = scene.config.vlm_config.vision_config, scene.config
    count = (vision.image_size // vision.patch_size) ** 2
    words = scene.tokens(BATCH, LENGTH)
    marks = torch.full((BATCH, count), config.vlm_config.image_token_id)
    ids = torch.cat([marks, words], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": scene.normal(BATCH, 1, 3, vision.image_size, vision.image_size),
        "pixel_attention_mask": scene.ones(BATCH, 1).bool(),
        "state": scene.normal(BATCH, config.max_state_dim),
        "noise": scene.normal(BATCH, config.chunk_size, config.max_action_dim),
        "timestep": torch.tensor([0.3, 0.6]),
    }


def xclip_vision(scene: Scene) -> Inputs:
    frames = BATCH * scene.number("num_frames")
    return {"pixel_values": scene.normal(frames, 3, *scene.size())}


def ocr_patches(scene: Scene) -> Inputs:
    return {"patch_embeds": scene.normal(BATCH, scene.number("hidden_size"), 4, 4)}


def molmo2(scene: Scene) -> Inputs:
    """Flattened patches of one crop in each row, every four of which are pooled to one token."""
    vision = scene.config.vision_config
    rows, columns = scene.size()
    patches = (rows // vision.patch_size) * (columns // vision.patch_size)
    count = patches // 4
    ids = scene.tokens(BATCH, LENGTH + count)
    ids[:, 3 : 3 + count] = scene.config.image_token_id
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": scene.normal(BATCH, patches, 3 * vision.patch_size**2),
        "image_token_pooling": torch.arange(BATCH * patches).reshape(-1, 4),
        "image_grids": torch.tensor([[1, count, 0, 0]] * BATCH),
        "image_num_crops": scene.ones(BATCH),
    }


def boxed_image(scene: Scene) -> Inputs:
    """A box beside the words, so that the geometry encoder runs too."""
    ids = scene.tokens(BATCH, LENGTH)
    return {
        "pixel_values": scene.normal(BATCH, 3, *scene.size()),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_boxes": torch.tensor([[[0.3, 0.3, 0.4, 0.4]]] * BATCH),
        "input_boxes_labels": scene.ones(BATCH, 1),
    }


def diffusion_gemma(scene: Scene) -> Inputs:
    """A picture before the text, which its forward takes without naming it."""
    vision = scene.config.vision_config
    patch, side = vision.patch_size, 2 * vision.pooling_kernel_size
    token = scene.config.image_token_id
    ids = torch.cat([torch.full((BATCH, 4), token), scene.tokens(BATCH, LENGTH)], 1)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == token).long(),
        "decoder_input_ids": scene.tokens(BATCH, LENGTH),
        "pixel_values": scene.normal(BATCH, side * side, 3 * patch * patch).sigmoid(),
        "image_position_ids": places.expand(BATCH, -1, -1).contiguous(),
    }


def tall_strip(scene: Scene) -> Inputs:
    """A line of text that is wide enough for several steps after all strides."""
    return {"pixel_values": scene.normal(BATCH, 3, 96, 192)}


def large(scene: Scene) -> Inputs:
    """A picture of which more than one key is left after a stage has reduced them."""
    return {"pixel_values": scene.normal(BATCH, 3, 64, 64)}


def pair(scene: Scene) -> Inputs:
    """Two pictures to match, large for the same reason."""
    return {"pixel_values": scene.normal(BATCH, 2, 3, 64, 64)}


def larger(scene: Scene) -> Inputs:
    """A picture whose quarter is as large as a patch."""
    return {"pixel_values": scene.normal(BATCH, 3, 128, 128)}
