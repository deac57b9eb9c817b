"""Textual inversion files at generation: equal to diffusers', in a batch with other rows, in runs and on resume."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AddedToken, CLIPTokenizer

from genkit import InputError, Request, TextToImage, generate
from genkit.cli.app import run as run_command
from genkit.components import inspect_model, load_components
from genkit.components.inversion import add_embeddings
from genkit.components.single import TOKENIZER
from genkit.components.text import expand_tokens
from genkit.components.words import Words, given_embeddings
from genkit.job.load import reopen
from tests.tiny import tiny_sdxl, tiny_stable_diffusion

ROOT = Path(__file__).parent.parent.parent
SMALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0}
CONFIG: dict[str, Any] = {"text_encoder": {"hidden_size": 16, "max_position_embeddings": 32}}
RUN: dict[str, Any] = {"clip": "none", "device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def save(path: Path, **tensors: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def pixels(generator: Any, *rows: Request) -> list[np.ndarray]:
    found = {str(result.id): result for result in generator.stream(rows)}
    assert all(result.status == "done" for result in found.values()), [r.reason for r in found.values()]
    return [np.asarray(found[str(row.id)].pixels).astype(int) for row in rows]


def theirs(model: Path, load: Callable[[Any], None], prompt: str, negative: str = "") -> tuple[np.ndarray, Any]:
    """Return the picture of diffusers' pipeline, and the pipeline."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    load(pipe)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        prompt, negative_prompt=negative or None, generator=torch.Generator().manual_seed(3), output_type="np", **SMALL
    ).images[0]
    return (drawn * 255).round().astype(int), pipe


def ours(generator: Any, prompt: str, negative: str = "") -> np.ndarray:
    return pixels(generator, Request(id="a", prompt=prompt, negative_prompt=negative, seed=3, **SMALL))[0]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", ["emb_params", "<cat>"])
def test_equal_to_diffusers(sd: Path, tmp_path: Path, count: int, layout: str) -> None:
    file = save(tmp_path / "x.safetensors", **{layout: vectors(count, 16)})
    prompt, negative = "a <cat> on a red fox", "ugly, <cat>"
    theirs_, pipe = theirs(sd, lambda p: p.load_textual_inversion(str(file), token="<cat>"), prompt, negative)
    generator = TextToImage.from_pretrained(sd, embeddings=[(file, "<cat>")])
    assert np.abs(ours(generator, prompt, negative) - theirs_).max() <= 1
    embedded = pipe.encode_prompt(prompt, "cpu", 1, True, negative)
    assert generator.text is not None
    for mine, other in zip(generator.text([prompt, negative]), embedded, strict=True):
        assert torch.equal(mine, other[0])
    assert np.abs(ours(generator, prompt) - ours(TextToImage.from_pretrained(sd), prompt)).max() > 5


