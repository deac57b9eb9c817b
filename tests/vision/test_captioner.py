"""BLIP: captions and answers as transformers generates them, in any batch; `genkit caption`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BartTokenizer,
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipProcessor,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GPT2Tokenizer,
    VisionEncoderDecoderModel,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from genkit.cli import run
from genkit.errors import InputError
from genkit.vision.captioner import Captioner
from genkit.vision.models import inspect_vision
from tests.captioners import tiny_florence, tiny_vit_gpt2
from tests.senses import noise, pictures, tensor, tiny_blip, tiny_blip_vqa

QUESTION = "how many cats in the picture?"


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip_vqa(tmp_path_factory.mktemp("vqa"))


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_florence(tmp_path_factory.mktemp("florence"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vit_gpt2(tmp_path_factory.mktemp("gpt2"))


def expected(kind: Any, folder: Path, picture: Image.Image, text: str | None) -> str:
    """Return what transformers' model and processor say of a picture."""
    processor = BlipProcessor(BlipImageProcessorPil.from_pretrained(folder), BertTokenizer.from_pretrained(folder))
    inputs = processor(images=picture, text=text, return_tensors="pt")
    with torch.inference_mode():
        ids = kind.from_pretrained(folder).eval().generate(**inputs, max_new_tokens=20)
    return processor.decode(ids[0], skip_special_tokens=True).strip()


def test_captions_as_in_transformers(blip: Path, vqa: Path) -> None:
    shots = [noise(n, 30 + 9 * n, 50) for n in range(5)]
    cases: list[tuple[Any, Path, str | None]] = [
        (BlipForConditionalGeneration, blip, None),
        (BlipForConditionalGeneration, blip, "a picture of"),
        (BlipForQuestionAnswering, vqa, QUESTION),
    ]
    for kind, folder, text in cases:
        captioner = Captioner.from_pretrained(folder, device="cpu")
        pixels = torch.cat([captioner.pixels(tensor(shot)) for shot in shots])
        found = captioner.captions(pixels, text, 20)
        assert found == [expected(kind, folder, shot, text) for shot in shots]
        assert any(found) and found == [captioner(tensor(shot), text, 20)[0] for shot in shots]
        captioner.batch = 2
        assert captioner.captions(pixels, text, 20) == found


