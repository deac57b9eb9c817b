"""Pictures out: bit-exact where that is promised, their settings in every format, and a run in one that is not PNG."""

from __future__ import annotations

import io
import json
import struct
import sys
import threading
import time
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from genkit import InputError, Request, Result, generate
from genkit.pictures.encoders import encoding
from genkit.pictures.images import read_image
from genkit.pictures.metadata import METADATA_BYTES, Origin, texts
from genkit.runs import writers as writing
from genkit.runs.run import Run
from genkit.studies.filter import refilter
from genkit.studies.score import score_images
from tests.check_run import check_run
from tests.null_run import CONFIG, rows_of

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
JXL = pytest.param("jxl", marks=pytest.mark.skipif(not find_spec("pillow_jxl"), reason="needs pillow-jxl-plugin"))
FORMATS = ["png", "webp", "jpeg", JXL]


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    """Let Image.open know JPEG XL, where its plugin is there."""
    if find_spec("pillow_jxl"):
        import pillow_jxl  # noqa: F401


def opened(data: bytes) -> ImageFile.ImageFile:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def smooth(height: int, width: int) -> np.ndarray:
    """What pictures are like: slopes, edges and a little grain."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    light = (
        np.stack([200 * x, 255 * y, 120 + 90 * np.sin(9 * (x + y))], -1)
        + 40 * (((x - 0.5) ** 2 + y**2) < 0.2)[..., None]
    )
    return (light + RNG.normal(0, 2, light.shape)).clip(0, 255).astype(np.uint8)


# -- every bit --------------------------------------------------------------------------------------------------------

# The last three: rows of one block and more, of exactly one row a block, and the block that is left over.
SHAPES = [(1, 1), (1, 2), (2, 1), (1, 300), (300, 1), (2, 2), (3, 5), (64, 64), (5, 44_000), (3, 43_689), (257, 511)]
CONTENTS = {
    "noise": lambda h, w: RNG.integers(0, 256, (h, w, 3), dtype=np.uint8),
    "ties": lambda h, w: RNG.integers(0, 3, (h, w, 3), dtype=np.uint8) * 127,  # of which neighbour predicts best
    "black": lambda h, w: np.zeros((h, w, 3), np.uint8),
    "white": lambda h, w: np.full((h, w, 3), 255, np.uint8),
    "smooth": smooth,
    "turned": lambda h, w: smooth(w, h).transpose(1, 0, 2),  # not contiguous
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_png_reads_back_bit_for_bit(content: str, shape: tuple[int, int]) -> None:
    pixels = CONTENTS[content](*shape)
    data = encoding().encode(pixels)
    picture = opened(data)
    assert (picture.mode, picture.format) == ("RGB", "PNG")
    np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_a_png_is_whole(tmp_path: Path) -> None:
    """Every checksum and the end hold for a reader stricter than Pillow, and the pixels are one zlib stream."""
    data = encoding().encode(PIXELS, {"parameters": "a", "genkit": "{}"})
    (tmp_path / "a.png").write_bytes(data)
    assert read_image(tmp_path / "a.png").size == (32, 24)
    at, kinds = 8, []
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        kinds.append(kind)
        if kind == b"IDAT":
            raw = zlib.decompress(data[at + 8 : at + 8 + length])
            assert len(raw) == 24 * (1 + 32 * 3) and set(raw[:: 1 + 32 * 3]) == {4}
        at += 12 + length
    assert kinds == [b"IHDR", b"tEXt", b"tEXt", b"IDAT", b"IEND"]


def test_a_png_is_no_larger_than_pillows() -> None:
    for pixels in (smooth(300, 400), smooth(90, 64), PIXELS):
        theirs = io.BytesIO()
        Image.fromarray(pixels).save(theirs, "PNG")
        assert len(encoding().encode(pixels)) <= 1.15 * len(theirs.getvalue())


@pytest.mark.parametrize("name", ["webp", JXL])
@pytest.mark.parametrize("content", CONTENTS)
def test_quality_100_keeps_every_bit_where_the_format_can(name: str, content: str) -> None:
    for shape in ((1, 1), (1, 300), (300, 1), (33, 57)):
        pixels = np.ascontiguousarray(CONTENTS[content](*shape))
        np.testing.assert_array_equal(np.asarray(opened(encoding(name, 100).encode(pixels)).convert("RGB")), pixels)


@pytest.mark.parametrize("name", ["webp", "jpeg", JXL])
def test_quality_is_bytes_against_error(name: str) -> None:
    pixels = smooth(96, 128)
    sizes, errors = [], []
    for quality in (1, 30, 60, 89, None, 99):
        data = encoding(name, quality).encode(pixels)
        sizes.append(len(data))
        errors.append(np.abs(np.asarray(opened(data).convert("RGB")).astype(int) - pixels).mean())
    assert sizes == sorted(sizes) and len(set(sizes)) == 6
    assert errors[0] > errors[2] > errors[5] > 0 and errors[4] < 4
    assert (encoding(name).quality, str(encoding(name))) == (90, f"{name}, quality 90")


def test_a_jpeg_keeps_the_colours_of_edges_from_quality_90_on() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    stripes[:, 1::2] = (0, 0, 255)
    errors = [
        np.abs(np.asarray(opened(encoding("jpeg", q).encode(stripes))).astype(int) - stripes).mean() for q in (89, 90)
    ]
    assert errors[1] < 10 < errors[0]


def test_pictures_are_encoded_in_parallel() -> None:
    """The interpreter is free while a picture is packed: another thread gets its turn many times."""
    pixels = smooth(1500, 1500)

    def turns() -> int:
        done, found = threading.Event(), 0

        def work() -> None:
            encoding().encode(pixels)
            done.set()

        thread = threading.Thread(target=work)
        thread.start()
        while not done.wait(0.0005):
            found += 1
        thread.join()
        return found

    before = sys.getswitchinterval()
    sys.setswitchinterval(10)  # nobody is asked to give way: a turn is had only where the encoder lets go
    try:
        # About 20 of a picture, and fewer where other processes want the core; never more than one where it is held
        assert any(turns() >= 3 for _ in range(50))
    finally:
        sys.setswitchinterval(before)


# -- what a picture says of itself -------------------------------------------------------------------------------------


def result(**fields: Any) -> Result:
    scores = {"clip": 0.25, "p": {}, "nan": False, "flat": False}
    return Result("fox", 2, 9, width=64, height=48, steps=20, nfe=40, seconds=1.5, **{"scores": scores, **fields})


def read_back(data: bytes) -> dict[str, str]:
    """The two texts as other tools find them: text chunks of a PNG, else EXIF."""
    picture = opened(data)
    if picture.format == "PNG":
        return dict(picture.text)  # type: ignore[attr-defined]
    exif = picture.getexif()
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return {"parameters": comment[8:].decode("utf-16-be"), "genkit": exif[0x010E]}


def written(request: Request, found: Result | None = None, model: str = "emoji", name: str = "png") -> dict[str, str]:
    """The texts of a picture, as they come back from a file of that format."""
    text = texts(request.to_json(), (found or result()).to_json(), Origin(model, "0.1.0"))
    back = read_back(encoding(name).encode(PIXELS, text))
    assert back == text
    return back


def test_parameters_are_what_other_tools_read() -> None:
    request = Request(
        id="fox", prompt="a red fox,\nrunning", negative_prompt="text", num_images=4, num_inference_steps=20,
        guidance_scale=7.0, scheduler={"solver": "dpmpp_2m", "spacing": "karras"}, image="x.png", strength=0.75,
    )  # fmt: skip
    assert written(request)["parameters"] == (
        "a red fox,\nrunning\nNegative prompt: text\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, "
        "CFG scale: 7, Seed: 9, Size: 64x48, Model: emoji, Denoising strength: 0.75, Version: genkit 0.1.0"
    )
    plain = written(Request(prompt="a", scheduler="euler_ancestral", num_inference_steps=20))["parameters"]
    assert plain == "a\nSteps: 20, Sampler: Euler a, Seed: 9, Size: 64x48, Model: emoji, Version: genkit 0.1.0"
    comma = texts(Request(prompt="a").to_json(), result().to_json(), Origin("my, model: 2", "0.1.0"))["parameters"]
    assert 'Model: "my, model: 2"' in comma


def test_the_record_holds_what_the_picture_depends_on() -> None:
    request = Request(
        id="fox", prompt="日本 \u2028 <b>", seed=[7, 8, 9], meta={"a": [1, None]}, image="/home/me/secret/x.png"
    )
    record = json.loads(written(request)["genkit"])
    assert record["request"] == {**request.to_json(), "image": "x.png"}  # a picture that is shared tells no folder
    assert (record["id"], record["index"], record["seed"], record["model"]) == ("fox", 2, 9, "emoji")
    assert record["scores"]["clip"] == 0.25
    assert "seconds" not in record  # the same picture is the same file, however long it took
    assert json.loads(written(request, result(scores={"clip": float("nan")}))["genkit"])["scores"] == {"clip": None}


HOSTILE = {
    "latin": "un château à Besançon ÿ\xa0\x85",
    "emoji": "🦊 and 猫 and e\u0301",
    "breaks": "a\r\nb\u2028c\u2029d\x0be",
    "control": "\x01\x1b[31m\x7f",
    "right-to-left": "\u202efox\u202c",
    "markup": "</script><b>&amp;{{x}}%s$(id)\\u0000\\",
    "infotext": "Negative prompt: x\nSteps: 1, Seed: 2",
    "spaces": "  a  \n\n ",
    "long": "ab" * 50_000,
    "long-wide": "\u732b" * 100_000,
    "long-lines": "a\n" * 50_000,
    "long-pairs": "🦊" * 50_000,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_travels_in_every_format(kind: str, name: str) -> None:
    prompt = HOSTILE[kind]
    labels = [f"label {i}" * 9 for i in range(1000)]
    crowded = {"negative_prompt": prompt, "labels": labels, "meta": {"k": "v" * 90_000}} if "long" in kind else {}
    text = written(Request(prompt=prompt, **crowded), result(scores={"p": dict.fromkeys(labels, 0.5)}), name=name)
    record = json.loads(text["genkit"])
    assert record["seed"] == 9 and text["parameters"].endswith("Version: genkit 0.1.0")
    assert text["parameters"].startswith(prompt[:1000])
    if "long" in kind:
        assert record["cut"] is True
        assert sum(len(value.encode()) for value in text.values()) <= METADATA_BYTES
    else:
        assert record["request"]["prompt"] == prompt
    assert len(encoding(name).encode(PIXELS, text)) < 2 * METADATA_BYTES


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_folder_that_is_no_text(name: str) -> None:
    """A folder's name may hold bytes that are no UTF-8, which Python gives as half surrogates."""
    text = written(Request(prompt="a"), model="m\udcff", name=name)
    assert "Model: m?" in text["parameters"] and json.loads(text["genkit"])["model"] == "m\udcff"


