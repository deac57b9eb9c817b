"""Every task learns what it is shown, changes what it says and nothing else, and what it writes loads everywhere."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genkit import TextToImage, Unconditional
from genkit.components import inspect_model
from genkit.errors import InputError
from genkit.scoring import plugins
from genkit.training import setup
from genkit.training.loop import Outcome, train
from genkit.training.recipe import make_recipe
from tests.colours import COLOURS, colour_folder
from tests.grids import thinned
from tests.tiny import (
    EMBEDDED,
    SCHEDULER,
    tiny_clip,
    tiny_ddpm,
    tiny_latent_unconditional,
    tiny_sdxl,
    tiny_stable_diffusion,
)

UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "block_out_channels": [16, 16], "layers_per_block": 1,
    "norm_num_groups": 4, "attention_head_dim": 8, "cross_attention_dim": 16,
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FID = {"metrics": ["fid"], "num_images": 8, "prompts": ["red"]}
V: dict[str, Any] = {**SCHEDULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
V["timestep_spacing"] = "trailing"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    for make in (tiny_ddpm, tiny_latent_unconditional, tiny_stable_diffusion, tiny_sdxl, tiny_clip):
        make(folder / make.__name__)
    colour_folder(folder / "pictures", 40)
    return folder


def run(places: Path, out: Path, task: str, **changes: Any) -> tuple[Outcome, list[dict[str, Any]]]:
    """Train and return the outcome and the evaluations, first to last."""
    values: dict[str, Any] = {
        "task": task, "data": {"path": str(places / "pictures"), "validation": 0.2},
        "train": {"steps": 60, "batch_size": 8, "learning_rate": 3e-3, "ema": 0.9},
        "evaluate": {"every": 20, "pictures": 8, "num_images": 2, "num_inference_steps": 3, "guidance_scale": 3.0},
        "save": {"every": 1000},
    }  # fmt: skip
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    outcome = train(make_recipe(values), out, device="cpu", quiet=True)
    last = sorted((out / "checkpoints").iterdir())[-1]
    return outcome, list(json.loads((last / "checkpoint.json").read_text())["scores"].values())


def mean_colours(images: list[Any]) -> np.ndarray:
    return np.array([np.asarray(image.convert("RGB"), dtype=float).mean(axis=(0, 1)) for image in images])


def nearest_colour(images: list[Any]) -> list[str]:
    known = np.array(list(COLOURS.values()))
    return [list(COLOURS)[int(np.abs(known - colour).sum(axis=1).argmin())] for colour in mean_colours(images)]


def colours(pictures: torch.Tensor) -> torch.Tensor:
    """A feature network: (B, 3) mean colours."""
    assert pictures.dtype == torch.uint8
    return pictures.float().mean(dim=(2, 3)) / 255


@pytest.mark.slow
def test_unconditional_pictures_get_the_colours_of_the_data(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = EntryPoints([EntryPoint("colours", "tests.training.test_tasks:colours", plugins.FEATURES)])
    monkeypatch.setattr(plugins, "entry_points", lambda group: found.select(group=group))
    config: dict[str, Any] = {"model": str(places / "tiny_ddpm"), "networks": {"unet": {"sample_size": 8}}}
    look = {"num_images": 12, "metrics": ["fid", "kid"], "features": "colours", "best": "fid", "every": 100}
    outcome, scores = run(
        places, tmp_path, "unconditional", train={"steps": 200, "learning_rate": 4e-3}, scheduler=V, evaluate=look,
        **config,
    )  # fmt: skip
    assert scores[-1]["loss"] < 0.7 * scores[0]["loss"]
    assert scores[-1]["fid"] < 0.5 * scores[0]["fid"] and scores[-1]["kid"] < scores[0]["kid"]
    assert scores[-1]["fid_interval"][0] < scores[-1]["fid"] < scores[-1]["fid_interval"][1]
    assert outcome.scores["fid"] == min(s["fid"] for s in scores)
    images = Unconditional.from_pretrained(tmp_path, device="cpu", dtype="float32")(
        16, seed=1, num_inference_steps=20
    ).images
    means = mean_colours(images)
    distance = np.abs(means[:, None] - np.array(list(COLOURS.values()))).sum(axis=2).min(axis=1)
    assert np.median(distance) < 150, "random pictures lie at about 300 from red and from blue"
    assert (means[:, 1] < 128).mean() > 0.9, "neither colour has much green"
    from diffusers import DDPMPipeline

    assert DDPMPipeline.from_pretrained(tmp_path)(num_inference_steps=2).images[0].size == (8, 8)


def test_unconditional_of_latents_runs(places: Path, tmp_path: Path) -> None:
    outcome, scores = run(
        places, tmp_path, "unconditional", model=str(places / "tiny_latent_unconditional"), train={"steps": 40}
    )
    assert outcome.exit_code == 0 and scores[-1]["loss"] < scores[0]["loss"]
    assert inspect_model(tmp_path).kind == "unconditional"


@pytest.fixture(scope="module")
def drawn_from_text(places: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A text-to-image model with a UNet from scratch, on the latents of a random VAE."""
    out = places / "text"
    networks = {"unet": {**UNET, "in_channels": 4, "out_channels": 4}}
    _, scores = run(
        places, out, "text-to-image", model=str(places / "tiny_stable_diffusion"), networks=networks, scheduler=V,
        train={"steps": 40, "gradient_accumulation_steps": 2, "text_encoder": True}, data={"caption_dropout": 0.1},
        objective={"snr_gamma": 5.0},
        evaluate={"prompts": ["a red picture", "a blue picture"], "metrics": ["clip", "cmmd"]},
    )  # fmt: skip
    return out, scores


