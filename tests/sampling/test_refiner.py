"""SDXL's refiner, on its own and after a model: diffusers' pictures, in any batch, resumed, and what is refused."""

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

from genkit import ImageToImage, InputError, Request, TextToImage, generate, replay
from genkit.components import inspect_model, load_components
from genkit.device.memory import LAYERS, LEVELS, PARTS, RESIDENT, Budget, away
from genkit.job.load import reopen
from genkit.job.plan import plan_job
from genkit.options import Options
from genkit.rows.infotext import read_picture_settings
from genkit.rows.refining import check_refiner, handover
from genkit.rows.sdxl import time_ids
from genkit.runs.records import read_config
from genkit.sampling.engine import Engine, _Group
from genkit.sampling.tuning import tune_model
from tests.components.checkpoints import folder_of
from tests.sampling.test_few_steps import CONFIGS, lcm_lora, reads_guidance, xl
from tests.sampling.test_parity import assert_same, seeds
from tests.sampling.test_sdxl_conditioning import differs, louder
from tests.tiny import tiny_refiner, tiny_stable_diffusion

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32))


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return louder(tiny_refiner(tmp_path_factory.mktemp("refiner"), CONFIGS["base"]))


@pytest.fixture(scope="module")
def gen(refiner: Path) -> ImageToImage:
    return ImageToImage.from_pretrained(refiner, device="cpu")


def pipeline(name: str, folder: Path) -> Any:
    pipe = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


ROWS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # a row, and diffusers' arguments
    ({}, {}),
    ({"strength": 0.8, "negative_prompt": "blurry"}, {"strength": 0.8, "negative_prompt": "blurry"}),
    (
        {"aesthetic_score": 9, "negative_aesthetic_score": 1.0, "original_size": [100, 200], "crop": [3, 40]},
        {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0, "original_size": (200, 100),
         "crops_coords_top_left": (40, 3)},
    ),
    (
        {"negative_original_size": [8, 16], "negative_crop": "7,70"},
        {"negative_original_size": (16, 8), "negative_crops_coords_top_left": (70, 7)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "theirs"), ROWS)
def test_as_a_model_of_its_own(refiner: Path, gen: ImageToImage, row: dict[str, Any], theirs: dict[str, Any]) -> None:
    pipe = pipeline("StableDiffusionXLImg2ImgPipeline", refiner)
    same: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 5.0}
    made = pipe("a red fox", image=PICTURE, generator=seeds(3), **same, **theirs).images
    (ours,) = gen.stream([Request(prompt="a red fox", image=PICTURE, seed=3, **same, **row)])
    assert_same([ours.image], made)
    (other,) = gen.stream([Request(prompt="a red fox", image=PICTURE, seed=3, **same)])
    assert not row or differs(ours.image, other.image), "the fields say nothing"


def test_its_scores_take_the_place_of_the_target() -> None:
    positive, negative = time_ids(Request(prompt="a", crop=[1, 2], original_size=[64, 32]), 8, 8, refines=True)
    assert positive == [32, 64, 2, 1, 6.0] and negative == [32, 64, 0, 0, 2.5]


def test_a_run_of_the_refiner(refiner: Path, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "in.png")
    row = Request(id="a", prompt="a fox", image=str(tmp_path / "in.png"), seed=1, num_images=2, aesthetic_score=7.5)
    run: dict[str, Any] = {"model": str(refiner), "quiet": True, "device": "cpu"}
    assert generate([row], tmp_path / "run", **run).new == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "requests.jsonl").read_text().splitlines()]
    assert (rows[0]["strength"], rows[0]["guidance_scale"], rows[0]["aesthetic_score"]) == (0.3, 5.0, 7.5)
    whole = (tmp_path / "run" / "images" / "a-01.png").read_bytes()
    (tmp_path / "run" / "images" / "a-01.png").unlink()
    assert generate([row], tmp_path / "run", **run).new == 1
    assert (tmp_path / "run" / "images" / "a-01.png").read_bytes() == whole


