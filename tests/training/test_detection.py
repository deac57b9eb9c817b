"""Detectors: scenes whose boxes are true, the losses of transformers, a run that goes on, and what it writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import CLIPModel, OwlViTForObjectDetection
from transformers.loss.loss_for_object_detection import generalized_box_iou

from genkit import Detector
from genkit.components import inspect_model, load_components
from genkit.datasets.example import Example
from genkit.datasets.sources import read_examples
from genkit.errors import InputError
from genkit.training import scenes
from genkit.training.counting import Verdict, average_precision, measures, threshold_of, verdicts
from genkit.training.detection import Detection, detection_loss, giou, naming, owl_of, owned
from genkit.training.loop import train
from genkit.training.recipe import Recipe, make_recipe
from genkit.training.scenes import Scene, ScenePictures, apart, compose
from tests.tiny import tiny_clip

SHAPES = {"red ball": "ellipse", "blue box": "rectangle", "green tile": "rectangle", "yellow moon": "ellipse"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with one width, another without, and drawings on transparent grounds."""
    folder = tmp_path_factory.mktemp("places")
    tiny_clip(folder / "clip", projection=16)
    tiny_clip(folder / "narrow")
    (folder / "drawings").mkdir()
    lines = []
    for n, (name, shape) in enumerate(SHAPES.items()):
        picture = Image.new("RGBA", (32, 32))
        getattr(ImageDraw.Draw(picture), shape)((4, 8, 27, 23), fill=name.split()[0])
        picture.save(folder / "drawings" / f"{n}.png")
        lines.append(json.dumps({"file_name": f"{n}.png", "text": name, "kind": f"k{n}", "group": "all"}))
    (folder / "drawings" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def recipe_of(places: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "task": "detector", "model": str(places / "clip"),
        "data": {"path": str(places / "drawings"), "validation": 0.25, "validation_by": "kind", "resolution": 32},
        "scenes": {"most": 3, "absent": 2, "near": "group"},
        "train": {"steps": 6, "batch_size": 2, "learning_rate": 3e-3, "ema": 0.9},
        "evaluate": {"every": 3, "pictures": 4}, "save": {"every": 3, "keep_best": 0, "dtype": "float16"},
    }  # fmt: skip
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    return make_recipe(values)


def drawn(places: Path, **changes: Any) -> ScenePictures:
    recipe = recipe_of(places, **changes)
    return ScenePictures(read_examples(recipe.data), recipe.data, (32, 32), 8, 0, recipe.scenes)


def test_a_thing_belongs_to_the_places_around_its_centre() -> None:
    boxes = torch.tensor([[[0.375, 0.375, 0.9, 0.9], [0.875, 0.6, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]])
    thing, inside, nearest = owned(boxes, torch.tensor([[0, 2, -1]]), 4)
    assert inside.view(4, 4).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert torch.equal(nearest, inside)
    assert thing.view(4, 4)[1, 1] == 0 and thing.view(4, 4)[2, 3] == 1
    corner = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])  # of four places
    assert int(owned(corner, torch.tensor([[0]]), 4)[1].sum()) == 4
    assert int(owned(corner, torch.tensor([[-1]]), 4)[1].sum()) == 0


def test_of_the_places_of_a_thing_the_nearest_one_finds_it_or_those_that_are_as_near() -> None:
    owner = torch.tensor([[0]])
    for x, wanted in ((0.5, [0, 1, 1, 0]), (0.475, [0, 1, 1 / 3, 0]), (0.45, [0, 1, 0, 0])):  # between two places
        _, inside, nearest = owned(torch.tensor([[[x, 0.375, 0.2, 0.2]]]), owner, 4)
        assert inside.view(4, 4)[1].tolist() == [0, 1, 1, 0]
        assert torch.allclose(nearest.view(4, 4)[1], torch.tensor(wanted, dtype=torch.float32), atol=1e-5)


def test_overlap_is_that_of_transformers() -> None:
    boxes = torch.rand(2, 50, 4, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.01
    corners = [torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], dim=1) for b in boxes]
    expected = generalized_box_iou(*corners)
    assert torch.allclose(giou(boxes[0][:, None], boxes[1][None]), expected, atol=1e-5)


