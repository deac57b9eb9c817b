"""The tables of config keys against the libraries they describe, and configs as they are found in the wild."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from genkit.components import inspect_model, keys, load_components
from genkit.components.geometry import Geometry
from genkit.components.registry import NETWORKS
from genkit.components.rules import Key, check_config
from genkit.errors import InputError
from genkit.files import parse_json
from tests.tiny import tiny_clip, tiny_ddpm, tiny_latent_unconditional, tiny_stable_diffusion


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", [n for n, network in NETWORKS.items() if network.library == "diffusers"])
def test_tables_are_the_signatures_of_diffusers(name: str) -> None:
    """A key that a new release adds, drops or gives another default fails here."""
    parameters = dict(inspect.signature(getattr(diffusers, name).__init__).parameters)
    del parameters["self"]
    table = NETWORKS[name].table
    assert {k: key.default for k, key in table.items()} == {k: plain(p.default) for k, p in parameters.items()}


TRANSFORMERS = [
    (CLIPTextConfig, keys.CLIP_TEXT), (CLIPVisionConfig, keys.CLIP_VISION), (CLIPConfig, keys.CLIP),
    (SiglipTextConfig, keys.SIGLIP_TEXT), (SiglipVisionConfig, keys.SIGLIP_VISION), (SiglipConfig, keys.SIGLIP),
]  # fmt: skip


@pytest.mark.parametrize(("config", "table"), TRANSFORMERS, ids=lambda v: getattr(v, "__name__", ""))
def test_tables_are_the_fields_of_transformers(config: type[Any], table: Mapping[str, Key]) -> None:
    generic = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = {f.name: f.default for f in dataclasses.fields(config) if f.name not in generic}
    assert fields == {k: key.default for k, key in table.items() if not k.endswith("_config_dict")}
    assert generic <= {*keys.TEXT_UNUSED, "output_hidden_states"}


@pytest.mark.parametrize("name", NETWORKS)
def test_defaults_keep_their_own_rules(name: str) -> None:
    table = NETWORKS[name].table
    given = {k: key.default for k, key in table.items()}
    assert check_config(given, table, "here") == given


SD15_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SD21_UNET = {
    **SD15_UNET, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
    "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96,
    "upcast_attention": True, "use_linear_projection": True,
}  # fmt: skip
SD15_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "_name_or_path": "somewhere/vae",
}  # fmt: skip
SD15_TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32", "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}  # fmt: skip
DDPM_CIFAR = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
WILD: dict[str, tuple[str, dict[str, Any]]] = {
    "Stable Diffusion 1.5 UNet": ("UNet2DConditionModel", SD15_UNET),
    "Stable Diffusion 2.1 UNet": ("UNet2DConditionModel", SD21_UNET),
    "Stable Diffusion 1.5 VAE": ("AutoencoderKL", SD15_VAE),
    "Stable Diffusion 1.5 text encoder": ("CLIPTextModel", SD15_TEXT),
    "DDPM CIFAR-10 UNet": ("UNet2DModel", DDPM_CIFAR),
}


@pytest.mark.parametrize("name", WILD)
def test_configs_of_2022(name: str) -> None:
    cls, config = WILD[name]
    network = NETWORKS[cls]
    found = check_config(config, network.table, "here", network.unused)
    network.check(found, "here")
    assert found.items() >= {k: v for k, v in config.items() if k in network.table}.items()


# What transformers 4.x wrote into each half of openai/clip-vit-base-patch32's config.json.
GENERIC_4X = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None, "task_specific_params": None,
    "temperature": 1.0, "tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None,
    "top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False, "transformers_version": "4.21.0.dev0",
    "typical_p": 1.0, "use_bfloat16": False, "_commit_hash": None, "_attn_implementation_autoset": True,
}  # fmt: skip


@pytest.mark.parametrize("spelling", ["text_config", "text_config_dict"])
def test_a_clip_config_with_everything_that_transformers_4_wrote(tmp_path: Path, spelling: str) -> None:
    tiny_clip(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    before = load_components(inspect_model(tmp_path), device="cpu", dtype=torch.float32)
    halves = {half: {**GENERIC_4X, **config[f"{half}_config"]} for half in ("text", "vision")}
    config |= {"_commit_hash": None, "torch_dtype": "float32", "text_config_dict": None, "vision_config_dict": None}
    config["text_config"]["num_hidden_layers"] = 5  # the old spelling goes before the new one
    config |= {"vision_config": halves["vision"], spelling: halves["text"]}
    path.write_text(json.dumps(config))
    after = load_components(inspect_model(tmp_path), device="cpu", dtype=torch.float32)
    assert after.info.configs == before.info.configs
    assert after.clip.config.to_dict() == before.clip.config.to_dict()


def test_missing_keys_take_the_defaults_of_the_library(tmp_path: Path) -> None:
    tiny_ddpm(tmp_path)
    path = tmp_path / "unet" / "config.json"
    full = inspect_model(tmp_path).configs["unet"]
    config = json.loads(path.read_text())
    for key in ("downsample_type", "add_attention", "num_train_timesteps", "sample_size", "act_fn", "dropout"):
        del config[key]
    path.write_text(json.dumps(config))
    assert inspect_model(tmp_path).configs["unet"] == {**full, "sample_size": None}


@pytest.mark.parametrize("maker", [tiny_stable_diffusion, tiny_ddpm, tiny_latent_unconditional])
def test_landmarks_are_shapes_of_the_network(tmp_path: Path, maker: Any) -> None:
    for part in inspect_model(maker(tmp_path)).parts.values():
        landmarks = NETWORKS[part.kind].landmarks(part.config)
        assert len(landmarks) >= 3
        assert {name: part.tensors[name].shape for name in landmarks} == landmarks


@pytest.mark.parametrize("name", WILD)
def test_landmarks_are_shapes_of_real_networks(name: str) -> None:
    cls, given = WILD[name]
    network = NETWORKS[cls]
    config = check_config(given, network.table, "here", network.unused)
    library = diffusers if network.library == "diffusers" else transformers
    kind = getattr(library, cls)
    with init_empty_weights(include_buffers=False):
        built = kind(**config) if library is diffusers else kind(kind.config_class(**config))
    shapes = {key: tuple(weight.shape) for key, weight in built.state_dict().items()}
    landmarks = network.landmarks(config)
    assert {key: shapes.get(key) for key in landmarks} == landmarks


@pytest.mark.parametrize("maker", [tiny_stable_diffusion, tiny_ddpm, tiny_latent_unconditional])
def test_every_size_that_is_allowed_can_be_drawn(tmp_path: Path, maker: Any) -> None:
    components = load_components(inspect_model(maker(tmp_path)), device="cpu", dtype=torch.float32)
    geometry = components.info.geometry
    assert isinstance(geometry, Geometry) and (geometry.width, geometry.height) == (16, 16)
    for width, height in ((1, 1), (1, 3), (5, 2)):
        shape = geometry.latent_shape(width * geometry.multiple, height * geometry.multiple)
        x = torch.zeros(1, *shape)
        text = [torch.zeros(1, 4, 16)] if geometry.text else []
        assert components.unet(x, 1, *text)[0].shape == x.shape


def test_a_whole_number_may_stand_for_a_real_one(tmp_path: Path) -> None:
    tiny_clip(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"logit_scale_init_value": 3, "initializer_factor": 1}))
    assert load_components(inspect_model(tmp_path), device="cpu", dtype=torch.float32).clip is not None


LISTS = ["[1]", "3", '"text"', "null", "true"]


@pytest.mark.parametrize("text", LISTS)
def test_a_config_is_an_object(text: str) -> None:
    with pytest.raises(InputError, match="not a JSON object"):
        parse_json(text, "here")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_are_finite(number: str) -> None:
    with pytest.raises(InputError, match="here"):
        parse_json(f'{{"a": [{number}]}}', "here")


def test_the_key_that_is_repeated_is_named_wherever_it_is() -> None:
    with pytest.raises(InputError, match=r"here: 'b': key is given twice"):
        parse_json('{"a": [{"b": 1, "c": 2, "b": 1}]}', "here")