def test_text_to_image_learns_and_loads_in_diffusers(drawn_from_text: tuple[Path, list[dict[str, Any]]]) -> None:
    from diffusers import StableDiffusionPipeline

    out, scores = drawn_from_text
    assert scores[-1]["loss"] < 0.98 * scores[0]["loss"]
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    ours = TextToImage.from_pretrained(out, device="cpu", dtype="float32")(
        "a red picture", seed=3, num_inference_steps=4
    )
    theirs = pipeline("a red picture", generator=torch.manual_seed(3), num_inference_steps=4, guidance_scale=7.5)
    assert np.abs(np.asarray(ours.images[0], dtype=int) - np.asarray(theirs.images[0], dtype=int)).max() <= 2
    assert (out / "samples" / "000040.png").is_file()
    for found in scores:
        assert found["clip_interval"][0] <= found["clip"] <= found["clip_interval"][1] and found["cmmd"] > 0
    assert f"{scores[-1]['clip']:.4g}" in (out / "index.html").read_text()
    card = (out / "README.md").read_text()
    assert "library_name: diffusers" in card and '"snr_gamma": 5.0' in card
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


@pytest.mark.slow
def test_captions_decide_on_the_colour(places: Path, tmp_path: Path) -> None:
    """On the embedded VAE and text encoder, with a small UNet of its own: red and blue as asked."""
    side = {"resolution": 64}
    networks = {"unet": {"block_out_channels": [32, 32, 32], "sample_size": 8}}
    _, scores = run(
        places, tmp_path, "text-to-image", model="emoji", networks=networks, data={**side, "cache": 1},
        train={"steps": 150, "learning_rate": 2e-3},
    )  # fmt: skip
    assert scores[-1]["loss"] < 0.8 * scores[0]["loss"]
    drawer = TextToImage.from_pretrained(tmp_path, device="cpu", dtype="float32")
    for colour in COLOURS:
        images = drawer(f"a {colour} picture", num_images=6, seed=0, num_inference_steps=10, width=64, height=64).images
        assert nearest_colour(images).count(colour) >= 5


