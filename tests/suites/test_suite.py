"""Suites: what a file must say, the rows of the built-in ones, and what the scores of the pixels find."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import label

from genkit.errors import InputError
from genkit.scoring.gates import Expression
from genkit.suites import emoji, geneval
from genkit.suites.pixels import LEAST, NAMES, _pieces, pixel_scores
from genkit.suites.suite import read_suite

ROW = {"prompt": "a fox", "verify": "clip > 0.2", "task": "things"}


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "s.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_suite_is_rows_with_verify_and_task(tmp_path: Path) -> None:
    found = read_suite(written(tmp_path, ROW, {**ROW, "id": "b", "num_images": 2, "meta": {"a": 1}, "steps": 3}))
    assert (found.name, found.tasks) == ("s", ["things", "things"])
    assert [row.gate for row in found.rows] == ["clip > 0.2"] * 2
    assert (found.rows[1].num_images, found.rows[1].num_inference_steps, found.rows[1].meta) == (2, 3, {"a": 1})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.csv", "id;prompt;verify;task\na;a fox;clip > 0.2;things\nb;a cat;p['a cat'] > 0.5;pets\n"),
        ("s.csv", "id,prompt,verify,task\na,a fox,clip > 0.2,things\nb,a cat,p['a cat'] > 0.5,pets\n"),
        ("s.yaml", "defaults: {task: things}\nrequests:\n- {id: a, prompt: a fox, verify: clip > 0.2}\n"
                   "- {id: b, prompt: a cat, verify: \"p['a cat'] > 0.5\", task: pets}\n"),
    ],
)  # fmt: skip
def test_tables_and_yaml_say_the_same_as_lines(name: str, text: str, tmp_path: Path) -> None:
    text = text.replace("a cat", "cat")
    labels = {"labels": ["cat", "dog"]}
    lines = read_suite([{**ROW, "id": "a"}, {**ROW, "id": "b", "prompt": "cat", "verify": "p['cat'] > 0.5",
                                             "task": "pets", **labels}])  # fmt: skip
    if "yaml" in name:
        text = text.replace("task: pets}", "task: pets, labels: [cat, dog]}")
    else:
        separator = ";" if ";" in text else ","
        first, a, b, _ = text.split("\n")
        text = "\n".join([first + separator + "labels", a + separator, b + separator + '"cat,dog"', ""])
    (tmp_path / name).write_text(text)
    found = read_suite(tmp_path / name)
    assert found.tasks == lines.tasks and found.sha256 == lines.sha256


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"verify": None}, r"s\.jsonl:2: verify: is missing; an expression that is true of a right picture"),
        ({"verify": "clip + 1"}, r"s\.jsonl:2: verify: 'clip \+ 1' is a number; compare it"),
        ({"verify": "clip > 2"}, r"s\.jsonl:2: verify: 'clip > 2' is never true: 'clip' is -1 to 1"),
        ({"verify": "p['cat'] > 0.5"}, r"s\.jsonl:2: verify: p\['cat'\]: there are no labels"),
        ({"verify": 7}, r"s\.jsonl:2: verify: 7 is not a text"),
        ({"task": " "}, r"s\.jsonl:2: task: ' ' is not a text"),
        ({"keep": 1}, r"s\.jsonl:2: 'keep': has no place in a suite"),
        ({"Max Images": 8}, r"s\.jsonl:2: 'Max Images': has no place in a suite"),
        ({"stesp": 3}, r"s\.jsonl:2: 'stesp': unknown field \(did you mean 'steps'\?\)"),
        ({"prompt": ""}, r"s\.jsonl:2: prompt: '' is empty"),
    ],
)
def test_a_bad_row_is_refused_by_file_line_and_field(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {key: value for key, value in {**ROW, **changed}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        read_suite(written(tmp_path, ROW, row))


def test_a_misspelt_verify_and_a_misspelt_suite_are_guessed(tmp_path: Path) -> None:
    row = {"prompt": "a fox", "verfy": "clip > 0.2", "task": "t"}
    with pytest.raises(InputError, match=r"verify: is missing \(did you mean 'verfy'\?\)"):
        read_suite(written(tmp_path, row))
    with pytest.raises(InputError, match=r"--suite: 'genevl': no such suite \(did you mean 'geneval'\?\)"):
        read_suite("genevl")
    with pytest.raises(InputError, match="is absent"):
        read_suite(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="has no `verify`"):
        read_suite("prompts/demo.txt")


def test_the_hash_is_of_what_is_asked_and_not_of_order_or_place(tmp_path: Path) -> None:
    rows = [{**ROW, "id": "a"}, {**ROW, "id": "b"}]
    same = {read_suite(rows).sha256, read_suite(rows[::-1]).sha256, read_suite(written(tmp_path, *rows)).sha256}
    assert len(same) == 1
    for change in ({"verify": "clip > 0.3"}, {"task": "x"}, {"prompt": "a cat"}, {"num_images": 2}, {"seed": 1}):
        assert read_suite([rows[0], {**rows[1], **change}]).sha256 not in same


# -- GenEval -----------------------------------------------------------------------------------------------------------


def test_geneval_has_the_published_numbers_and_is_the_same_every_time() -> None:
    rows = geneval.rows()
    assert rows == geneval.rows()
    assert collections.Counter(row["task"] for row in rows) == {
        "single object": 80, "two objects": 99, "counting": 80, "colors": 94, "position": 100, "color attribution": 100,
    }  # fmt: skip
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 553
    assert len(geneval.OBJECTS) == len(set(geneval.OBJECTS)) == 80


def test_geneval_says_in_the_prompt_what_it_verifies() -> None:
    by_task = collections.defaultdict(list)
    for row in geneval.rows():
        by_task[row["task"]].append((row["prompt"].removeprefix("a photo of "), row["verify"]))
        for name in re.findall(r"'([^']*)'", row["verify"]):
            assert name in (*geneval.OBJECTS, *geneval.COLOURS)
            said = geneval.SAID.get(name, name)
            assert said in row["prompt"] or geneval.plural(name) in row["prompt"]
        assert Expression(row["verify"]).words and not re.search(r"\ba [aeiou]", row["prompt"].replace("a u", ""))
    assert ("a bus", "count['bus'] >= 1") in by_task["single object"]
    for prompt, verify in by_task["counting"]:
        number = {v: k for k, v in geneval.NUMBERS.items()}[prompt.split()[0]]
        assert verify.endswith(f"== {number}")
    for prompt, verify in by_task["position"]:
        function, first, second = re.fullmatch(r"(\w+)\('(.*)', '(.*)'\)", verify).groups()  # type: ignore[union-attr]
        first, second = geneval.SAID.get(first, first), geneval.SAID.get(second, second)
        assert re.fullmatch(rf"(an? )?{first} {function.replace('_', ' ')} (an? )?{second}", prompt)
    for _, verify in by_task["color attribution"]:
        one, two = re.findall(r"== '(\w+)'", verify)
        assert one != two and "person" not in verify
    numbers = collections.Counter(verify[-1] for _, verify in by_task["counting"])
    assert set(numbers) == {"2", "3", "4"}


def test_every_expression_of_geneval_parses() -> None:
    for row in geneval.rows():
        assert Expression(row["verify"], None, names=None).decides, row["verify"]


# -- emoji -------------------------------------------------------------------------------------------------------------


def test_the_emoji_suite_is_whole_and_every_colour_comes_alike() -> None:
    found = read_suite("emoji")
    assert len(found.rows) == len({row.prompt for row in found.rows}) == 138
    assert collections.Counter(found.tasks)["single thing"] == len(emoji.THINGS)
    asked = collections.Counter(
        c for row, task in zip(found.rows, found.tasks, strict=True) if task == "colour"
        for c in re.findall(r"thing_(\w+)", str(row.gate))
    )  # fmt: skip
    assert set(asked.values()) == {3} and len(asked) == 7
    for row, task in zip(found.rows, found.tasks, strict=True):
        assert row.labels is None or (len(row.labels) == 8 and row.labels[0] == row.prompt)
        if task in ("colour and background", "unusual colour"):
            thing, back = re.findall(r"(?:thing|back)_(\w+)", str(row.gate))
            assert thing != back and thing in row.prompt and f"{back} background" in row.prompt


def scored(picture: Image.Image) -> dict[str, Any]:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    found = pixel_scores(pixels, [""])
    assert tuple(found) == NAMES
    return {name: column[0] for name, column in found.items()}


@pytest.mark.parametrize("side", [128, 300])
def test_colours_and_pieces_of_a_composed_picture(side: int) -> None:
    picture = Image.new("RGB", (side, side), (30, 90, 220))
    draw = ImageDraw.Draw(picture)
    for k, colour in enumerate([(220, 30, 30), (220, 30, 30), (50, 170, 60)]):
        at = side // 10 + k * side * 3 // 10
        draw.ellipse([at, side // 3, at + side // 5, side // 2], fill=colour)
        draw.rectangle([at, side // 2, at + side // 5, side * 6 // 10], fill=(0, 0, 0))  # no colour
    found = scored(picture)
    assert found["pieces"] == 3 and found["back_blue"] == 1 and found["thing_blue"] < (0.02 if side == 128 else 0.2)
    near = 0.03 if side == 128 else 0.15  # made smaller, edges mix with the background
    assert found["thing_red"] == pytest.approx(2 / 3, abs=near)
    assert found["thing_green"] == pytest.approx(1 / 3, abs=near)
    assert 0.05 < found["thing_area"] < 0.3


def test_empty_and_grey_pictures_have_no_colour_and_no_piece() -> None:
    flat = scored(Image.new("RGB", (64, 64), (255, 255, 255)))
    assert not any(flat.values())
    grey = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(grey).rectangle([30, 30, 90, 90], fill=(90, 90, 90))
    ImageDraw.Draw(grey).rectangle([40, 40, 45, 45], fill=(250, 0, 0))  # a speck is not the thing's colour
    found = scored(grey)
    assert found["pieces"] == 1 and found["thing_red"] == 0
    assert scored(Image.new("RGB", (9, 5), "red"))["back_red"] == 1


def test_pieces_are_those_that_scipy_finds() -> None:
    lot = np.random.default_rng(0)
    for share in (0.2, 0.35, 0.5):
        coarse = lot.random((16, 16)) < share
        mask = np.kron(coarse, np.ones((8, 8), bool))
        labels, _ = label(mask, np.ones((3, 3)))
        assert _pieces(mask) == sum(np.bincount(labels.ravel())[1:] >= LEAST * mask.size)
