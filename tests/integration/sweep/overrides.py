"""What single model types need beyond the rules of shrinking.py, one line each."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "d_model": 16}
_AXES = {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}
_DECODES = {"decoder.is_decoder": True, "decoder.add_cross_attention": True}
_DOTS = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_WINDOWS = {"image_size": 64, "patch_size": 2, "window_size": 4}
_EFFICIENT = {
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
}
# The last two layers use the keys and values of the first two.
_SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_CODEC = {"num_filters": 4}
_VIBE = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [2, 1, 1]}
_VQGAN = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}

# Text models whose rotary embedding has sections, of another default size, for three axes.
SECTIONED = (
    "cohere_compass_text",
    "cosmos3_edge_text",
    "glm4v_moe_text",
    "glm4v_text",
    "glm_image_text",
    "glm_ocr_text",
    "hunyuan_vl_text",
    "paddleocr_vl_text",
    "qwen2_5_omni_talker",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
)

# Model type -> arguments. A dotted name reaches into a part, a dict at the name of a part builds
# that part (of another type, if it names one).
OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 320},
    "align_vision_model": _EFFICIENT,
    "apertus1p5": {
        "text_config.vocab_size": 384,
        "image_token_offset": 64,
        "audio_token_offset": 192,
    },
    "apertus1p5_vision_tokenizer": _VQGAN,
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "audio-spectrogram-transformer": {"max_length": 64},
    "autoformer": _SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {
        "vocabulary_map": {"<image>": 3, **{f"IMGIMG{'ABCD'[n]}Z": 4 + n for n in range(4)}},
    },
    "chameleon_vqgan": {**_VQGAN, "num_embeddings": 4},
    "chmv2": {"post_process_channels": [16, 16, 32, 32]},
    "clvp_encoder": {"num_attention_heads": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cvt": {"depth": [1, 2, 3]},
    "dac": {"encoder_hidden_size": 4},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "depth_pro": {
        "patch_size": 32,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [16, 16, 16],
        "fusion_hidden_size": 16,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dinov3_convnext": {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]},
    "donut-swin": _WINDOWS,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {2: _DOTS}},
    "efficientloftr": {"out_features": [16, 16, 32, 64], "num_attention_heads": 8},
    "efficientnet": {**_EFFICIENT, "hidden_dim": 1280},
    "emu3": {
        "vocabulary_map": {
            "<image>": 3,
            "<|extra_200|>": 8,
            **{f"<|visual token {n:06d}|>": 4 + n for n in range(4)},
        },
    },
    "emu3_vqgan": {**_VQGAN, "codebook_size": 4},
    "encodec": _CODEC,
    "encoder-decoder": _DECODES,
    "ernie4_5_vl_moe_text": _AXES,
    "esm": {"mask_token_id": 3},
    "esmfold2": {
        "single_inputs_size": 131,
        "atom_encoder.num_uid_rope_pairs": 2,
        "structure_head.diffusion_module.atom_encoder.num_uid_rope_pairs": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 80},
    "florence_vision": {"window_size": 4},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3n_text": _SHARED,
    "gemma4_assistant": {"text_config.num_kv_shared_layers": 4},
    "gemma4_text": {**_SHARED, "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}},
    "glmasr": {"audio_config.intermediate_size": 256},
    "glm5_next_text": {"index_kpool": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "informer": _SERIES,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "janus_vqgan": _VQGAN,
    "layoutlmv2": {"coordinate_size": 8, "shape_size": 16},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "input_size": 32},
    "led": {"attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "llama4_vision_model": {"intermediate_size": 256},
    "longcat_flash": {"head_dim": 8},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "lw_detr_vit": {"num_windows": 4},
    "mamba2": {"num_heads": 8},
    "maskformer": {"backbone_config": {"model_type": "swin", "out_indices": [1, 2, 3, 4]}},
    "maskformer-swin": _WINDOWS,
    "mimi": _CODEC,
    "mimi_decoder": _CODEC,
    "mimi_encoder": _CODEC,
    "minicpm_ocr": {"downsample_mode": "16x"},
    "mllama_vision_model": {
        "num_hidden_layers": 2,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 192,  # the last states and those of two layers
    },
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "neucodec": {"quantization_dim": 128, "encoder_hidden_size": 4},
    "omdet-turbo": {
        # Its layer norm is for features with channels last, those of timm.
        "apply_layernorm_after_vision_backbone": False,
        "decoder_hidden_dim": 32,
        "encoder_hidden_dim": 32,
        "vision_features_channels": [32, 32, 32],
        "backbone_config": {"model_type": "swin", "out_indices": [2, 3, 4]},
    },
    "perceiver": {"num_self_attends_per_block": 1, "num_latents": 8},
    "pix2struct_text_model": {"initializer_range": 0.2},
    "pp_doclayout_v2": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    "pp_doclayout_v3": {"x4_feat_dim": 32},
    "pp_lcnet_v4": {"stem_channels": [3, 48, 96]},
    "qwen2_5_omni_audio_encoder": {"n_window": 8},
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "qwen2_5_omni_dit": {"enc_channels": [64, 64, 64, 64, 192]},
    "qwen3_omni_moe": {"talker_config.spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48]},
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "blocks_per_stage": [1, 1, 2, 1],
        "global_attention_blocks": [3],
    },
    "sam2_prompt_encoder": {"patch_size": 16},
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
    },
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_lite_text_text_model": {"num_hidden_layers": 4},
    "sam3_vit_model": {"window_size": 2},
    "sam_hq_vision_model": {"num_pos_feats": 32},
    "sam_vision_model": {"num_pos_feats": 32},
    "sapiens2_head": {
        "upsample_out_channels": [16],
        "upsample_kernel_sizes": [4],
        "conv_out_channels": [16],
        "conv_kernel_sizes": [1],
    },
    "seggpt": {"merge_index": 0},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "speech-encoder-decoder": _DECODES,
    "step3p5": {"sliding_window": 4},
    "superpoint": {"keypoint_decoder_dim": 65},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "time_series_transformer": _SERIES,
    "timesfm2_5": {"context_length": 256},
    "tipsv2_dpt": {"neck_hidden_sizes": [16, 16, 32, 32]},
    "tvp": {"visual_prompt_size": 4, "max_img_size": 32, "num_frames": 2},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [32, 64]},
    "vibevoice_acoustic_tokenizer": _VIBE,
    "vibevoice_acoustic_tokenizer_decoder": _VIBE,
    "vibevoice_acoustic_tokenizer_encoder": _VIBE,
    "vipllava": {"vision_feature_layers": [-1, 0]},
    "vision-encoder-decoder": _DECODES,
    "vjepa2": {"frames_per_clip": 4},
    "vitmatte": {"fusion_hidden_sizes": [16, 16, 16, 16]},
    "vits": {"flow_size": 64},
    "voxtral": {"audio_config.intermediate_size": 256},
    "xcodec2": {"quantization_dim": 128, "encoder_hidden_size": 4},
    "wavtokenizer": _CODEC,
    "wavtokenizer_encoder": _CODEC,
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zoedepth": {"bottleneck_features": 64},
}

# What a class needs to have a default instance at all.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "nougat": {"encoder": {"model_type": "donut-swin"}, "decoder": {"model_type": "mbart"}},
}
