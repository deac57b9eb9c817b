"""Classifiers: p of every label as in transformers, folders that are refused, and the command `classify --model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from genkit.vision.classes import CLASSES
from genkit.vision.classifier import Classifier
from tests.classifiers import CASES, LABELS, tiny_classifier
from tests.grids import thinned
from tests.senses import noise, tensor

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
    assert set(CASES) == {name for name, kind in CLASSES.items() if kind.sense == "classifier"}
