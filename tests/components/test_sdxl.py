"""SDXL's shape, two text encoders and six sizes: diffusers' pictures, in any batch; and bad folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from genkit import ImageToImage, InputError, Request, TextToImage, generate
from genkit.components import inspect_model, load_components
from genkit.components.registry import NETWORKS
from genkit.components.rules import check_config
from genkit.sampling.generators import Generator
from genkit.schedulers import Scheduler
from tests.sampling.test_parity import assert_same, seeds
from tests.tiny import tiny_sdxl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def gen(folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(folder, device="cpu")


def pipeline(name: str, folder: Path, **options: Any) -> Any:
    pipe = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("negative", ["", "blurry"])
@pytest.mark.parametrize("zeros", [True, False])
def test_text_to_image(tmp_path: Path, negative: str, zeros: bool) -> None:
    tiny_sdxl(tmp_path, force_zeros_for_empty_prompt=zeros)
    made = pipeline("StableDiffusionXLPipeline", tmp_path)(
        ["a red fox"] * 2, negative_prompt=[negative] * 2 if negative else None, num_inference_steps=6,
        guidance_scale=5.0, width=48, height=32, generator=seeds(3, 4),
    ).images  # fmt: skip
    ours = TextToImage.from_pretrained(tmp_path, device="cpu")(
        "a red fox", negative_prompt=negative, num_images=2, seed=3, num_inference_steps=6, guidance_scale=5,
        width=48, height=32,
    )  # fmt: skip
    assert_same(ours.images, made)


@pytest.mark.parametrize("masked", [False, True])
def test_image_to_image_and_inpainting(folder: Path, masked: bool) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    name = "StableDiffusionXLInpaintPipeline" if masked else "StableDiffusionXLImg2ImgPipeline"
    size = {"width": 32, "height": 32, "mask_image": mask} if masked else {}
    made = pipeline(name, folder, requires_aesthetics_score=False)(
        "a blue fox",
        image=picture,
        strength=0.7,
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=seeds(9),
        **size,
    ).images
    ours = ImageToImage.from_pretrained(folder, device="cpu")(
        "a blue fox", image=picture, mask_image=mask if masked else None, strength=0.7, seed=9, num_inference_steps=10,
        guidance_scale=5,
    )  # fmt: skip
    assert_same(ours.images, made)


def test_mixed_requests_are_as_if_alone(gen: TextToImage) -> None:
    rows = [
        Request(id=f"{k}", prompt=f"fox {k}", negative_prompt="dull" * (k % 2), seed=k, num_inference_steps=3 + k,
                guidance_scale=1.0 + 2 * (k % 3), width=32 + 16 * (k % 2),
                guidance_interval=[0, 0.5] if k == 4 else None)
        for k in range(6)
    ]  # fmt: skip
    mixed = {r.id: r for r in gen.stream(rows, slots=4)}
    assert mixed["0"].nfe == 3 and mixed["1"].nfe == 8 and mixed["4"].nfe == 7 + 4
    for row in rows:
        (alone,) = gen.stream([row])
        assert_same([mixed[str(row.id)].image], [alone.image])


def test_a_run_and_inspect(folder: Path, tmp_path: Path) -> None:
    summary = generate(
        [Request(prompt="a fox", num_inference_steps=2)], tmp_path / "run", model=str(folder), quiet=True
    )
    assert (summary.images, summary.failed) == (1, 0)
    found = inspect_model(folder).describe()
    assert found["size"] == "32x32" and found["guidance_scale"] == 5.0
    assert found["components"]["text_encoder_2"]["class"] == "CLIPTextModelWithProjection"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def remove(folder: Path, file: str, part: str) -> None:
    (folder / file).unlink()
    shutil.rmtree(folder / part)


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no second encoder", lambda f: edit(f / "model_index.json", text_encoder_2=[None, None]),
     "model_index.json: text_encoder_2: is missing, which a StableDiffusionXLPipeline needs"),
    ("no second tokenizer", lambda f: edit(f / "model_index.json", tokenizer_2=[None, None]),
     "tokenizer_2: is missing"),
    ("not XL", lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"),
     "text_encoder_2: does not belong in a StableDiffusionPipeline"),
    ("refiner", lambda f: edit(f / "model_index.json", requires_aesthetics_score=True),
     "text_encoder: does not belong in a StableDiffusionXLPipeline"),
    ("projection", lambda f: edit(f / "unet" / "config.json", projection_class_embeddings_input_dim=61),
     "projection_class_embeddings_input_dim: 61, but 6 times"),
    ("width", lambda f: edit(f / "unet" / "config.json", cross_attention_dim=16), "cross_attention_dim: 16, but"),
    ("sizes", lambda f: edit(f / "unet" / "config.json", addition_embed_type=None),
     "addition_time_embed_dim: 8, but addition_embed_type is not"),
    ("another kind", lambda f: edit(f / "unet" / "config.json", addition_embed_type="image"),
     "addition_embed_type: 'image'"),
    ("plain encoder", lambda f: edit(f / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
     "text_encoder_2: class 'transformers.CLIPTextModel' is not supported"),
    ("no width of the projection", lambda f: edit(f / "text_encoder_2" / "config.json", projection_dim=None),
     "projection_dim: None is no width"),
    ("unlike tokenizers", lambda f: edit(f / "tokenizer_2" / "tokenizer_config.json", model_max_length=16),
     "tokenizer_2: reads 16 tokens, but tokenizer reads 32"),
    ("padding past the table", lambda f: edit(f / "tokenizer_2" / "tokenizer_config.json", pad_token="<pad>"),
     "pad_token: '<pad>' is not in the vocabulary"),
    ("no index, no second tokenizer", lambda f: remove(f, "model_index.json", "tokenizer_2"),
     "tokenizer_2: is absent, which text_encoder_2 needs"),
    ("no index, no second encoder", lambda f: remove(f, "model_index.json", "text_encoder_2"),
     "text_encoder_2: is absent, which tokenizer_2 needs"),
    ("no weights", lambda f: (f / "text_encoder_2" / "model.safetensors").unlink(), "text_encoder_2"),
]  # fmt: skip


@pytest.mark.parametrize(("breaking", "words"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_bad_folders_are_refused_in_one_line(tmp_path: Path, breaking: Callable[[Path], Any], words: str) -> None:
    tiny_sdxl(tmp_path)
    breaking(tmp_path)
    with pytest.raises(InputError) as caught:
        inspect_model(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_index_of_the_published_base_is_read(tmp_path: Path) -> None:
    tiny_sdxl(tmp_path, add_watermarker=None, feature_extractor=[None, None], image_encoder=[None, None])
    assert inspect_model(tmp_path).kind == "text-to-image"


def test_a_half_of_the_second_pair_is_refused(folder: Path) -> None:
    parts = load_components(inspect_model(folder), device=torch.device("cpu"), dtype=torch.float32)
    given: dict[str, Any] = {
        "unet": parts.unet, "scheduler": Scheduler.from_config(parts.info.scheduler_config), "vae": parts.vae,
        "text_encoder": parts.text_encoder, "tokenizer": parts.tokenizer,
        "text_encoder_2": parts.text_encoder_2, "tokenizer_2": parts.tokenizer_2,
    }  # fmt: skip
    Generator(**given)
    for half in (["tokenizer_2"], ["text_encoder_2"], ["text_encoder_2", "tokenizer_2"]):
        with pytest.raises(InputError, match="text_encoder_2, tokenizer_2: SDXL's UNet needs both"):
            Generator(**{**given, **dict.fromkeys(half)})


# The configs of stabilityai/stable-diffusion-xl-base-1.0, without the keys that transformers writes everywhere.
BASE: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {
        "act_fn": "silu", "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
        "center_input_sample": False, "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3,
        "conv_out_kernel": 3, "cross_attention_dim": 2048, "cross_attention_norm": None,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
        "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True,
        "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05,
        "norm_num_groups": 32, "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False,
        "out_channels": 4, "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "sample_size": 128,
        "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_dim": None,
        "time_embedding_type": "positional", "timestep_post_act": None, "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": None,
        "use_linear_projection": True,
    },
    "AutoencoderKL": {
        "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
        "out_channels": 3, "sample_size": 1024, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "CLIPTextModelWithProjection": {
        "architectures": ["CLIPTextModelWithProjection"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
        "eos_token_id": 2, "hidden_act": "gelu", "hidden_size": 1280, "initializer_factor": 1.0,
        "initializer_range": 0.02, "intermediate_size": 5120, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 20, "num_hidden_layers": 32, "pad_token_id": 1,
        "projection_dim": 1280, "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "vocab_size": 49408,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BASE)
def test_the_real_configs_are_read_and_their_landmarks_stand_in_the_network(kind: str) -> None:
    from genkit.components.loading import _CONSTRUCT

    network = NETWORKS[kind]
    config = check_config(BASE[kind], network.table, "config.json", network.unused)
    network.check(config, "config.json")
    library = __import__(network.library)
    with torch.device("meta"):
        built = _CONSTRUCT[network.library](getattr(library, kind), config)
    shapes = {name: tuple(weight.shape) for name, weight in built.state_dict().items()}
    landmarks = network.landmarks(config)
    assert len(landmarks) > 3 and all(shapes[name] == shape for name, shape in landmarks.items())
