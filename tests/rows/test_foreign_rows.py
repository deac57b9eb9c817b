"""Prompt files of other tools: lines of options, infotext, suffixes, graphs; no option is drawn, or obeyed unread."""

from __future__ import annotations

import json
from typing import Any

import pytest

from genkit import InputError, Request
from genkit.rows.foreign import numbered_rows, sniff
from genkit.rows.request import canonical


def read_rows(text: str, form: str, where: str, notes: list[str] | None = None) -> list[dict[str, Any]]:
    return [fields for _, fields in numbered_rows(text, form, where, notes)]


KARRAS = {"solver": "dpmpp_2m", "spacing": "karras"}

A1111 = """\
# a comment
--prompt "a cat, \\"big\\"" --negative_prompt "bad, text" --steps 20 --sampler_name "DPM++ 2M Karras" --cfg_scale 7
a dog, plain

--prompt a fox in snow --seed -1 --width 512 --height 768 --batch_size 2 --n_iter 3 --do_not_save_grid true
--seed 42 --prompt 'x' --restore_faces false --subseed_strength 0 --tiling false --do_not_save_samples false
"""
KOHYA = """\
# prompts
a cat, big --n bad, text --w 768 --h 512 --s 20 --l 7.5 --d 42
a dog
a fox --D 1,2,3 --ss euler_a
"""
INFOTEXT = """\
a cat,

second line
Negative prompt: bad
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 45dee52b, Hires upscale: 2

Time taken: 5.1 sec.

A: 13.96 GB, R: 15.27 GB

a dog
Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6, Seed: 2, Size: 64x64
"""


def graph(**nodes: Any) -> str:
    """A plain graph of ComfyUI, with some of its nodes replaced."""
    settings = {"seed": 5, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "karras", "denoise": 1}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    found = {
        "3": {"class_type": "KSampler", "inputs": {**settings, **links}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 3}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    }
    return json.dumps({**found, **{name[1:]: value for name, value in nodes.items()}})


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (A1111, "a1111-lines"),
        (KOHYA, "kohya"),
        (INFOTEXT, "infotext"),
        (graph(), "comfyui"),
        ('{"nodes": [], "links": []}', "comfyui"),
        ("--outpath_samples /etc --prompt a", "a1111-lines"),
        ("a cat\nNegative prompt: b", "infotext"),
        ("a cat --am 0.5", "kohya"),
        ("", None),
        ("a cat\na dog -- and a fox", None),
        ("a cat --ar 16:9", None),
        ("a cat --steps 20", None),
        ("--version 3", None),
        ('{"prompt": "a"}\n{"prompt": "b"}', None),
        ('{"prompt": "a"}', None),
        ("{" * 100_000, None),
        ("[" * 100_000, None),
        ("prompt,seed\na,1", None),
        ("- prompt: a", None),
    ],
)
def test_sniff(text: str, form: str | None) -> None:
    assert sniff(text) == form


def test_lines_of_options() -> None:
    notes: list[str] = []
    rows = numbered_rows(A1111, "a1111-lines", "a.txt", notes)
    assert rows == [
        (2, {
            "prompt": 'a cat, "big"', "negative_prompt": "bad, text", "num_inference_steps": 20,
            "guidance_scale": 7.0, "scheduler": KARRAS,
        }),
        (3, {"prompt": "a dog, plain"}),
        (5, {"prompt": "a fox in snow", "seed": -1, "width": 512, "height": 768, "num_images": 6}),
        (6, {"prompt": "x", "seed": 42}),
    ]  # fmt: skip
    assert notes[0] == "a.txt:5: --do_not_save_grid is not used" and len(notes) == 5
    for _, row in rows:
        Request(**canonical(row))
    assert read_rows("--prompt a --do_not_save_grid --seed 3", "a1111-lines", "a") == [{"prompt": "a", "seed": 3}]
    (row,) = read_rows('--prompt a --sampler_name "DPM++ 2M" --scheduler Karras', "a1111-lines", "a")
    assert row["scheduler"] == KARRAS
    assert read_rows("the dog--like thing", "a1111-lines", "a") == [{"prompt": "the dog--like thing"}]


def test_infotext_blocks() -> None:
    notes: list[str] = []
    rows = numbered_rows(INFOTEXT.replace("\n", "\r\n"), "infotext", "a.txt", notes)
    assert rows == [
        (1, {
            "prompt": "a cat,\n\nsecond line", "negative_prompt": "bad", "num_inference_steps": 20, "seed": 1,
            "guidance_scale": 7.0, "width": 512, "height": 768, "scheduler": "euler_ancestral",
        }),
        (11, {
            "prompt": "a dog", "num_inference_steps": 30, "guidance_scale": 6.0, "seed": 2, "width": 64,
            "height": 64, "scheduler": KARRAS,
        }),
    ]  # fmt: skip
    assert any(note.startswith("a.txt:1: hires fix: genkit has none") for note in notes)
    assert "a.txt:7: 'Time taken: 5.1 sec.' is not used" in notes
    for _, row in rows:
        Request(**canonical(row))


def test_suffixes() -> None:
    rows = read_rows(KOHYA, "kohya", "a.txt")
    assert rows == [
        {
            "prompt": "a cat, big", "negative_prompt": "bad, text", "width": 768, "height": 512,
            "num_inference_steps": 20, "guidance_scale": 7.5, "seed": 42,
        },
        {"prompt": "a dog"},
        {"prompt": "a fox", "seed": [1, 2, 3], "scheduler": "euler_ancestral"},
    ]  # fmt: skip
    assert [Request(**canonical(row)).num_images for row in rows] == [1, 1, 3]


