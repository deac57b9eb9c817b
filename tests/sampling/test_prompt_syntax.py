"""Pictures of prompts in the syntax of AUTOMATIC1111: weights, chunks, editing and composition, in one batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genkit import InputError, Request, TextToImage, generate
from genkit.cli.app import run as main
from tests.sampling.test_loras import pairs, peft, pixels
from tests.tiny import tiny_sdxl, tiny_stable_diffusion

LONG = ", ".join(f"a {c} fox under an old tree" for c in ("red", "green", "blue", "grey", "white", "black", "brown"))
PROMPTS = {
    "plain": "a red fox",
    "weights": "a (red:1.4) fox, [smiling]",
    "chunks": f"{LONG} BREAK a (tree:0.7)",
    "edited": "a [red fox:green apple:0.5] on a tree",
    "other length": f"[a fox:{LONG}:0.3]",
    "turns": "a [fox|owl|cat]",
    "composed": "a red fox AND a green apple :0.4",
    "composed to more": "a red fox :1.2 AND a [tree::0.5]",
}


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return (tiny_sdxl if request.param == "sdxl" else tiny_stable_diffusion)(folder)


def row(prompt: str, name: str = "a", **fields: Any) -> Request:
    fixed = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 4.0, "syntax": "a1111"}
    return Request(**{"id": name, "prompt": prompt, **fixed, **fields})


def drawn(generator: TextToImage, prompt: str, **fields: Any) -> np.ndarray:
    return pixels(generator, [row(prompt, **fields)])[0]


def close(one: np.ndarray, two: np.ndarray, most: int = 1) -> bool:
    return bool(np.abs(one - two).max() <= most)


def test_any_prompts_share_a_batch(model: Path) -> None:
    """Rows of every kind, with two solvers, are together what each is alone; and the kinds are different pictures."""
    generator = TextToImage.from_pretrained(model)
    rows = [
        row(text, f"{i}-{k}", scheduler=solver, negative_prompt="blurred, (bad:1.2)" if k else "")
        for i, text in enumerate(PROMPTS.values())
        for k, solver in enumerate(("euler", "heun"))
    ]
    together = pixels(generator, rows)
    for one, picture in zip(rows, together, strict=True):
        assert close(picture, pixels(TextToImage.from_pretrained(model), [one])[0]), one.prompt
    assert len({picture.tobytes() for picture in together}) == len(together)


def test_composition_is_a_sum(model: Path) -> None:
    generator = TextToImage.from_pretrained(model)
    plain = drawn(generator, "a red fox")
    assert close(drawn(generator, "a red fox", syntax=None), plain)
    assert close(drawn(generator, "a red fox :0.5 AND a red fox :0.5"), plain)
    assert close(drawn(generator, "a green apple :0 AND a red fox"), plain)
    assert close(drawn(generator, "a red fox AND a red fox"), drawn(generator, "a red fox", guidance_scale=8.0))
    assert close(drawn(generator, "a red fox :2"), drawn(generator, "a red fox", guidance_scale=8.0))
    assert close(drawn(generator, "a fox :2", guidance_scale=1.0), drawn(generator, "a fox", guidance_scale=2.0))
    assert not close(drawn(generator, "a red fox AND a tree :3"), plain)


def test_editing_changes_what_the_network_reads(model: Path) -> None:
    generator = TextToImage.from_pretrained(model)
    assert close(drawn(generator, "[a fox:a tree:0]"), drawn(generator, "a tree"))
    assert close(drawn(generator, "[a fox:a tree:1.0]"), drawn(generator, "a fox"))
    read: list[torch.Tensor] = []
    real = generator.denoiser

    def recorded(x: Any, t: Any, cond: torch.Tensor, *given: Any) -> Any:
        read.append(cond[0].clone())
        return real(x, t, cond, *given)

    generator.denoiser = recorded  # type: ignore[assignment]
    drawn(generator, "[a fox:a tree:2]")
    fox, tree = (
        generator.embed(row(text), generator.geometry.width, generator.geometry.height)["cond"]
        for text in ("a fox", "a tree")
    )
    assert [bool(torch.equal(r, fox)) for r in read] == [True, True, *[False] * 4]
    assert [bool(torch.equal(r, tree)) for r in read] == [False, False, *[True] * 4]


@pytest.mark.parametrize("write", [tiny_stable_diffusion, tiny_sdxl])
def test_clip_skip_is_diffusers(tmp_path: Path, write: Any) -> None:
    """diffusers counts from the layer that the model reads: the last of SD, the one before it of SDXL.

    Without guidance: its negative prompts are read from the model's own layer, those of AUTOMATIC1111 are not.
    """
    import diffusers
    import transformers

    model = write(tmp_path)
    for folder in model.glob("text_encoder*"):
        config = transformers.CLIPTextConfig.from_pretrained(folder)
        config.num_hidden_layers = 4
        getattr(transformers, (config.architectures or [""])[0])(config).save_pretrained(folder)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    own = 2 if hasattr(pipeline, "text_encoder_2") else 1
    vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder  # which transformers 5.23 has no more
    generator = TextToImage.from_pretrained(model)
    pictures = []
    for skip in (0, 1):
        seeded = torch.Generator().manual_seed(3)
        made = pipeline("a fox", num_inference_steps=6, guidance_scale=1.0, generator=seeded, clip_skip=skip or None)
        pictures.append(drawn(generator, "a fox", clip_skip=own + skip, syntax=None, guidance_scale=1.0))
        assert close(pictures[-1], np.asarray(made.images[0]).astype(int))
    assert not close(pictures[0], pictures[1])
    assert close(drawn(generator, "a fox", clip_skip=1, guidance_scale=1.0), pictures[0])


def test_a_run_records_template_and_text_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_stable_diffusion(tmp_path / "model")
    (tmp_path / "wild").mkdir()
    (tmp_path / "wild" / "colour.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "loras").mkdir()
    peft(model, pairs(model), tmp_path / "loras" / "style.safetensors")
    (tmp_path / "p.txt").write_text("a (__colour__:1.2) fox <lora:style:0.5>\n{e$$an owl|a cat} AND [a tree::0.5]\n")
    command = [
        "generate", str(tmp_path / "p.txt"), "-o", str(tmp_path / "run"), "--model", str(model), "--steps", "2",
        "--syntax", "a1111", "--wildcards", str(tmp_path / "wild"), "--lora-dir", str(tmp_path / "loras"),
        "--expansions", "2", "--clip-skip", "1",
    ]  # fmt: skip
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "requests.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == ["000000-1", "000000-2", *(f"000001-{i}" for i in range(1, 5))]
    assert rows[0]["template"] == {"prompt": "a (__colour__:1.2) fox <lora:style:0.5>"}
    assert rows[0]["loras"][0]["weight"] == 0.5 and "lora" not in rows[0]["prompt"] and "__" not in rows[0]["prompt"]
    results = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {r["id"]: r["prompt"] for r in results}["000001-1"] == "an owl, "
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new"] == 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a (fox:1.2.3)", [], "prompt: the weight of"),
        ("a fox", ["--clip-skip", "9"], "clip_skip: 9: the model's text encoder has"),
        ("a fox", ["--wildcards", "nowhere"], "--wildcards: nowhere is not a folder"),
        ("a <lora:x>", [], "prompt: <lora:x>: is looked for in --lora-dir, and none is given"),
        ("a <hypernet:x:1>", [], "prompt: '<hypernet:x:1>': there are no such tags"),
    ],
)
def test_refused_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str, options: list[str], message: str
) -> None:
    model = tiny_stable_diffusion(tmp_path / "model")
    words = ["generate", "--prompt", prompt, "--syntax", "a1111", "-o", str(tmp_path / "run"), "--model", str(model)]
    assert main([*words, *options]) == 2
    said = capsys.readouterr().err.partition("genkit: ")[2]
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_from_python(tmp_path: Path) -> None:
    model = str(tiny_stable_diffusion(tmp_path / "model"))
    rows = [Request(prompt="a {red|green} fox", syntax="a1111", num_inference_steps=2)]
    summary = generate(rows, tmp_path / "run", model=model, quiet=True)
    assert summary.images == 1
    generator = TextToImage.from_pretrained(model)
    drawn_rows = list(generator.stream([Request(prompt="{e$$a|b} (fox)", syntax="a1111", num_inference_steps=1)]))
    assert sorted(r.prompt for r in drawn_rows) == ["a fox", "b fox"]
    composed = {"prompt": "a fox AND a cat", "syntax": "a1111", "seed": 1, "num_inference_steps": 2}
    alike = list(generator.stream([Request(id=f"{k}", **composed) for k in range(3)], slots=1))
    assert [r.nfe for r in alike] == [6, 6, 6], "two prompts and none, at two calls, however often it is asked for"
    for prompt, message in (("a (b:1.2.3)", "prompt: the weight of"), ("<lora:x>", "--lora-dir, and none")):
        with pytest.raises(InputError, match=message):
            list(generator.stream([Request(prompt=prompt, syntax="a1111")]))
    with pytest.raises(InputError, match="clip_skip: 9: the model's text encoder has 1 layers"):
        list(generator.stream([Request(prompt="a", clip_skip=9)]))
    with pytest.raises(InputError, match="--lora-dir, and none"):
        generate([Request(prompt="<lora:x>", syntax="a1111")], tmp_path / "other", model=model, quiet=True)
