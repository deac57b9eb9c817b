"""SigLIP as a scorer: equal to transformers' SiglipModel, its tokenizers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from genkit import ClipScorer, InputError, cli
from genkit.components import inspect_model
from genkit.components.loading import load_components
from genkit.components.siglip import SiglipTokenizer
from genkit.scoring.panel import Panel, half
from tests.tiny import tiny_clip, tiny_siglip

TEXTS = ["a fox", "An APPLE!", "a very long text about foxes and apples and more foxes", "b,c"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(16, 16), (16, 16), (16, 16)]
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module", params=[False, True], ids=["SigLIP", "SigLIP 2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_siglip(tmp_path_factory.mktemp("siglip"), second=request.param)


def cleaned(text: str, folder: Path) -> str:
    """What transformers' SiglipTokenizer and Siglip2Tokenizer make of a text."""
    text = text.lower()
    if "Gemma" in (folder / "tokenizer_config.json").read_text():
        return text
    return "".join(c for c in text if c not in "!,")


def ids_of_transformers(folder: Path, texts: list[str]) -> torch.Tensor:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    eos, pad = (tokenizer.convert_tokens_to_ids(config[name]) for name in ("eos_token", "pad_token"))
    rows = []
    for text in texts:
        ids = [*tokenizer(cleaned(text, folder), add_special_tokens=False)["input_ids"][:11], eos]
        rows.append(ids + [pad] * (12 - len(ids)))
    return torch.tensor(rows)


def test_logits_are_those_of_transformers(folder: Path, pictures: list[Image.Image]) -> None:
    model = SiglipModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = SiglipImageProcessorPil.from_pretrained(folder)(images=pictures, return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = model(input_ids=ids_of_transformers(folder, TEXTS), pixel_values=pixels).logits_per_image
    scorer = ClipScorer.from_pretrained(folder, device="cpu")
    assert scorer.logit_bias is not None
    cosines = scorer.embed_images(pictures) @ scorer.embed_texts(TEXTS).T
    found = scorer.logit_scale * cosines + scorer.logit_bias
    assert torch.allclose(found, expected, atol=1e-4) and expected.std() > 0.05
    p = scorer.classify(pictures, TEXTS, templates=["{}"])
    assert np.allclose([list(row.values()) for row in p], expected.sigmoid().numpy(), atol=1e-5)
    assert scorer.texts.truncated == {TEXTS[2]}


def test_pictures_are_squeezed_as_transformers_does_it(folder: Path) -> None:
    random = np.random.default_rng(1)
    low = Image.fromarray(random.integers(0, 256, (5, 4, 3), dtype=np.uint8))
    odd = [low.resize(size, Image.Resampling.BICUBIC) for size in ((300, 200), (21, 64))]
    pixels = SiglipImageProcessorPil.from_pretrained(folder)(images=odd, return_tensors="pt").pixel_values
    scorer = ClipScorer.from_pretrained(folder, device="cpu")
    for picture, expected in zip(odd, pixels, strict=True):
        found = scorer.preprocess(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])[0]
        assert (found - expected).abs().max() < 0.02, "a level of 255 and a half"


def test_scores_of_a_run_are_sigmoids(folder: Path, pictures: list[Image.Image]) -> None:
    scorer = ClipScorer.from_pretrained(folder, device="cpu")
    vector = half(scorer.embed_images(pictures[:1]))[0]
    found = Panel(scorer, ["a fox", "an apple"]).of_embedding(vector, "a fox", ["a fox", "a dog"])
    assert {"clip", "clip_margin", "clip_z", "p"} <= found.keys()
    cosines = scorer.directions(["a fox", "a dog"]).numpy() @ vector.astype(np.float64)
    logits = scorer.logit_scale * cosines + scorer.logit_bias
    assert list(found["p"].values()) == pytest.approx((1 / (1 + np.exp(-logits))).tolist(), abs=1e-4)
    assert sum(found["p"].values()) != pytest.approx(1, abs=0.01)


def test_a_run_is_scored_by_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--prompt", "a fox", "-o", str(tmp_path / "run"), "--steps", "1", "--clip", str(folder)]
    assert cli.run([*command, "--labels", "a fox,a dog", "--gate", "p['a fox'] > 0.0001"]) == 0
    record = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])
    assert record["scores"].keys() >= {"clip", "p"}
    capsys.readouterr()
    assert cli.run(["score", str(tmp_path / "run"), "--clip", str(folder), "--labels", "a fox,a dog"]) == 0
    again = json.loads(capsys.readouterr().out)["scores"]
    assert again["p"] == pytest.approx(record["scores"]["p"], abs=1e-4)
    assert inspect_model(folder).embedding_width == 16


