"""X-CLIP: probabilities as transformers computes them; frames of clips; `genkit classify-video`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer, XCLIPModel
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from genkit.cli import run
from genkit.errors import HostError, InputError
from genkit.pictures.frames import read_frames, sampled
from genkit.vision.video import VideoClassifier
from tests.videos import animation, frame_folder, shots, tiny_xclip

LABELS = ["a fox", "the sky over a green house", "two cats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_xclip(tmp_path_factory.mktemp("xclip"))


def expected(folder: Path, frames: list[Image.Image]) -> torch.Tensor:
    """Return the probabilities (1, L) by transformers' model, tokenizer and image processor."""
    pixels = VideoMAEImageProcessorPil.from_pretrained(folder)(frames, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(LABELS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = XCLIPModel.from_pretrained(folder).eval()(**pixels, **tokens)
    return out.logits_per_video.softmax(dim=1)


def test_probabilities_as_in_transformers(folder: Path, tmp_path: Path) -> None:
    sense = VideoClassifier.from_pretrained(folder, device="cpu")
    clips = [shots(4, 1), shots(4, 2, 30, 90), shots(4, 3, 70, 33)]
    wanted = torch.cat([expected(folder, clip) for clip in clips])
    found = sense(clips, LABELS)
    assert found.shape == (3, 3) and float(wanted.std()) > 0.01 and float((found - wanted).abs().max()) < 1e-4
    sense.batch = 2
    assert torch.allclose(sense(clips, LABELS), found, atol=1e-5)
    files = [frame_folder(tmp_path / "a", clips[0]), animation(tmp_path / "b.webp", clips[1])]
    assert torch.allclose(sense(files, LABELS), found[:2], atol=1e-5)


def test_frames_are_sampled_evenly(tmp_path: Path) -> None:
    assert sampled(4, 4) == [0, 1, 2, 3] and sampled(12, 3) == [2, 6, 10] and sampled(10, 4) == [1, 3, 6, 8]
    frames = shots(12)
    for clip in (frames, frame_folder(tmp_path / "frames", frames), animation(tmp_path / "clip.webp", frames)):
        found, total = read_frames(clip, 3)
        assert total == 12
        assert all(one.tobytes() == frames[n].tobytes() for one, n in zip(found, (2, 6, 10), strict=True))
    grey = [Image.new("L", (8, 8), 20 * n) for n in range(5)]
    found, total = read_frames(animation(tmp_path / "clip.gif", grey), 5)
    assert total == 5 and [one.getpixel((0, 0)) for one in found] == [(20 * n,) * 3 for n in range(5)]


def test_clips_that_cannot_be_read_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gif = animation(tmp_path / "clip.gif", shots(5))
    cut, mp4, one = tmp_path / "cut.gif", tmp_path / "clip.mp4", tmp_path / "one.gif"
    cut.write_bytes(gif.read_bytes()[:-200])
    mp4.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(40))
    shots(1)[0].save(one)
    (tmp_path / "empty").mkdir()
    refused = {
        "cut.gif: is truncated": cut, "clip.mp4: is neither an animated GIF or WebP": mp4,
        "one.gif: has 1 frame, fewer than the 4 that are looked at": one, "empty: holds no PNG": tmp_path / "empty",
        "the clip: has 2 frames, fewer than the 4": shots(2), "nothing.gif": tmp_path / "nothing.gif",
    }  # fmt: skip
    for message, clip in refused.items():
        with pytest.raises(InputError) as error:
            read_frames(clip, 4)
        assert message in str(error.value)
    sense = VideoClassifier.from_pretrained(folder, device="cpu")
    for labels in (["a", " "], [], ["fox " * 90]):
        with pytest.raises(InputError, match="labels: "):
            sense([gif], labels)
    monkeypatch.setattr("genkit.pictures.frames.MAX_FRAMES", 4)
    with pytest.raises(InputError, match="has 5 frames of 56x40, more than is read"):
        read_frames(gif, 4)
    with pytest.raises(HostError, match="no numbers in float32"), torch.no_grad():
        sense.model.logit_scale.fill_(torch.nan)
        sense([shots(4)], LABELS)
    path = folder / "preprocessor_config.json"
    stated = path.read_text()
    path.write_text(json.dumps({**json.loads(stated), "crop_size": 24}))
    with pytest.raises(InputError, match="makes 24x24 of a frame, not 32x32"):
        VideoClassifier.from_pretrained(folder, device="cpu").clip(shots(4))
    path.write_text(stated)


def classify(*words: Any) -> int:
    return run(["classify-video", *map(str, words), "--device", "cpu"])


def test_the_command_classifies_clips(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [animation(tmp_path / "a.gif", shots(6)), animation(tmp_path / "b.gif", shots(2)),
             frame_folder(tmp_path / "c", shots(9, 4))]  # fmt: skip
    assert classify(*clips, "--labels", ", ".join(LABELS), "--model", folder) == 1
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert [one.get("frames") for one in found] == [6, None, 9] and "b.gif: has 2 frames" in found[1]["error"]
    assert "b.gif: has 2 frames, fewer than the 4 that are looked at" in printed.err
    wanted = expected(folder, [shots(9, 4)[n] for n in sampled(9, 4)])[0].tolist()
    assert list(found[2]["p"]) == LABELS and found[2]["p"] == pytest.approx(
        dict(zip(LABELS, wanted, strict=True)), abs=1e-4
    )
    assert found[2]["label"] == LABELS[int(np.argmax(wanted))]
    out = tmp_path / "lines.jsonl"
    assert classify(clips[0], "--labels", "a fox,two_cats", "--model", folder, "-o", out) == 0
    assert list(json.loads(out.read_text())["p"]) == ["a fox", "two_cats"]
    refused: dict[str, list[Any]] = {
        "--labels: 'a' is a single label": ["--labels", "a"],
        "tokens, more than the 32 that": ["--labels", "a," + "fox " * 90],
        "'emoji' is no video classifier": ["--labels", "a,b", "--model", "emoji"],
        "there is no such file or folder": ["--labels", "a,b", tmp_path / "nothing"],
        "is a folder; name a file": ["--labels", "a,b", "-o", tmp_path],
    }
    for message, words in refused.items():
        capsys.readouterr()
        assert classify(clips[0], *words, *([] if "--model" in words else ["--model", folder])) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