def test_a_graph() -> None:
    notes: list[str] = []
    (row,) = read_rows(graph(), "comfyui", "a.json", notes)
    assert row == {
        "prompt": "a cat", "seed": 5, "num_inference_steps": 20, "guidance_scale": 8.0, "width": 512, "height": 512,
        "num_images": 3, "scheduler": {"solver": "euler", "spacing": "karras"},
    }  # fmt: skip
    assert notes[0].startswith("a.json: a batch of 3")
    Request(**canonical(row))


SAVE = {"class_type": "SaveImage", "inputs": {"filename_prefix": "../../x", "images": ["8", 0]}}
NOT_PLAIN = {"class_type": "FreeU", "inputs": {"model": ["40", 0]}}


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("a1111-lines", "--prompt a --outpath_samples /etc", "a:1: --outpath_samples: names where pictures go"),
        ("a1111-lines", "a\n--prompt b --outpath_grids x", "a:2: --outpath_grids: names where pictures go"),
        ("a1111-lines", "--prompt a --filename_pattern x", "a:1: '--filename_pattern': unknown option; where pictures"),
        ("a1111-lines", "--prompt a --step 20", "a:1: '--step': unknown option (did you mean 'steps'?)"),
        ("a1111-lines", "--prompt a --zzz", "a:1: '--zzz': unknown option"),
        ("a1111-lines", "--prompt a --sd_model x", "a:1: --sd_model: names a model"),
        ("a1111-lines", "--prompt a --styles x", "a:1: --styles: names styles"),
        ("a1111-lines", "--prompt a --tiling true", "a:1: --tiling: 'true': genkit has no such thing"),
        ("a1111-lines", "--prompt a --subseed 3", "a:1: --subseed: '3': genkit has no such thing"),
        ("a1111-lines", "--prompt a --do_not_save_samples", "a:1: --do_not_save_samples: 'true'"),
        ("a1111-lines", "--prompt a --steps", "a:1: --steps: has no value"),
        ("a1111-lines", "--prompt a --steps 20 30", "a:1: --steps: '20 30' is more than one value"),
        ("a1111-lines", "--prompt a --steps x", "a:1: num_inference_steps: 'x' is not a whole number"),
        ("a1111-lines", "--prompt a --cfg_scale nan", "a:1: guidance_scale: 'nan' is not a number"),
        ("a1111-lines", "--prompt a --batch_size 1.5", "a:1: num_images: '1.5' is not a whole number"),
        ("a1111-lines", "--prompt a --seed 1 --seed 2", "a:1: --seed: given twice"),
        ("a1111-lines", "a cat --steps 20", "a:1: 'a': is in front of the options; write --prompt"),
        ("a1111-lines", "--prompt a cat's", "a:1: a quote is opened and never closed"),
        ("a1111-lines", "--prompt a --sampler_name Euler2", "a:1: 'Euler2': no solver (did you mean 'euler'?)"),
        ("a1111-lines", "# only\n", "a: has no row"),
        ("infotext", "a cat", "a:1: 'a cat': no line of settings follows"),
        ("infotext", "a\nSteps: 2, Seed: 1\nb\nSteps: 2, Seed: 1", "a:3: 'b': a blank line is between"),
        ("infotext", "a\nSteps: 2, Sampler: Euler, Seed: x", "a:2: seed: 'x' is not a whole number"),
        ("infotext", "a\nSteps: 2, Sampler: DPM fast, Seed: 1", "a:2: 'DPM fast': no solver"),
        ("infotext", "a\nSteps: 2, Sampler: Euler, Schedule type: Odd, Seed: 1", "asks for schedule 'Odd'"),
        ("kohya", "a cat --ar 16:9", "a:1: '--ar': unknown option; there are --n, --w"),
        ("kohya", "a -- b", "a:1: '--': unknown option"),
        ("kohya", "a --f /etc", "a:1: --f: names where pictures go"),
        ("kohya", "a --am 1", "a:1: --am: weights of networks"),
        ("kohya", "a --w 768px", "a:1: width: '768px' is not a whole number"),
        ("kohya", "a --w 768 --w 8", "a:1: --w: given twice"),
        ("kohya", "a --n --w 8", "a:1: --n: has no value"),
        ("kohya", "a --d 1,x", "a:1: seed: 'x' is not a whole number"),
        ("comfyui", "{", "a: line 1 column 2: not JSON"),
        ("comfyui", '{"nodes": [], "links": []}', "a: is a workflow of ComfyUI's editor"),
        ("comfyui", graph(_9=SAVE), "a: node '9': filename_prefix: '../../x': where pictures go"),
        ("comfyui", graph(_4=NOT_PLAIN, _40=json.loads(graph())["4"]), "a: asks for FreeU, which genkit lacks"),
        ("comfyui", graph(_30=json.loads(graph())["3"]), "a: has 2 samplers that start a picture; one is read"),
        ("kohia", "a", "'kohia': no form of rows (did you mean 'kohya'?)"),
    ],
)
def test_what_is_refused(form: str, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_rows(text, form, "a")
    assert message in str(error.value) and "\n" not in str(error.value)