def test_the_loss_is_least_where_every_thing_is_found_whatever_their_order() -> None:
    boxes = torch.tensor([[[0.25, 0.25, 0.4, 0.4], [0.75, 0.75, 0.3, 0.3]]])
    words = torch.eye(4)[None, :3]
    tensors = {"boxes": boxes, "owners": torch.tensor([[0, 1]]), "asked": torch.ones(1, 3), "queries": words}
    places = torch.full((1, 4, 4), 0.5)  # 2x2 of them; the first and the last are right
    places[0, 0], places[0, 3] = boxes[0, 0], boxes[0, 1]
    right, names = torch.full((1, 4, 3), -8.0), torch.eye(4)[None][:, [0, 3, 3, 1]]
    right[0, 0, 0] = right[0, 3, 1] = 8.0
    found = detection_loss(right, names, places, tensors)
    assert found.shape == (1,) and float(found) < 1e-3
    turned = {**tensors, "boxes": boxes.flip(1), "owners": torch.tensor([[1, 0]])}
    assert torch.allclose(detection_loss(right, names, places, turned), found)
    for wrong in (
        detection_loss(right[..., [1, 0, 2]], names, places, tensors), detection_loss(-right, names, places, tensors),
        detection_loss(right, names.flip(1), places, tensors), detection_loss(right, names, places.flip(1), tensors),
    ):  # fmt: skip
        assert float(wrong) > 1
    third = right.clone()
    third[0, 1, 2] = 8.0  # a word that is not asked for costs nothing
    unasked = {**tensors, "asked": torch.tensor([[1.0, 1, 0]])}
    assert (
        float(detection_loss(third, names, places, unasked))
        < 1e-3
        < float(detection_loss(third, names, places, tensors))
    )


def test_naming_tells_a_word_from_all_of_the_batch_and_the_same_word_is_right_everywhere() -> None:
    words = torch.eye(3)[None].expand(2, -1, -1)  # the same in both pictures
    tensors = {"queries": words, "asked": torch.ones(2, 3)}
    word = torch.zeros(2, 1, dtype=torch.long)
    assert naming(torch.eye(3)[None, :1].expand(2, -1, -1), word, tensors).abs().max() < 1e-6
    unsure = naming(torch.ones(2, 1, 3), word, tensors)
    assert torch.allclose(unsure, torch.full((2, 1), 3.0).log(), atol=1e-5)


def test_words_are_embedded_as_clip_does_whatever_stands_beside_them(places: Path) -> None:
    parts = load_components(inspect_model(places / "clip"), device=torch.device("cpu"), dtype=torch.float32)
    task = Detection(recipe_of(places), parts, torch.float32)
    words = ["ball", "a red ball beside a blue box"]
    found = task.embedded(words)
    padded = parts.tokenizer(words, return_tensors="pt", padding="max_length", truncation=True)
    with torch.no_grad():
        text = parts.clip.text_model(**padded).pooler_output
        expected = torch.nn.functional.normalize(parts.clip.text_projection(text), dim=-1)
    assert torch.allclose(torch.stack([found[word] for word in words]), expected, atol=1e-6)


def test_the_tower_is_that_of_the_clip_until_it_learns(places: Path) -> None:
    clip = CLIPModel.from_pretrained(places / "clip").eval()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    owl = owl_of(clip, 16).eval()
    assert isinstance(owl, OwlViTForObjectDetection)
    with torch.no_grad():
        ours, theirs = owl.owlvit.vision_model(pixels)[0], clip.vision_model(pixels)[0]
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert torch.equal(owl.class_head.dense0.weight, clip.visual_projection.weight)
        assert owl_of(clip, 32).image_embedder(pixel_values=torch.zeros(1, 3, 32, 32))[0].shape == (1, 4, 4, 16)