def test_text_is_never_compressed() -> None:
    """A reader refuses the whole file when a compressed chunk unpacks past its limit."""
    data = encoding().encode(
        PIXELS, texts(Request(prompt="x" * 9000).to_json(), result().to_json(), Origin("emoji", "0.1.0"))
    )
    assert b"zTXt" not in data and b"tEXtparameters\0xxx" in data
    wide = encoding().encode(
        PIXELS, texts(Request(prompt="猫").to_json(), result().to_json(), Origin("emoji", "0.1.0"))
    )
    assert b"iTXtparameters\0\0\0\0\0" + "猫\n".encode() in wide


@pytest.mark.parametrize("name", ["webp", "jpeg", JXL])
def test_exif_as_the_standard_has_it(name: str) -> None:
    data = encoding(name).encode(
        PIXELS, texts(Request(prompt="a").to_json(), result().to_json(), Origin("emoji", "0.1.0"))
    )
    block = data[data.index(b"MM\0\x2a\0\0\0\x08") :]

    def entries(at: int) -> dict[int, tuple[int, int, int]]:
        (count,) = struct.unpack_from(">H", block, at)
        found = [struct.unpack_from(">HHII", block, at + 2 + 12 * k) for k in range(count)]
        assert [tag for tag, *_ in found] == sorted(tag for tag, *_ in found)
        assert block[at + 2 + 12 * count :][:4] == b"\0" * 4, "no further directory"
        return {tag: (kind, length, value) for tag, kind, length, value in found}

    first = entries(8)
    inner = entries(first[0x8769][2])
    assert (first[0x010E][0], first[0x8769][:2], inner[0x9286][0]) == (2, (4, 1), 7)  # ASCII, LONG, UNDEFINED
    for _, length, at in (first[0x010E], inner[0x9286]):
        assert at % 2 == 0 and at + length <= len(block)
    _, length, at = first[0x010E]
    assert block[at + length - 1] == 0 and json.loads(block[at : at + length].decode()[:-1])["seed"] == 9


