"""Masks in words: found before drawing, recorded with the run, part of what a picture depends on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from genkit import InputError, Request, TextToImage, generate
from genkit.cli import run as command
from genkit.job.load import reopen
from genkit.job.masks import find_masks, recall_masks
from genkit.rows.prompts import read_prompts
from genkit.runs.records import read_results, read_rows
from genkit.vision.segmenter import Segmenter
from tests.senses import noise, tensor, tiny_clipseg
from tests.tiny import tiny_stable_diffusion


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, segmenter and a picture, start.png, of 40x32 pixels."""
    folder = tmp_path_factory.mktemp("masks")
    tiny_stable_diffusion(folder / "sd")
    tiny_clipseg(folder / "clipseg")
    noise(3, 32, 40).save(folder / "start.png")
    return folder


def row(here: Path, name: str = "a", **fields: Any) -> Request:
    given: dict[str, Any] = {"image": str(here / "start.png"), "mask": "the tail", "seed": 3, **fields}
    return Request(id=name, prompt="a fox", num_inference_steps=3, **given)


def draw(here: Path, out: Path, rows: list[Request], **options: Any) -> dict[str, str]:
    """Draw rows into a run and return the SHA-256 of each row's picture."""
    given: dict[str, Any] = {
        "model": str(here / "sd"),
        "segmenter": str(here / "clipseg"),
        "device": "cpu",
        "quiet": True,
        "batch_size": 1,
    }
    generate(rows, out, **{**given, **options})
    return {result.id: str(result.sha256) for result in read_results(out)}


def test_drawn_as_with_the_same_mask_as_a_picture(here: Path, tmp_path: Path) -> None:
    """The mask is that of the segmenter's map at the size of the drawn picture, and recorded."""
    rows = [row(here), row(here, "b", mask_grow=2, mask_invert=True, mask_threshold=0.6), row(here, "c", width=48)]
    found = draw(here, tmp_path / "words", rows, no_metadata=True)
    levels = Segmenter.from_pretrained(here / "clipseg", device="cpu").maps
    pixels = Segmenter.from_pretrained(here / "clipseg", device="cpu").pixels(tensor(Image.open(here / "start.png")))
    for name, (width, height), threshold in (("a", (40, 32), 0.5), ("b", (40, 32), 0.6), ("c", (48, 32), 0.5)):
        whole = torch.nn.functional.interpolate(levels(pixels, ["the tail"]), (height, width), mode="bilinear")
        wanted = Image.fromarray((whole[0, 0].numpy() >= threshold).astype(np.uint8) * 255)
        if name == "b":
            wanted = wanted.filter(ImageFilter.MaxFilter(5)).point(lambda level: 255 - level)
        mask = Image.open(tmp_path / "words" / "masks" / f"{name}.png").convert("L")
        assert 0 < np.array(mask).mean() < 255 and np.array_equal(np.array(mask), np.array(wanted))
    pictures = [
        row(
            here,
            str(one.id),
            mask=None,
            mask_image=str(tmp_path / "words" / "masks" / f"{one.id}.png"),
            width=one.width,
        )
        for one in rows
    ]
    assert draw(here, tmp_path / "pictures", pictures, no_metadata=True, segmenter=None) == found
    assert draw(here, tmp_path / "other", [row(here, mask="two houses"), *rows[1:]], no_metadata=True) != found


@pytest.mark.slow
def test_going_on_draws_again_what_depends_on_the_mask(here: Path, tmp_path: Path) -> None:
    plain = Request(id="z", prompt="a fox", num_inference_steps=3, seed=9)
    rows, out = [row(here), row(here, "b", seed=4), plain], tmp_path / "run"
    draw(here, out, rows, max_total_images=1)
    first = draw(here, out, rows)
    assert first == draw(here, tmp_path / "at once", rows)
    stamps = {file.name: file.stat().st_mtime_ns for file in (out / "images").iterdir()}
    assert draw(here, out, rows) == first
    assert stamps == {file.name: file.stat().st_mtime_ns for file in (out / "images").iterdir()}
    changed = draw(here, out, [rows[0], row(here, "b", seed=4, mask_threshold=0.7), plain])
    assert changed["b"] != first["b"] and changed["a"] == first["a"]
    tiny_clipseg(tmp_path / "other", seed=8)
    again = draw(here, out, rows, segmenter=str(tmp_path / "other"))
    assert again["a"] != first["a"] and again["z"] == first["z"]
    recorded = json.loads((out / "run.json").read_text())["binding"]["segmenter"]
    assert recorded["folder"] == str(tmp_path / "other")
    shutil.move(tmp_path / "other", tmp_path / "moved")
    assert draw(here, out, rows, segmenter=str(tmp_path / "moved")) == again


def test_older_rows_keep_their_fingerprint() -> None:
    assert Request(prompt="a fox").fingerprint() == "f635e1f001d2e6a5"
    assert Request(prompt="a fox", image="x.png", mask_image="y.png", seed=3).fingerprint() == "dfdd884bf988bfdc"
    one: dict[str, Any] = {"prompt": "a fox", "image": "x.png", "mask": "the tail"}
    different: list[dict[str, Any]] = [
        {},
        {"mask": "the ear"},
        {"mask_threshold": 0.4},
        {"mask_grow": 1},
        {"mask_invert": True},
    ]
    assert len({Request(**{**one, **fields}).fingerprint() for fields in different}) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_image": "y.png"}, "does not go with mask_image"),
        ({"image": None}, "mask: needs `image`"),
        ({"mask": None, "mask_grow": 3}, "mask_grow: needs `mask`"),
        ({"mask": " "}, "mask: ' ' must say what to draw anew"),
        ({"mask": Image.new("L", (8, 8))}, "a picture is `mask_image`"),
        ({"mask_threshold": 1.0}, "mask_threshold: 1.0 must be less than 1"),
        ({"mask_grow": -1}, "mask_grow: -1 must be at least 0"),
        ({"mask_grow": 513}, "mask_grow: 513 must be at most 512"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str, here: Path) -> None:
    with pytest.raises(InputError, match=message):
        row(here, **fields)


