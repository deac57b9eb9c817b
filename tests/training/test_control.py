"""ControlNets learn as in a plain loop of diffusers, from what lies beside the pictures or is found in them."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

from genkit import TextToImage, cli
from genkit.components import load_components
from genkit.datasets.sources import read_examples, split
from genkit.errors import InputError
from genkit.pictures.edges import canny
from genkit.training.checkpoint import read_log
from genkit.training.control import model_of
from genkit.training.data import Pictures
from genkit.training.doctor import examine
from genkit.training.estimate import task_on_shapes, training_memory, training_work
from genkit.training.loop import train
from genkit.training.recipe import make_recipe
from genkit.training.state import fold
from genkit.training.tasks import make_task
from tests.tiny import tiny_controlnet, tiny_ddpm, tiny_sdxl, tiny_stable_diffusion

pytest.importorskip("cv2")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    tiny_stable_diffusion(folder / "sd")
    tiny_sdxl(folder / "sdxl")
    tiny_ddpm(folder / "ddpm")
    (folder / "pictures").mkdir()
    for n in range(20):
        square(n).save(folder / "pictures" / f"{n:03d}.png")
        (folder / "pictures" / f"{n:03d}.txt").write_text("a square\n")
    return folder


def square(n: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A square whose place and colours depend on n."""
    picture = Image.new("RGB", size, (10 * n, 40, 90))
    ImageDraw.Draw(picture).rectangle((2 + n % 5, 3 + n % 4, 9 + n % 5, 10 + n % 4), fill=(250, 12 * n, 30))
    return picture


def values(places: Path, base: str = "sd", **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "task": "controlnet", "model": str(places / base),
        "data": {"path": str(places / "pictures"), "validation": 0.2, "conditioning": "canny"},
        "train": {"steps": 4, "batch_size": 4, "learning_rate": 3e-3},
        "evaluate": {"every": 0, "pictures": 4, "num_inference_steps": 2}, "save": {"keep_best": 0},
    }  # fmt: skip
    for key, change in changes.items():
        found[key] = {**found.get(key, {}), **change} if isinstance(change, dict) else change
    return found


def run(places: Path, out: Path, base: str = "sd", **changes: Any) -> Path:
    assert train(make_recipe(values(places, base, **changes)), out, device="cpu", quiet=True).exit_code == 0
    return out


