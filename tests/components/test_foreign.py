"""Model folders as other tools write them: what asks for nothing is taken, and what is left out is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from genkit import ClipScorer, InputError, TextToImage
from genkit.components import inspect_model, load_components
from genkit.components.folder import EMBEDDED
from genkit.components.text import expand_tokens
from tests.tiny import tiny_clip, tiny_sdxl, tiny_stable_diffusion

Change = Callable[[Path], Any]
INDEX, TOKENIZER, PREPROCESSOR = "model_index.json", "tokenizer/tokenizer_config.json", "preprocessor_config.json"


def change(file: str, inside: str | None = None, **keys: Any) -> Change:
    """Set keys of a JSON file, or of an object inside it; ... removes one."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        place = content if inside is None else content[inside]
        for key, value in keys.items():
            place.pop(key, None) if value is ... else place.update({key: value})
        (folder / file).write_text(json.dumps(content))

    return apply


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("whole")
    made = {"sd": tiny_stable_diffusion(top / "sd"), "xl": tiny_sdxl(top / "xl"), "clip": top / "clip"}
    tiny_clip(top / "clip")
    return made


ASKS_NOTHING: dict[str, tuple[str, Change]] = {
    "null flag": ("sd", change(INDEX, requires_safety_checker=None)),
    "null flag of a network": ("sd", change("unet/config.json", flip_sin_to_cos=True, use_linear_projection=None)),
    "null component": ("sd", change(INDEX, feature_extractor=None, image_encoder=None)),
    "unknown null component": ("sd", change(INDEX, upscaler=[None, None], controlnet=None)),
    "false code": ("sd", change(TOKENIZER, trust_remote_code=False)),
    "false code of the index": ("sd", change(INDEX, trust_remote_code=False, custom_pipeline=None)),
    "unknown false and empty": ("sd", change("vae/config.json", use_tiling=False, hooks=[], extra={}, note="")),
    "null of a tokenizer": ("sd", change(TOKENIZER, additional_special_tokens=None, do_lower_case=None)),
    "null of a preprocessor": ("clip", change(PREPROCESSOR, do_center_crop=None, resample=None, do_resize=None)),
    "special tokens as text": ("sd", change(TOKENIZER, additional_special_tokens=["<|endoftext|>"])),
    "special tokens as objects": (
        "sd", change(TOKENIZER, additional_special_tokens=[{"content": "<|endoftext|>", "lstrip": False}]),
    ),
    "no square": ("clip", change(PREPROCESSOR, use_square_size=False)),
    "false for null": ("sd", change("unet/config.json", class_embed_type=False, encoder_hid_dim=[])),
    "empty for null": ("sd", change("unet/config.json", num_class_embeds="", time_cond_proj_dim={})),
    "whole floats": ("sd", change("unet/config.json", in_channels=4.0, cross_attention_dim=16.0)),
    "a byte order mark": ("sd", lambda f: (f / INDEX).write_bytes(b"\xef\xbb\xbf" + (f / INDEX).read_bytes())),
    "no length": ("sd", change(TOKENIZER, model_max_length=None)),
    "null sizes": ("clip", change(PREPROCESSOR, crop_size=None, image_mean=None)),
    "class as null": ("sd", change(TOKENIZER, tokenizer_class=None)),
}  # fmt: skip