@pytest.mark.parametrize(
    "targets", thinned([["proj_in", "ff.net.0.proj", "conv1"], ["to_q", "to_k", "to_v", "to_out.0"]], 2)
)
def test_lora_changes_the_adapters_alone_and_loads_everywhere(places: Path, tmp_path: Path, targets: list[str]) -> None:
    from diffusers import StableDiffusionPipeline

    base = places / "tiny_stable_diffusion"
    lora = {"rank": 2, "alpha": 4.0, "text_encoder": True, "targets": targets}
    _, scores = run(places, tmp_path, "lora", model=str(base), lora=lora, evaluate={"prompts": ["a red picture"]})
    assert scores[-1]["loss"] < scores[0]["loss"]
    before, after = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (base, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(tuple(f"{target}.weight" for target in targets))}
    assert before.keys() == after.keys()
    merged = StableDiffusionPipeline.from_pretrained(tmp_path)
    for name in ("pytorch_lora_weights", "kohya"):
        pipeline = StableDiffusionPipeline.from_pretrained(base)
        pipeline.load_lora_weights(tmp_path / "lora", weight_name=f"{name}.safetensors")
        options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
        one, two = (p("a red picture", generator=torch.manual_seed(3), **options).images for p in (merged, pipeline))
        assert np.abs(one - two).max() < 1e-3, name
        plain = StableDiffusionPipeline.from_pretrained(base)(
            "a red picture", generator=torch.manual_seed(3), **options
        )
        assert np.abs(one - plain.images).max() > 1e-2, "without the adapters it is another picture"


def test_textual_inversion_changes_one_word_alone(places: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    base = places / "tiny_stable_diffusion"
    token = {"placeholder": "<red>", "initializer": "picture", "vectors": 2}
    data = {"captions": ["a <red> picture"]}
    _, scores = run(
        places, tmp_path, "textual-inversion", model=str(base), token=token, data=data, train={"learning_rate": 0.05},
        evaluate={"prompts": ["a <red> picture"]},
    )  # fmt: skip
    assert scores[-1]["loss"] < scores[0]["loss"]
    before, after = (load_file(f / "text_encoder" / "model.safetensors") for f in (base, tmp_path))
    table = next(name for name in after if name.endswith("token_embedding.weight"))
    assert all(torch.equal(before[name], after[name]) for name in before if name != table)
    assert torch.equal(after[table][:-2], before[table]) and len(after[table]) == len(before[table]) + 2
    learned = load_file(tmp_path / "learned_embeds.safetensors")["<red>"]
    assert torch.equal(learned, after[table][-2:])
    start = before[table][inspect_tokens("picture")[0]]
    assert not torch.equal(learned[0], start)
    theirs = StableDiffusionPipeline.from_pretrained(base)
    theirs.load_textual_inversion(tmp_path / "learned_embeds.safetensors", token="<red>")
    drawer = TextToImage.from_pretrained(tmp_path, device="cpu", dtype="float32")
    ours, full = (  # the word stands for all its tokens, which may also be written out
        drawer(text, seed=3, num_inference_steps=3, guidance_scale=7.5).images[0]
        for text in ("a <red> picture", "a <red> <red>_1 picture")
    )
    assert ours.tobytes() == full.tobytes()
    other = theirs("a <red> picture", generator=torch.manual_seed(3), num_inference_steps=3).images[0]
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(other, dtype=int)).max() <= 2


@pytest.mark.slow
def test_a_shared_cache_does_not_take_other_words_for_these(places: Path, tmp_path: Path) -> None:
    """The same captions, pictures and weights, but tokens of another number or of another tokenizer."""
    tokenizer = shutil.copytree(places / "tiny_stable_diffusion" / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"errors": "ignore"}))
    data = {"captions": ["a <red> picture"], "cache": 1, "cache_folder": str(tmp_path / "cache"), "validation": 0.0}
    counts = []
    for number, (vectors, words) in enumerate([(1, {}), (2, {}), (1, {"tokenizer": str(tokenizer)})]):
        token = {"placeholder": "<red>", "initializer": "picture", "vectors": vectors}
        changes: dict[str, Any] = {"train": {"steps": 1}, "evaluate": {"every": 0}, "networks": words}
        model = str(places / "tiny_stable_diffusion")
        run(places, tmp_path / str(number), "textual-inversion", model=model, token=token, data=data, **changes)
        counts.append(len(list((tmp_path / "cache").rglob("*.safetensors"))))
    assert counts == [1, 2, 3]


