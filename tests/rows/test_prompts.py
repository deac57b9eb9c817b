"""Prompt files: four formats that mean the same, with their defaults, odd prompts and odd bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genkit.errors import InputError
from genkit.rows.prompts import read_prompts, typed
from genkit.rows.request import Request
from tests.promptfiles import refusal, row, with_pictures, write

ROOT = Path(__file__).parents[2]

ODD = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "=cmd|' /C calc'!A0", "\x1b[31mred\x1b[0m",
       "\u202eabc",
       "{{ 7*7 }}", "%n%s", "$(id)", "`id`", "<|endoftext|>", "a\u2028b", "a\x1cb", "a\x0bb", "a\x85b",
       "日本 \U0001f98a", "a, b; c|d", "--outpath_samples /etc", "C:\\temp", "'", "a -- b"]  # fmt: skip


@pytest.mark.parametrize("prompt", ODD, ids=[f"10-34-35-36-{i}" for i in range(len(ODD))])
def test_odd_prompts_are_prompts(tmp_path: Path, prompt: str) -> None:
    doubled = prompt.replace('"', '""')
    quoted = json.dumps(prompt, ensure_ascii="\U0001f98a" not in prompt)  # YAML has no surrogate pairs
    files = {
        "a.jsonl": row(prompt=prompt),
        "a.csv": f'prompt\n"{doubled}"\n',
        "a.yaml": f"requests:\n- prompt: {quoted}\n",
    }
    if "--outpath" not in prompt:
        files["a.txt"] = prompt
    for name, text in files.items():
        assert [r.prompt for r in read_prompts(write(tmp_path, name, text))] == [prompt], name


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.yaml"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "4-bom"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("last", [True, False], ids=["final-newline", "12-no-final-newline"])
def test_line_ends_and_marks(tmp_path: Path, name: str, mark: bytes, end: bytes, last: bool) -> None:
    lines = {
        "a.txt": [b"# comment", b"a cat", b"", b"  a dog\t"],
        "a.jsonl": [b'{"prompt": "a cat"}', b"", b' {"prompt": "a dog"} '],
        "a.csv": [b"prompt,seed", b"a cat,", b"", b",,"[:1], b"a dog,"],
        "a.yaml": [b"requests:", b"- prompt: a cat", b"", b"- prompt: a dog"],
    }[name]
    rows = read_prompts(write(tmp_path, name, mark + end.join(lines) + (end if last else b"")))
    assert [(r.id, r.prompt, r.seed) for r in rows] == [("000000", "a cat", None), ("000001", "a dog", None)]


def test_40_many_identical_rows(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = read_prompts(write(tmp_path, "a.jsonl", row(prompt="a", image="a.png") * 5_000))
    assert len(rows) == 5_000 and rows[-1].id == "004999"


JSONL = r"""
{"id": "fox", "prompt": "a \"red\" fox, running", "negative_prompt": "text", "seed": 7, "num_images": 4, "keep": 2}
{"prompt": "two\nlines", "steps": 8, "cfg_scale": 4.5, "size": "64x48", "sampler": "euler", "seed": [1, 2]}
{"prompt": "no", "init_image": "good.png", "denoising_strength": 0.5, "labels": ["cat", "dog"], "gate": "p['cat'] > .5"}
{"id": "last", "prompt": "010", "scheduler": {"solver": "heun"}, "rank_by": "clip", "meta": {"a": [1, null, true]}}
"""
CSV = """\
id,prompt,negative_prompt,seed,num_images,keep,steps,cfg_scale,size,sampler,init_image,denoising_strength,labels,gate,rank_by,meta
fox,"a ""red"" fox, running",text,7,4,2,,,,,,,,,,
,"two
lines",,"1,2",,,8,4.5,64x48,euler,,,,,,
,no,,,,,,,,,good.png,0.5,"cat,dog",p['cat'] > .5,,
last,010,,,,,,,,"{""solver"": ""heun""}",,,,,clip,"{""a"": [1, null, true]}"
"""
YAML = r"""
requests:
  - id: fox
    prompt: a "red" fox, running
    negative_prompt: text
    seed: 7
    n: 4
    keep: 2
  - prompt: "two\nlines"
    steps: 8
    cfg_scale: 4.5
    size: 64x48
    sampler: euler
    seed: [1, 2]
  - {prompt: 'no', init_image: good.png, denoising_strength: 0.5, labels: [cat, dog], gate: "p['cat'] > .5"}
  - id: last
    prompt: "010"
    scheduler: {solver: heun}
    rank_by: clip
    meta: {a: [1, null, true]}