NOTED: dict[str, tuple[str, Change, str]] = {
    "a list of files": ("sd", change(INDEX, _ignore_files=["pytorch_model.bin"]), "model_index.json: not used"),
    "private key": ("sd", change(INDEX, _module="model"), "_module"),
    "a tool's mark": ("sd", change("unet/config.json", converted_by="a tool"), "converted_by"),
    "mistyped": ("sd", change("vae/config.json", scaling_facter=1), "(did you mean 'scaling_factor'?)"),
    "mistyped in the text encoder": ("sd", change("text_encoder/config.json", hiden_size=16), "'hidden_size'"),
    "half a pair": (
        "sd",
        change(INDEX, feature_extractor=["StableDiffusionSafetyChecker"]),
        "is not a pair of library",
    ),
    "unknown option": ("sd", change(INDEX, is_safe=True), "is_safe"),
    "fast tokenizer": ("sd", change(TOKENIZER, use_fast=True), "use_fast"),
    "unknown in CLIP's half": ("clip", change("config.json", "text_config", hidden=1), "text_config: not used"),
    "unknown in a preprocessor": ("clip", change(PREPROCESSOR, image_men=[0, 0, 0]), "'image_mean'"),
}


@pytest.mark.parametrize("name", ASKS_NOTHING)
def test_what_asks_for_nothing_is_taken(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    model, apply = ASKS_NOTHING[name]
    folder = shutil.copytree(whole[model], tmp_path / "m")
    apply(folder)
    found = inspect_model(folder)
    assert found.notes == () and found.configs == inspect_model(whole[model]).configs
    load_components(found, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", NOTED)
def test_what_is_left_out_is_said_once(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    model, apply, words = NOTED[name]
    folder = shutil.copytree(whole[model], tmp_path / "m")
    apply(folder)
    found = inspect_model(folder)
    (note,) = found.notes
    assert words in note and "\n" not in note and found.configs == inspect_model(whole[model]).configs
    assert found.describe()["notes"] == [note]
    load_components(found, device="cpu", dtype=torch.float32)


def test_many_unknown_keys_are_one_line(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(whole["sd"], tmp_path / "m")
    change("unet/config.json", None, **{f"tool_{k}": k + 1 for k in range(20)})(folder)
    (note,) = inspect_model(folder).notes
    assert note.endswith("tool_5 and 14 more")


def test_what_a_newer_library_knows_is_refused(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    folder = shutil.copytree(whole["sd"], tmp_path / "m")
    change("vae/config.json", latents_gain=2.0)(folder)
    original = AutoencoderKL.__init__

    def newer(self: Any, latents_gain: float = 1.0, **config: Any) -> None:
        original(self, **config)

    monkeypatch.setattr(AutoencoderKL, "__init__", newer)
    with pytest.raises(InputError, match=r"latents_gain: 2\.0: the installed diffusers knows it, genkit does not"):
        load_components(inspect_model(folder), device="cpu", dtype=torch.float32)


REFUSED: dict[str, tuple[str, Change, str]] = {
    "an adapter": ("sd", change(INDEX, adapter=["diffusers", "T2IAdapter"]), "'adapter': unknown component"),
    "null where a number is needed": ("sd", change("vae/config.json", latent_channels=None), "latent_channels: None"),
    "a code key that asks": ("sd", change(TOKENIZER, trust_remote_code=1), "never run"),
    "auto_map, empty": ("sd", change("vae/config.json", auto_map={}), "never run"),
    "another tokenizer": ("sd", change(TOKENIZER, tokenizer_class="T5Tokenizer"), "tokenizer_class: 'T5Tokenizer'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_result_is_refused(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    model, apply, words = REFUSED[name]
    folder = shutil.copytree(whole[model], tmp_path / "m")
    apply(folder)
    with pytest.raises(InputError) as caught:
        inspect_model(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/tokenizer.json"]
)
def test_a_pointer_of_git_lfs_is_named(file: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(whole["sd"], tmp_path / "a model")
    lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 3438167534\n"
    (folder / file).write_text(lines)
    with pytest.raises(InputError, match=r"is a Git LFS pointer, not the file: `git -C '.*a model/\w+' lfs pull`"):
        inspect_model(folder)


def cached(whole: Path, folder: Path, *commits: str) -> Path:
    for commit in commits:
        shutil.copytree(whole, folder / "snapshots" / commit)
    (folder / "blobs").mkdir()
    return folder


def test_a_folder_of_the_hub_cache_is_its_snapshot(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = cached(whole["sd"], tmp_path / "models--owner--name", "a" * 40)
    found = inspect_model(folder)
    assert found.folder == folder / "snapshots" / ("a" * 40) and "snapshot aaaaaaaaaaaa" in found.notes[0]
    shutil.copytree(whole["sd"], folder / "snapshots" / ("b" * 40))
    with pytest.raises(InputError, match="holds 2 snapshots and no refs/main"):
        inspect_model(folder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40 + "\n")
    assert inspect_model(folder).folder.name == "b" * 40
    (folder / "refs" / "main").write_text("../../../etc")
    with pytest.raises(InputError, match="holds 1 snapshots"):
        inspect_model(folder)


@pytest.mark.parametrize("name", ["~/m", "$MODELS/m", "${MODELS}/m"])
def test_home_and_variables_in_a_name(
    name: str, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", str(tmp_path))
    shutil.copytree(whole["sd"], tmp_path / "m")
    assert inspect_model(name).folder == tmp_path / "m"


def test_a_processor_config_alone_is_a_preprocessor(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED / "emoji-clip", tmp_path / "clip")
    content = json.loads((folder / PREPROCESSOR).read_text())
    (folder / PREPROCESSOR).unlink()
    whole = {"image_processor": content, "processor_class": "CLIPProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    assert inspect_model(folder).preprocessor == inspect_model("emoji-clip").preprocessor
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    with pytest.raises(InputError, match=r"processor_config\.json: image_processor: None is not an object"):
        inspect_model(folder)


def test_a_square_size_is_no_crop(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED / "emoji-clip", tmp_path / "clip")
    side = inspect_model("emoji-clip").configs["clip"]["vision_config"]["image_size"]
    change(PREPROCESSOR, use_square_size=True, size={"shortest_edge": side}, do_center_crop=False)(folder)
    scorer = ClipScorer.from_pretrained(folder, device="cpu")
    assert scorer.preprocess(torch.zeros(1, 3, 40, 90, dtype=torch.uint8)).shape == (1, 3, side, side)


def test_the_text_half_of_a_whole_clip(whole: dict[str, Path], tmp_path: Path) -> None:
    """As `text_encoder` of a folder that was put together by hand; transformers loads it as well."""
    folder = shutil.copytree(whole["sd"], tmp_path / "m")
    plain = TextToImage.from_pretrained(folder, device="cpu")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    from transformers import CLIPConfig, CLIPTextModel

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=config, vision_config=vision, projection_dim=8))
    text: Any = CLIPTextModel.from_pretrained(folder / "text_encoder")
    half: Any = clip.text_model
    half.load_state_dict({name.removeprefix("text_model."): weight for name, weight in text.state_dict().items()})
    shutil.rmtree(folder / "text_encoder")
    clip.save_pretrained(folder / "text_encoder")
    found = inspect_model(folder)
    assert any("is of a whole CLIP: its text half is used" in note for note in found.notes)
    ours = TextToImage.from_pretrained(folder, device="cpu")
    assert plain.text is not None and ours.text is not None
    assert torch.equal(ours.text(["a red fox"])[0], plain.text(["a red fox"])[0])


@pytest.mark.parametrize(
    ("word", "text", "alone"),
    [("sks", "a sks dog", True), ("sks", "he asks", False), ("sks", "sks", True), ("<cat>", "a<cat>b", True),
     ("my-cat", "my-cats", False), ("my-cat", "a my-cat, sitting", True)],
)  # fmt: skip
def test_a_learned_word_is_not_a_part_of_another(word: str, text: str, alone: bool) -> None:
    class Tokenizer:
        def get_added_vocab(self) -> dict[str, int]:
            return {word: 1, f"{word}_1": 2}

    (found,) = expand_tokens(Tokenizer(), [text])
    assert (found != text) == alone and (f"{word} {word}_1" in found) == alone