@pytest.mark.slow
def test_less_precision_in_training_leaves_the_rest_as_it_was(places: Path, tmp_path: Path) -> None:
    """What does not learn computes in bf16, and is written as it was read; small updates are not rounded away."""
    base, few = places / "tiny_stable_diffusion", {"steps": 2, "mixed_precision": "bf16", "learning_rate": 1e-4}
    prompts = {"prompts": ["a red picture"], "every": 0, "num_inference_steps": 1}
    run(
        places,
        tmp_path / "lora",
        "lora",
        model=str(base),
        lora={"rank": 2},
        train={**few, "ema": 0.0},
        evaluate=prompts,
    )
    before, after = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (base, tmp_path / "lora"))
    adapters = load_file(tmp_path / "lora" / "lora" / "pytorch_lora_weights.safetensors")
    updates = {
        name.removeprefix("unet.").replace("lora_A.", ""): adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
        for name in adapters
        if "lora_A" in name
    }
    assert updates
    for name in before:
        torch.testing.assert_close(after[name], before[name] + updates.get(name, 0), atol=1e-8, rtol=1e-6)
    token = {"placeholder": "<red>", "initializer": "picture"}
    run(
        places, tmp_path / "word", "textual-inversion", model=str(base), token=token, train=few, evaluate=prompts,
        data={"captions": ["a <red> picture"]},
    )  # fmt: skip
    before, after = (load_file(f / "text_encoder" / "model.safetensors") for f in (base, tmp_path / "word"))
    assert all(torch.equal(after[name][: len(before[name])], before[name]) for name in before)


def inspect_tokens(word: str) -> list[int]:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(EMBEDDED / "emoji" / "tokenizer")(word, add_special_tokens=False).input_ids