def test_scenes_depend_on_seed_and_epoch_and_their_boxes_are_true(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, again = drawn(places).batch([0, 1, 2, 3], 5), drawn(places).batch([0, 1, 2, 3], 5)
    assert torch.equal(one.pixels, again.pixels) and one.captions == again.captions
    assert not torch.equal(one.pixels, drawn(places).batch([0, 1, 2, 3], 6).pixels)
    assert one.scenes is not None and all(1 <= len(s.owners) <= 3 for s in one.scenes)
    assert {s.words[0] for s in one.scenes} == {*SHAPES}
    monkeypatch.setattr(scenes, "ground", lambda side, lot: Image.new("RGB", (side, side), "white"))
    monkeypatch.setattr(scenes, "grained", lambda picture, lot: picture)
    ball = drawn(places).drawing(0)
    for seed in range(20):
        picture, [corners] = compose([ball], 64, random.Random(seed))
        rows, columns = np.nonzero(np.asarray(picture).min(axis=2) < 200)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        assert np.abs(seen - corners).max() < 2.1 / 64
        _, many = compose([ball] * 5, 64, random.Random(seed))
        assert all(0 <= a < c <= 1 and 0 <= b < d <= 1 for a, b, c, d in many)
        assert all(scenes._covered(p, q) <= scenes.SHARED for k, p in enumerate(many) for q in many[:k])


def test_what_shares_a_name_is_never_called_absent() -> None:
    apple, green, car = (
        Example(name, name, fields, ("", 0, -1))
        for name, fields in (
            ("red apple", {"keywords": ["fruit"]}),
            ("green apple", {}),
            ("car", {"synonyms": ["auto"]}),
        )
    )
    fruit = Example("x", "fruit", {}, ("", 0, -1))
    assert not apart(apple, green) and not apart(apple, fruit) and not apart(fruit, apple) and apart(apple, car)


def test_counting_and_precision() -> None:
    scene = Scene(["a", "b"], np.array([[0.25, 0.5, 0.2, 0.4], [0.75, 0.5, 0.2, 0.4]], dtype=np.float32), [0, 0])
    boxes = torch.tensor([[[0.25, 0.5, 0.2, 0.4], [0.25, 0.5, 0.21, 0.4], [0.75, 0.5, 0.2, 0.4], [0.5, 0.1, 0.1, 0.1]]])
    logits = torch.tensor([[[3.0, -9], [2.0, -9], [1.0, -9], [-9.0, 0.0]]])
    there, absent = verdicts(logits, boxes, [scene])
    assert there.counted(0.5) == 2 and there.counted(0.8) == 1, "of two boxes of one thing the better one counts"
    assert absent.truth == [] and absent.counted(0.4) == 1 and absent.counted(0.6) == 0
    assert average_precision([there]) == pytest.approx(1.0)
    assert threshold_of([there, absent]) == 0.5
    found = measures([there, absent], 0.5)
    assert found["count"] == found["count_2"] == found["absent"] == 1.0 and found["threshold"] == 0.5
    worse = Verdict([("a", 0.9, 0.0, 0.0, 0.1, 0.1), *there.boxes], there.truth, 2)
    assert average_precision([worse]) == pytest.approx(5 / 6)
    assert average_precision([Verdict([], there.truth, 2)]) == 0.0


def test_a_stopped_run_ends_with_the_same_bits_and_its_folder_is_a_detector(places: Path, tmp_path: Path) -> None:
    whole = train(recipe_of(places), tmp_path / "whole", device="cpu", quiet=True)
    train(recipe_of(places, train={"steps": 3}), tmp_path / "parts", device="cpu", quiet=True)
    outcome = train(recipe_of(places), tmp_path / "parts", device="cpu", quiet=True)
    assert outcome.step == 6 and json.dumps(outcome.scores) == json.dumps(whole.scores)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert {"threshold", "count", "absent", "ap50", "loss"} <= whole.scores.keys()
    start = load_file(places / "clip" / "model.safetensors")
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(one[f"owlvit.{name}"], start[name].half()), "the words' tower does not learn"
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(one[f"owlvit.{name}"], start[name].half())
    detector = Detector.from_pretrained(tmp_path / "whole", device="cpu", dtype="float32")
    last = json.loads((tmp_path / "whole" / "checkpoints" / "000006" / "checkpoint.json").read_text())["scores"]["6"]
    assert detector.threshold == last["threshold"]
    theirs = OwlViTForObjectDetection.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert all(torch.equal(w, detector.model.state_dict()[key]) for key, w in theirs.state_dict().items())
    assert detector.detect([Image.new("RGB", (40, 30))], ["red ball"], 0.001)[0]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "genkit detect IMAGES" in card and "library_name: transformers" in card


def test_it_learns_where_things_are(places: Path, tmp_path: Path) -> None:
    plan = {"steps": 40, "batch_size": 8}
    train(
        recipe_of(places, train=plan, scenes={"most": 1}, evaluate={"every": 0}),
        tmp_path / "run",
        device="cpu",
        quiet=True,
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"resolution": 36}}, "data.resolution: 36 is not a multiple of 8"),
        ({"data": {"resolution": [32, 16]}}, "data.resolution: [32, 16]: a detector reads squares; give one side"),
        ({"model": "narrow"}, "an OWL-ViT has one width for both"),
        ({"scenes": {"near": "subgroup"}}, "scenes.near: no picture has a field 'subgroup'"),
        ({"scenes": {"most": 0}}, "scenes.most: 0: input should be greater than or equal to 1"),
        ({"scenes": {"mots": 1}}, "scenes.mots: unknown key (did you mean 'most'?)"),
        ({"data": {"flip": 0.5}}, "data.flip: 0.5: has no effect in task detector"),
        ({"data": {"zoom": 0.5}}, "data.zoom: 0.5: has no effect in task detector"),
        ({"data": {"cache": 2}}, "data.cache: 2: has no effect in task detector"),
        ({"data": {"background": {"share": 0.5}}}, "data.background: has no effect in task detector"),
        ({"evaluate": {"metrics": ["fid"]}}, "evaluate.metrics: task detector draws no pictures to measure"),
        ({"task": "clip", "scenes": {"most": 2}}, "scenes: has no effect in task clip; it belongs to detector"),
    ],
)
def test_what_a_detector_is_not_trained_on(places: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("model") == "narrow":
        changes = {"model": str(places / "narrow")}
    with pytest.raises(InputError) as error:
        train(recipe_of(places, **changes), tmp_path / "run", device="cpu", quiet=True)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_drawing_that_is_not_there_is_named(places: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8)).save(tmp_path / "nothing.png")
    (tmp_path / "nothing.txt").write_text("nothing")
    made = ScenePictures(read_examples(recipe_of(places, data={"path": str(tmp_path)}).data), recipe_of(places).data,
                         (32, 32), 8, 0, recipe_of(places, scenes={"near": None}).scenes)  # fmt: skip
    with pytest.raises(InputError, match=r"nothing\.png: is transparent all over"):
        made.batch([0], 0)