# -- asking for a format ----------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, Any, str]] = [
    ("wepb", None, "--format: 'wepb' is not png, webp, jpeg or jxl (did you mean 'webp'?)"),
    ("PNG", None, "'PNG' is not png, webp, jpeg or jxl (did you mean 'png'?)"),
    ("jpge", None, "(did you mean 'jpeg'?)"),
    ("", None, "--format: '' is not png"),
    ("a" * 500 + "\n", None, "--format: 'aaa"),
    ("png", 90, "--quality: png keeps every bit and has none"),
    ("webp", 0, "--quality: 0 is not a whole number from 1 to 100"),
    ("jpeg", 101, "--quality: 101 is not"),
    ("jpeg", -5, "--quality: -5 is not"),
    ("jpeg", 90.0, "--quality: 90.0 is not"),
    ("jpeg", True, "--quality: True is not"),
]


@pytest.mark.parametrize(("name", "quality", "words"), REFUSED)
def test_what_is_no_format_or_quality(name: str, quality: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        generate([Request(prompt="a")], tmp_path / "run", model="no-such-model", format=name, quality=quality)
    assert words in str(caught.value) and len(str(caught.value)) < 200
    assert not (tmp_path / "run").exists()


def test_jxl_without_its_plugin_is_refused_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    with pytest.raises(InputError, match=r"^--format: jxl .* pip install pillow-jxl-plugin$"):
        encoding("jxl")


def test_jpg_is_jpeg() -> None:
    assert encoding("jpg") == encoding("jpeg") and encoding("jpg").suffix == ".jpg"


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_in_jpeg_from_start_to_score(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = [Request(id="fox", prompt="a red fox", num_images=3, keep=2), Request(id="b.jpg", prompt="a pizza")]
    small = {"num_inference_steps": 1, "width": 64, "height": 64}

    def again(**options: Any) -> Any:
        return generate(rows, run, device="cpu", defaults=small, quiet=True, **options)

    assert again(format="jpeg", quality=80).new == 4
    check_run(run, finished=True)
    names = sorted(p.name for p in (run / "images").iterdir())
    assert names == ["b.jpg-00.jpg", "fox-00.jpg", "fox-01.jpg", "fox-02.jpg"]
    data = (run / "images/fox-01.jpg").read_bytes()
    assert opened(data).format == "JPEG"
    record = json.loads(read_back(data)["genkit"])
    assert (record["request"]["prompt"], record["index"], record["width"]) == ("a red fox", 1, 64)
    assert '"images/fox-01.jpg"' in (run / "index.html").read_text()

    assert again(format="jpg", quality=80).new == 0, "the same again has nothing to do"
    (run / "images/fox-00.jpg").write_bytes(data)
    (run / "images/stray-00.webp").write_bytes(b"not ours")
    assert again(format="jpeg", quality=80).new == 1, "another picture in its place is noticed"
    check_run(run, finished=True)
    for options, words in (
        ({}, "format: jpeg, quality 80 -> png"),
        ({"format": "jpeg"}, "format: jpeg, quality 80 -> jpeg, quality 90"),
        ({"format": "webp"}, "format: jpeg, quality 80 -> webp, quality 90"),
    ):
        with pytest.raises(InputError, match=words):
            again(**options)

    refilter(run, keep=1, out=tmp_path / "best")
    lines = [json.loads(line) for line in (tmp_path / "best/metadata.jsonl").read_text().splitlines()]
    assert sorted(line["file_name"] for line in lines) == sorted(
        p.name for p in (tmp_path / "best").iterdir() if p.suffix == ".jpg"
    )
    assert len(lines) == 2
    scores = tmp_path / "scores.jsonl"
    assert score_images(run, None, None, None, scores, "emoji-clip", "cpu", "auto") == 0
    scored = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [line["prompt"] for line in scored] == ["a pizza", "a red fox", "a red fox", "a red fox"]
    assert all(0 < line["scores"]["clip"] < 1 for line in scored)


def test_a_run_of_pngs_from_before_there_was_a_choice_goes_on(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", CONFIG, rows_of(1)).close()
    assert "format" not in json.loads((tmp_path / "run/run.json").read_text())["binding"]
    recorded: dict[str, Any] = CONFIG["binding"]  # type: ignore[assignment]
    now = {**CONFIG, "binding": {**recorded, "format": "png"}}
    Run.open(tmp_path / "run", now, rows_of(1)).close()
    other = {**CONFIG, "binding": {**recorded, "format": "jxl, quality 100"}}
    with pytest.raises(InputError, match="format: png -> jxl, quality 100"):
        Run.open(tmp_path / "run", other, rows_of(1))


class SlowRun:
    """A run folder on a disk that answers nobody until it is told to."""

    folder = Path("run")

    def __init__(self) -> None:
        self.answers, self.saved = threading.Event(), list[tuple[str, int, str]]()

    def save(self, found: Result, data: bytes, suffix: str) -> None:
        self.answers.wait(30)
        self.saved.append((found.id, found.index, suffix))


@pytest.mark.parametrize(("side", "waiting"), [(10, 4), (2, 9), (30, 2)])
def test_denoising_waits_for_writers_by_count_and_by_bytes(
    monkeypatch: pytest.MonkeyPatch, side: int, waiting: int
) -> None:
    """At most 1,000 bytes of pixels wait, or 8 pictures, beside the one handed over; one alone may be larger."""
    monkeypatch.setattr(writing, "QUEUE", 8)
    monkeypatch.setattr(writing, "QUEUE_BYTES", 1000)
    run, row = SlowRun(), Request(id="a", prompt="x", num_images=12)
    writers = writing.Writers(run, [row], encoding("webp"), Origin("emoji", "0.1.0"))  # type: ignore[arg-type]
    results = [Result("a", k, k, pixels=np.zeros((side, side, 3), np.uint8)) for k in range(12)]
    handed: list[int] = []

    def hand_over() -> None:
        for found in results:
            handed.append(found.index)
            writers.put(found)
        writers.close()

    thread = threading.Thread(target=hand_over)
    thread.start()
    deadline = time.monotonic() + 30
    while len(handed) < waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    thread.join(0.2)
    handed_over = len(handed)  # the last of them is not taken yet
    run.answers.set()
    thread.join(30)
    assert handed_over == waiting
    assert sorted(run.saved) == [("a", k, ".webp") for k in range(12)]
    assert writers.bytes == sum(size for _, size in writers.waiting), "what is written no longer counts"
    assert all(found.pixels is None for found in results)
