"""Classifiers of timm: p of every label as timm computes it, and folders that are refused by name."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genkit import cli
from genkit.errors import HostError, InputError
from genkit.vision import timms
from genkit.vision.classifier import Classifier
from genkit.vision.models import inspect_vision
from tests.senses import noise, pictures, tensor
from tests.timms import CASES, LABELS, import_timm, tiny_timm

SIZES = [(40, 57), (72, 45), (33, 34), (90, 128)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_timm(tmp_path_factory.mktemp("timm"))


def prepared(picture: Image.Image, config: dict[str, Any]) -> torch.Tensor:
    """Return a picture as timm's `create_transform` prepares it, (1, 3, h, w): by it, or by PIL without torchvision."""
    try:
        import torchvision.transforms  # noqa: F401
        from timm.data import create_transform

        return create_transform(**config, is_training=False)(picture)[None]
    except (ImportError, RuntimeError):
        pass
    side = config["input_size"][1]
    edge = math.floor(side / config["crop_pct"])
    width, height = picture.size
    if config["crop_mode"] == "squash":
        size = edge, edge
    else:
        size = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    code = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[config["interpolation"]]
    resized = picture.resize(size, code)
    left, top = (round((whole - side) / 2) for whole in size)
    x = np.array(resized.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    x = (x - np.array(config["mean"], dtype=np.float32)) / np.array(config["std"], dtype=np.float32)
    return torch.from_numpy(x).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", CASES)
def test_p_as_in_timm(name: str, tmp_path: Path) -> None:
    timm = import_timm()
    home = tiny_timm(tmp_path / "model", name)
    model = Classifier.from_pretrained(home, device="cpu")
    assert model.labels == LABELS
    theirs = timm.create_model(f"local-dir:{home}", pretrained=True).eval()
    config = timm.data.resolve_data_config(theirs.pretrained_cfg, model=theirs)
    found = []
    for n, size in enumerate(SIZES):
        with torch.inference_mode():
            wanted = theirs(prepared(noise(n, *size), config)).softmax(dim=-1)
        found.append(model(tensor(noise(n, *size))))
        assert float((found[-1] - wanted).abs().max()) < 1e-4
    assert float(torch.cat(found).std(dim=0).max()) > 1e-3  # it does not say the same of every picture


def test_a_folder_of_the_wrapper_of_transformers(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({f"timm_model.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    _config(tmp_path, model_type="timm_wrapper", architectures=["TimmWrapperForImageClassification"], do_pooling=True)
    ours, same = (Classifier.from_pretrained(home, device="cpu") for home in (folder, tmp_path))
    assert torch.equal(ours(tensor(noise(1, 40, 40))), same(tensor(noise(1, 40, 40)))) and same.labels == LABELS
    info = inspect_vision(tmp_path, ("classifier",))
    assert info.kind == "timm" and not info.notes


def _config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def _prepared(**fields: Any) -> dict[str, Any]:
    return {"pretrained_cfg": {"input_size": [3, 32, 32], "fixed_input_size": True, **fields}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "vit_tinny_patch16_224"}, "is none that timm has .did you mean 'vit_tiny_patch"),
    "no name": ({"architecture": "../vit"}, "is no name of a network of timm"),
    "shapes": ({"model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}},
               "has shape"),
    "argument": ({"model_args": {"heads": 2}}, "vit_tiny_patch16_224 of timm cannot be built: "),
    "file": ({"model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path: 'x.pth': genkit builds networks without"),
    "layers": ({"model_args": {"depth": 100_000}}, "depth: 100000 is more than 1000"),
    "channels": ({"model_args": {"in_chans": 1}}, "in_chans: 1 is not 3"),
    "features": ({"num_classes": 0}, "num_classes: 0 is no number of labels: it has no classifier, only features"),
    "count": ({"num_classes": 4}, "label_names: 5 labels, and num_classes is 4"),
    "label": ({"label_names": ["a", "b", " ", "c", "d"]}, "label_names: 2: ' ' is no label"),
    "border": (_prepared(crop_mode="border"), "crop_mode: 'border' is not 'center' or 'squash'"),
    "resample": (_prepared(interpolation="nearest"), "interpolation: 'nearest' is not"),
    "wide": (_prepared(input_size=[3, 32, 64], fixed_input_size=False), "input_size: 32x64 is no square"),
    "unprepared": ({"pretrained_cfg": ...}, "pretrained_cfg: None is not an object"),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "regression": ({"problem_type": "regression"}, "problem_type: 'regression' is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_in_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    fields, message = REFUSED[name]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _config(tmp_path, **fields)
    with pytest.raises(InputError, match=message) as error:
        Classifier.from_pretrained(tmp_path, device="cpu")
    assert "\n" not in str(error.value)


def test_pickles_and_absent_packages_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"'pytorch_model.bin' is refused: weights that unpickle can run code"):
        inspect_vision(tmp_path, ("classifier",))
    there = timms.importlib.util.find_spec("PIL")
    for name in ("timm", "torchvision"):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "timm")
            patch.setattr(timms.importlib.util, "find_spec", lambda n, name=name: None if n == name else there)
            with pytest.raises(HostError, match=rf"needs {name}, which is not installed: pip install 'genkit-"):
                inspect_vision(folder, ("classifier",))


def test_labels_where_the_config_names_none(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _config(tmp_path, label_names=...)
    info = inspect_vision(tmp_path, ("classifier",))
    assert info.labels[4] == "LABEL_4" and "labels are called LABEL_0 to LABEL_4" in info.notes[0]
    _config(tmp_path, num_classes=1000)
    info = inspect_vision(tmp_path, ("classifier",))
    assert info.labels[0] == "tench, Tinca tinca" and "labels that are there more than once" in info.notes[0]
    data = json.loads((tmp_path / "config.json").read_text())
    flat = {**data.pop("pretrained_cfg"), **data, "num_classes": 5, "labels": list(LABELS)}
    flat.pop("model_args")
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert inspect_vision(tmp_path, ("classifier",)).labels == LABELS


def test_the_command_takes_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = pictures(tmp_path / "photos", 2)
    assert cli.run(["classify", str(photos), "--model", str(folder), "--device", "cpu", "--top", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["classes"]) for line in lines] == [2, 2] and lines[0]["classes"][0][0] in LABELS
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _config(tmp_path, architecture="resnet1x8")
    assert cli.run(["classify", str(photos), "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