@pytest.mark.parametrize(("model", "stored"), [("sd", False), ("sd", True), ("sdxl", False), ("sdxl", True)])
def test_a_step_is_that_of_a_plain_loop_of_diffusers(places: Path, tmp_path: Path, model: str, stored: bool) -> None:
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel

    base = places / model
    unet = UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False)
    if stored:
        theirs = ControlNetModel.from_pretrained(tiny_controlnet(tmp_path / "net", base, hints=(16, 32)))
    else:
        theirs = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    recipe = make_recipe(values(places, model, networks={"controlnet": str(tmp_path / "net")} if stored else {}))
    parts = load_components(model_of(recipe, "text-to-image"), device="cpu", dtype=torch.float32)
    if not stored:  # its first layers, which are not the UNet's, are drawn at random
        own = parts.controlnet.controlnet_cond_embedding
        theirs.controlnet_cond_embedding.load_state_dict(own.state_dict())
    task = make_task(recipe, parts, torch.float32)
    batch = Pictures(read_examples(recipe.data), recipe.data, (16, 16), 8, 0).batch([0, 1, 2], 0)
    tensors = task.encode(batch)
    loss = task.loss(tensors, torch.Generator().manual_seed(5)).mean()
    loss.backward()

    generator = torch.Generator().manual_seed(5)
    mean, logvar = AutoencoderKL.from_pretrained(base / "vae").encode(batch.pixels).latent_dist.parameters.chunk(2, 1)
    x0 = (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)) * 0.18215
    t = torch.randint(1000, (3,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    x = DDPMScheduler.from_config(config).add_noise(x0, noise, t)
    added = {"text_embeds": tensors["pooled"], "time_ids": tensors["sizes"]} if model == "sdxl" else None
    edges = [np.asarray(canny(Image.open(places / "pictures" / f"{n:03d}.png"))) for n in range(3)]
    picture = torch.from_numpy(np.stack(edges)).permute(0, 3, 1, 2).float() / 255
    assert picture.any()
    given: dict[str, Any] = {"encoder_hidden_states": tensors["text"], "added_cond_kwargs": added}
    down, middle = theirs(x, t, controlnet_cond=picture, return_dict=False, **given)
    out = unet(x, t, down_block_additional_residuals=down, mid_block_additional_residual=middle, **given).sample
    wanted = mse_loss(out, noise)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    ours = dict(parts.controlnet.named_parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 1e-4 for p in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert all(p.grad is None for p in parts.unet.parameters())


def test_a_new_one_changes_nothing_at_first_and_what_is_written_is_what_was_drawn_with(
    places: Path, tmp_path: Path
) -> None:
    from diffusers import ControlNetModel

    prompts = ["a square", "a red square"]
    look = {"every": 4, "prompts": prompts, "guidance_scale": 3.0}
    out = run(places, tmp_path / "out", evaluate=look, train={"steps": 8, "learning_rate": 3e-2})
    net = ControlNetModel.from_pretrained(out)
    assert sorted(p.name for p in out.glob("*.safetensors")) == [WEIGHTS] and not (out / "unet").exists()
    assert all(layer.weight.abs().max() > 0 for layer in net.controlnet_down_blocks)
    recipe = make_recipe(values(places))
    held = split(read_examples(recipe.data), recipe.data)[1]
    gen = TextToImage.from_pretrained(places / "sd", device="cpu", dtype="float32")
    plain, steered = [], []
    for number, prompt in enumerate(prompts):
        given: dict[str, Any] = {"seed": fold(0, number) % 2**32, "num_inference_steps": 2, "guidance_scale": 3.0}
        control = {"file": str(out), "image": held[number].read(), "preprocess": "canny"}
        assert held[number].read().size == (16, 16)
        plain += gen(prompt, **given).images
        steered += gen(prompt, controls=[control], **given).images
    sheets = [np.asarray(Image.open(out / "samples" / f"{step:06d}.png"), dtype=int) for step in (0, 8)]
    for sheet, images in zip(sheets, (plain, steered), strict=True):
        joined = np.concatenate([np.asarray(image, dtype=int) for image in images], axis=1)
        assert np.abs(sheet - joined).max() <= 1
    assert np.abs(sheets[0] - sheets[1]).max() > 8
    card = (out / "README.md").read_text()
    assert "--control FOLDER --control-image PICTURE" in card and "--control-preprocess canny" in card
    command = ["generate", "--prompt", "a square", "--model", str(places / "sd"), "--control", str(out), "--steps", "1"]
    picture = ["--control-image", str(places / "pictures" / "000.png"), "--control-preprocess", "canny"]
    assert cli.run([*command, *picture, "-o", str(tmp_path / "drawn"), "--clip", "none"]) == 0


@pytest.mark.parametrize("changes", [{}, {"data": {"cache": 2, "flip": 0.5}}])
def test_a_run_that_goes_on_is_the_run_without_interruption(
    places: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan = {"steps": 6, "batch_size": 4, "learning_rate": 3e-3, "ema": 0.9}
    whole = run(places, tmp_path / "whole", train=plan, **changes)
    for steps in (3, 6):
        run(places, tmp_path / "parts", train={**plan, "steps": steps}, **changes)
    for name in ("weights", "ema", "optimizer"):
        one, two = (
            load_file(out / "checkpoints" / "000006" / f"{name}.safetensors") for out in (whole, tmp_path / "parts")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    logs = [[line["loss"] for line in read_log(out / "log.jsonl")] for out in (whole, tmp_path / "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_cached_conditioning_is_that_of_every_time(places: Path, tmp_path: Path) -> None:
    losses = []
    for cache in (0, 1):
        out = run(places, tmp_path / str(cache), data={"cache": cache})
        losses.append([line["loss"] for line in read_log(out / "log.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    shard = next((tmp_path / "1" / "cache").rglob("*.safetensors"))
    assert load_file(shard)["conditioning"].dtype == torch.uint8


def test_sdxl_in_half_precision_goes_on_from_a_trained_one(places: Path, tmp_path: Path) -> None:
    net = tiny_controlnet(tmp_path / "net", places / "sdxl")
    out = run(
        places, tmp_path / "out", "sdxl", networks={"controlnet": str(net)}, evaluate={"every": 2, "prompts": ["a"]},
        data={"caption_dropout": 0.5}, train={"mixed_precision": "bf16", "gradient_checkpointing": True},
        save={"dtype": "float16"},
    )  # fmt: skip
    before, after = load_file(net / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys() and all(w.dtype == torch.float16 for w in after.values())
    assert all(torch.isfinite(w).all() for w in after.values())
    assert any(not torch.equal(before[key].half(), after[key]) for key in before)


def test_half_precision_of_the_unet_does_not_round_the_copy(places: Path) -> None:
    recipe = make_recipe(values(places))
    parts = load_components(model_of(recipe, "text-to-image"), device="cpu", dtype=torch.float32)
    first = parts.unet.conv_in.weight.clone()
    make_task(recipe, parts, torch.bfloat16)
    assert parts.unet.dtype == torch.bfloat16 and torch.equal(parts.controlnet.conv_in.weight, first)


# -- what lies beside --


def folder_beside(folder: Path) -> Path:
    for n in range(4):
        square(n, (24, 18)).save(folder / f"{n}.png")
        shutil.copyfile(folder / f"{n}.png", folder / f"{n}.edges.png")
        (folder / f"{n}.txt").write_text("a square")
    return folder


def table_beside(folder: Path) -> Path:
    folder_beside(folder)
    lines = []
    for n in range(4):
        shutil.move(folder / f"{n}.edges.png", folder / f"c{n}.png")
        lines.append({"file_name": f"{n}.png", "text": "a square", ("edges", "edges_file_name")[n % 2]: f"c{n}.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def shard_beside(folder: Path) -> Path:
    files = sorted(folder_beside(folder).iterdir())
    with tarfile.open(folder / "a.tar", "w") as tar:
        for path in files:
            tar.add(path, path.name)
    return folder / "a.tar"


def parquet_beside(folder: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    cells = []
    for n in range(4):
        file = io.BytesIO()
        square(n, (24, 18)).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    write_table(arrow.table({"picture": cells, "edges": cells, "text": ["a square"] * 4}), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize("made", [folder_beside, table_beside, shard_beside, parquet_beside])
def test_what_lies_beside_is_cropped_mirrored_and_scaled_as_the_picture(tmp_path: Path, made: Any) -> None:
    """Where the picture lies beside itself, on the ground that conditioning has, both stay equal."""
    data = make_recipe({
        "task": "controlnet", "model": "emoji", "data": {
            "path": str(made(tmp_path)), "conditioning": "edges", "flip": 0.5, "crop": "random", "zoom": 0.5,
            "background": {"colour": "black"}, "validation": 0.0,
        },
    }).data  # fmt: skip
    examples = read_examples(data)
    assert len(examples) == 4 and all(e.caption == "a square" for e in examples)
    pictures = Pictures(examples, data, (16, 16), 8, 0)
    seen = set()
    for epoch in range(6):
        batch = pictures.batch([0, 1, 2, 3], epoch)
        assert batch.conditioning is not None and batch.conditioning.dtype == torch.uint8
        torch.testing.assert_close(batch.conditioning.float() / 127.5 - 1, batch.pixels)
        seen.add(batch.pixels[0].sum().item())
    assert len(seen) > 3


@pytest.mark.parametrize("kind", ["canny", "invert"])
def test_what_is_computed_is_of_the_picture_as_it_is_trained_on(places: Path, kind: str) -> None:
    from genkit.pictures.edges import PREPROCESS

    data = make_recipe(values(places, data={"conditioning": kind, "flip": 0.5, "zoom": 0.7})).data
    batch = Pictures(read_examples(data), data, (8, 8), 8, 0).batch([0, 1, 2, 3], 1)
    assert batch.conditioning is not None
    for pixels, found in zip(batch.pixels, batch.conditioning, strict=True):
        picture = Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        assert np.array_equal(np.asarray(PREPROCESS[kind](picture)), found.permute(1, 2, 0).numpy())


def test_a_run_on_what_lies_beside_is_written_for_it(places: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    data = {"path": str(folder_beside(tmp_path / "set")), "conditioning": "edges"}
    out = run(places, tmp_path / "out", data=data, evaluate={"prompts": ["a"]})
    assert (out / "samples" / "000004.png").exists() and "preprocess" not in (out / "README.md").read_text()
    (tmp_path / "set" / "2.edges.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"2\.edges\.png"):
        run(places, tmp_path / "other", data=data)


# -- memory, time and errors --


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_its_memory_is_that_of_half_a_unet_and_its_work_is_more_than_a_unet(places: Path, base: str) -> None:
    found = {}
    for task in ("controlnet", "text-to-image"):
        changes = {} if task == "controlnet" else {"conditioning": None}
        recipe = make_recipe(values(places, base, task=task, data={"cache": 1, **changes}))
        info = model_of(recipe, "text-to-image")
        assert not examine(recipe.data, *split(read_examples(recipe.data), recipe.data), recipe, info).errors
        shapes = task_on_shapes(recipe, info)
        found[task] = training_memory(recipe, info, shapes, (16, 16)) | {
            "work": training_work(recipe, shapes, (16, 16))
        }
    control, unet = found["controlnet"], found["text-to-image"]
    assert 0.3 < control["Adam"] / unet["Adam"] < 0.8 and control["weights"] > unet["weights"]
    assert unet["activations"] < control["activations"] < 2 * unet["activations"]
    assert 0.9 < control["work"] / unet["work"] < 2, "half a UNet, and the layers that read the picture"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "", "networks": {"unet": "emoji"}}, r"model: is missing, which the ControlNet steers"),
        ({"data": {"conditioning": None}}, r"data\.conditioning: is missing: canny, invert, or the column"),
        ({"data": {"conditioning": "cany"}}, r"conditioning: 'cany': 17 of 17 .*000\.png \(did you mean 'canny'"),
        ({"model": "ddpm"}, "is a model of kind unconditional, not text-to-image"),
        ({"networks": {"controlnet": {"layers_per_block": 1}}}, "networks.controlnet: is a folder, a hub id or a file"),
        ({"networks": {"controlnet": "ddpm/unet"}}, "class 'UNet2DModel' is no controlnet"),
        ({"networks": {"controlnet": "net"}}, r"json: cross_attention_dim: 40, but the model's UNet has 16"),
        ({"task": "text-to-image"}, r"data\.conditioning: canny: has no effect in task text-to-image"),
        ({"task": "text-to-image", "data": {"conditioning": None}, "networks": {"controlnet": "net"}},
         r"networks\.controlnet: has no effect in task text-to-image"),
        ({"data": {"validation": 0.0}, "evaluate": {"prompts": ["a"]}}, r"data\.validation: holds nothing out"),
        ({"train": {"text_encoder": True}}, r"train\.text_encoder: has no effect in task controlnet"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_before_the_first_step(
    places: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tiny_controlnet(tmp_path / "net", places / "sdxl")
    changes = dict(changes)
    if "model" in changes:
        changes["model"] = str(places / changes["model"]) if changes["model"] else None
    networks = changes.get("networks", {})
    if isinstance(name := networks.get("controlnet"), str):
        changes["networks"] = {"controlnet": str((tmp_path if name == "net" else places) / name)}
    with pytest.raises(InputError, match=message) as error:
        run(places, tmp_path / "out", **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "log.jsonl").exists()


def test_without_opencv_nothing_is_loaded(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "cv2" else real(name, *more))
    recipe = values(places) | {"model": "nowhere"}
    with pytest.raises(InputError, match=r"^data\.conditioning: canny needs OpenCV: pip install .*\[control\]"):
        train(make_recipe(recipe), tmp_path / "out", device="cpu", quiet=True)
    assert not (tmp_path / "out").exists()
