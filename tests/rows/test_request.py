"""A row: what it accepts, the one line it refuses with, its defaults, its seeds and its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genkit.errors import InputError
from genkit.rows.request import SEED_LIMIT, Request, canonical, over
from genkit.rows.result import Result

NAN, INF = float("nan"), float("inf")
DEEP: dict[str, Any] = {}
for _ in range(5000):
    DEEP = {"a": DEEP}

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("24", {"promt": "x"}, "'promt': unknown field (did you mean 'prompt'?)"),
    ("24-alias", {"steps": 3}, "'steps': unknown field (did you mean 'num_inference_steps'?)"),
    ("25-null", {"prompt": None}, "prompt: None must be text"),
    ("25-list", {"prompt": ["a"]}, "prompt: ['a'] must be text"),
    ("25-number", {"prompt": 3}, "prompt: 3 must be text"),
    ("8-surrogate", {"prompt": "a\ud800"}, "prompt: 'a\\ud800' holds half a surrogate pair"),
    ("8-surrogate-label", {"labels": ["\udfff"]}, "labels[0]: '\\udfff' holds half a surrogate pair"),
    ("8-surrogate-meta", {"meta": {"a": "\ud800"}}, "meta: "),
    ("9-nul", {"negative_prompt": "a\0"}, "negative_prompt: 'a\\x00' holds a NUL"),
    ("13-long", {"prompt": "x" * 100_001}, "must have at most 100000 characters"),
    *[(f"27-{v[:9]!a}", {"id": v}, "reserved file name") for v in
      ["../../x", "/abs", "CON", "con.txt", "Lpt1", "a/b", "a\\b", "é", "x" * 101, ".", "..", "", "a b", "a\n", "a\0"]],
    ("27-number", {"id": 7}, "id: 7 must be text"),
    ("29-negative", {"seed": -1}, "seed: -1 must be at least 0"),
    ("29-fraction", {"seed": 1.5}, "seed: 1.5 must be a whole number"),
    ("29-text", {"seed": "7"}, "seed: '7' must be a whole number"),
    ("29-true", {"seed": True}, "seed: True must be a whole number"),
    *[(f"29-{v}", {"seed": v}, f"must be less than {2**32}") for v in (2**32, 2**53 + 1, 2**64)],
    ("29-list", {"seed": [1, -1]}, "seed[1]: -1 must be at least 0"),
    ("29-list-text", {"seed": [1, "x"]}, "seed[1]: 'x' must be a whole number"),
    ("29-list-empty", {"seed": []}, "seed: []"),
    ("29-list-length", {"seed": [1, 2], "num_images": 3}, "seed: 2 seeds for num_images 3"),
    ("30-zero", {"num_inference_steps": 0}, "num_inference_steps: 0 must be at least 1"),
    ("30-negative", {"num_inference_steps": -1}, "at least 1"),
    ("30-many", {"num_inference_steps": 1001}, "at most 1000"),
    ("30-float", {"num_inference_steps": 1e9}, "must be"),
    ("30-true", {"num_inference_steps": True}, "whole number"),
    ("31-nan", {"guidance_scale": NAN}, "guidance_scale: nan must be finite"),
    ("31-inf", {"guidance_scale": INF}, "guidance_scale: inf must be finite"),
    ("31-negative", {"guidance_scale": -1}, "at least 0"),
    ("31-huge", {"guidance_scale": 1e30}, "at most 100"),
    ("31-text", {"guidance_scale": "7"}, "must be a number"),
    ("31-true", {"guidance_scale": True}, "must be a number"),
    *[(f"interval-{v}", {"guidance_interval": v}, f"guidance_interval: {v!r} must be two fractions") for v in
      [[0.5], [0.5, 0.5], [0.8, 0.1], [-0.1, 1], [0, 2], [0, NAN], [False, True], "0,1", 0.5, {"sigma": [2, 1]},
       {"sigma": 3}, {"sigma": [0, INF]}, {"sigmas": [0, 1]}, {"sigma": [0, 1], "x": 1}, {}, [[0], [1]]]],
    *[(f"32-{v}", {"width": v}, "width: ") for v in (0, 7, 65_536, "512", 512.5)],
    ("32-height", {"height": 7}, "height: 7 must be at least 8"),
    ("33-zero", {"num_images": 0}, "num_images: 0 must be at least 1"),
    ("33-many", {"num_images": 10**9}, "num_images: 1000000000 must be at most 100000"),
    ("33-max-images", {"max_images": 10**9, "keep": 1, "gate": "not nan"}, "at most 100000"),
    ("55", {"gate": "clip > 2"}, "gate: 'clip > 2' is never true"),
    ("gate-number", {"gate": "clip"}, "gate: 'clip' is a number; compare it"),
    ("gate-label", {"gate": "p['a'] > 0.5"}, "gate: p['a']: there are no labels"),
    ("gate-label-brace", {"gate": "p['{x}'] > 0.5", "labels": ["a"]}, "gate: p['{x}']: no such label"),
    ("gate-sim", {"gate": "sim < 0.9"}, "gate: 'sim < 0.9' reads sim, which is known only once pictures are chosen"),
    (
        "prune-sim",
        {"num_images": 4, "prune": {}, "rank_by": "-sim"},
        "rank_by: '-sim' reads sim, which is known only once pictures are chosen",
    ),
    ("keep", {"keep": 2}, "keep: 2 of at most 1 images"),
    ("max-alone", {"max_images": 4}, "max_images: needs `keep` and `gate`"),
    ("max-less", {"max_images": 2, "num_images": 4, "keep": 1, "gate": "not nan"}, "max_images: 2 is less than"),
    ("strength-alone", {"strength": 0.5}, "strength: needs `image`"),
    ("strength", {"strength": 1.5, "image": "a"}, "strength: 1.5 must be at most 1"),
    ("strength-zero", {"strength": 0.0, "image": "a"}, "strength: 0.0 must be more than 0"),
    ("mask-alone", {"mask_image": "a"}, "mask_image: needs `image`"),
    ("image", {"image": 3}, "image: 3 must be a path, a PIL image"),
    ("labels-text", {"labels": "a"}, "labels: 'a' must be a list"),
    ("labels-empty", {"labels": []}, "labels: [] must not be empty"),
    ("labels-twice", {"labels": ["a", "a"]}, "different, non-empty"),
    ("meta-list", {"meta": [1]}, "meta: [1] must be an object"),
    ("meta-nan", {"meta": {"a": NAN}}, "plain JSON"),
    ("meta-keys", {"meta": {"a": {1: 2}}}, "plain JSON"),
    ("meta-object", {"meta": {"a": object()}}, "plain JSON"),
    ("meta-deep", {"meta": DEEP}, "plain JSON"),
    ("meta-long", {"meta": {"a": "x" * 100_000}}, "plain JSON"),
    ("54-scheduler", {"scheduler": "banana"}, "scheduler: 'banana'"),
    ("54-scheduler-case", {"scheduler": "DDIMM"}, "scheduler: 'DDIMM'"),
    ("scheduler-number", {"scheduler": 3}, "scheduler: 3 must be text"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_refused_in_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        Request(**fields)
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 400
    assert "Error" not in message and "pydantic" not in message


def test_the_shortest_row() -> None:
    row = Request()
    assert (row.prompt, row.num_images, row.seed, row.source) == ("", 1, None, "")


def test_a_row_is_its_fields() -> None:
    one, other = Request(prompt="a", seed=1), Request(prompt="a", seed=1)
    other._source = "a.txt:1"
    assert one == other and hash(one) == hash(other)
    assert one != Request(prompt="a", seed=2) and one != "a"
    with pytest.raises(ValueError, match="frozen"):
        one.prompt = "b"


def test_seeds_count_on_and_wrap() -> None:
    assert [Request(seed=5).seed_of(k) for k in range(3)] == [5, 6, 7]
    assert [Request(seed=SEED_LIMIT - 1).seed_of(k) for k in range(3)] == [SEED_LIMIT - 1, 0, 1]
    listed = Request(seed=[7, 100, 3], keep=1, gate="not nan", max_images=9)
    assert listed.num_images == 3
    assert [listed.seed_of(k) for k in range(6)] == [7, 100, 3, 4, 5, 6]
    assert Request(seed=[SEED_LIMIT - 1]).seed_of(1) == 0


def test_seeds_derived_from_run_row_and_image() -> None:
    seeds = {Request(id=i).seed_of(k, run) for i in ("a", "b") for k in range(5) for run in (0, 1)}
    assert len(seeds) == 20 and all(0 <= seed < SEED_LIMIT for seed in seeds)
    # A promise: the pictures of a run folder can be drawn again years later.
    assert Request(id="000000").seed_of(0, 0) == 1321150923


def test_filled_takes_only_what_the_row_leaves_open() -> None:
    row = Request(prompt="a", width=64, seed=None, num_images=1)
    row._source = "a.txt:1"
    full = row.filled({"width": 128, "height": 128, "seed": 3, "num_images": 4, "strength": 0.5})
    assert (full.width, full.height, full.seed, full.num_images, full.strength) == (64, 128, 3, 1, None)
    assert full.source == "a.txt:1"
    assert Request(image="a.png").filled({"strength": 0.5}).strength == 0.5
    assert Request(seed=[1, 2]).filled({"num_images": 5}).num_images == 2
    with pytest.raises(InputError, match="keep: 3 of at most 1"):
        row.filled({"keep": 3})


def test_over_lets_seeds_say_how_many() -> None:
    assert over({"num_images": 4, "width": 8}, {"seed": [1, 2]}) == {"width": 8, "seed": [1, 2]}
    assert over({"num_images": 4}, {"seed": 1}) == {"num_images": 4, "seed": 1}


def test_canonical_names() -> None:
    assert canonical({"steps": 3, "cfg_scale": 5, "n": 2, "sampler_name": "euler", "size": "640X480"}) == {
        "num_inference_steps": 3, "guidance_scale": 5, "num_images": 2, "scheduler": "euler",
        "width": 640, "height": 480,
    }  # fmt: skip
    assert canonical({"denoising_strength": 1, "init_image": "a", "guidance": 2}) == {
        "strength": 1,
        "image": "a",
        "guidance_scale": 2,
    }
    for fields, words in [
        ({"steps": 3, "num_inference_steps": 3}, "num_inference_steps: given twice"),
        ({"size": "8x8", "width": 8}, "width: given twice"),
        ({"size": "8"}, "size: '8' is not like \"512x512\""),
        ({"size": "8x8x8"}, "size: "),
        ({"size": "99999999x8"}, "size: "),
        ({"size": 8}, "size: 8"),
        ({"sise": "8x8"}, "did you mean 'size'"),
        ({3: 1}, "3: unknown field"),
    ]:
        with pytest.raises(InputError) as caught:
            canonical(fields)  # type: ignore[arg-type]
        assert words in str(caught.value)


def test_a_guidance_interval_is_part_of_the_fingerprint_and_its_absence_is_not() -> None:
    plain = Request(prompt="a")
    assert plain.fingerprint() == "5fe023af1ecc3c1f", "runs of before there was such a field go on"
    assert len({Request(prompt="a", guidance_interval=v).fingerprint() for v in (None, [0, 1], {"sigma": [0, 1]})}) == 3


def test_fingerprint_follows_what_decides_on_pixels(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    row = Request(prompt="a", image=str(file), strength=0.5)
    before = row.fingerprint()
    assert before == Request(id="x", prompt="a", image=str(file), strength=0.5, meta={"a": 1}).fingerprint()
    for other in ({"prompt": "b"}, {"seed": 1}, {"strength": 0.6}, {"width": 64}, {"scheduler": "euler"}):
        fields = {"prompt": "a", "image": str(file), "strength": 0.5, **other}
        assert Request(**fields).fingerprint() != before
    Image.fromarray(np.ones((8, 8, 3), np.uint8)).save(file)
    assert row.fingerprint() != before


def test_a_row_survives_its_json() -> None:
    row = Request(
        id="a", prompt="日本", seed=[1, 2], labels=["x"], gate="p['x'] > 0.5", meta={"a": [None, 1.5, {"b": True}]}
    )
    assert Request(**row.to_json()) == row
    picture = Image.new("RGB", (4, 4))
    assert Request(image=picture).to_json()["image"].startswith("sha256:")


def test_a_result_survives_its_json() -> None:
    result = Result("a", 3, 5, scores={"clip": 0.5}, pixels=np.zeros((4, 4, 3), np.uint8))
    again = Result.from_json({**result.to_json(), "of_a_newer_genkit": 1})
    assert again == result and again.pixels is None and again.image is None
    assert result.image.size == (4, 4)