"""


def test_the_formats_say_the_same(tmp_path: Path) -> None:
    folder = with_pictures(tmp_path)
    rows = read_prompts(write(folder, "a.jsonl", JSONL))
    assert [r.id for r in rows] == ["fox", "000001", "000002", "last"]
    assert rows[0] == Request(
        id="fox", prompt='a "red" fox, running', negative_prompt="text", seed=7, num_images=4, keep=2
    )
    assert rows[1] == Request(
        id="000001", prompt="two\nlines", num_inference_steps=8, guidance_scale=4.5, width=64, height=48,
        scheduler="euler", seed=[1, 2],
    )  # fmt: skip
    assert rows[2].image == str(folder / "good.png")
    assert rows[3].meta == {"a": [1, None, True]}
    assert read_prompts(write(folder, "a.csv", CSV)) == rows
    assert read_prompts(write(folder, "a.yaml", YAML)) == rows
    assert read_prompts(write(folder, "a.YML", YAML)) == rows


def test_a_row_knows_its_line(tmp_path: Path) -> None:
    folder = with_pictures(tmp_path)
    for name, text, lines in [
        ("a.jsonl", JSONL, [2, 3, 4, 5]),
        ("a.csv", CSV, [2, 3, 5, 6]),
        ("a.yaml", YAML, [3, 9, 15, 16]),
    ]:
        path = write(folder, name, text)
        assert [r.source for r in read_prompts(path)] == [f"{path}:{line}" for line in lines]


def test_defaults_of_the_file_and_of_the_caller(tmp_path: Path) -> None:
    folder = with_pictures(tmp_path)
    text = """