def test_a_folder_without_an_index(refiner: Path, gen: ImageToImage, tmp_path: Path) -> None:
    shutil.copytree(refiner, tmp_path / "bare")
    (tmp_path / "bare" / "model_index.json").unlink()
    assert inspect_model(tmp_path / "bare").refines
    other = ImageToImage.from_pretrained(tmp_path / "bare", device="cpu")
    assert_same(other("a fox", PICTURE, seed=1).images, gen("a fox", PICTURE, seed=1).images)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "image: is missing: this model is SDXL's refiner, which finishes pictures"),
    ({"image": PICTURE, "prompt_2": "x"}, "prompt_2: 'x': SDXL's refiner does not read it, and this model is one"),
    ({"image": PICTURE, "target_size": [8, 8]}, "target_size: [8, 8]: SDXL's refiner does not read it"),
]


@pytest.mark.parametrize(("row", "words"), REFUSED)
def test_rows_that_it_cannot_draw(refiner: Path, tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        generate([Request(prompt="a", **row)], tmp_path / "run", model=str(refiner), quiet=True)
    assert words in str(caught.value) and not (tmp_path / "run").exists()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: edit(f / "model_index.json", text_encoder_2=[None, None]), "text_encoder_2: is missing"),
    (lambda f: edit(f / "model_index.json", requires_aesthetics_score=False), "text_encoder: is missing"),
    (lambda f: edit(f / "unet" / "config.json", projection_class_embeddings_input_dim=60),
     "projection_class_embeddings_input_dim: 60, but 5 times addition_time_embed_dim"),
    (lambda f: edit(f / "unet" / "config.json", cross_attention_dim=40), "cross_attention_dim: 40, but"),
]  # fmt: skip


@pytest.mark.parametrize(("breaking", "words"), BROKEN)
def test_bad_folders_are_refused(tmp_path: Path, breaking: Callable[[Path], Any], words: str) -> None:
    breaking(tiny_refiner(tmp_path))
    with pytest.raises(InputError) as caught:
        inspect_model(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_it_is_not_tuned(refiner: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is SDXL's refiner"):
        tune_model(str(refiner), 4, out=tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return louder(xl(tmp_path_factory.mktemp("base") / "base", "base"))


@pytest.fixture(scope="module")
def both(base: Path, refiner: Path) -> TextToImage:
    return TextToImage.from_pretrained(base, device="cpu", refiner=refiner, refiner_start=0.5)


@pytest.fixture(scope="module")
def pipes(base: Path, refiner: Path) -> tuple[Any, Any]:
    """diffusers' two pipelines; the refiner's VAE is that of the model, as it is in the published ones."""
    first = pipeline("StableDiffusionXLPipeline", base)
    second = pipeline("StableDiffusionXLImg2ImgPipeline", refiner)
    second.vae = first.vae
    return first, second


ROW: dict[str, Any] = {"prompt": "a red fox", "seed": 3, "guidance_scale": 5.0}


def drawn(gen: TextToImage, **row: Any) -> Image.Image:
    (result,) = gen.stream([Request(**{**ROW, **row})])
    assert result.status == "done", result.reason
    return result.image


def handed(
    pipes: tuple[Any, Any], steps: int, start: float, scheduler: Callable[[Any], Any], first: Any = (), second: Any = ()
) -> Any:
    """Return diffusers' picture of base(denoising_end=start) and refiner(denoising_start=start)."""
    for pipe in pipes:
        pipe.scheduler = scheduler(diffusers.EulerDiscreteScheduler.from_config(CONFIGS["base"]).config)
    (generator,) = seeds(3)
    same: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 5.0, "generator": generator}
    one, two = pipes
    latents = one("a red fox", denoising_end=start, output_type="latent", **same, **dict(first)).images
    return two("a red fox", image=latents, denoising_start=start, **same, **dict(second)).images


SOLVERS: list[tuple[str, Callable[[Any], Any]]] = [
    ("euler", diffusers.EulerDiscreteScheduler.from_config),
    ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler.from_config),
    ("dpmpp_2m_karras", lambda c: diffusers.DPMSolverMultistepScheduler.from_config(c, use_karras_sigmas=True)),
    ("euler_ancestral", diffusers.EulerAncestralDiscreteScheduler.from_config),
    ("ddim", diffusers.DDIMScheduler.from_config),
]


@pytest.mark.parametrize(("solver", "theirs"), SOLVERS, ids=[s[0] for s in SOLVERS])
def test_it_takes_over_as_in_diffusers(
    both: TextToImage, base: Path, pipes: tuple[Any, Any], solver: str, theirs: Callable[[Any], Any]
) -> None:
    ours = drawn(both, num_inference_steps=12, scheduler=solver)
    assert_same([ours], handed(pipes, 12, 0.5, theirs))
    alone = TextToImage.from_pretrained(base, device="cpu")
    assert differs(ours, drawn(alone, num_inference_steps=12, scheduler=solver)), "the refiner does nothing"


@pytest.mark.parametrize(
    ("steps", "start"), [(5, 0.8), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((25, 0.8), (10, 0.35)))]
)
def test_where_it_takes_over(base: Path, refiner: Path, pipes: tuple[Any, Any], steps: int, start: float) -> None:
    gen = TextToImage.from_pretrained(base, device="cpu", refiner=refiner, refiner_start=start)
    made = handed(pipes, steps, start, diffusers.EulerDiscreteScheduler.from_config)
    assert_same([drawn(gen, num_inference_steps=steps)], made)
    plan = gen.plan(Request(**ROW, num_inference_steps=steps))
    assert 0 < handover(plan, start, 1000) < steps == plan.nfe


