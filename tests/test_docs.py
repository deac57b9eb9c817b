"""README.md and docs/: every command and snippet runs as written, options and links in the text exist.

HTML comments steer it. One at the head of a page holds `setup:` (placeholders to make, see SETUPS) and words that are
added to every `genkit generate` or `genkit train` of the page, in place of the same options, to make them cheap:

    <!-- test
    setup: photos
    generate: --steps 1
    -->

Before a block:

    <!-- file: NAME -->                        the block is written to that file
    <!-- test: setup NAME -->                  as in the head, at this place
    <!-- test: generate --steps 4 -->          words for this block in place of the head's
    <!-- test: cheaper NAME=VALUE -->          this argument in a snippet is changed, or added where a line has `seed=`
    <!-- test: exit 2 -->                      what its commands exit with; else 0
    <!-- test: skip REASON -->                 not run; options of its `genkit` commands, keys of recipes, syntax of
                                               snippets are checked

Of a console block the lines after a command must be among those that it prints.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from genkit import cli
from genkit.cli.app import app
from genkit.training.recipe import read_recipe
from tests.captioners import tiny_florence
from tests.classifiers import tiny_classifier
from tests.depths import tiny_depth_anything
from tests.detectors import tiny_owlvit
from tests.grids import thinned
from tests.senses import tiny_blip, tiny_blip_vqa, tiny_clipseg
from tests.tiny import tiny_clip, tiny_controlnet, tiny_ddpm, tiny_refiner, tiny_sdxl, tiny_stable_diffusion
from tests.videos import animation, shots, tiny_xclip

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = [ROOT / "docs" / name for name in ("prompt-files.md", "python.md", "runs.md", "scores.md", "vision.md")]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCE = re.compile(r"((?:<!--[^>]*-->\n)*)```(\w+)\n(.*?)```\n", re.DOTALL)
DIRECTIVE = re.compile(r"<!-- (file|test): (.*?) -->")
HEAD = re.compile(r"<!-- test\n(.*?)-->", re.DOTALL)
LANGUAGES = {"bash", "console", "python", "jsonl", "csv", "yaml", "toml", "text"}
Words = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, and what the comments before it say."""

    language: str
    text: str
    said: dict[str, str]
    words: Words


def head_of(page: str) -> dict[str, str]:
    found = HEAD.search(page)
    return {} if found is None else dict(line.split(": ", 1) for line in found[1].strip().splitlines())


def blocks_of(page: str) -> Iterator[Block]:
    usual = {name: text.split() for name, text in head_of(page).items() if name in COMMANDS}
    for comments, language, text in FENCE.findall(page):
        said: dict[str, str] = {}
        words = dict(usual)
        for kind, value in DIRECTIVE.findall(comments):
            key, _, rest = value.partition(" ")
            if kind == "test" and key in COMMANDS:
                words[key] = rest.split()
            else:
                said |= {kind: value} if kind == "file" else {key: rest}
        yield Block(language, text, said, words)


