"""Single files in the original layout: recognised, placed key by key, and drawn as diffusers draws them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from genkit import Request, TextToImage
from genkit.components import inspect_model
from genkit.components.convert import convert
from genkit.components.info import file_facts
from genkit.components.loading import construct
from genkit.components.original import backward, openclip_modules, renamed, unet_modules, vae_modules
from genkit.errors import InputError
from tests.components.checkpoints import FAMILIES, folder_of


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A family, the folder of a tiny model of it, and the same as a single file."""
    root = tmp_path_factory.mktemp("pair")
    folder = folder_of(request.param, root / "folder")
    convert(inspect_model(folder), root / "model.safetensors")
    return request.param, folder, root / "model.safetensors"


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((64, 64))


def drawn(model: Path, **options: Any) -> np.ndarray:
    generator = TextToImage.from_pretrained(model, **options)
    start = {"image": PICTURE, "strength": 1.0} if generator.geometry.refines else {"width": 64, "height": 64}
    row = Request(prompt="a red fox, 1girl", seed=3, num_inference_steps=3, guidance_scale=5.0, **start)
    (result,) = generator.stream([row])
    return np.asarray(result.image).astype(int)


def test_a_file_draws_what_its_folder_and_diffusers_draw(pair: tuple[str, Path, Path]) -> None:
    """As `from_single_file(config=folder)` of diffusers reads the same file."""
    import diffusers

    family, folder, file = pair
    info, other = inspect_model(file), inspect_model(folder)
    assert info.family == family and not info.notes
    assert {name: part.parameters for name, part in info.parts.items()} == {
        name: part.parameters for name, part in other.parts.items()
    }
    assert np.array_equal(drawn(file), drawn(folder))
    refiner = family == "SDXL refiner"
    name = "StableDiffusionXLPipeline" if family == "SDXL" else "StableDiffusionPipeline"
    name = "StableDiffusionXLImg2ImgPipeline" if refiner else name
    options = {} if family.startswith("SDXL") else {"safety_checker": None}
    start = {"image": PICTURE, "strength": 1.0} if refiner else {"width": 64, "height": 64}
    pipeline = getattr(diffusers, name).from_single_file(
        str(file), config=str(folder), local_files_only=True, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "a red fox, 1girl", num_inference_steps=3, guidance_scale=5.0, **start,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert np.abs(drawn(file) - np.asarray(made.images[0]).astype(int)).max() <= 2


def test_there_and_back_every_bit_is_the_same(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    family, folder, file = pair
    convert(inspect_model(file), tmp_path / "again")
    convert(inspect_model(tmp_path / "again"), tmp_path / "again.safetensors")
    one, two = load_file(file), load_file(tmp_path / "again.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for part in ("unet", "vae", "text_encoder_2" if family == "SDXL refiner" else "text_encoder"):
        name = "model.safetensors" if part.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"
        before, after = load_file(folder / part / name), load_file(tmp_path / "again" / part / name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def changed(file: Path, out: Path, metadata: dict[str, str] | None = None, **change: Any) -> Path:
    """Write the file with weights changed by prefix: a dtype, or None to leave them out; and return it."""
    weights = load_file(file)
    for prefix, what in change.items():
        for key in [key for key in weights if key.startswith(prefix)]:
            weights[key] = weights.pop(key) if what is None else weights[key].to(what)
            if what is None:
                del weights[key]
    save_file(weights, out, metadata=metadata)
    return out


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the first family as a single file."""
    root = tmp_path_factory.mktemp("one")
    convert(inspect_model(folder_of("SD 1", root / "folder")), root / "model.safetensors")
    return root / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_what_training_left(file: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {key: weight.to(dtype) for key, weight in load_file(file).items()}
    weights["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(3)
    weights["alphas_cumprod"] = weights["betas"] = torch.zeros(1000)
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights = {key: weight.clone() for key, weight in weights.items()}
    save_file(weights, tmp_path / "pruned.safetensors")
    info = inspect_model(tmp_path / "pruned.safetensors")
    assert "4 keys that no network has are left out (averaged weights among them)" in info.notes[0]
    assert np.abs(drawn(tmp_path / "pruned.safetensors") - drawn(file)).max() <= 8


@pytest.mark.slow
def test_missing_networks_are_named_and_taken_from_others(file: Path, tmp_path: Path) -> None:
    bare = changed(file, tmp_path / "bare.safetensors", first_stage_model=None, cond_stage_model=None)
    with pytest.raises(InputError, match=r"SD 1, without a vae: give --vae"):
        inspect_model(bare)
    with pytest.raises(InputError, match=r"without a text_encoder: give --text-encoder"):
        inspect_model(bare, vae=str(file))
    vae = {key.removeprefix("first_stage_model."): w for key, w in load_file(file).items() if key.startswith("first_")}
    save_file(vae, tmp_path / "vae.safetensors")
    folder = file.parent / "folder"
    whole = drawn(file)
    for given in (tmp_path / "vae.safetensors", file, folder, folder / "vae"):
        assert np.array_equal(drawn(bare, vae=str(given), text_encoder=str(folder)), whole)
    with pytest.raises(InputError, match="is a VAE alone: give it with --vae"):
        inspect_model(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(("family", "scale"), [("SD 1", 0.18215), ("SDXL", 0.13025)])
def test_a_vae_in_a_file_has_the_scale_of_the_model_that_takes_it(
    file: Path, tmp_path: Path, family: str, scale: float
) -> None:
    """The file does not show it: the same VAE serves both here, as a folder's and as a file's."""
    folder = folder_of(family, tmp_path / "folder")
    convert(inspect_model(folder), tmp_path / "model.safetensors")
    for model in (folder, tmp_path / "model.safetensors"):
        config = inspect_model(model, vae=str(file)).parts["vae"].config
        assert (config["scaling_factor"], config["force_upcast"]) == (scale, family == "SDXL")


def test_prediction_type_by_mark_metadata_yaml_family_and_wish(file: Path, tmp_path: Path) -> None:
    def kind(path: Path, **options: str) -> tuple[str, tuple[str, ...]]:
        info = inspect_model(path, **options)
        return info.scheduler_config["prediction_type"], info.notes

    plain = changed(file, tmp_path / "plain.safetensors")
    assert kind(plain) == ("epsilon", ())
    assert kind(plain, prediction="v_prediction") == ("v_prediction", ())
    (tmp_path / "plain.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert kind(plain)[0] == "v_prediction" and "by plain.yaml" in kind(plain)[1][0]
    stated = changed(file, tmp_path / "stated.safetensors", {"modelspec.prediction_type": "v"})
    assert kind(stated) == ("v_prediction", ())
    weights = {**load_file(file), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(weights, tmp_path / "marked.safetensors")
    assert kind(tmp_path / "marked.safetensors")[0] == "v_prediction"
    assert inspect_model(tmp_path / "marked.safetensors").scheduler_config["rescale_betas_zero_snr"] is True
    with pytest.raises(InputError, match="did you mean 'epsilon'"):
        inspect_model(plain, prediction="epsilom")


@pytest.mark.parametrize(("prediction", "side"), [("epsilon", 512), ("v_prediction", 768)])
def test_sd_2_is_drawn_at_the_size_it_was_trained_at(tmp_path: Path, prediction: str, side: int) -> None:
    """As the configs of stable-diffusion-2-base and 2-1 have it; eight pixels a latent there, two in the tiny VAE."""
    convert(inspect_model(folder_of("SD 2", tmp_path / "folder")), tmp_path / "model.safetensors")
    geometry = inspect_model(tmp_path / "model.safetensors", prediction=prediction).geometry
    assert geometry is not None and geometry.width * 8 // geometry.scale == side


def test_facts_of_a_file(file: Path, tmp_path: Path) -> None:
    import hashlib

    told = changed(file, tmp_path / "told.safetensors", {"modelspec.title": "Fox"})
    data = told.read_bytes()
    facts = file_facts(inspect_model(told))
    assert facts["hashes"]["SHA256"] == hashlib.sha256(data).hexdigest()
    assert facts["hashes"]["AutoV2"] == facts["hashes"]["SHA256"][:10]
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    assert facts["hashes"]["AutoV3"] == hashlib.sha256(body).hexdigest()[:12]
    assert facts["metadata"] == {"modelspec.title": "Fox"} and facts["prediction_type"] == "epsilon"


def fake(path: Path, *keys: str) -> Path:
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("lora_unet_down_blocks_0.lora_up.weight",), "is a LoRA: give it with --lora"),
        (("unet.down_blocks.0.attn.to_q.lora_A.weight",), "is a LoRA"),
        (("emb_params",), "is a textual inversion"),
        (("double_blocks.0.img_attn.qkv.weight",), "is of Flux"),
        (("model.diffusion_model.joint_blocks.0.x.weight",), "is of Stable Diffusion 3"),
        (("control_model.input_blocks.0.0.weight",), "is a ControlNet"),
        (("down_blocks.0.resnets.0.conv1.weight",), "in diffusers' layout: give its folder"),
        (("input_blocks.0.0.weight",), "is a UNet without VAE"),
        (("something.else",), "of 1 keys none begins with model.diffusion_model."),
        (("model.diffusion_model.input_blocks.0.0.weight",), "is no UNet of Stable Diffusion"),
    ],
)
def test_other_files_are_named(tmp_path: Path, keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inspect_model(fake(tmp_path / "x.safetensors", *keys))


def test_keys_without_a_place_and_damage_are_refused(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    save_file({**load_file(file), "other_model.weight": torch.zeros(3)}, out)
    with pytest.raises(InputError, match=r"1 of its keys have no place in a model of SD 1: 'other_model\.weight'"):
        inspect_model(out)
    save_file({**load_file(file), "model.diffusion_model.extra.weight": torch.zeros(3)}, out)
    with pytest.raises(InputError, match=r"model\.diffusion_model\.extra\.weight': has no place"):
        inspect_model(out)
    out.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="bytes of weights, but its header describes"):
        inspect_model(out)
    weights = load_file(file)
    del weights["model.diffusion_model.middle_block.0.in_layers.2.bias"]
    save_file(weights, out)
    with pytest.raises(InputError, match=r"mid_block\.resnets\.0\.conv1\.bias: is missing"):
        TextToImage.from_pretrained(out)
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="is refused: weights that unpickle"):
        inspect_model(tmp_path / "x.ckpt")
    out.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4\n")
    with pytest.raises(InputError, match="Git LFS"):
        inspect_model(out)


def test_nothing_is_converted_over_or_into_what_is_not_there(file: Path, tmp_path: Path) -> None:
    info = inspect_model(file)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        convert(info, tmp_path / "there")
    with pytest.raises(InputError, match="no such folder"):
        convert(info, tmp_path / "no" / "where")
    with pytest.raises(InputError, match="prediction_type: sample has no mark in a single file"):
        convert(inspect_model(file, prediction="sample"), tmp_path / "sample.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


# The configs that were published with the weights of each family; widths and depths alone are what the keys depend on.
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
REAL: dict[str, dict[str, Any]] = {
    "SD 1": {"down_block_types": [_CROSS] * 3 + [_PLAIN], "cross_attention_dim": 768, "attention_head_dim": 8},
    "SD 2": {
        "down_block_types": [_CROSS] * 3 + [_PLAIN], "cross_attention_dim": 1024, "use_linear_projection": True,
        "attention_head_dim": [5, 10, 20, 20],
    },
    "SDXL": {
        "down_block_types": [_PLAIN, _CROSS, _CROSS], "cross_attention_dim": 2048, "use_linear_projection": True,
        "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "addition_time_embed_dim": 256,
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": 2816,
    },
    "SDXL refiner": {  # whose first level has no transformer: published as 4 for all
        "down_block_types": [_PLAIN, _CROSS, _CROSS, _PLAIN], "cross_attention_dim": 1280,
        "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536],
        "transformer_layers_per_block": [1, 4, 4, 4], "addition_embed_type": "text_time", "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 2560, "addition_time_embed_dim": 256,
    },
}  # fmt: skip


def real_unet(family: str) -> Any:
    config = dict(REAL[family])
    config["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(config["down_block_types"])]
    with init_empty_weights():
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_real_unets_has_its_place(family: str, tmp_path: Path) -> None:
    """Original names by our table are those that diffusers' converter takes; a file of them is read whole."""
    unet = real_unet(family)
    shapes = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    config = unet.config
    attention = ["Cross" in kind for kind in config.down_block_types]
    back = backward(unet_modules(len(config.block_out_channels), 2, attention))
    original = {renamed(name, back): shape for name, shape in shapes.items()}
    assert None not in original and len(original) == len(shapes)
    checkpoint = {f"model.diffusion_model.{name}": torch.empty(s, device="meta") for name, s in original.items()}
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(checkpoint), dict(config))
    assert {name: tuple(weight.shape) for name, weight in theirs.items()} == shapes
    sparse = write_header(tmp_path / "unet.safetensors", checkpoint)
    from genkit.components.single import UNET, _grouped, _parts
    from genkit.components.weights import check_shapes, read_header

    groups, unknown = _grouped({tensor.key: tensor for tensor in read_header(sparse)})
    from genkit.components.families import unet_config

    found = unet_config({name: tensor.shape for name, tensor in groups[UNET].items()}, "x")
    part = _parts(groups, found, family, "x")["unet"]
    assert not unknown
    with init_empty_weights():
        built = construct(part)
    check_shapes(part.tensors, {n: tuple(w.shape) for n, w in built.state_dict().items()}, "x", complete=True)
    ours, published = dict(part.config), dict(config)
    assert all(ours[key] == value or ours[key] == [*value] for key, value in published.items() if key in REAL[family])


def write_header(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a safetensors file of half-precision weights that are a hole in it, and return it."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def test_every_key_of_the_real_vae_and_open_clip_has_its_place() -> None:
    with init_empty_weights():
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    back = backward(vae_modules(4, 2))
    original = {f"first_stage_model.{renamed(name, back)}": weight for name, weight in vae.state_dict().items()}
    theirs = single_file_utils.convert_ldm_vae_checkpoint(original, dict(vae.config))
    assert theirs.keys() == vae.state_dict().keys()
    table: Any = (
        single_file_utils.DIFFUSERS_TO_LDM_MAPPING
    )  # names of open_clip's ViT-H and bigG, as diffusers has them
    ours = openclip_modules(32)
    named = {ours.get(key.rsplit(".", 1)[0]) for key in table["openclip"]["layers"].values()}
    assert {"embeddings.token_embedding", "final_layer_norm"} <= named


def test_the_tokenizer_is_clips(tmp_path: Path) -> None:
    """Ids of texts with accents, emoji, digits, contractions and unusual spaces, as open_clip's tokenizer has them."""
    from transformers import CLIPTokenizer

    from genkit.components.single import TOKENIZER

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    for text, ids in IDS.items():
        assert tokenizer(text)["input_ids"][1:-1] == ids, text
    assert len(tokenizer) == 49408


IDS: dict[str, list[int]] = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "Déjà vu, café": [25466, 73, 21259, 13230, 267, 15304],
    "it's the fox's den; don't": [585, 568, 518, 3240, 568, 1181, 282, 847, 713],
    "1girl, 8k, UHD": [272, 1611, 267, 279, 330, 267, 84, 4414],
    "🦊 and 👨\u200d👩\u200d👧": [6040, 488, 537, 25023, 26304, 964, 356],
    "日本語の猫": [39121, 44353, 34002, 252, 21575, 163, 234, 360],
    "  two   spaces\tand\nlines ": [1237, 9006, 537, 3418],
    "x_y #1 C++ ...": [343, 318, 344, 258, 272, 322, 19056, 678],
    "(best quality:1.2)": [263, 949, 3027, 281, 272, 269, 273, 264],
    "ÄÖÜß": [10896, 7255, 6522, 127, 509],
}


def test_a_run_from_a_file_goes_on_under_another_name(file: Path, tmp_path: Path) -> None:
    from genkit import generate

    prompts = tmp_path / "two.txt"
    prompts.write_text("a fox\na cat\n")
    options: dict[str, Any] = {"defaults": {"num_inference_steps": 2, "width": 64, "height": 64}, "quiet": True}
    model = tmp_path / "first.safetensors"
    model.write_bytes(file.read_bytes())
    first = generate(prompts, out=tmp_path / "run", model=str(model), max_total_images=1, **options)
    assert first.images == 1
    other = tmp_path / "moved.safetensors"
    model.rename(other)
    second = generate(prompts, out=tmp_path / "run", model=str(other), **options)
    assert (second.images, second.new) == (2, 1)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["binding"]["model"]["weights"]
    assert list(recorded) == ["checkpoint"]
    with safe_open(other, "pt") as weights:
        changed_weights = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    changed_weights["model.diffusion_model.out.2.bias"] += 1e-3
    save_file(changed_weights, other)
    with pytest.raises(InputError, match=r"was begun otherwise: model\.weights\.checkpoint"):
        generate(prompts, out=tmp_path / "run", model=str(other), **options)


def text_files(folder: Path, out: Path, layout: str) -> list[Path]:
    """Write each text encoder of a folder as a file of its own, under transformers' names or open_clip's."""
    found = []
    for name in sorted(path.name for path in folder.glob("text_encoder*")):
        weights = load_file(folder / name / "model.safetensors")
        weights = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in weights.items()}
        if layout == "openclip":
            layers = 1 + max(int(k.split(".")[3]) for k in weights if ".layers." in k)
            back = backward(openclip_modules(layers))
            named = {
                renamed(k.removeprefix("text_model."), back): v for k, v in weights.items()
                if "self_attn.q" not in k and "self_attn.k" not in k and "self_attn.v" not in k
            }  # fmt: skip
            for layer in range(layers):
                for kind in ("weight", "bias"):
                    parts = [weights[f"text_model.encoder.layers.{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                    named[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
            named["positional_embedding"] = weights["text_model.embeddings.position_embedding.weight"]
            if "text_projection.weight" in weights:
                named["text_projection"] = weights["text_projection.weight"].T.contiguous()
            weights = {k: v for k, v in named.items() if k is not None}
        found.append(out / f"{layout}-{name}.safetensors")
        save_file({k: v.contiguous() for k, v in weights.items()}, found[-1])
    return found


@pytest.mark.parametrize("layout", ["clip", "openclip"])
def test_text_encoders_in_files_of_their_own(pair: tuple[str, Path, Path], tmp_path: Path, layout: str) -> None:
    """Given beside a checkpoint without them, as ComfyUI keeps them, they are those of the folder."""
    family, folder, file = pair
    whole = load_file(file)
    bare = tmp_path / "bare.safetensors"
    save_file({k: v for k, v in whole.items() if not k.startswith(("cond_stage_model.", "conditioner."))}, bare)
    if family == "SDXL refiner":
        pytest.skip("its UNet alone is recognised by its width, which this tiny one has not")
    if family == "SD 1" and layout == "openclip":
        pytest.skip("SD 1's text encoder is OpenAI's, with another activation")
    files = text_files(folder, tmp_path, layout)
    if layout == "openclip" and family == "SDXL":
        files = [text_files(folder, tmp_path, "clip")[0], files[1]]
    found = inspect_model(bare, text_encoder=",".join(map(str, files)))
    assert {n: p.config for n, p in found.parts.items()} == {n: p.config for n, p in inspect_model(file).parts.items()}
    assert np.array_equal(drawn(bare, text_encoder=",".join(map(str, files))), drawn(file))


def test_other_files_are_no_text_encoders(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    save_file({"encoder.down.0.block.0.conv1.weight": torch.zeros(2, 2)}, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match="is a VAE alone"):
        inspect_model(pair[2], text_encoder=str(tmp_path / "vae.safetensors"))