defaults: {steps: 30, n: 4, negative_prompt: blurry, strength: 0.5}
requests:
- prompt: a
- {prompt: b, steps: 10, seed: [1, 2], image: good.png}
- {prompt: c, steps: null}
"""
    rows = read_prompts(write(folder, "a.yaml", text), {"num_inference_steps": 5, "width": 64})
    assert [r.num_inference_steps for r in rows] == [30, 10, 30]
    assert [r.num_images for r in rows] == [4, 2, 4]
    assert [r.strength for r in rows] == [None, 0.5, None]
    assert {r.negative_prompt for r in rows} == {"blurry"} and {r.width for r in rows} == {64}
    # A row that only makes sense with the caller's defaults is a good row.
    path = write(folder, "a.jsonl", row(prompt="a", keep=2, gate="p['a cat'] > 0.5"))
    assert read_prompts(path, {"num_images": 4, "labels": ["a cat"]})[0].keep == 2
    assert "keep: 2 of at most 1" in refusal(write(folder, "b.jsonl", row(prompt="a", keep=2)))


def test_columns_of_ones_own_are_passed_through_as_meta(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text('prompt,meta.client,Meta.page,meta\na fox,Ann,3,"{""x"": 1}"\nan owl,,,\n')
    assert [row.meta for row in read_prompts(table)] == [{"x": 1, "client": "Ann", "page": "3"}, None]
    table.write_text("prompt,Client\na fox,Ann\n")
    with pytest.raises(InputError, match=r"a\.csv:1: 'Client': unknown field.*; names of your own .* with 'meta\.'"):
        read_prompts(table)


def test_an_absent_prompt_is_left_to_the_job(tmp_path: Path) -> None:
    assert [r.prompt for r in read_prompts(write(tmp_path, "a.csv", "prompt,seed\n,1\n,2\n"))] == ["", ""]
    assert read_prompts(write(tmp_path, "a.jsonl", "{}"))[0] == Request(id="000000")


def test_messages_survive_any_file_name(tmp_path: Path) -> None:
    for name in ("a\nb.txt", os.fsdecode(b"\xff.txt"), "\x1b[31m.txt"):
        (tmp_path / name).write_bytes(b"\xff")
        with pytest.raises(InputError) as caught:
            read_prompts(tmp_path / name)
        assert str(caught.value).isprintable() and str(caught.value).encode()


def test_the_prompt_files_that_ship() -> None:
    demo = read_prompts(ROOT / "prompts/demo.txt")
    assert len(demo) == 24 and len({r.prompt for r in demo}) == 24
    rows = read_prompts(ROOT / "prompts/showcase.jsonl")
    used = set().union(*(r.model_fields_set for r in rows))
    assert used >= {"width", "num_inference_steps", "scheduler", "seed", "negative_prompt", "keep", "gate"}
    assert used >= {"max_images", "labels", "meta", "image", "strength"}
    assert any(isinstance(r.seed, list) for r in rows)


TYPED: list[tuple[str, str, Any]] = [
    ("seed", "7", 7),
    ("seed", " 7 ", 7),
    ("seed", "1, 2,3", [1, 2, 3]),
    ("seed", "[1, 2]", [1, 2]),
    ("num_images", "+4", 4),
    ("guidance_scale", "7", 7.0),
    ("guidance_interval", "0.1, 0.8", [0.1, 0.8]),
    ("guidance_interval", "[0, 1]", [0.0, 1.0]),
    ("guidance_interval", '{"sigma": [0.3, 5]}', {"sigma": [0.3, 5]}),
    ("guidance_scale", "1e-1", 0.1),
    ("strength", ".5", 0.5),
    ("labels", "a cat, a dog", ["a cat", "a dog"]),
    ("labels", '["a, b", "c"]', ["a, b", "c"]),
    ("meta", '{"a": 1}', {"a": 1}),
    ("scheduler", "euler", "euler"),
    ("scheduler", '{"solver": "euler"}', {"solver": "euler"}),
    ("prompt", " 7 ", " 7 "),
    ("id", "007", "007"),
]


@pytest.mark.parametrize(("field", "text", "value"), TYPED, ids=[f"{c[0]}={c[1]}" for c in TYPED])
def test_typed(field: str, text: str, value: Any) -> None:
    found = typed(field, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "text"),
    [("seed", "1_0"), ("seed", "0x10"), ("seed", ""), ("width", "8.5"), ("strength", "nan"), ("strength", "1_0.5"),
     ("meta", "{"), ("meta", "[]"), ("labels", '["a", "b"'), ("labels", '["a"], "x": [1]'), ("guidance_scale", "7,5")],
)  # fmt: skip
def test_typed_refuses(field: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        typed(field, text)
    assert str(caught.value).startswith(f"{field}: ")


def mutated(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at = rng.randrange(len(out) + 1)
        change = rng.randrange(4)
        if change == 0 and out:
            out[at % len(out)] = rng.randrange(256)
        elif change == 1:
            out[at:at] = rng.choice(PIECES)
        elif change == 2:
            del out[at : at + rng.randrange(8)]
        else:
            out[at:at] = out[: rng.randrange(20)]
    return bytes(out)


PIECES = [b'"', b"'", b",", b"{", b"}", b"[", b"]", b":", b"\n", b"\r\n", b"\\", b"\\u", b"\\ud800", b"null", b"1e999",
          b"&a ",
          b"*a", b"!!int ", b"- ", b"? ", b"| ", b"> ", b"%", b"---\n", b"\t", b"\xc3\xa9", b"\xe2\x80\xa8", b"9" * 50,
          b"-1",
          b"NaN", b"true", b"image", b"id", b"#", b" ", b"<<", b"~", b"."]  # fmt: skip


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.yaml"])
def test_noise_is_refused_or_read(tmp_path: Path, name: str) -> None:
    folder = with_pictures(tmp_path)
    rng = random.Random(name)
    seeds = {"a.txt": b"# c\na cat\na dog\n", "a.jsonl": JSONL.encode(), "a.csv": CSV.encode(), "a.yaml": YAML.encode()}
    read = 0
    for i in range(500):
        data = rng.randbytes(rng.randrange(60)) if i % 10 == 0 else mutated(rng, seeds[name])
        path = write(folder, name, data)
        try:
            rows = read_prompts(path)
        except InputError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path)), data
        else:
            assert rows and all(isinstance(r, Request) for r in rows)
            read += 1
    assert read > 10


def test_nothing_here_imports_torch() -> None:
    code = (
        "import sys, genkit.rows.prompts, genkit.scoring.gates, genkit.pictures.images\n"
        "genkit.rows.prompts.read_prompts('prompts/showcase.jsonl')\n"
        "print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_is_light() -> None:
    code = (
        "import sys, genkit.rows.prompts, genkit.scoring.gates, genkit.pictures.images\n"
        "print(sorted({'numpy', 'PIL', 'yaml'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