def test_captions_of_florence_as_in_transformers(florence: Path) -> None:
    shots = [noise(n, 30 + 9 * n, 50) for n in range(3)]
    images: Any = AutoImageProcessor.from_pretrained(florence)
    processor = Florence2Processor(images, BartTokenizer.from_pretrained(florence))
    model = Florence2ForConditionalGeneration.from_pretrained(florence).eval()
    captioner = Captioner.from_pretrained(florence, device="cpu")
    pixels = torch.cat([captioner.pixels(tensor(shot)) for shot in shots])
    asked = {None: "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "more-detailed": "<MORE_DETAILED_CAPTION>"}
    said = []
    for detail, task in asked.items():
        wanted = []
        for shot in shots:
            ids = model.generate(**processor(text=task, images=shot, return_tensors="pt"), max_new_tokens=12)
            wanted.append(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
        assert captioner.captions(pixels, None, 12, detail) == wanted
        said += wanted
    assert len(set(said)) == 9
    captioner.batch = 2
    assert captioner.captions(pixels, None, 12, "more-detailed") == said[6:]


@pytest.mark.parametrize("stated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_captions_of_a_vit_before_a_gpt2_as_in_transformers(stated: bool, gpt2: Path, tmp_path: Path) -> None:
    folder = gpt2 if stated else Path(shutil.copytree(gpt2, tmp_path / "old"))
    if not stated:  # as folders from before there was such a file
        ids = json.loads((gpt2 / "generation_config.json").read_text())
        (folder / "generation_config.json").unlink()
        config = json.loads((gpt2 / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **ids}))
    shots = [noise(n, 30 + 9 * n, 50) for n in range(3)]
    model: Any = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    images: Any = AutoImageProcessor.from_pretrained(folder)
    ids = model.generate(images(shots, return_tensors="pt").pixel_values, max_new_tokens=12)
    wanted = [
        text.strip() for text in GPT2Tokenizer.from_pretrained(folder).batch_decode(ids, skip_special_tokens=True)
    ]
    captioner = Captioner.from_pretrained(folder, device="cpu")
    assert [captioner(tensor(shot), None, 12)[0] for shot in shots] == wanted and len(set(wanted)) == 3


def test_how_text_is_generated_is_checked(florence: Path, gpt2: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gpt2, tmp_path / "gpt2"))
    bad = {
        "num_beams: 1000 is not": {"num_beams": 1000},
        "suppress_tokens: [3] is not null": {"suppress_tokens": [3]},
        "guidance_scale: 2 is not 1 or null": {"guidance_scale": 2},
    }
    for message, fields in bad.items():
        (folder / "generation_config.json").write_text(json.dumps(fields))
        with pytest.raises(InputError) as error:
            inspect_vision(folder, ("captioner",))
        assert message in str(error.value)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 5, "pad_token_id": 0}))
    assert "do_sample: is left out" in inspect_vision(folder, ("captioner",)).notes[0]
    with pytest.raises(InputError, match="decoder_start_token_id: is missing"):
        Captioner.from_pretrained(folder, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    for part, kind in (("encoder", "swin"), ("decoder", "trocr")):
        (folder / "config.json").write_text(json.dumps({**config, part: {"model_type": kind}}))
        with pytest.raises(InputError, match=f"{part}: model_type: '{kind}' is not"):
            inspect_vision(folder, ("captioner",))
    with pytest.raises(InputError, match=r"text: 'a': .* reads none beside the picture"):
        Captioner.from_pretrained(florence, device="cpu")(tensor(noise(1, 20, 20)), "a")


def test_what_a_model_cannot_read_is_refused(blip: Path, vqa: Path) -> None:
    picture = tensor(noise(1, 20, 20))
    with pytest.raises(InputError, match="question: is missing"):
        Captioner.from_pretrained(vqa, device="cpu")(picture)
    with pytest.raises(InputError, match="is no text"):
        Captioner.from_pretrained(blip, device="cpu")(picture, " ")
    with pytest.raises(InputError, match="tokens, more than the 40 read"):
        Captioner.from_pretrained(blip, device="cpu")(picture, "fox " * 50)


def caption(*words: Any) -> int:
    return run(["caption", *map(str, words), "--device", "cpu"])


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_captions_are_written_once(blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = pictures(tmp_path / "pictures", 3)
    (where / "1.txt").write_text("mine\n")
    assert caption(where, "--model", blip, "--write", "txt") == 0
    printed = capsys.readouterr()
    found = {Path(one["file"]).name: one["caption"] for one in lines(printed.out)}
    assert list(found) == ["0.png", "2.png"] and "1 of 3 pictures have a caption and keep it" in printed.err
    assert (where / "1.txt").read_text() == "mine\n" and (where / "0.txt").read_text() == found["0.png"] + "\n"
    assert caption(where, "--model", blip, "--write", "txt") == 0 and capsys.readouterr().out == ""
    assert caption(where, "--model", blip, "--write", "txt", "--overwrite") == 0
    assert (where / "1.txt").read_text() != "mine\n"


def test_metadata_keeps_what_it_has(blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = pictures(tmp_path / "pictures", 3)
    (where / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    mine = [{"file_name": "1.png", "caption": "mine"}, {"file_name": "2.png", "artist": "me"}]
    (where / "metadata.jsonl").write_text("\n".join(map(json.dumps, mine)))
    assert caption(where, "--model", blip, "--write", "jsonl", "--begin", "a picture of") == 1
    found = {Path(one["file"]).name: one.get("caption") for one in lines(capsys.readouterr().out)}
    assert lines((where / "metadata.jsonl").read_text()) == [
        mine[0], {**mine[1], "text": found["2.png"]}, {"file_name": "0.png", "text": found["0.png"]},
    ]  # fmt: skip
    assert str(found["0.png"]).startswith("a picture of")
    assert caption(where, "--model", blip, "--write", "jsonl", "--overwrite") == 1
    again = {Path(one["file"]).name: one.get("caption") for one in lines(capsys.readouterr().out)}
    assert lines((where / "metadata.jsonl").read_text())[0] == {"file_name": "1.png", "caption": again["1.png"]}
    (where / "metadata.jsonl").write_text('{"file_name": "1.png"}\n{"file_name": "1.png"}\n')
    assert caption(where, "--model", blip, "--write", "jsonl") == 2
    assert "metadata.jsonl:2: file_name: '1.png' is there twice" in capsys.readouterr().err


def test_a_stopped_command_goes_on(
    blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = pictures(tmp_path / "pictures", 5)
    monkeypatch.setattr("genkit.studies.senses.READ", 2)
    say, calls = Captioner.captions, []

    def stopped(self: Captioner, *words: Any) -> list[str]:
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return say(self, *words)

    monkeypatch.setattr(Captioner, "captions", stopped)
    assert caption(where, "--model", blip, "--write", "jsonl") == 130
    assert [one["file_name"] for one in lines((where / "metadata.jsonl").read_text())] == ["0.png", "1.png"]
    assert caption(where, "--model", blip, "--write", "jsonl") == 0
    assert [one["file_name"] for one in lines((where / "metadata.jsonl").read_text())] == [f"{n}.png" for n in range(5)]


def test_answers_and_refusals(
    blip: Path, vqa: Path, florence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = pictures(tmp_path / "pictures", 2)
    assert caption(where, "--model", vqa, "--question", QUESTION, "-o", tmp_path / "answers.jsonl") == 0
    assert [one["question"] for one in lines((tmp_path / "answers.jsonl").read_text())] == [QUESTION] * 2
    assert caption(where, "--model", florence, "--detail", "detailed", "--tokens", "4", "--write", "txt") == 0
    found = lines(capsys.readouterr().out)
    assert [(where / f"{n}.txt").read_text().strip() for n in range(2)] == [one["caption"] for one in found]
    refused = {
        "--question: is missing": ["--model", vqa],
        "--begin: 'a': ": ["--model", vqa, "--begin", "a", "--question", "b"],
        "captions; a BlipForQuestionAnswering answers questions": ["--model", blip, "--question", "how many?"],
        "--write: 'json' is not txt or jsonl (did you mean 'jsonl'?)": ["--model", blip, "--write", "json"],
        "--overwrite: needs --write": ["--model", blip, "--overwrite"],
        "--tokens: 0 is not": ["--model", blip, "--tokens", "0"],
        "--begin: ' ' is no text": ["--model", blip, "--begin", " "],
        "continues no text; a BlipForConditionalGeneration does": ["--model", florence, "--begin", "a"],
        "captions; a BlipForQuestionAnswering": ["--model", florence, "--question", "how many?"],
        "--detail: 'more' is not caption or detailed or more-detailed": ["--model", florence, "--detail", "more"],
        "captions in one way only": ["--model", blip, "--detail", "detailed"],
        "--begin: 'fox": ["--model", blip, "--begin", "fox " * 50],
    }
    for message, words in refused.items():
        capsys.readouterr()
        assert caption(where, *words) == 2
        assert message in capsys.readouterr().err
