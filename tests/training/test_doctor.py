"""What the doctor finds in data sets that are wrong in one way each, and that it is quiet about those that are not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from genkit import cli
from genkit.components import load_components
from genkit.components.compose import compose_model
from genkit.datasets import duplicates as likeness
from genkit.datasets.config import Data
from genkit.datasets.sources import read_examples, split
from genkit.errors import InputError
from genkit.training import doctor
from genkit.training.cache import encoded
from genkit.training.control import model_of
from genkit.training.data import Batch, Pictures
from genkit.training.doctor import Report, check_data, examine
from genkit.training.loop import train
from genkit.training.recipe import make_recipe
from genkit.training.tasks import KINDS, make_task
from tests.tiny import tiny_clip, tiny_ddpm, tiny_stable_diffusion


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Return coarse coloured noise: no two seeds look alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(8):
        picture(n).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a thing of kind {n}")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_ddpm(folder / "ddpm")
    tiny_stable_diffusion(folder / "sd")
    tiny_clip(folder / "clip")
    return folder


def data_of(path: Path, **options: Any) -> Data:
    return Data.model_validate({"path": str(path), "validation": 0.0, **options})


def report_on(path: Path, **options: Any) -> Report:
    data = data_of(path, **options)
    return examine(data, *split(read_examples(data), data))


def recipe_of(
    model: Path, path: Path, task: str = "text-to-image", train: dict[str, Any] | None = None, **data: Any
) -> Any:
    extra = {"lora": {"rank": 2}} if task == "lora" else {}
    values = {"task": task, "model": str(model), "data": {"path": str(path), "validation": 0.0, **data}, **extra}
    values["evaluate"] = {"pictures": 1, "num_inference_steps": 1}
    return make_recipe(values | {"train": {"batch_size": 2, "steps": 2, **(train or {})}})


def report_for(recipe: Any) -> Report:
    kind = KINDS.get(recipe.task, "text-to-image")
    info = compose_model(kind, recipe.model, recipe.networks, recipe.scheduler)
    return examine(recipe.data, *split(read_examples(recipe.data), recipe.data), recipe, info)


def only(report: Report, level: str) -> str:
    assert [f.level for f in report.findings] == [level], report.lines()
    return report.findings[0].text


def test_nothing_is_said_of_what_is_right(pictures: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", ""]) == 2
    assert cli.run(["doctor", str(pictures)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("pictures  8: 8 to train on, 0 held out\nsizes     32x32 (8)\n") and "nothing is wrong" in out
    facts = report_for(recipe_of(models / "sd", pictures, train={"steps": 10})).facts
    assert facts["buckets"] == "16x16 (8)" and facts["steps"] == "10: 2.5 epochs of 4 steps"


# -- captions --


@pytest.mark.parametrize("wrong", ["3.caption", "3txt", "3.txt.txt", "3.png.txt", "3.tags"])
def test_a_caption_under_a_wrong_name_is_an_error_that_says_so(pictures: Path, wrong: str) -> None:
    (pictures / "3.txt").rename(pictures / wrong)
    said = only(report_on(pictures), "error")
    assert (
        said.startswith("1 of 8 pictures have no caption: 3.png")
        and f"{wrong!r}; its caption is looked for in '3.txt'" in said
    )
    assert "missing_captions" not in only(report_on(pictures, missing_captions="empty"), "warning")


def test_captions_of_another_column_or_of_shards_are_found(pictures: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"file_name": f"{n}.png", "title": f"thing {n}"}) for n in range(8)]
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    assert "(it has 'title': data.caption names the column)" in only(report_on(pictures), "error")
    assert not report_on(pictures, caption="title").findings
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(8):
            tar.add(pictures / f"{n}.png", f"{n}.png")
            tar.add(pictures / f"{n}.txt", f"{n}.caption")
    assert "beside it is '0.caption'" in only(report_on(tmp_path / "a.tar"), "error")


def test_tasks_without_captions_miss_none(pictures: Path, models: Path) -> None:
    for path in pictures.glob("*.txt"):
        path.unlink()
    assert "8 of 8 pictures have no caption" in only(report_on(pictures), "error")
    assert not report_for(recipe_of(models / "ddpm", pictures, "unconditional")).findings


@pytest.mark.slow
def test_captions_past_the_token_limit_as_templates_make_them(pictures: Path, models: Path) -> None:
    (pictures / "5.txt").write_text("one two three four " * 9)
    said = only(report_for(recipe_of(models / "sd", pictures)), "warning")
    assert re.match(r"1 captions are longer than the 32 tokens that are read, up to \d\d: 5.png", said)
    (pictures / "5.txt").write_text("a thing")
    assert not report_for(recipe_of(models / "sd", pictures)).findings
    long = report_for(recipe_of(models / "sd", pictures, captions=["{caption}", "a " * 30 + "{caption}"]))
    assert only(long, "warning").startswith("8 captions are longer")


# -- pictures --


def test_pictures_that_cannot_be_read_are_all_named(
    pictures: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (pictures / "2.png").read_bytes()
    (pictures / "2.png").write_bytes(whole[:-20])
    (pictures / "6.png").write_bytes(b"GIF89a")
    assert cli.run(["doctor", str(pictures), "--json", "-o", str(pictures.parent / "page.html")]) == 2
    found = json.loads(capsys.readouterr().out)["findings"]
    assert found[0]["pictures"] == [["2.png"], ["6.png"]] and found[0]["level"] == "error"
    assert "2 of 8 pictures cannot be read: 2.png: is truncated; 6.png: is not a PNG" in found[0]["text"]
    assert "unreadable</i>" in (page := (pictures.parent / "page.html").read_text()) and ">is truncated</small>" in page
    for n in (3, 4):
        (pictures / f"{n}.png").write_bytes(b"")
    assert cli.run(["doctor", str(pictures)]) == 2
    assert "--json names all of them" in capsys.readouterr().out
    (pictures / "7.png").unlink()
    os.symlink("nowhere", pictures / "7.png")
    recipe = recipe_of(models / "sd", pictures)
    with pytest.raises(InputError, match=r"data: 5 of 8 pictures cannot be read: "):
        train(recipe, pictures.parent / "out", device="cpu", quiet=True)


def test_what_is_tiny_and_what_is_not_read_is_named(pictures: Path, tmp_path: Path) -> None:
    picture(70, 4, 4).save(pictures / "0.png")
    assert only(report_on(pictures), "warning") == "1 pictures are tiny beside the others: 0.png (4x4)"
    picture(0).save(pictures / "0.png")
    picture(8).save(pictures / "8.BMP")
    (pictures / "sub").symlink_to(tmp_path)
    assert only(report_on(pictures), "warning").startswith("2 files are left out: 8.BMP, sub: ")


def test_an_empty_caption_and_a_picture_without_a_line_are_said_to_be_that(pictures: Path) -> None:
    (pictures / "3.txt").write_text("\n")
    assert "3.png ('3.txt' is empty)" in only(report_on(pictures), "error")
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    assert "7 of 8" in (said := only(report_on(pictures), "error"))
    assert "(no line of metadata.jsonl speaks of it)" in said


def test_small_pictures_and_small_buckets(pictures: Path, models: Path) -> None:
    picture(70, 8, 8).save(pictures / "0.png")
    assert "1 pictures are smaller than they are trained at, and blown up to 2.0 times: 0.png (8x8)" in only(
        report_for(recipe_of(models / "sd", pictures)), "warning"
    )
    picture(71, 64, 32).save(pictures / "0.png")
    report = report_for(recipe_of(models / "sd", pictures, buckets=True, bucket_step=8, resolution=32))
    assert only(report, "warning").startswith("1 of 2 buckets do not fill a batch of 2")
    assert sum(map(len, report.buckets.values())) == 8


def resaved(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.resize((48, 48)).save(file, "jpeg", quality=60)
    return Image.open(file)


def test_copies_and_pictures_that_look_alike(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pictures / "copy.png").write_bytes((pictures / "1.png").read_bytes())
    (pictures / "copy.txt").write_text("another caption")
    resaved(Image.open(pictures / "4.png")).save(pictures / "again.png")
    (pictures / "again.txt").write_text("again")
    same, near = (f.text for f in report_on(pictures).findings)
    assert same.startswith(
        "copies of a picture, byte for byte: 1, of 1 pictures, 1 of them under different captions: 1.png, copy.png"
    )
    assert near.startswith("2 pictures look alike, in 1 groups, the largest of 2: 4.png, again.png")
    looks = [likeness.Fingerprint(str(n), (8, 8), False, bytes([n > 2] * 64), bytes(768)) for n in range(5)]
    pairs = likeness.alike(looks)
    assert sorted(pairs) == [(0, 1), (0, 2), (1, 2), (3, 4)]
    monkeypatch.setattr(likeness, "MOST", 1)  # as with many pictures: neighbours alone, which join to the same groups
    assert likeness.joined(likeness.alike(looks)) == likeness.joined(pairs) == [[0, 1, 2], [3, 4]]


def test_things_of_one_shape_in_other_colours_are_not_alike(pictures: Path) -> None:
    for n, colour in enumerate(["red", "blue", "green"]):
        heart = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        ImageDraw.Draw(heart).ellipse((4, 4, 28, 28), fill=colour)
        heart.save(pictures / f"{n}.png")
    report = report_on(pictures)
    assert not report.findings and "3 transparent, on white" in report.facts["pictures"]


def test_what_is_held_out_must_not_be_trained_on(pictures: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    picture(90).save(held / "new.png")
    (held / "same.png").write_bytes((pictures / "3.png").read_bytes())
    resaved(Image.open(pictures / "5.png")).save(held / "near.png")
    for name in ("new", "same", "near"):
        (held / f"{name}.txt").write_text(name)
    report = report_on(pictures, validation=str(held))
    said = only(report, "warning")
    assert said.startswith("2 of 3 held-out pictures are trained on, or look like one that is: near.png, 5.png")
    pairs = [[report.pictures[i].key for i in group] for group in report.findings[0].groups]
    assert pairs == [["near.png", "5.png"], ["same.png", "3.png"]]


def test_a_share_that_a_field_cannot_give(pictures: Path) -> None:
    rows = [json.dumps({"file_name": f"{n}.png", "text": f"thing {n}", "kind": n % 2}) for n in range(8)]
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    said = only(report_on(pictures, validation=0.1, validation_by="kind"), "warning")
    assert said.startswith(
        "4 of 8 pictures are held out, where data.validation asks for 0.1 of them: kind has 2 values"
    )


def test_a_share_that_few_names_do_not_give(tmp_path: Path) -> None:
    def place(n: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{n}.png".encode()).digest()[:8], "big")

    def said(numbers: list[int]) -> list[str]:
        for n in numbers:
            picture(n).save(tmp_path / f"{n}.png")
            (tmp_path / f"{n}.txt").write_text(f"thing {n}")
        findings = report_on(tmp_path, validation=0.1).findings
        return [finding.text for finding in findings if "held out" in finding.text]

    ranked = sorted(range(200), key=place)
    assert said(ranked[-8:]) == [], "one is held out, as one is the least"
    (found,) = said(ranked[:5])
    assert found.startswith("5 of 13 pictures are held out, where data.validation asks for 0.1 of them: each is by the")


def test_hostile_names_and_captions_are_text(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "</span><script>alert(1)</script><img src=x onerror=alert(2)> {{policy}} \x1b[31m"
    (pictures / "0.txt").write_text(evil)
    for n in (1, 2):
        picture(50).save(pictures / f"<b>\x1b[2J{n}.png")
        (pictures / f"<b>\x1b[2J{n}.txt").write_text(evil)
    page = pictures.parent / "page.html"
    assert cli.run(["doctor", str(pictures), "-o", str(page)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    text = page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "{{policy}}" in text
    assert (
        "<script" not in text
        and "<img src=x" not in text
        and "<b>\x1b" not in text
        and "http" not in text.replace("http-equiv", "")
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'; img-src data:; style-src 'sha256-")


# -- before training --


def test_errors_stop_training_and_mended_data_trains(
    pictures: Path, models: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    recipe, out = recipe_of(models / "sd", pictures, train={"steps": 1}), tmp_path / "run"
    caption = (pictures / "3.txt").read_text()
    (pictures / "3.txt").unlink()
    with pytest.raises(InputError, match=r"data: 1 of 8 pictures have no caption: 3.png.*; see .*doctor.html"):
        train(recipe, out, device="cpu", quiet=True)
    assert not (out / "run.json").exists()
    (pictures / "3.txt").write_text(caption)
    assert train(recipe, out, device="cpu", quiet=True).exit_code == 0
    monkeypatch.setattr(doctor, "examine", lambda *a, **k: pytest.fail("examined again"))
    assert train(recipe, out, device="cpu", quiet=True).exit_code == 0


def test_what_is_wrong_with_the_recipe_is_not_said_of_the_data(pictures: Path, models: Path, tmp_path: Path) -> None:
    recipe = recipe_of(models / "sd", pictures).model_copy(update={"scheduler": {"_class_name": "DDIMSchedular"}})
    with pytest.raises(InputError, match=r"^scheduler: _class_name: .*DDIMSchedular"):
        train(recipe, tmp_path / "run", device="cpu", quiet=True)
    recipe = recipe_of(models / "sd", pictures, resolution=17)
    with pytest.raises(InputError, match=r"^data\.resolution: 17 is not a multiple of"):
        train(recipe, tmp_path / "run", device="cpu", quiet=True)


def test_data_are_examined_again_when_a_file_changed(pictures: Path, models: Path, tmp_path: Path) -> None:
    recipe = recipe_of(models / "sd", pictures)
    info = compose_model("text-to-image", recipe.model, recipe.networks, recipe.scheduler)
    examples, said = read_examples(recipe.data), list[str]()
    check_data(recipe, examples, [], info, tmp_path, said.append, quiet=True)
    (pictures / "2.png").write_bytes((pictures / "2.png").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"2\.png: is truncated"):
        check_data(recipe, examples, [], info, tmp_path, said.append, quiet=True)
    assert len(said) == 1 and said[0].startswith("error: 1 of 8 pictures cannot be read")


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("text-to-image", "sd", {}),
    ("text-to-image", "sd", {"text_encoder": True, "gradient_checkpointing": True}),
    ("lora", "sd", {}),
    ("controlnet", "sd", {}),
    ("unconditional", "ddpm", {}),
    ("autoencoder", "sd", {}),
    ("clip", "clip", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "model", "plan"), CASES, ids=lambda value: str(value))
def test_activations_are_those_that_a_real_step_keeps(
    pictures: Path, models: Path, name: str, model: str, plan: dict[str, Any]
) -> None:
    from genkit.training.estimate import task_on_shapes, training_memory

    cache = int(name not in ("autoencoder", "clip"))  # else encoding the pictures may take more
    told = {"cache": cache, **({"conditioning": "invert"} if name == "controlnet" else {})}
    recipe = recipe_of(models / model, pictures, name, {"batch_size": 1, "ema": 0.9, **plan}, **told)
    info = model_of(recipe, KINDS.get(name, "text-to-image"))
    shapes = task_on_shapes(recipe, info)
    found = training_memory(recipe, info, shapes, shapes.resolution)
    parts = load_components(info, device="cpu", dtype=torch.float32)
    task = make_task(recipe, parts, torch.float32)
    networks = [getattr(parts, n) for n in info.parts] + list(task.networks.values())
    weights = {p.untyped_storage()._cdata: p for network in networks for p in network.parameters()}
    learns = sum(p.numel() for p in weights.values() if p.requires_grad)
    assert (found["gradients"], found["Adam"], found["average"]) == (4 * learns, 8 * learns, 4 * learns)
    assert found["weights"] == 4 * sum(p.numel() for p in weights.values())
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    width, height = task.resolution
    sizes = torch.zeros(1, 6, dtype=torch.long)
    pixels, dropped = torch.zeros(1, 3, height, width), torch.zeros(1, dtype=torch.bool)
    batch = Batch(pixels, [""], [""], sizes, torch.ones(1), dropped, conditioning=pixels.byte())
    tensors = task.encode(batch)
    for network in task.networks.values():
        network.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(tensors, torch.Generator().manual_seed(0))
    assert loss.shape == (1,)
    real = sum(storage.nbytes() for storage in kept.values())
    assert real * 0.9 < found["activations"] < real * 1.15


def test_the_time_is_what_torch_counts_at_the_speed_of_the_machine(
    pictures: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from genkit.training.estimate import task_on_shapes, training_work

    def work(task: str = "unconditional", model: str = "ddpm", size: int = 16, **data: Any) -> tuple[Any, int]:
        recipe = recipe_of(models / model, pictures, task, **data)
        info = compose_model(KINDS.get(task, "text-to-image"), recipe.model, recipe.networks, recipe.scheduler)
        return info, training_work(recipe, task_on_shapes(recipe, info), (size, size))

    info, counted = work()
    network = load_components(info, device="cpu", dtype=torch.float32).unet
    with FlopCounterMode(display=False) as counter:
        network.requires_grad_(True)(torch.zeros(1, 3, 16, 16), torch.zeros(1)).sample.sum().backward()
    assert 1 <= counted / counter.get_total_flops() < 1.2, "a CPU's own attention is not counted"
    assert 3.5 < work(size=32)[1] / counted < 6
    assert work("lora", "sd", cache=1)[1] < work("lora", "sd")[1] < work("text-to-image", "sd")[1]
    monkeypatch.setattr("genkit.training.estimate.speed", lambda device, dtype: counted / 6)
    recipe = recipe_of(models / "ddpm", pictures, "unconditional", {"steps": 100, "gradient_accumulation_steps": 3})
    assert report_for(recipe).facts["time"].startswith("60 min or more on c"), "100 steps of 6 pictures of 6 s"
    recipe = recipe_of(models / "ddpm", pictures, "unconditional", {"steps": 10**6, "max_seconds": 60})
    assert report_for(recipe).facts["time"] == "60 s, which train.max_seconds allows; all steps take 139 days or more"


# -- the cache --


def test_a_change_makes_one_shard_anew_and_a_flipped_bit_too(pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("genkit.training.cache.SHARD", 2)
    made: list[str] = []

    def encode(batch: Batch) -> dict[str, torch.Tensor]:
        made.extend(batch.keys)
        return {"mean": batch.pixels.mean(dim=(2, 3)).half()}

    def cached(**options: Any) -> Any:
        made.clear()
        data = data_of(pictures, cache=1, **options)
        source = Pictures(read_examples(data), data, (16, 16), 8, 0)
        return source, encoded(source, encode, tmp_path / "cache", "w", quiet=True)

    cached()
    assert len(made) == 8
    cached(caption_dropout=0.5, validation=0.5, repeat=3)
    assert not made, "what is not in the tensors"
    (pictures / "3.txt").write_text("new")
    cached()
    assert "3.png" in made and len(made) < 8
    (pictures / "3.png").write_bytes((pictures / "4.png").read_bytes())  # other bytes under the same name
    cached()
    assert "3.png" in made and len(made) < 8
    for shard in (tmp_path / "cache").rglob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    (tmp_path / "cache" / "digests.json").write_text("[")
    source, found = cached(workers=2)
    assert len(made) == 8
    expected = encode(source.batch([5, 0], 0))["mean"]
    assert torch.equal(found.batch([5, 0], 0).tensors["mean"], expected)