def test_texts_are_tokenized_as_trained(tmp_path: Path) -> None:
    first = tiny_siglip(tmp_path / "one")
    tokenizer = SiglipTokenizer(first, {"max_position_embeddings": 12, "vocab_size": 60})
    assert tokenizer.canonical(" A  Fox,\nand it's «Red»! ") == "a fox and its «red»"
    found = tokenizer(["", "fo"], padding="max_length", truncation=True)
    assert found["input_ids"][0] == [1] * 12 and found["attention_mask"][1] == [1, 1] + [0] * 10
    second = SiglipTokenizer(tiny_siglip(tmp_path / "two", True), {"max_position_embeddings": 12, "vocab_size": 62})
    assert second.canonical("A Fox, Red!") == "a fox, red!", "SigLIP 2 keeps punctuation"
    assert second(["fo"], padding="max_length")["input_ids"][0][-1] == 0


def _edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def _spiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "spiece.model")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_edit("config.json", lambda c: c.update(model_type="siglip2")), "'siglip2' is NaFlex"),
        (_edit("config.json", lambda c: c["text_config"].update(projection_size=8)), "projection_size: 8, but"),
        (_edit("config.json", lambda c: c["vision_config"].update(vision_use_head=False)), "vision_use_head: False"),
        (_edit("config.json", lambda c: c["vision_config"].update(patch_size=4)), "patch_embedding.weight: has shape"),
        (_edit("config.json", lambda c: c["text_config"].update(vocab_size=500)), "tokens, but .* vocab_size 500"),
        (_edit("preprocessor_config.json", lambda c: c.update(size={"height": 32, "width": 32})), "image_size 16"),
        (_edit("preprocessor_config.json", lambda c: c.update(resample=1)), "resample: 1 is not 2 or 3"),
        (_edit("tokenizer_config.json", lambda c: c.update(eos_token="<end>")), "eos_token: '<end>' is not in the"),
        (_edit("tokenizer_config.json", lambda c: c.update(tokenizer_class="BertTokenizer")), "tokenizer_class: 'Bert"),
        (_edit("tokenizer.json", lambda c: c["model"].update(type="WordPiece")), "neither a Unigram nor"),
        (_edit("tokenizer.json", lambda c: c["model"].update(vocab=5)), "vocab: 5 is no vocabulary"),
        (_spiece, "tokenizer.json: is absent .spiece.model alone"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(tiny_siglip(tmp_path / "m"))
    with pytest.raises(InputError, match=message) as error:
        inspect_model(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_it_is_no_text_encoder_and_is_not_trained(tmp_path: Path) -> None:
    from genkit.components.compose import compose_model

    model = str(tiny_siglip(tmp_path))
    with pytest.raises(InputError, match="SiglipModel cannot be trained"):
        compose_model("clip", model, {}, None)
    with pytest.raises(InputError, match="has no text_encoder"):
        compose_model("text-to-image", "emoji", {"text_encoder": model}, None)


def test_clip_of_open_clip_in_the_layout_of_transformers(tmp_path: Path, pictures: list[Image.Image]) -> None:
    """As laion/CLIP-ViT-H-14: GELU, an embedding wider than the text network, old ids of special tokens."""
    tiny_clip(tmp_path)
    config: Any = CLIPConfig.from_pretrained(tmp_path)
    for part in (config.text_config, config.vision_config):
        part.hidden_act, part.projection_dim = "gelu", 24
    config.projection_dim = 24
    config.text_config.num_attention_heads = 4
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    stated["text_config"] |= {"bos_token_id": 0, "eos_token_id": 2, "top_k": 50, "torch_dtype": None}
    stated |= {"text_config_dict": None, "torch_dtype": "float32", "transformers_version": None, "_commit_hash": None}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    scorer = ClipScorer.from_pretrained(tmp_path, device="cpu")
    parts = load_components(inspect_model(tmp_path), device="cpu", dtype=torch.float32)
    pixels = torch.cat([scorer.preprocess(torch.from_numpy(np.array(p)).permute(2, 0, 1)[None]) for p in pictures])
    tokens = parts.tokenizer(["a fox", "red"], padding="max_length", return_tensors="pt").input_ids
    reference = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = reference(input_ids=tokens, pixel_values=pixels)
    assert scorer.embed_images(pictures).shape == (3, 24)
    logits = scorer.logit_scale * scorer.embed_images(pictures) @ scorer.embed_texts(["a fox", "red"]).T
    assert torch.allclose(logits, expected.logits_per_image, atol=1e-4)
