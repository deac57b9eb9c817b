"""The keys of each network's config.json: the rule for a value, and the default of diffusers or transformers."""

from __future__ import annotations

from genkit.components.rules import ANYTHING, FLAG, Key, Rule, choice, either, many, one_or_many, optional, real, whole

NULL = Rule("null: networks that take more than a prompt are not supported", lambda v: v is None)
OBJECT = Rule("an object or null", lambda v: v is None or isinstance(v, dict))
CHANNELS = whole(1, 16384)
LAYERS = whole(1, 64)
WIDTH = whole(1, 65536)
SIDE = whole(1, 8192)
SIDES = optional(either(SIDE, many(SIDE, 2, 2)))
HEADS = whole(1, 1024)
GROUPS = whole(1, 1024)
EPSILON = real(0, 1, above=True)
RATE = real(0, 1)
TOKEN = optional(whole(0, 2**20))
ACTIVATION = choice("silu", "swish", "mish", "gelu", "relu")
CLIP_ACTIVATION = choice("quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish")

# Rules and defaults that both UNets share. NULL is for keys that add inputs other than prompt and timestep, such as
# class labels or images.
_UNET = {
    "sample_size": Key(SIDES, None),
    "center_input_sample": Key(FLAG, False),
    "flip_sin_to_cos": Key(FLAG, True),
    "freq_shift": Key(real(0, 1), 0),
    "downsample_padding": Key(whole(0, 1), 1),
    "mid_block_scale_factor": Key(real(0, 1000, above=True), 1),
    "dropout": Key(RATE, 0.0),
    "act_fn": Key(ACTIVATION, "silu"),
    "norm_eps": Key(EPSILON, 1e-5),
    "resnet_time_scale_shift": Key(choice("default", "scale_shift"), "default"),
    "time_embedding_dim": Key(optional(WIDTH), None),
    "class_embed_type": Key(NULL, None),
    "num_class_embeds": Key(NULL, None),
}

UNET2D = {
    **_UNET,
    "in_channels": Key(CHANNELS, 3),
    "out_channels": Key(CHANNELS, 3),
    "time_embedding_type": Key(choice("positional", "fourier", "learned"), "positional"),
    "down_block_types": Key(
        many(
            choice(
                "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"
            )
        ),
        ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    ),
    "mid_block_type": Key(choice("UNetMidBlock2D", None), "UNetMidBlock2D"),
    "up_block_types": Key(
        many(choice("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")),
        ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    ),
    "block_out_channels": Key(many(CHANNELS), [224, 448, 672, 896]),
    "layers_per_block": Key(LAYERS, 2),
    "downsample_type": Key(choice("conv", "resnet"), "conv"),
    "upsample_type": Key(choice("conv", "resnet"), "conv"),
    "attention_head_dim": Key(optional(HEADS), 8),
    "norm_num_groups": Key(GROUPS, 32),
    "attn_norm_num_groups": Key(optional(GROUPS), None),
    "add_attention": Key(FLAG, True),
    "num_train_timesteps": Key(optional(whole(1, 100_000)), None),
}