def test_what_each_of_them_reads(both: TextToImage, pipes: tuple[Any, Any]) -> None:
    sizes = {"original_size": (50, 100), "crops_coords_top_left": (40, 3), "negative_prompt": "blurry"}
    first = {**sizes, "prompt_2": "an owl", "target_size": (20, 50)}
    made = handed(
        pipes, 10, 0.5, diffusers.EulerDiscreteScheduler.from_config, first, {**sizes, "aesthetic_score": 9.0}
    )
    row: dict[str, Any] = {
        "original_size": [100, 50],
        "crop": [3, 40],
        "negative_prompt": "blurry",
        "prompt_2": "an owl",
    }
    row |= {"target_size": [50, 20], "aesthetic_score": 9}
    assert_same([drawn(both, num_inference_steps=10, **row)], made)


def test_rows_at_steps_of_either_network_share_the_slots(both: TextToImage) -> None:
    rows = [
        Request(id=str(k), prompt="a red fox", seed=k, num_inference_steps=4 + k, guidance_scale=1.0 + 2 * (k % 3),
                width=32 + 16 * (k % 2), scheduler=("euler", "dpmpp_2m", "euler_ancestral")[k % 3])
        for k in range(7)
    ]  # fmt: skip
    mixed = {r.id: r for r in both.stream(rows, slots=3)}
    for row in rows:
        (alone,) = both.stream([row])
        assert_same([mixed[str(row.id)].image], [alone.image])
        calls = (row.num_inference_steps or 0) * (1 if row.guidance_scale == 1 else 2)
        assert alone.nfe == mixed[str(row.id)].nfe == calls


