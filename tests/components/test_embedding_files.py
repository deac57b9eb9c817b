"""Textual inversion files: every layout, what they say of themselves, and what is refused; words found in prompts."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from genkit import InputError
from genkit.cli.app import run
from genkit.components import inspect_model
from genkit.components.embeddingfile import EmbeddingFile, read_embedding
from genkit.components.single import kind_of
from genkit.components.words import Words, all_embeddings, given_embeddings, used_embeddings

CONFIGS = {  # of the text encoders of real models
    "SD 1": {"text_encoder": {"hidden_size": 768, "max_position_embeddings": 77}},
    "SD 2": {"text_encoder": {"hidden_size": 1024, "max_position_embeddings": 77}},
    "SDXL": {
        "text_encoder": {"hidden_size": 768, "max_position_embeddings": 77},
        "text_encoder_2": {"hidden_size": 1280, "max_position_embeddings": 77},
    },
    "pixels": {},
}
SD1: dict[str, Any] = CONFIGS["SD 1"]


def save(path: Path, metadata: Any = None, **shapes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {k: v if isinstance(v, torch.Tensor) else torch.full(v, 0.5) for k, v in shapes.items()}
    save_file(made, path, metadata)
    return path


def read(path: Path) -> EmbeddingFile:
    return read_embedding(path, kind_of)


LAYOUTS: dict[str, tuple[dict[str, Any], str, int, str]] = {  # tensors -> word, vectors, family
    "A1111 and kohya": ({"emb_params": (8, 768)}, "file", 8, "SD 1"),
    "of one vector": ({"emb_params": (1024,)}, "file", 1, "SD 2"),
    "SDXL": ({"clip_g": (2, 1280), "clip_l": (2, 768)}, "file", 2, "SDXL"),
    "diffusers' scripts for SDXL": ({"text_encoders_0": (2, 768), "text_encoders_1": (2, 1280)}, "file", 2, "SDXL"),
    "diffusers, one vector": ({"<cat-toy>": (768,)}, "<cat-toy>", 1, "SD 1"),
    "diffusers, several": ({"<cat-toy>": (3, 768)}, "<cat-toy>", 3, "SD 1"),
    "a word with a dot": ({"negative_v1.3": (3, 768)}, "negative_v1.3", 3, "SD 1"),
    "clip_l alone": ({"clip_l": (4, 768)}, "file", 4, "SD 1"),
    "an original, flattened": (
        {"string_to_param.*": (2, 768), "string_to_token.*": torch.tensor([265]), "step": torch.tensor(10)},
        "file", 2, "SD 1",
    ),
    "a star": ({"*": (2, 768)}, "file", 2, "SD 1"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    tensors, word, count, family = LAYOUTS[layout]
    file = save(tmp_path / "file.safetensors", **tensors)
    (one,) = given_embeddings([file], CONFIGS[family])
    assert (one.word, one.file.vectors, one.file.family) == (word, count, family)
    assert [values.shape for values in one.file.values.values()] == [(count, width) for width in one.file.widths]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_bit_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(3, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = read(save(tmp_path / "x.safetensors", emb_params=values)).values["text_encoder"]
    assert torch.equal(torch.from_numpy(found.copy()).to(dtype), values)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {  # tensors, model -> message
    "SD 2's for SD 1": ({"emb_params": (2, 1024)}, "SD 1", "width 1024, made for SD 2; this model's text_encoder has"),
    "SD 1's for SD 2": ({"<cat>": (768,)}, "SD 2", r"width 768, made for SD 1; .* has width 1024 \(SD 2\)"),
    "SD 1's for SDXL": ({"emb_params": (2, 768)}, "SDXL", r"width 768, made for SD 1, and none \(clip_g\) for .*_2"),
    "SDXL's without clip_g": ({"clip_l": (2, 768)}, "SDXL", r"none \(clip_g\) for this model's text_encoder_2, of wid"),
    "SDXL's without clip_l": ({"clip_g": (2, 1280)}, "SDXL", r"none \(clip_l\) for this model's text_encoder, of wid"),
    "SDXL's for SD 1": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "SD 1", "two text encoders .* made for SDXL; this"),
    "for no text": ({"emb_params": (2, 768)}, "pixels", "this model reads no prompts"),
    "unequal": ({"clip_l": (2, 768), "clip_g": (3, 1280)}, "SDXL", "3x1280: not the same number"),
    "no vectors": ({"emb_params": (0, 768)}, "SD 1", "holds no vectors: its shape is 0x768"),
    "longer than a prompt": ({"emb_params": (76, 768)}, "SD 1", "has 76 vectors, and a prompt has room for 75 tokens"),
    "three axes": ({"emb_params": (1, 2, 768)}, "SD 1", "is float32 of shape 1x2x768, not vectors x width"),
    "integers": ({"emb_params": torch.ones(2, 768, dtype=torch.int64)}, "SD 1", "is int64 of shape 2x768"),
    "NaN": ({"emb_params": torch.full((1, 768), float("nan"))}, "SD 1", "'emb_params': holds a NaN or an infinity"),
    "infinity": ({"x": torch.full((768,), float("inf")).half()}, "SD 1", "'x': holds a NaN or an infinity"),
    "two words": ({"emb_params": (1, 768), "<b>": (1, 768)}, "SD 1", "more than one word"),
    "several words": ({"<a>": (768,), "<b>": (768,)}, "SD 1", "'<a>', '<b>': more than one word"),
    "a head": ({"weight": (1, 768), "bias": (1,)}, "SD 1", "is no textual inversion: it is no model that genkit knows"),
    "one weight": ({"model.weight": (1, 768)}, "SD 1", "is no textual inversion"),
    "a LoRA": ({"lora_unet_x.lora_up.weight": (4, 4)}, "SD 1", "is no textual inversion: it is a LoRA"),
    "a marker": ({"<|endoftext|>": (768,)}, "SD 1", r"'<\|endoftext\|>': is a token with which"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    tensors, model, message = REFUSED[case]
    file = save(tmp_path / "file.safetensors", **tensors)
    with pytest.raises(InputError, match=message) as error:
        given_embeddings([file], CONFIGS[model])
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    pickle, text, cut = tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path / "cut.safetensors"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    cut.write_bytes(save(tmp_path / "whole.safetensors", emb_params=(2, 768)).read_bytes()[:-1])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for file, message in (
        (pickle, "is refused: a pickle can run code: save its vectors as .safetensors"),
        (tmp_path / "a.png", "is a picture: embeddings in pictures are not read"),
        (text, "is a Git LFS pointer"),
        (cut, "bytes of weights, but its header describes"),
        (tmp_path, "is a folder"),
        (tmp_path / "absent.pt", "is absent"),
    ):
        with pytest.raises(InputError, match=message):
            read(file)


def test_words_and_files(tmp_path: Path) -> None:
    file = save(tmp_path / "a:b.safetensors", emb_params=(1, 768))
    named = save(tmp_path / "learned_embeds.safetensors", **{"<cat>": (1, 768)})
    words = [one.word for one in given_embeddings([str(file), f"{file}:neg", named, (named, "<dog>")], SD1)]
    assert words == ["a:b", "neg", "<cat>", "<dog>"]
    with pytest.raises(InputError, match=r"learned.*: stands for the word 'NEG', and so does .*a:b\.safetensors"):
        given_embeddings([f"{file}:neg", f"{named}:NEG"], SD1)
    assert len(given_embeddings([file, str(file)], SD1)) == 1
    for entry, message in (((file, ""), "is no word"), (f"{file}:a\nb", "is no word"), (7, "7 is not FILE, FILE:WORD")):
        with pytest.raises(InputError, match=message):
            given_embeddings([entry], SD1)


def marked(path: Path) -> Path:
    note = PngImagePlugin.PngInfo()
    note.add_text("sd-ti-embedding", "e30=")
    Image.new("RGB", (8, 8)).save(path, pnginfo=note)
    return path


def test_of_a_folder_only_what_prompts_use_is_opened(tmp_path: Path) -> None:
    save(tmp_path / "Easy-Neg.safetensors", emb_params=(2, 768))
    save(tmp_path / "sub" / "easy.safetensors", emb_params=(1, 768))
    for name in ("sub/broken.safetensors", "old.pt", "Easy-Neg.pt", "readme.txt"):
        (tmp_path / name).write_bytes(b"\x80\x02")
    Image.new("RGB", (8, 8)).save(tmp_path / "Easy-Neg.png")  # a preview
    Image.new("RGB", (8, 8)).save(tmp_path / "sunset.png")
    marked(tmp_path / "sunrise.png")

    def words(*texts: str, given: tuple[Any, ...] = ()) -> list[str]:
        return [one.word for one in used_embeddings(given, tmp_path, texts, SD1)]

    assert words("a fox, easy-neg", "uneasy", "a sunset") == ["Easy-Neg"]  # and not the easy of easy-neg
    assert words("easy does it (easy-neg:1.2)") == ["easy", "Easy-Neg"]
    assert words("a fox") == []
    assert words("embedding:sub/easy, embedding:Easy-Neg.pt") == ["easy", "Easy-Neg"]
    assert words("easy", given=(tmp_path / "sub" / "easy.safetensors",)) == ["easy"]
    for text, message in (
        ("a broken vase", "--embedding-dir: for the word 'broken': .*/broken.safetensors: is a pickle"),
        ("old", "is refused"),
        ("sunrise", "is a picture"),
    ):
        with pytest.raises(InputError, match=message):
            words(text)
    save(tmp_path / "other" / "EASY.safetensors", emb_params=(3, 768))
    with pytest.raises(InputError, match=r"sub/easy\.safetensors: stands for the word .* so does .*EASY\.safetensors"):
        words("easy")
    assert words("Easy-Neg") == ["Easy-Neg"]
    found, refused = all_embeddings((), tmp_path, SD1)
    assert [one.word for one in found] == ["Easy-Neg"] and {"broken", "old", "sunrise", "EASY"} == set(refused)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <cat>, Neg", "a A B C, D"),
        ("negative", "negative"),
        ("(neg:1.3) neg-ative not_neg", "(D:1.3) D-ative not_neg"),
        ("<CAT>, <cat>_1 <cat>_7", "A B C, B <cat>_7"),
        ("<cat> <cat>_1 <cat>_2", "A B C"),  # a prompt that lists them
        ("embedding:neg embedding:neg.pt embedding:x/neg.safetensors, embedding:<cat>", "D D D, A B C"),
        ("embedding:negs myembedding:neg embedding: neg", "embedding:negs myembedding:D embedding: D"),
        ("two words here", "E here"),
        ("ſ k \u212a", "ſ k \u212a"),
    ],
)
def test_words_in_prompts(text: str, expected: str) -> None:
    words = Words({"<cat>": 3, "neg": 1, "two words": 1})
    letters = dict(zip((token for tokens in words.tokens.values() for token in tokens), "ABCDE", strict=True))
    found = words.expanded(text)
    for token, letter in letters.items():
        found = found.replace(token, letter)
    assert found == expected


def test_a_word_of_its_own_comes_before_the_second_vector_of_another() -> None:
    words = Words({"bad": 2, "bad_1": 1})
    assert words.expanded("bad_1") == words.tokens["bad_1"][0]
    assert Words({}).expanded("bad") == "bad" and Words({"ſs": 1}).found("SS, ss") == ["ſs"]


def test_inspect_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "x.safetensors", {"ss_base": "sdxl"}, clip_l=(2, 768), clip_g=(2, 1280))
    assert run(["inspect", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = ("kind", "word", "vectors", "width", "family", "dtype", "metadata")
    assert [found[name] for name in facts] == [
        "textual inversion", "x", 2, "768 and 1280", "SDXL", "float32", {"ss_base": "sdxl"},
    ]  # fmt: skip
    assert found["hashes"]["TI hash"] == found["hashes"]["SHA256"][:12]
    for name in ("emb_params", "<cat>"):
        with pytest.raises(InputError, match="is a textual inversion, not a model: give it with --embedding"):
            inspect_model(save(tmp_path / "y.safetensors", **{name: (2, 768)}))


def test_a_header_that_lies(tmp_path: Path) -> None:
    header = json.dumps({"emb_params": {"dtype": "F32", "shape": [2, 768], "data_offsets": [0, 6144]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + np.ones(10, "<f4").tobytes())
    with pytest.raises(InputError, match="has 40 bytes of weights, but its header describes 6144"):
        read(file)