UNET2D_CONDITION = {
    **_UNET,
    "in_channels": Key(CHANNELS, 4),
    "out_channels": Key(CHANNELS, 4),
    "down_block_types": Key(
        many(choice("CrossAttnDownBlock2D", "DownBlock2D", "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D")),
        ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    ),
    "mid_block_type": Key(
        choice("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None),
        "UNetMidBlock2DCrossAttn",
    ),
    "up_block_types": Key(
        many(choice("CrossAttnUpBlock2D", "UpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")),
        ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    ),
    "only_cross_attention": Key(one_or_many(FLAG), False),
    "block_out_channels": Key(many(CHANNELS), [320, 640, 1280, 1280]),
    "layers_per_block": Key(one_or_many(LAYERS), 2),
    "norm_num_groups": Key(optional(GROUPS), 32),
    "cross_attention_dim": Key(WIDTH, 1280),
    "transformer_layers_per_block": Key(one_or_many(LAYERS), 1),
    "reverse_transformer_layers_per_block": Key(choice(None), None),
    "encoder_hid_dim": Key(NULL, None),
    "encoder_hid_dim_type": Key(NULL, None),
    "attention_head_dim": Key(one_or_many(HEADS), 8),
    "num_attention_heads": Key(choice(None), None),
    "dual_cross_attention": Key(choice(False), False),
    "use_linear_projection": Key(FLAG, False),
    "addition_embed_type": Key(choice(None, "text_time"), None),
    "addition_time_embed_dim": Key(optional(WIDTH), None),
    "upcast_attention": Key(optional(FLAG), False),
    "resnet_skip_time_act": Key(FLAG, False),
    "resnet_out_scale_factor": Key(real(0, 1000, above=True), 1.0),
    "time_embedding_type": Key(choice("positional", "fourier"), "positional"),
    "time_embedding_act_fn": Key(optional(ACTIVATION), None),
    "timestep_post_act": Key(optional(ACTIVATION), None),
    "time_cond_proj_dim": Key(optional(whole(2, 65536)), None),
    "conv_in_kernel": Key(choice(1, 3, 5, 7), 3),
    "conv_out_kernel": Key(choice(1, 3, 5, 7), 3),
    "projection_class_embeddings_input_dim": Key(optional(WIDTH), None),
    "attention_type": Key(choice("default"), "default"),
    "class_embeddings_concat": Key(choice(False), False),
    "mid_block_only_cross_attention": Key(optional(FLAG), None),
    "cross_attention_norm": Key(choice("layer_norm", "group_norm", None), None),
    "addition_embed_type_num_heads": Key(HEADS, 64),
}

_SHARED = (
    "in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "only_cross_attention", "block_out_channels",
    "downsample_padding", "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim",
    "transformer_layers_per_block", "encoder_hid_dim", "encoder_hid_dim_type", "attention_head_dim",
    "num_attention_heads", "use_linear_projection", "class_embed_type", "addition_embed_type",
    "addition_time_embed_dim", "num_class_embeds", "upcast_attention", "resnet_time_scale_shift",
    "projection_class_embeddings_input_dim", "addition_embed_type_num_heads",
)  # fmt: skip
CONTROLNET = {
    **{name: UNET2D_CONDITION[name] for name in _SHARED},
    "layers_per_block": Key(LAYERS, 2),
    "mid_block_type": Key(choice("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), "UNetMidBlock2DCrossAttn"),
    "conditioning_channels": Key(choice(3), 3),
    "controlnet_conditioning_channel_order": Key(choice("rgb", "bgr"), "rgb"),
    "conditioning_embedding_out_channels": Key(many(CHANNELS), [16, 32, 96, 256]),
    # Of the network for shuffled pictures, which conditions one half of a guided batch only
    "global_pool_conditions": Key(choice(False), False),
}

AUTOENCODER_KL = {
    "in_channels": Key(choice(1, 3), 3),
    "out_channels": Key(choice(1, 3), 3),
    "down_block_types": Key(many(choice("DownEncoderBlock2D", "AttnDownEncoderBlock2D")), ["DownEncoderBlock2D"]),
    "up_block_types": Key(many(choice("UpDecoderBlock2D", "AttnUpDecoderBlock2D")), ["UpDecoderBlock2D"]),
    "block_out_channels": Key(many(CHANNELS), [64]),
    "layers_per_block": Key(LAYERS, 1),
    "act_fn": Key(ACTIVATION, "silu"),
    "latent_channels": Key(CHANNELS, 4),
    "norm_num_groups": Key(GROUPS, 32),
    "sample_size": Key(either(SIDE, many(SIDE, 2, 2)), 32),
    "scaling_factor": Key(real(0, 1000, above=True), 0.18215),
    "shift_factor": Key(optional(real(-1000, 1000)), None),
    "latents_mean": Key(choice(None), None),
    "latents_std": Key(choice(None), None),
    "force_upcast": Key(FLAG, True),
    "use_quant_conv": Key(FLAG, True),
    "use_post_quant_conv": Key(FLAG, True),
    "mid_block_add_attention": Key(FLAG, True),
}

_CLIP = {
    "hidden_act": Key(CLIP_ACTIVATION, "quick_gelu"),
    "layer_norm_eps": Key(EPSILON, 1e-5),
    "attention_dropout": Key(RATE, 0.0),
    "initializer_range": Key(real(0, 100), 0.02),
    "initializer_factor": Key(real(0, 100), 1.0),
}

CLIP_TEXT = {
    **_CLIP,
    "vocab_size": Key(whole(1, 2**20), 49408),
    "hidden_size": Key(WIDTH, 512),
    "intermediate_size": Key(whole(1, 2**18), 2048),
    "projection_dim": Key(optional(WIDTH), 512),
    "num_hidden_layers": Key(LAYERS, 12),
    "num_attention_heads": Key(HEADS, 8),
    "max_position_embeddings": Key(whole(3, 8192), 77),
    "pad_token_id": Key(TOKEN, 1),
    "bos_token_id": Key(TOKEN, 49406),
    "eos_token_id": Key(TOKEN, 49407),
}

CLIP_VISION = {
    **_CLIP,
    "hidden_size": Key(WIDTH, 768),
    "intermediate_size": Key(whole(1, 2**18), 3072),
    "projection_dim": Key(WIDTH, 512),
    "num_hidden_layers": Key(LAYERS, 12),
    "num_attention_heads": Key(HEADS, 12),
    "num_channels": Key(choice(3), 3),
    "image_size": Key(SIDE, 224),
    "patch_size": Key(SIDE, 32),
}

CLIP = {
    "projection_dim": Key(WIDTH, 512),
    "logit_scale_init_value": Key(real(-100, 100), 2.6592),
    "initializer_factor": Key(real(0, 100), 1.0),
    # Checked with tables of their own (Network.nested); transformers called them `*_config_dict` in 2022.
    **dict.fromkeys(("text_config", "vision_config", "text_config_dict", "vision_config_dict"), Key(OBJECT, None)),
}

_SIGLIP = {
    "hidden_act": Key(CLIP_ACTIVATION, "gelu_pytorch_tanh"),
    "layer_norm_eps": Key(EPSILON, 1e-6),
    "attention_dropout": Key(RATE, 0.0),
    "hidden_size": Key(WIDTH, 768),
    "intermediate_size": Key(whole(1, 2**18), 3072),
    "num_hidden_layers": Key(LAYERS, 12),
    "num_attention_heads": Key(HEADS, 12),
}

SIGLIP_TEXT = {
    **_SIGLIP,
    "vocab_size": Key(whole(1, 2**20), 32000),
    "max_position_embeddings": Key(whole(3, 8192), 64),
    "pad_token_id": Key(TOKEN, 1),  # the tokenizer's own are used
    "bos_token_id": Key(TOKEN, 49406),
    "eos_token_id": Key(TOKEN, 49407),
    "projection_size": Key(optional(WIDTH), None),
}

SIGLIP_VISION = {
    **_SIGLIP,
    "num_channels": Key(choice(3), 3),
    "image_size": Key(SIDE, 224),
    "patch_size": Key(SIDE, 16),
    "vision_use_head": Key(choice(True), True),
}

SIGLIP = {
    "initializer_factor": Key(real(0, 100), 1.0),
    **dict.fromkeys(("text_config", "vision_config", "text_config_dict", "vision_config_dict"), Key(OBJECT, None)),
}

# Keys that versions of transformers have written into every config (PretrainedConfig). They do not affect inference:
# accepted, never passed on.
_GENERIC = """
    _attn_implementation_autoset _commit_hash add_cross_attention bad_words_ids begin_suppress_tokens
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16 use_cache
"""


def _transformers_unused(model_types: tuple[str, ...], classes: tuple[str, ...]) -> dict[str, Rule]:
    return {
        **dict.fromkeys(_GENERIC.split(), ANYTHING),
        "model_type": choice(*model_types),
        "architectures": optional(many(choice(*classes))),
    }


TEXT_UNUSED = _transformers_unused(
    ("clip_text_model", "clip"), ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
)
VISION_UNUSED = _transformers_unused(("clip_vision_model", "clip"), ("CLIPVisionModel", "CLIPModel"))
CLIP_UNUSED = _transformers_unused(("clip",), ("CLIPModel",))
SIGLIP_TEXT_UNUSED = _transformers_unused(("siglip_text_model", "siglip"), ("SiglipTextModel", "SiglipModel"))
SIGLIP_VISION_UNUSED = _transformers_unused(("siglip_vision_model", "siglip"), ("SiglipVisionModel", "SiglipModel"))
SIGLIP_UNUSED = _transformers_unused(("siglip",), ("SiglipModel",))