def commands_of(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a block, and the lines that a console block shows after it."""
    text = block.text.replace("\\\n", " ")
    if block.language == "bash":
        for line in filter(None, map(str.strip, text.splitlines())):
            yield line, []
        return
    for part in text.removeprefix("$ ").split("\n$ "):
        command, *shown = part.splitlines()
        yield command, shown


def cheaper(arguments: list[str], words: Words) -> list[str]:
    """Return the arguments of a command with the page's words in place of the same options, or at the end."""
    out, extra = list(arguments), words.get(arguments[0], [])
    for option, value in itertools.pairwise([*extra, "--"]):
        values = [] if value.startswith("--") else [value]
        if option.startswith("--") and option in out:
            at = out.index(option) + 1
            out[at : at + len(values)] = values
        elif option.startswith("--"):
            out += [option, *values]
    changed = {word.split("=")[0] for word in extra if "=" in word}
    return [a for a in out if a.split("=")[0] not in changed] + [word for word in extra if "=" in word]


def cheaper_calls(block: Block) -> str:
    """Return a snippet with `cheaper`'s argument changed, or added after `seed=`, line by line."""
    name, _, value = block.said.get("cheaper", "").partition("=")
    lines = block.text.splitlines()
    for n, line in enumerate(lines if name else ()):
        if f"{name}=" in line:
            lines[n] = re.sub(rf"\b{name}=\d+", f"{name}={value}", line)
        else:
            lines[n] = re.sub(r"\bseed=\d+", rf"\g<0>, {name}={value}", line)
    return "\n".join(lines)


def run_command(line: str, words: Words, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run one `genkit …` in this process, "$(genkit …)" in it first; return exit code and what it printed."""
    while inner := re.search(r'"\$\((genkit .*?)\)"', line):
        code, printed, error = run_command(inner[1], words, capsys)
        assert code == 0, error
        line = line.replace(inner[0], shlex.quote(printed.strip()))
    name, *arguments = shlex.split(line, comments=True)
    assert name == "genkit", f"{line}: only genkit runs here; `test: skip REASON` for others"
    capsys.readouterr()
    code = cli.run(cheaper(arguments, words))
    return code, *capsys.readouterr()


def parse_command(line: str) -> None:
    """Check the options of a command that is not run, and the keys of its recipe: unknown ones raise."""
    words = shlex.split(line, comments=True)
    if "genkit" not in words:
        return
    name, *arguments = [*words[words.index("genkit") + 1 :], ""]
    if words[0] != "genkit" and name not in COMMANDS:  # the name of an image
        return
    arguments = arguments[:-1]
    given = COMMANDS[name].make_context(name, arguments).params
    if name == "train":
        read_recipe(given["recipe"], given["changes"] or ())


# -- what the pages' placeholders stand for ---------------------------------------------------------------------------


def _prompts(folder: Path) -> None:
    """The repository's prompts, of demo.txt the first one."""
    shutil.copytree(ROOT / "prompts", folder)
    lines = (folder / "demo.txt").read_text().splitlines()
    (folder / "demo.txt").write_text(next(line for line in lines if line and line[0] != "#"))


def _pictures(folder: Path) -> None:
    folder.mkdir()
    for n in range(6):
        Image.effect_noise((128, 128 + 16 * n), 40 + 10 * n).convert("RGB").save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"drawing {n}")


def _photos(folder: Path) -> None:
    for n, name in enumerate(("cat", "dog", "cat", "dog")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((96, 64), 40 + 10 * n).convert("RGB").save(folder / name / f"{n}.jpg")


def _clips(folder: Path) -> None:
    folder.mkdir()
    for n in range(2):
        animation(folder / f"{n}.gif", shots(6, n))


def _votes(folder: Path) -> None:
    """Votes on runs/mine for what is likest to be a red fox."""
    run = folder.parent / "runs" / "mine"
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    ranked = sorted(records, key=lambda r: -r["scores"]["p"]["a red fox"])
    votes = [f"{r['file']},{'yes' if n < 12 else 'no'}" for n, r in enumerate(ranked)]
    (run / "votes.csv").write_text("\n".join(["image,vote", *votes, ""]))


def _lora(file: Path) -> None:
    """A LoRA on one layer that all tiny models have."""
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{layer}.lora_{side}.weight": torch.ones(16, 1).view(s) for side, s in SIDES.items()}, file)


SIDES = {"up": (16, 1), "down": (1, 16)}


def _embeddings(folder: Path) -> None:
    folder.mkdir()
    for name in ("badpic", "toy"):
        save_file({"emb_params": torch.ones(2, 256)}, folder / f"{name}.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(2, 256)}, "name": "old"}, folder / "old.pt")


def _wildcards(folder: Path) -> None:
    folder.mkdir()
    (folder / "colours.txt").write_text("green\nyellow\n")


SETUPS: dict[str, Callable[[Path], Any]] = {
    "prompts": _prompts,
    "wildcards": _wildcards,
    "training": lambda folder: folder.symlink_to(ROOT / "training"),
    "my-pictures": _pictures,
    "photos": _photos,
    "my-sd-folder": tiny_stable_diffusion,
    "my-sdxl-folder": tiny_sdxl,
    "my-canny": lambda folder: tiny_controlnet(folder, folder.parent / "my-sd-folder"),
    "my-depth-net": lambda folder: tiny_controlnet(folder, folder.parent / "my-sd-folder", seed=9),
    "my-refiner": tiny_refiner,
    **dict.fromkeys(("lcm-lora.safetensors", "hyper-lora.safetensors"), _lora),
    "my-ddpm": tiny_ddpm,
    "my-clip": tiny_clip,
    "my-owl": tiny_owlvit,
    "votes": _votes,
    "embeddings": _embeddings,
    "my-clipseg": tiny_clipseg,
    "my-blip": tiny_blip,
    "my-blip-vqa": tiny_blip_vqa,
    "my-classifier": tiny_classifier,
    "my-florence": tiny_florence,
    "my-depth": tiny_depth_anything,
    "my-xclip": lambda folder: tiny_xclip(folder, frames=2),
    "clips": _clips,
}


@pytest.mark.parametrize("path", thinned(PAGES, len(PAGES), QUICK), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_block_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = path.read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in head_of(page).get("setup", "").split():
        SETUPS[name](tmp_path / name)
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        assert block.language in LANGUAGES
        for name in block.said.get("setup", "").split():
            SETUPS[name](tmp_path / name)
        if "file" in block.said:
            (tmp_path / block.said["file"]).write_text(block.text)
        elif block.language == "python":
            snippet = compile(cheaper_calls(block), str(path), "exec")
            if "skip" not in block.said:
                exec(snippet, names)
        elif block.language in ("bash", "console"):
            for line, shown in commands_of(block):
                if "skip" in block.said:
                    parse_command(line)
                    continue
                code, out, err = run_command(line, block.words, capsys)
                assert code == int(block.said.get("exit", "0")), f"{line}\n{err}"
                assert not set(shown) - {*out.splitlines(), *err.splitlines()}, f"{line}\n{out}{err}"


def test_quoted_code_is_that_of_the_source() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    quoted = re.findall(r"<!-- from: (.*?) -->\n```python\n(.*?)```\n", page, re.DOTALL)
    assert len(quoted) == 2
    for file, code in quoted:
        assert code in (ROOT / file).read_text(), f"{file} has changed; quote it again"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_text_speaks_of_what_there_is(path: Path) -> None:
    page = path.read_text()
    prose = FENCE.sub("", page)
    assert not re.search(r"^(?:    |\$ )\s*genkit ", prose, re.MULTILINE), "a command outside a fenced block is not run"
    known = {option for command in COMMANDS.values() for p in command.params for option in p.opts} | {"--help"}
    for code in re.findall(r"`([^`\n]+)`", prose):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
            assert option in known or "benchmarks/" in code, f"{code}: no command has {option}"
        if command := re.match(r"genkit ([a-z]+)", code):
            assert command[1] in COMMANDS, code
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        there = (path.parent / target).resolve()
        assert "://" in target or there.exists(), f"{path.name}: {target} is not there"
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", prose):
        other = (path.parent / target).read_text() if target else page
        titles = re.findall(r"^#+ (.*)$", other, re.MULTILINE)
        found = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in found, f"{path.name}: {target} has no section {anchor}"