def test_dreambooth_keeps_the_prior_in_every_batch(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves, sizes = [], []
    real = setup.Setup.feed

    def note(self: Any, start: int) -> Any:
        for tensors, keys, share in real(self, start):
            weights, own = tensors["weights"], sum(key.startswith("0") and len(key) == 7 for key in keys)
            halves.append((float(weights[:own].sum()) / len(weights), float(weights[own:].sum()) / len(weights)))
            sizes.append((own, len(weights) - own))
            yield tensors, keys, share

    monkeypatch.setattr(setup.Setup, "feed", note)
    prior = {"prompt": "a blue picture", "count": 6, "weight": 0.5}
    outcome, _ = run(
        places, tmp_path, "dreambooth", model=str(places / "tiny_stable_diffusion"), prior=prior, train={"steps": 20},
    )  # fmt: skip
    assert outcome.exit_code == 0
    assert len(list((tmp_path / "prior" / "images").glob("*.png"))) == 6
    assert halves and all(abs(own - 1) < 1e-6 and abs(other - 0.5) < 1e-6 for own, other in halves)
    assert {n for n, _ in sizes} == {8, 1}, "an epoch's last batch is short"
    assert inspect_model(tmp_path).kind == "text-to-image"


@pytest.mark.slow
def test_autoencoder_learns_and_measures_its_scale(places: Path, tmp_path: Path) -> None:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [16, 16], "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16}
    networks = {"vae": {**blocks, **sizes}}
    outcome, scores = run(places, tmp_path, "autoencoder", networks=networks, train={"steps": 120})
    assert scores[-1]["psnr"] > scores[0]["psnr"] + 3
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor == pytest.approx(1 / outcome.scores["latent_std"])


def test_clip_learns_to_tell_captions_apart(places: Path, tmp_path: Path) -> None:
    _, scores = run(
        places, tmp_path, "clip", model=str(places / "tiny_clip"), train={"steps": 100, "learning_rate": 3e-3}
    )
    assert scores[-1]["top1"] > 0.9 and scores[-1]["names"] == 2
    from genkit import ClipScorer

    scorer = ClipScorer.from_pretrained(tmp_path, device="cpu", dtype="float32")
    from PIL import Image

    found = scorer.classify(
        [Image.new("RGB", (16, 16), c) for c in COLOURS.values()], [f"a {c} picture" for c in COLOURS], ["{}"]
    )
    assert [max(p, key=lambda label: p[label]) for p in found] == [f"a {c} picture" for c in COLOURS]


@pytest.mark.slow
def test_sdxl_shapes_train_whole_and_by_adapters(places: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    base = str(places / "tiny_sdxl")
    data = {"caption_dropout": 0.3, "crop": "random"}
    _, whole = run(
        places, tmp_path / "whole", "text-to-image", model=base, data=data, train={"steps": 30, "text_encoder": True},
        evaluate={"every": 10},
    )  # fmt: skip
    for name in ("text_encoder", "text_encoder_2"):
        before, after = (load_file(f / name / "model.safetensors") for f in (Path(base), tmp_path / "whole"))
        assert any(not torch.equal(before[key], after[key]) for key in before)
    assert whole[-1]["loss"] < whole[0]["loss"]
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "whole")
    _, lora = run(
        places, tmp_path / "lora", "lora", model=base, data={**data, "cache": 1}, lora={"rank": 2}, train={"steps": 30},
        evaluate={"every": 10, "prompts": ["a red picture"]},
    )  # fmt: skip
    assert lora[-1]["loss"] < lora[0]["loss"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "lora" / "lora", weight_name="pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "lora", "lora": {"targets": ["to_z"]}}, r"lora\.targets: \['to_z'\]"),
        ({"task": "textual-inversion", "token": {"placeholder": "fox", "initializer": "cat"}}, r"placeholder: 'fox'"),
        ({"task": "text-to-image", "evaluate": {"metrics": ["fid"]}, "data": {"validation": 0.0}}, "too few pictures"),
        ({"task": "text-to-image", "evaluate": {"metrics": ["fid"], "num_images": 1}}, "a distance needs 2"),
        ({"task": "text-to-image", "evaluate": {**FID, "features": "incepton"}}, r"features: 'incepton': no such"),
        ({"task": "text-to-image", "objective": {"zero_snr": True, "prediction": "epsilon"}}, r"prediction: epsilon"),
        (
            {"task": "dreambooth", "prior": {"prompt": "a dog", "path": "nowhere"}},
            r"prior\.path: 'nowhere': there is no such",
        ),
        ({"task": "unconditional"}, "is a model of kind text-to-image, not unconditional"),
        ({"task": "autoencoder", "data": {"cache": 2}}, r"data\.cache: 2: has no effect in task autoenc"),
        ({"task": "textual-inversion", "token": {"placeholder": "<a>", "initializer": "cat"}}, "none has the new word"),
        (
            {"task": "autoencoder", "networks": {"vae": {}}, "data": {"validation": 0.0}},
            r"data\.validation: holds nothing out",
        ),
        (
            {"task": "unconditional", "scheduler": FLOW, "objective": {"prediction": "v_prediction"}},
            "'v_prediction' cannot be said",
        ),
        ({"task": "text-to-image", "networks": {"unet": {"layers": 2}}}, r"networks\.unet: 'layers': unknown key"),
        ({"task": "text-to-image", "data": {"resolution": 21}}, r"data\.resolution: 21 is not a multiple"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_before_the_first_step(
    places: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = "emoji" if "token" in changes else str(places / "tiny_stable_diffusion")
    model = str(places / "tiny_ddpm") if "scheduler" in changes else model
    with pytest.raises(InputError, match=message) as error:
        run(places, tmp_path, **{"model": model, **changes})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "log.jsonl").exists()