@pytest.mark.slow
def test_prompts_with_syntax_are_read_by_both(both: TextToImage) -> None:
    """Edited, composed and long prompts, with the hand-over before or after the change, are as alone; all differ."""
    colours = ("red", "green", "blue", "grey", "white", "black", "brown")
    long = ", ".join(f"a {colour} fox under a tree" for colour in colours)
    texts = (
        "a fox", "a [fox:green apple:0.2]", "a [fox:green apple:0.9]", "a fox AND an apple :0.5", "a (fox:1.4)", long,
        f"[a fox:{long}:0.9]",
    )  # fmt: skip
    rows = [
        Request(id=str(k), prompt=text, syntax="a1111", seed=1, num_inference_steps=8, guidance_scale=4.0)
        for k, text in enumerate(texts)
    ]
    mixed = {r.id: r for r in both.stream(rows)}
    for row in rows:
        (alone,) = both.stream([row])
        assert_same([mixed[str(row.id)].image], [alone.image])
    assert len({r.image.tobytes() for r in mixed.values()}) == len(rows)
    plain = both("a fox", seed=1, num_inference_steps=8, guidance_scale=4.0).images
    assert_same([mixed["0"].image], plain)


@pytest.mark.slow
def test_pictures_masks_intervals_and_pruning(both: TextToImage, base: Path) -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    rows: list[dict[str, Any]] = [
        {"image": PICTURE, "strength": 0.7}, {"image": PICTURE, "strength": 0.7, "mask_image": mask},
        {"guidance_interval": [0.2, 0.8]},
    ]  # fmt: skip
    alone = TextToImage.from_pretrained(base, device="cpu")
    for row in rows:
        assert differs(drawn(both, num_inference_steps=10, **row), drawn(alone, num_inference_steps=10, **row))
    (interval,) = both.stream([Request(**ROW, num_inference_steps=10, **rows[2])])
    assert interval.nfe == 10 + 6
    trajectory = both.begin(Request(**ROW, num_inference_steps=10, **rows[1]), 0, 3)
    assert both.refiner is not None and trajectory.keep_mask is not None and trajectory.known is not None
    engine = Engine(both.denoiser, torch.device("cpu"), 4, refiner=both.refiner.denoiser)
    waiting = [trajectory]
    (end,) = (t for ended in engine.run(lambda free, alone: [waiting.pop()] if waiting else []) for t in ended)
    kept = trajectory.keep_mask.expand_as(end.latent) == 0
    assert kept.any() and torch.equal(end.latent[kept], trajectory.known[0][kept]), "what is black stays"
    fields = {**ROW, "num_images": 4, "num_inference_steps": 10, "rank_by": "sharpness"}
    whole = {r.index: r for r in both.stream([Request(id="a", **fields)])}
    for after in (0.3, 0.5, 0.8):  # before, at and after the hand-over
        pruned = list(both.stream([Request(id="a", **fields, prune={"after": after})]))
        done = [r for r in pruned if r.status == "done"]
        assert len(pruned) == 4 and len(done) == 2
        assert_same([r.image for r in done], [whole[r.index].image for r in done])


def test_loras_are_the_models_alone(base: Path, refiner: Path, pipes: tuple[Any, Any], tmp_path: Path) -> None:
    file = lcm_lora(base, tmp_path / "pytorch_lora_weights.safetensors")
    gen = TextToImage.from_pretrained(base, device="cpu", refiner=refiner, refiner_start=0.5)
    lora = [{"file": str(file), "weight": 0.5}]
    pipes[0].load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="a")
    pipes[0].set_adapters("a", 0.5)
    try:
        made = handed(pipes, 8, 0.5, diffusers.EulerDiscreteScheduler.from_config)
    finally:
        pipes[0].unload_lora_weights()
    ours = drawn(gen, num_inference_steps=8, loras=lora)
    assert_same([ours], made)
    assert differs(ours, drawn(gen, num_inference_steps=8))


