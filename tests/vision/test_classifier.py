"""Classifiers: p of every label as in transformers, folders that are refused, and the command `classify --model`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from genkit import cli
from genkit.errors import HostError, InputError
from genkit.vision.classes import CLASSES
from genkit.vision.classifier import Classifier
from genkit.vision.models import inspect_vision
from genkit.vision.preprocess import prepare
from tests.classifiers import CASES, LABELS, tiny_classifier
from tests.grids import thinned
from tests.senses import noise, pictures, tensor

SIZES = [(40, 56), (72, 45), (33, 33), (90, 128)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", thinned(CASES, 1000, ["ConvNextForImageClassification"]))
def test_p_as_in_the_pipeline_of_transformers(kind: str, several: bool, tmp_path: Path) -> None:
    problem: Any = {"problem_type": "multi_label_classification"} if several else {}
    folder = tiny_classifier(tmp_path / "model", kind, **problem)
    model = Classifier.from_pretrained(folder, device="cpu")
    pictures = [noise(n, *size) for n, size in enumerate(SIZES)]
    wanted = pipeline("image-classification", str(folder), top_k=len(LABELS), device="cpu")
    spread = []
    for picture in pictures:
        expected = {one["label"]: one["score"] for one in wanted(picture)}
        found = dict(zip(model.labels, model(tensor(picture))[0].tolist(), strict=True))
        assert found.keys() == expected.keys()
        assert max(abs(found[label] - expected[label]) for label in LABELS) < 1e-4
        spread.append(list(found.values()))
    assert float(torch.tensor(spread).std(dim=0).max()) > 1e-4  # it does not say the same of every picture


def test_the_list_of_cases_is_that_of_the_classes() -> None:
    assert {*CASES, "timm"} == {name for name, kind in CLASSES.items() if kind.sense == "classifier"}


def _config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"id2label": {"0": "a", "1": " "}, "label2id": ...}, "id2label: 1: ' ' is no label"),
    "hole": ({"id2label": {"0": "a", "2": "b"}, "label2id": ...}, "has 2 labels, and none of the number 1"),
    "count": ({"num_labels": 7}, "num_labels: 7 is not 5, the number of id2label"),
    "back": ({"label2id": {"dog": 3}}, "label2id: 'tabby, tabby cat' is absent, and 0 by id2label"),
    "regression": ({"problem_type": "regression"}, "problem_type: 'regression' is not single_label_classification"),
    "fewer": ({"id2label": {"0": "a", "1": "b"}, "label2id": ...}, "but .*config.json asks for"),
    "other": ({"architectures": ["ViTModel"]}, "'ViTModel' is no classifier"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_folders_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    fields, message = REFUSED[name]
    folder = tiny_classifier(tmp_path / "model")
    _config(folder, **fields)
    with pytest.raises(InputError, match=message) as error:
        Classifier.from_pretrained(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_labels_that_are_there_twice_and_labels_that_are_absent(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path / "model")
    cranes = {"0": "crane", "1": "dog", "2": "crane", "3": "house", "4": "apple"}
    _config(folder, id2label=cranes, label2id={"crane": 2, "dog": 1, "house": 3, "apple": "4"})
    info = inspect_vision(folder, ("classifier",))
    assert info.labels == ("crane (0)", "dog", "crane (2)", "house", "apple")
    assert "have their number: 'crane (0)', 'crane (2)'" in info.notes[0]
    backbone = {**cranes, "0": "backbone", "2": "layers"}  # which are names of settings elsewhere
    _config(folder, id2label=backbone, label2id={"backbone": 0, "dog": 1, "layers": 2, "house": 3, "apple": 4})
    assert inspect_vision(folder, ("classifier",)).labels[0] == "backbone"
    _config(folder, id2label=..., label2id=..., num_labels=5)
    info = inspect_vision(folder, ("classifier",))
    assert info.labels[0] == "LABEL_0" and "labels are called LABEL_0 to LABEL_4" in info.notes[0]


def test_processors_that_cannot_be_followed_are_refused(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path / "model")
    for fields, message in (
        ({"image_processor_type": "EfficientNetImageProcessor"}, "is none that genkit prepares pictures of"),
        ({"feature_extractor_type": "ViTFeatureExtractr"}, "is none that genkit prepares pictures of"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 8, "width": 8}}, "has no shortest_edge"),
        (
            {"image_processor_type": "BitImageProcessor", "crop_size": {"shortest_edge": 8}},
            "is not a height and a width",
        ),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(fields))
        with pytest.raises(InputError, match=message):
            inspect_vision(folder, ("classifier",))


@pytest.mark.parametrize(
    ("size", "crop"),
    [({"height": 40, "width": 40}, (33, 50)), ({"shortest_edge": 40, "longest_edge": 60}, (32, 32)), (None, (64, 64))],
)
def test_a_picture_that_is_smaller_than_its_crop_is_padded_as_in_transformers(
    size: dict[str, int] | None, crop: tuple[int, int], tmp_path: Path
) -> None:
    folder = tiny_classifier(tmp_path / "model", "BitForImageClassification")
    stated = {"do_resize": size is not None, "size": size, "crop_size": {"height": crop[0], "width": crop[1]}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BitImageProcessor", **stated})
    )
    picture = noise(0, 45, 140)
    expected = BitImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    found = prepare(tensor(picture), inspect_vision(folder, ("classifier",)).processor)
    assert found.shape == expected.shape and float((found - expected).abs().max()) < 1e-4


def test_a_picture_too_narrow_to_be_resized_is_refused(tmp_path: Path) -> None:
    model = Classifier.from_pretrained(tiny_classifier(tmp_path / "model", "BitForImageClassification"), device="cpu")
    with pytest.raises(InputError, match=r"20000x1 pixels are too narrow: .*model would resize them to 800000x40"):
        model(torch.zeros(1, 3, 1, 20000, dtype=torch.uint8))


def test_the_command_and_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_classifier(tmp_path / "model")
    photos = pictures(tmp_path / "photos", 3)
    (photos / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    command = ["classify", str(photos), "--model", str(folder), "--device", "cpu"]
    assert cli.run([*command, "--top", "2"]) == 1
    told = capsys.readouterr()
    lines = {Path(line["file"]).name: line for line in map(json.loads, told.out.splitlines())}
    assert set(lines) == {"0.png", "1.png", "2.png", "bad.png"} and "bad.png" in lines["bad.png"]["error"]
    model = Classifier.from_pretrained(folder, device="cpu")
    [best] = model.classify([photos / "1.png"])
    assert [list(one) for one in best[:2]] == lines["1.png"]["classes"] and len(best) == 5
    assert abs(sum(p for _, p in best) - 1) < 1e-5 and best == sorted(best, key=lambda one: -one[1])
    assert cli.run([*command, "-o", str(tmp_path / "found.jsonl")]) == 1
    assert len(json.loads((tmp_path / "found.jsonl").read_text().splitlines()[0])["classes"]) == 5
    for words, message in (
        ([*command, "--labels", "a,b"], "--labels: has no use with --model"),
        ([*command, "--clip", "emoji-clip"], "--clip: has no use with --model"),
        ([*command, "--top", "0"], "--top: 0 is not a number from 1"),
        (["classify", str(photos), "--labels", "a,b", "--top", "3"], "--top: 3 needs --model"),
    ):
        capsys.readouterr()
        assert cli.run(words) == 2
        assert message in capsys.readouterr().err


def test_batches_are_halved_and_no_numbers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classifier.from_pretrained(tiny_classifier(tmp_path / "model"), device="cpu")
    batch = torch.cat([tensor(noise(n, 48, 40)) for n in range(5)])
    wanted, sizes, forward = model(batch), list[int](), model._logits

    def small(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pixels)

    monkeypatch.setattr(model, "_logits", small)
    assert torch.allclose(model(batch), wanted, atol=1e-6) and sizes == [5, 2, 2, 1]
    monkeypatch.setattr(model, "_logits", lambda pixels: forward(pixels) * math.nan)
    with pytest.raises(HostError, match="its scores are no numbers in float32"):
        model.classify([noise(0, 40, 40)])
