"""Vision models: loaded as from_pretrained loads them, pictures prepared as transformers' processors prepare them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BlipForQuestionAnswering,
    GroundingDinoForObjectDetection,
    Owlv2ForObjectDetection,
    OwlViTForObjectDetection,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

from genkit.device.cpu import through_onednn
from genkit.errors import InputError
from genkit.vision import preprocess
from genkit.vision.models import inspect_vision, load_model
from genkit.vision.preprocess import CLIP_MEAN, CLIP_STD, Processor, prepare, resize
from tests.detectors import tiny_grounding_dino, tiny_owlv2, tiny_owlvit
from tests.senses import tiny_blip_vqa

MODELS: dict[str, tuple[Any, Any, Any]] = {
    "owlvit": (tiny_owlvit, OwlViTForObjectDetection, OwlViTImageProcessorPil),
    "owlv2": (tiny_owlv2, Owlv2ForObjectDetection, Owlv2ImageProcessorPil),
    "grounding_dino": (tiny_grounding_dino, GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil),
}
SENSES = ("detector",)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_pictures_as_in_transformers(name: str, tmp_path: Path) -> None:
    make, cls, processor = MODELS[name]
    folder = make(tmp_path / name)
    found = load_model(folder, SENSES, "cpu", torch.float32)
    reference = cls.from_pretrained(folder)
    weights = reference.state_dict()
    assert found.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[key]) for key, weight in found.model.state_dict().items())
    buffers = dict(reference.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in found.model.named_buffers())
    assert list(found.hashes) == ["model.safetensors"] and found.kind == cls.__name__
    prepares = processor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    for height, width in ((64, 64), (100, 37), (20, 50), (11, 90), (32, 32), (300, 200)):
        pixels = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        prepared = prepare(torch.from_numpy(pixels).permute(0, 3, 1, 2), found.processor_config)
        for k in range(2):
            expected = prepares(images=Image.fromarray(pixels[k]), return_tensors="pt")["pixel_values"][0]
            assert prepared[k].shape == expected.shape
            assert float((prepared[k] - expected).abs().max()) < 1e-4


@pytest.mark.parametrize(("name", "code"), [("bilinear", 2), ("bicubic", 3), ("lanczos", 1)])
def test_resizing_is_that_of_pil(name: str, code: int) -> None:
    rng = np.random.default_rng(1)
    for before, after in (((100, 37), (32, 32)), ((20, 50), (60, 16)), ((33, 33), (48, 48)), ((300, 40), (17, 64))):
        pixels = rng.integers(0, 256, (*before, 3), dtype=np.uint8)
        expected = np.array(Image.fromarray(pixels).resize(after[::-1], code))
        found = resize(torch.from_numpy(pixels).permute(2, 0, 1).int(), after, name)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_pictures_in_memory_and_on_a_device_are_prepared_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor({"shortest_edge": 32}, "bicubic", CLIP_MEAN, CLIP_STD, crop=(24, 32))
    pictures = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (2, 3, 70, 90), dtype=np.uint8))
    by_pillow = prepare(pictures, processor)
    assert torch.equal(prepare(pictures.to(memory_format=torch.channels_last), processor), by_pillow)
    monkeypatch.setattr(preprocess, "_by_pillow", preprocess._by_torch)
    assert torch.equal(prepare(pictures, processor), by_pillow)


def test_linear_layers_and_blip_s_attention_are_those_of_transformers(tmp_path: Path) -> None:
    reference = BlipForQuestionAnswering.from_pretrained(tiny_blip_vqa(tmp_path / "vqa")).eval()
    model = load_model(tmp_path / "vqa", ("captioner",), "cpu", torch.float32).model
    wide, x = torch.nn.Linear(96, 64).requires_grad_(False), torch.randn(2, 7, 96)
    assert through_onednn(wide) == 1
    assert torch.allclose(wide(x), torch.nn.functional.linear(x, wide.weight, wide.bias), atol=1e-5)
    assert torch.equal(wide.double()(x.double()), torch.nn.functional.linear(x.double(), wide.weight, wide.bias))
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        found, expected = (m.vision_model(pixel_values=pixels)[0] for m in (model, reference))
    assert torch.allclose(found, expected, atol=1e-5)


def test_shards_and_old_buffers_are_read(tmp_path: Path) -> None:
    whole = load_model(tiny_owlvit(tmp_path / "whole"), SENSES, "cpu", torch.float32).model.state_dict()
    shards = tiny_owlvit(tmp_path / "shards", max_shard_size="20KB")
    found = load_model(shards, SENSES, "cpu", torch.float32)
    assert len(found.hashes) > 1
    assert all(torch.equal(weight, whole[key]) for key, weight in found.model.state_dict().items())
    file = tmp_path / "whole" / "model.safetensors"
    old = "owlvit.text_model.embeddings.position_ids"
    save_file({**load_file(file), old: torch.arange(16)[None]}, file, metadata={"format": "pt"})
    load_model(tmp_path / "whole", SENSES, "cpu", torch.float32)


def test_weights_that_older_files_of_grounding_dino_lack_or_have_beyond(tmp_path: Path) -> None:
    folder = tiny_grounding_dino(tmp_path / "dino")
    whole = load_model(folder, SENSES, "cpu", torch.float32).model.state_dict()
    stem = "model.backbone.conv_encoder.model."
    index = {f"{stem}encoder.layers.0.blocks.0.attention.self.relative_position_index": torch.zeros(16, 16)}
    lacking = {
        f"{stem}layernorm.weight",
        f"{stem}layernorm.bias",
        f"{stem}swin.layernorm.weight",
        f"{stem}swin.layernorm.bias",
    }
    tied = {
        key for key in load_file(folder / "model.safetensors") if key.startswith(("bbox_embed.1", "model.decoder.bbox"))
    }
    _weights(folder, lambda w: (w.update(index), [w.pop(key, None) for key in (*lacking, *tied)]))
    found = load_model(folder, SENSES, "cpu", torch.float32).model.state_dict()
    assert found.keys() == whole.keys()
    for key, weight in found.items():
        assert torch.equal(weight, whole[key]) or "swin.layernorm" in key, key


def _config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def _processor(folder: Path, **fields: Any) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda f: _config(f, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "wrong class": (lambda f: _config(f, architectures=["CLIPModel"]), "supported: OwlViTForObjectDetection"),
    "wrong type": (lambda f: _config(f, model_type="owlv2"), "model_type: 'owlv2' is not 'owlvit'"),
    "huge": (lambda f: _config(f, vision_config={"num_hidden_layers": 10**6}), "num_hidden_layers: 1000000 is more"),
    "no object": (lambda f: _config(f, text_config="tiny"), "config.json: text_config: 'tiny' is not an object"),
    "no number": (lambda f: _config(f, text_config={"vocab_size": "9"}), "vocab_size: '9' is not a whole number"),
    "missing": (lambda f: _weights(f, lambda w: w.pop("layer_norm.bias")), "layer_norm.bias: is missing"),
    "extra": (lambda f: _weights(f, lambda w: w.update(more=torch.ones(2))), "'more': has no place"),
    "shape": (lambda f: _weights(f, lambda w: w.update({"layer_norm.bias": torch.ones(7)})), "asks for 24"),
    "nan": (lambda f: _weights(f, lambda w: w["layer_norm.bias"].fill_(float("nan"))), "holds a NaN"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "bytes"),
    "pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "LFS pointer",
    ),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "unpickle"),
    "resample": (lambda f: _processor(f, resample=0), "resample: 0 is not"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: is absent"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folder = tiny_owlvit(tmp_path / "owl")
    spoil, message = BAD[name]
    spoil(folder)
    with pytest.raises(InputError) as error:
        load_model(folder, SENSES, "cpu", torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_with_more_words_than_the_network_is_refused(tmp_path: Path) -> None:
    folder = tiny_grounding_dino(tmp_path / "dino")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["horse"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(InputError, match="has 501 tokens, but text_config has vocab_size 16"):
        load_model(folder, SENSES, "cpu", torch.float32)


def test_models_of_another_sense_and_other_backbones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a detector, not a segmenter"):
        inspect_vision(tiny_owlvit(tmp_path / "owl"), ("segmenter",))
    with pytest.raises(InputError, match="emoji' is no detector"):
        inspect_vision("emoji", SENSES)
    folder = tiny_grounding_dino(tmp_path / "dino")
    _config(folder, use_timm_backbone=True)
    with pytest.raises(InputError, match="never fetched"):
        inspect_vision(folder, SENSES)