@pytest.mark.parametrize("level", LEVELS)
def test_every_memory_level(base: Path, refiner: Path, both: TextToImage, level: str) -> None:
    info = inspect_model(base)
    other = check_refiner(info, inspect_model(refiner), 0.5)
    assert set(other.parts) == {"unet", "text_encoder_2"}
    cpu = torch.device("cpu")
    one, two = (load_components(i, device=cpu, dtype=torch.float32, in_ram=away(level, i.parts)) for i in (info, other))
    gen = TextToImage.from_components(one, Budget(level, 4, 1e9, 0, 0), refiner=(two, 0.5))
    rows = [Request(**{**ROW, "seed": k}, id=str(k), num_inference_steps=4 + k) for k in range(5)]
    for result, expected in zip(*(sorted(g.stream(rows), key=lambda r: r.id) for g in (gen, both)), strict=True):
        assert_same([result.image], [expected.image])
    assert (level in (RESIDENT, PARTS, LAYERS)) != ("refiner" in gen.residency._networks and level != LAYERS)


def test_memory_counts_both(base: Path, refiner: Path) -> None:
    alone, two = (
        plan_job([Request(prompt="a")], Options(model=str(base), refiner=r), {}).describe()
        for r in (None, str(refiner))
    )
    assert two["memory_gib"]["cuda"]["weights"] >= alone["memory_gib"]["cuda"]["weights"]
    assert (two["refiner"], two["refiner_start"]) == (str(refiner), 0.8) and "refiner" not in alone
    from genkit.components.needs import model_need

    info, other = inspect_model(base), inspect_model(refiner)
    found = model_need(info, None, "float16", "cuda", refiner=other).weights
    assert found["refiner"] == 2 * other.parts["unet"].parameters
    assert found["refiner_text"] == 2 * other.parts["text_encoder_2"].parameters


def test_a_run_with_both_goes_on_and_is_reopened(base: Path, refiner: Path, tmp_path: Path) -> None:
    row = Request(id="a", prompt="a fox", seed=1, num_images=3, num_inference_steps=4)
    run: dict[str, Any] = {"model": str(base), "quiet": True, "device": "cpu"}
    both: dict[str, Any] = {"refiner": str(refiner), "refiner_start": 0.6}
    out = tmp_path / "run"
    assert generate([row], out, max_total_images=2, **run, **both).new == 2
    assert generate([row], out, **run, **both).new == 1
    whole = (out / "images" / "a-02.png").read_bytes()
    (out / "images" / "a-02.png").unlink()
    moved = shutil.copytree(refiner, tmp_path / "moved")
    assert generate([row], out, **run, refiner=str(moved), refiner_start=0.6).new == 1
    assert (out / "images" / "a-02.png").read_bytes() != b""
    with Image.open(out / "images" / "a-02.png") as one:
        assert f"Refiner: {moved.name}, Refiner switch at: 0.6" in one.info["parameters"]
        assert json.loads(one.info["genkit"])["refiner"] == {
            "name": moved.name, "start": 0.6, "weights": read_config(out)["binding"]["refiner"]["weights"],  # type: ignore[index]
        }  # fmt: skip
        again = np.asarray(one)
    (tmp_path / "before.png").write_bytes(whole)
    with Image.open(tmp_path / "before.png") as before:
        assert np.array_equal(again, np.asarray(before))
    for options, lacking in (
        (Options(), ["refiner"]),
        (Options(refiner=str(moved), refiner_start=0.7), ["refiner: another start"]),
        (Options(refiner=str(moved), refiner_start=0.6), []),
    ):
        told = replay([out / "images" / "a-02.png"], tmp_path / f"r{len(lacking)}{options.refiner_start}",
                      options=options, model=str(base))["pictures"][0]  # fmt: skip
        assert told["lacking"] == lacking and (lacking or told["result"] == "identical")
    found = read_picture_settings(out / "images" / "a-02.png")
    assert found.lacking == ("refiner",) and "is an option of a run, --refiner" in found.notes[0]
    generator, _, _, _ = reopen(out, "cpu")
    assert (generator.refiner.name, generator.refiner.start) == (str(refiner), 0.6)
    for other, words in (({}, "refiner.weights.*none"), ({**both, "refiner_start": 0.7}, "refiner.start: 0.6 -> 0.7")):
        with pytest.raises(InputError, match=words):
            generate([row], out, **run, **other)