@pytest.mark.parametrize("count", [1, 2])
def test_sdxl_equal_to_diffusers(sdxl: Path, tmp_path: Path, count: int) -> None:
    pair = {"clip_l": vectors(count, 16), "clip_g": vectors(count, 24, seed=1)}
    file = save(tmp_path / "cat.safetensors", **pair)

    def load(pipe: Any) -> None:
        pipe.load_textual_inversion(
            pair["clip_l"], token="<cat>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
        )
        pipe.load_textual_inversion(
            pair["clip_g"], token="<cat>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )

    prompt = "a <cat> on a red fox"
    theirs_, pipe = theirs(sdxl, load, prompt, "an <cat> owl")
    generator = TextToImage.from_pretrained(sdxl, embeddings=[f"{file}:<cat>"])
    assert np.abs(ours(generator, prompt, "an <cat> owl") - theirs_).max() <= 1
    with torch.inference_mode():
        cond, _, pooled, _ = pipe.encode_prompt(prompt)
    assert generator.text is not None
    ((mine, vector),) = generator.text([prompt])
    assert torch.equal(mine, cond[0])
    torch.testing.assert_close(vector, pooled[0], rtol=0, atol=1e-6)  # a product of one row, and of two


def test_the_pooled_embedding_is_that_of_the_end(sdxl: Path, tmp_path: Path) -> None:
    """Also where the config has the end token's id of CLIP's first configs, as SDXL's has."""
    old = shutil.copytree(sdxl, tmp_path / "old")
    config = old / "text_encoder_2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 2}))
    file = save(tmp_path / "cat.safetensors", clip_l=vectors(2, 16), clip_g=vectors(2, 24))
    for prompt in ("a red fox", "a cat"):
        new, same = (TextToImage.from_pretrained(model, embeddings=[file]) for model in (sdxl, old))
        for (one, pooled), (other, again) in zip(new.text([prompt]), same.text([prompt]), strict=True):
            assert torch.equal(one, other) and torch.equal(pooled, again)


def test_a_batch_of_rows_with_and_without_the_word(sd: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "cat-toy.safetensors", emb_params=vectors(2, 16))
    generator, plain = TextToImage.from_pretrained(sd, embeddings=[file]), TextToImage.from_pretrained(sd)
    prompts = ["a cat-toy", "a red fox", "two cat-toys", "a CAT-TOY", "embedding:cat-toy, an owl", "cat-toy, an owl"]
    rows = [Request(id=f"{n}", prompt=prompt, seed=3, **SMALL) for n, prompt in enumerate(prompts)]
    together = pixels(generator, *rows)
    for row, image in zip(rows, together, strict=True):
        assert np.abs(pixels(generator, row)[0] - image).max() <= 1
    without = [1, 2]
    for n in without:
        assert np.abs(pixels(plain, rows[n])[0] - together[n]).max() <= 1
    assert np.abs(together[0] - together[3]).max() <= 1 and np.abs(together[4] - together[5]).max() <= 1
    assert np.abs(pixels(plain, rows[0])[0] - together[0]).max() > 5
    with pytest.raises(InputError, match=r"embedding:dog': there is no such embedding: give its file"):
        generator("a embedding:dog")


def test_prompts_without_the_words_are_embedded_as_before(sdxl: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "zzz.safetensors", clip_l=vectors(2, 16), clip_g=vectors(2, 24))
    with_file, plain = TextToImage.from_pretrained(sdxl, embeddings=[file]), TextToImage.from_pretrained(sdxl)
    for mine, other in zip(with_file.text(["a red fox", ""]), plain.text(["a red fox", ""]), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(mine, other, strict=True))


def test_a_word_of_the_model_is_the_files(sd: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "cat.safetensors", emb_params=vectors(1, 16))
    generator = TextToImage.from_pretrained(sd, embeddings=[file])
    (expanded,) = expand_tokens(generator.tokenizer, ["a cat, cats and a catalog"])
    assert expanded.endswith(", cats and a catalog") and "cat," not in expanded
    other = TextToImage.from_pretrained(sd, embeddings=[(file, "<x>")])
    assert np.abs(ours(generator, "a red cat") - ours(other, "a red <x>")).max() <= 1


@pytest.mark.parametrize("word", ["<cat>", "easynegative", "bad-hands-5", "bad_prompt_version2"])
def test_tokens_of_clips_tokenizer_are_those_of_diffusers(word: str) -> None:
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    other, mine = (CLIPTokenizer.from_pretrained(TOKENIZER) for _ in range(2))
    other.add_tokens([word, f"{word}_1", f"{word}_2"])
    mine.words = Words({word: 3})
    mine.add_tokens([AddedToken(token, normalized=False, special=False) for token in mine.words.tokens[word]])
    texts = ["a W", "W", "W, on W.", "(W:1.2)", "W's hat", "naïve W café 猫 W!", "W\nW", "  W  ", "W_1", "x,W,y"]
    for text in (text.replace("W", word) for text in texts):
        expanded = TextualInversionLoaderMixin()._maybe_convert_prompt(text, other)
        assert other(expanded).input_ids == mine(expand_tokens(mine, [text])).input_ids[0], text


def test_what_the_precision_does_not_have_is_refused(sd: Path, tmp_path: Path) -> None:
    (one,) = given_embeddings([save(tmp_path / "x.safetensors", emb_params=vectors(1, 16) * 1e6)], CONFIG)
    parts = load_components(inspect_model(sd), device="cpu", dtype=torch.float16)
    with pytest.raises(InputError, match=r"x\.safetensors: holds values that float16 does not have"):
        add_embeddings(parts, [one])


def test_a_folder_in_python(sd: Path, tmp_path: Path) -> None:
    save(tmp_path / "cat.safetensors", emb_params=vectors(1, 16))
    save(tmp_path / "wide.safetensors", emb_params=vectors(1, 1024))
    (tmp_path / "old.pt").write_bytes(b"\x80\x02")
    generator = TextToImage.from_pretrained(sd, embedding_dir=str(tmp_path))
    single = TextToImage.from_pretrained(sd, embeddings=[tmp_path / "cat.safetensors"])
    assert (ours(generator, "a cat") == ours(single, "a cat")).all()
    with pytest.raises(InputError, match=r"wide\.safetensors: has vectors of width 1024, made for SD 2"):
        generator("a wide owl")
    with pytest.raises(InputError, match=r"old\.pt: is refused: a pickle can run code"):
        generator("an owl", negative_prompt="old")


@pytest.fixture
def here(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "words" / "deep" / "badpic.safetensors", emb_params=vectors(2, 16))
    save(tmp_path / "words" / "zebra.safetensors", emb_params=vectors(1, 1024))
    (tmp_path / "words" / "broken.safetensors").write_bytes(b"not one")
    save(tmp_path / "learned_embeds.safetensors", **{"<cat>": vectors(1, 16, seed=2)})
    rows = [
        {"id": "a", "prompt": "a <cat>", "negative_prompt": "badpic, ugly"},
        {"id": "b", "prompt": "a red fox"},
        {"id": "c", "prompt": "an owl, embedding:badpic"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(sd: Path, *more: str) -> list[str]:
    options = ["--model", str(sd), "--clip", "none", "--device", "cpu", "--steps", "2"]
    given = ["--embedding", "learned_embeds.safetensors", "--embedding-dir", "words"]
    return ["generate", "rows.jsonl", "-o", "run", *options, *given, *more]


def test_a_run_says_what_it_uses(sd: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(command(sd, "--dry-run", "--json")) == 0
    words = json.loads(capfd.readouterr().out)["embeddings"]
    assert {word: (one["vectors"], one["width"], one["rows"]) for word, one in words.items()} == {
        "<cat>": (1, "16", "a"), "badpic": (2, "16", "a, c"),
    }  # fmt: skip
    assert run_command(command(sd)) == 0
    said = capfd.readouterr().err
    assert "badpic.safetensors: 'badpic' is 2 vectors of width 16; used by 2 rows" in said
    bound = json.loads((here / "run" / "run.json").read_text())["binding"]["embeddings"]
    assert list(bound) == ["<cat>", "badpic"] and len(bound["badpic"]["sha256"]) == 64
    told = {name: Image.open(here / "run" / "images" / f"{name}-00.png").info["parameters"] for name in "abc"}
    short = {word: one["sha256"][:12] for word, one in bound.items()}
    assert f'TI hashes: "<cat>: {short["<cat>"]}, badpic: {short["badpic"]}"' in told["a"]
    assert "TI hashes" not in told["b"] and f'TI hashes: "badpic: {short["badpic"]}"' in told["c"]


def test_resume_binds_by_content(sd: Path, here: Path) -> None:
    def draw(*rows: str, **options: Any) -> int:
        given = {"embeddings": ["learned_embeds.safetensors"], "embedding_dir": "words", **options}
        return generate("rows.jsonl", "run", model=str(sd), defaults={"num_inference_steps": 2}, **RUN, **given).new

    assert draw(max_total_images=1) == 1
    assert draw() == 2
    first = {p.name: p.read_bytes() for p in (here / "run" / "images").iterdir()}
    shutil.move("words", "elsewhere")
    shutil.move("learned_embeds.safetensors", "cat.safetensors")
    assert draw(embeddings=[("cat.safetensors", "<cat>")], embedding_dir="elsewhere") == 0
    generator, *_ = reopen(here / "run", device="cpu")
    rows = [Request(**json.loads(line)) for line in (here / "run" / "requests.jsonl").read_text().splitlines()]
    again = {str(result.id): result.pixels for result in generator.stream(rows, seed=0)}
    for name in "abc":
        before = np.asarray(Image.open(here / "run" / "images" / f"{name}-00.png")).astype(int)
        assert np.abs(before - again[name]).max() <= 1, "it was drawn beside others: rounding"
    with pytest.raises(InputError, match=r"begun otherwise: embeddings\.<cat>\.sha256: [0-9a-f]{12}… -> none"):
        draw(embeddings=[], embedding_dir="elsewhere")
    file = here / "elsewhere" / "deep" / "badpic.safetensors"
    save_file({name: -value for name, value in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"begun otherwise: embeddings\.badpic\.sha256: [0-9a-f]{12}… -> [0-9a-f]{12}"):
        draw(embeddings=["cat.safetensors"], embedding_dir="elsewhere")
    with pytest.raises(InputError, match=r"badpic\.sha256"):
        reopen(here / "run", device="cpu")
    assert first == {p.name: p.read_bytes() for p in (here / "run" / "images").iterdir()}


def test_words_come_and_go_with_their_rows(sd: Path, here: Path) -> None:
    def draw(*prompts: str, **options: Any) -> tuple[int, list[str]]:
        (here / "rows.jsonl").write_text("".join(json.dumps({"id": p[0], "prompt": p}) + "\n" for p in prompts))
        done = generate("rows.jsonl", "run", model=str(sd), defaults={"num_inference_steps": 1}, **RUN, **options)
        return done.new, sorted(json.loads((here / "run" / "run.json").read_text())["binding"].get("embeddings", ()))

    folder = {"embedding_dir": "words"}
    assert draw("a fox", "b <cat> badpic") == (2, [])
    assert draw("a fox", "b <cat> badpic", **folder) == (1, ["badpic"])  # its word was plain text before
    assert draw("a fox", "b <cat> badpic", "c owl, badpic", **folder) == (1, ["badpic"])
    given = {**folder, "embeddings": ["learned_embeds.safetensors"]}
    assert draw("a fox", "b <cat> badpic", "c owl, badpic", **given) == (1, ["<cat>", "badpic"])
    assert draw("a fox", "b <cat>", "c owl", **given) == (2, ["<cat>", "badpic"])
    with pytest.raises(InputError, match=r"embeddings\.<cat>\.sha256: [0-9a-f]{12}… -> none"):
        draw("a fox", "b <cat>", "c owl")
    shutil.rmtree("words")
    reopen(here / "run", device="cpu")
    assert draw("a fox", "c owl") == (0, ["<cat>", "badpic"])


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a zebra"}, (), "zebra.safetensors: has vectors of width 1024, made for SD 2; this model's"),
        ({"prompt": "a broken vase"}, (), "broken.safetensors: is cut short or no safetensors"),
        ({"prompt": "an embedding:badpics"}, (), "'embedding:badpics': there is no such embedding (did you mean 'b"),
        ({"prompt": "a cat"}, ("--embedding", "none.safetensors:cat"), "none.safetensors: is absent"),
        ({"prompt": "a cat"}, ("--embedding", "learned_embeds.safetensors:badpic"), "give one another, FILE:WORD"),
        ({"prompt": "badpic"}, ("--embedding", "learned_embeds.safetensors:badpic"), "badpic.safetensors: stands for"),
        ({"prompt": "a cat"}, ("--embedding-dir", "rows.jsonl"), "--embedding-dir: rows.jsonl is no folder"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(
    sd: Path, here: Path, row: dict[str, str], options: tuple[str, ...], message: str
) -> None:
    (here / "rows.jsonl").write_text(json.dumps(row))
    given = [] if "--embedding-dir" in options else ["--embedding-dir", "words"]
    twice = ["--embedding", "words/deep/badpic.safetensors"] if "another" in message else []
    command = ["generate", "rows.jsonl", "-o", "run", "--model", str(sd), "--clip", "none", *given, *twice, *options]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert run_command(command) == 2
    assert message in said.getvalue() and said.getvalue().count("\n") == 1
    assert not (here / "run").exists()