def test_refused_without_a_segmenter_and_nothing_is_left(here: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mask: 'the tail' needs --segmenter"):
        draw(here, tmp_path / "run", [row(here)], segmenter=None)
    with pytest.raises(InputError, match=r"config\.json: is absent"):
        draw(here, tmp_path / "run", [row(here)], segmenter=str(here / "sd"))
    assert not (tmp_path / "run").exists()
    one = row(here)
    model = TextToImage.from_pretrained(here / "sd", device="cpu")
    with pytest.raises(InputError, match="is to be found by a segmenter first"):
        list(model.stream([one]))
    find_masks([one], Segmenter.from_pretrained(here / "clipseg", device="cpu"))
    assert [result.status for result in model.stream([one])] == ["done"]
    unnamed = Request(prompt="a fox", image=str(here / "start.png"), mask="the tail", num_inference_steps=2)
    find_masks([unnamed], Segmenter.from_pretrained(here / "clipseg", device="cpu"))
    assert [result.status for result in model.stream([unnamed])] == ["done"]


def test_tables_and_masks_of_other_tools(here: Path, tmp_path: Path) -> None:
    start = here / "start.png"
    (tmp_path / "rows.csv").write_text(
        f"prompt,image,mask,mask_grow,mask_invert,Mask Threshold\na fox,{start},the tail,3,true,0.4\n"
        f"a fox,{start},{start},,,\na cat,,,,,\n"
    )
    rows = read_prompts(tmp_path / "rows.csv")
    assert [(r.mask, r.mask_grow, r.mask_invert, r.mask_threshold, r.mask_image) for r in rows] == [
        ("the tail", 3, True, 0.4, None), (None, None, None, None, str(start)), (None,) * 5,
    ]  # fmt: skip
    (tmp_path / "rows.yaml").write_text(f"- {{prompt: a fox, image: {start}, mask: the tail, mask_invert: true}}\n")
    assert read_prompts(tmp_path / "rows.yaml")[0].mask_invert is True
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "image": str(start), "mask": "gone.png"}) + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: mask_image: .*is absent"):
        read_prompts(tmp_path / "rows.jsonl")
    defaults = {"mask": "the tail", "mask_grow": 2, "image": str(start)}
    filled = [r.filled(defaults) for r in read_prompts(tmp_path / "rows.csv")]
    assert [(r.mask, r.mask_grow) for r in filled] == [("the tail", 3), (None, None), ("the tail", 2)]


def test_the_command(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "a fox", "--image", str(here / "start.png"), "--model", str(here / "sd"), "--steps", "3"]
    words += ["--seed", "5", "--device", "cpu"]
    own = ["--mask", "the tail", "--mask-grow", "2", "--segmenter", str(here / "clipseg")]
    assert command(["generate", *words, *own, "-o", str(tmp_path / "run")]) == 0
    assert command(["generate", *words, *own, "-o", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "segmenter" in capsys.readouterr().out
    picture = tmp_path / "run" / "images" / "000000-00.png"
    assert command(["replay", str(picture), "-o", str(tmp_path / "again"), "--json", "--model", str(here / "sd"),
                    f"image={here / 'start.png'}"]) == 2  # fmt: skip
    assert "needs --segmenter" in capsys.readouterr().err
    assert command(["replay", str(picture), "-o", str(tmp_path / "again"), "--json", "--model", str(here / "sd"),
                    f"image={here / 'start.png'}", "--segmenter", str(here / "clipseg")]) == 0  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert [one["result"] for one in report["pictures"]] == ["identical"]
    assert command(["generate", *words, *own, "--mask-threshold", "0.99", "-o", str(tmp_path / "none")]) == 0
    assert "mask: 'the tail' is nowhere more probable than 0." in capsys.readouterr().err
    assert command(["generate", *words, "--mask", "gone.png", "-o", str(tmp_path / "none")]) == 2
    assert "--mask: 'gone.png' is a picture" in capsys.readouterr().err
    assert command(["generate", *words, "--mask-grow", "3", "-o", str(tmp_path / "new")]) == 0
    assert "mask_grow: is not used: no row has a mask in words" in capsys.readouterr().err


def test_a_reopened_run_draws_with_the_recorded_masks(here: Path, tmp_path: Path) -> None:
    """As `redraw` does it for early scores: the same generator, and the masks of the run's folder."""
    found = draw(here, tmp_path / "run", [row(here)], no_metadata=True)
    generator, scorer, slots, seed = reopen(tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    recall_masks(tmp_path / "run", rows)
    result = next(generator.stream(rows, scorer=scorer, slots=slots, seed=seed))
    picture = np.array(Image.open(tmp_path / "run" / "images" / "a-00.png").convert("RGB"))
    assert found and np.array_equal(np.asarray(result.pixels), picture)
    (tmp_path / "run" / "masks" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: is absent: the mask of row a"):
        recall_masks(tmp_path / "run", read_rows(tmp_path / "run"))