def test_what_does_not_go_together_is_refused(base: Path, refiner: Path, tmp_path: Path) -> None:
    sd = tiny_stable_diffusion(tmp_path / "sd")
    lcm = reads_guidance(xl(tmp_path / "lcm", "lcm"), 8)
    inpaints = folder_of("SDXL", tmp_path / "inpaints", in_channels=9)
    other = tiny_refiner(tmp_path / "other", {**CONFIGS["base"], "beta_end": 0.02})
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"model": sd}, {}, "--refiner: finishes pictures of SDXL, and .* is not SDXL"),
        ({"model": refiner}, {}, "--refiner: finishes pictures of SDXL, and .* is a refiner itself"),
        ({"model": lcm}, {}, "--refiner: does not read the guidance scale"),
        ({"model": inpaints}, {}, "--refiner: does not read the mask"),
        ({"refiner": base}, {}, "--refiner: .* is not SDXL's refiner"),
        ({"refiner": other}, {}, "--refiner: was trained on other noise: beta_end 0.02, and 0.012"),
        ({"refiner": None, "refiner_start": 0.5}, {}, "--refiner-start: 0.5 needs --refiner"),
        ({"refiner_start": 1.0}, {}, "--refiner-start: 1 is not more than 0 and less than 1"),
        ({"refiner_start": 0.001}, {}, "of 30 steps the refiner's start, 0.001, leaves the model none"),
        ({"refiner_start": 0.999}, {}, "of 30 steps the refiner's start, 0.999, leaves the refiner none"),
        ({}, {"scheduler": "heun"}, "request 0: scheduler: heun calls the network several times a step"),
        ({}, {"scheduler": "tuned"}, "request 0: scheduler: "),
    ]  # fmt: skip
    for run, row, words in cases:
        asked = {"model": base, "refiner": refiner, **run}
        asked = {k: str(v) if isinstance(v, Path) else v for k, v in asked.items()}
        with pytest.raises(InputError, match=words) as caught:
            generate([Request(prompt="a", **row)], tmp_path / "run", quiet=True, **asked)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_nan_in_half_precision_is_redone_by_both_in_float32(base: Path, refiner: Path) -> None:
    gen = TextToImage.from_pretrained(base, device="cpu", dtype="bfloat16", refiner=refiner, refiner_start=0.5)
    assert gen.refiner is not None
    denoiser = gen.refiner.denoiser
    whole = denoiser._plain

    def sick(*inputs: torch.Tensor) -> torch.Tensor:
        return whole(*inputs) * (1 if denoiser.unet.dtype == torch.float32 else float("nan"))

    denoiser._plain = sick  # type: ignore[method-assign, assignment]
    exact = TextToImage.from_pretrained(base, device="cpu", refiner=refiner, refiner_start=0.5)
    difference = np.asarray(drawn(gen, num_inference_steps=4), dtype=int) - drawn(exact, num_inference_steps=4)
    assert np.abs(difference).mean() < 3
    assert gen.unet.dtype == denoiser.unet.dtype == torch.bfloat16


def test_memory_that_runs_out_at_the_hand_over_costs_slots_and_no_picture(
    both: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Request(**{**ROW, "seed": k}, id=str(k), num_inference_steps=6) for k in range(4)]
    expected = {r.id: r.image for r in both.stream(rows)}
    add = _Group.add
    failures: list[int] = []

    def scarce(self: _Group, new: Any) -> bool:
        if self.refines and len(failures) < 2:
            failures.append(len(new))
            raise torch.OutOfMemoryError("no room")
        return add(self, new)

    monkeypatch.setattr(_Group, "add", scarce)
    monkeypatch.setattr(both, "most_slots", None)
    found = {r.id: r for r in both.stream(rows, slots=4)}
    assert failures and {r.status for r in found.values()} == {"done"}
    for key, result in found.items():
        assert_same([result.image], [expected[key]])
