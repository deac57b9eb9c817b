"""Pictures drawn again from their own settings: what is identical, what has changed, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from genkit import InputError, Request, generate, replay
from genkit.components import inspect_model
from genkit.components.convert import convert
from genkit.components.folder import EMBEDDED
from genkit.components.weights import sha256
from genkit.options import Options
from genkit.pictures.images import read_image
from genkit.rows.infotext import read_picture_settings
from genkit.rows.pictures import find_pictures, read_pictures
from genkit.rows.plans import scheduler_options
from genkit.studies.modelfound import model_of
from tests.children import holding, start
from tests.cli.test_cli import here
from tests.components.checkpoints import folder_of
from tests.rows.test_infotext import sd15
from tests.sampling.test_loras import pairs, peft
from tests.tiny import tiny_ddpm, tiny_stable_diffusion

ROOT = Path(__file__).parents[2]
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures of the demo's prompts, with different settings."""
    lines = (ROOT / "prompts/demo.txt").read_text().splitlines()
    prompts = [line for line in lines if line and line[0] != "#"][:20]
    odd: list[dict[str, Any]] = [
        {}, {"scheduler": "dpmpp_2m_karras"}, {"scheduler": {"solver": "ddim", "eta": 0.7}}, {"seed": 3},
        {"negative_prompt": "red", "guidance_scale": 3.5}, {"guidance_interval": [0.0, 0.6]}, {"scheduler": "euler_a"},
    ]  # fmt: skip
    rows = [Request(prompt=text, **{**SMALL, **odd[n % len(odd)]}) for n, text in enumerate(prompts)]
    run = tmp_path_factory.mktemp("demo") / "run"
    generate(rows, run, clip="none", quiet=True)
    return run


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("sd") / "tiny")


def one(run: Path, row: dict[str, Any], **options: Any) -> Path:
    """Draw one row and return its picture."""
    generate([Request(id="a", prompt="a red fox", seed=5, **row)], run, clip="none", quiet=True, **options)
    return next((run / "images").iterdir())


def result(report: dict[str, Any]) -> dict[str, Any]:
    return report["pictures"][0]


def options(**fields: Any) -> Options:
    return Options(clip="none", quiet=True, **fields)


def test_twenty_pictures_are_identical(demo: Path, tmp_path: Path) -> None:
    done = here("replay", demo, "-o", tmp_path / "again", "--clip", "none")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 21 and lines[-1] == "20 of 20 identical, 0 differ"
    assert all(line.endswith("  identical") for line in lines[:-1])
    report = json.loads((tmp_path / "again/replay.json").read_text())
    first = result(report)
    assert (first["weights"], first["changed"], first["guessed"], first["lacking"]) == ("same", [], [], [])
    assert first["largest"] == 0 and first["file"] == "images/000000-00-00.png" and first["id"] == "000000-00"
    # The same command draws nothing, and says the same.
    again = here("replay", demo, "-o", tmp_path / "again", "--clip", "none", "--json")
    assert json.loads(again.stdout)["new"] == 0 and json.loads(again.stdout)["identical"] == 20
    # A picture of a batch, drawn alone, may round otherwise in the last bit: it is said, and how much.
    alone = replay(demo / "images/000004-00.png", tmp_path / "alone", options=options())
    assert result(alone)["result"] in ("identical", "differs") and result(alone)["largest"] <= 1


def test_a_flipped_bit_of_a_weight_is_refused_by_name(demo: Path, tmp_path: Path) -> None:
    model = shutil.copytree(EMBEDDED / "emoji", tmp_path / "emoji")
    file = model / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    command = ("replay", demo / "images/000003-00.png", "-o", tmp_path / "out", "--model", model, "--clip", "none")
    refused = here(*command)
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert f"{file} has SHA-256 {sha256(file)[:12]}" in refused.stderr and "--other-weights" in refused.stderr
    drawn = here(*command, "--other-weights")
    assert drawn.returncode == 0
    assert f"weights: {file} has SHA-256" in drawn.stdout
    # The same weights under another path are the same model.
    shutil.copy(EMBEDDED / "emoji/unet/diffusion_pytorch_model.safetensors", file)
    assert here(*command).stdout.count("weights:") == 0


def test_overrides_are_checked_and_named(demo: Path, tmp_path: Path) -> None:
    picture = demo / "images/000003-00.png"
    found = here("replay", picture, "steps=3", "cfg_scale=4", "-o", tmp_path / "a", "--clip", "none")
    assert "changed: num_inference_steps: 2 -> 3" in found.stdout and "guidance_scale: 5.0 -> 4.0" in found.stdout
    assert re.search(r"differs: largest difference \d+ of 255, mean [\d.]+\n", found.stdout)
    size = here("replay", picture, "width=72", "-o", tmp_path / "b", "--clip", "none")
    assert "another size: 64x64 -> 72x64" in size.stdout
    refused = {
        "stps=3": "'stps': unknown field (did you mean 'steps'?)", "id=x": "'id': unknown field",
        "steps=x": "num_inference_steps: 'x' is not a whole number", "steps=": "steps: has no value",
        "seed=-1": "seed: -1 is any", "scheduler=eulr": "'eulr': no solver (did you mean 'euler'?)",
        "steps=0": "num_inference_steps: 0 must be at least 1", "image=nix.png": "nix.png: is absent",
    }  # fmt: skip
    for word, message in refused.items():
        done = here("replay", picture, word, "-o", tmp_path / "c")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), word
        assert message in done.stderr, word
    assert "given twice" in here("replay", picture, "steps=3", "steps=4", "-o", tmp_path / "c").stderr
    assert not (tmp_path / "c").exists()
    with pytest.raises(InputError, match="'stps': unknown field"):
        replay(picture, tmp_path / "c", {"stps": 3})


def test_pictures_without_settings_are_all_named(demo: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("a red fox")
    whole = (demo / "images/000000-00.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    names = ("plain.png", "text.png", "torn.png", "absent.png")
    done = here("replay", demo / "images/000000-00.png", *(tmp_path / name for name in names), "-o", tmp_path / "out")
    assert done.returncode == 2 and "4 of 5 pictures cannot be read" in done.stderr
    assert all(str(tmp_path / name) in done.stderr for name in names) and not (tmp_path / "out").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no picture" in here("replay", empty, "-o", tmp_path / "out").stderr
    assert "at least one picture" in here("replay", "steps=3", "-o", tmp_path / "out").stderr


def hostile(text: bytes, kind: bytes = b"tEXt") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = chunk(b"IHDR", (8).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    pixels = chunk(b"IDAT", zlib.compress(bytes(25 * 8)))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, chunk(kind, text), pixels, chunk(b"IEND", b"")])


def request(**fields: Any) -> bytes:
    return b"genkit\0" + json.dumps({"model": "emoji", "request": {"prompt": "a", **fields}}).encode()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "64 MB": (b"parameters\0" + b"a" * (63 << 20), "more than 2000000 bytes of metadata"),
    "bomb": (b"genkit\0\0" + zlib.compress(b"[" * 50_000_000), "more than 2000000 bytes of metadata"),
    "deep": (b"genkit\0" + b'{"request":' * 100_000, "nested too deeply"),
    "digits": (b'genkit\0{"request": {"seed": ' + b"9" * 5000 + b"}}", "a number has 5000 digits"),
    "no row": (b'genkit\0{"request": 3}', "request: 3 is not a row"),
    "weights": (b'genkit\0{"request": {}, "weights": {"a": "../../b"}}', "is not an object of names and SHA-256"),
    "unknown": (request(bananas=1), "'bananas': unknown field"),
    "outside": (request(image="/etc/passwd", strength=0.5), "image: 'passwd' is not beside the picture"),
    "up": (request(image=".."), "image: '..' is not the name of a file"),
    "lora": (request(loras=[{"file": "/etc/passwd"}]), "loras: 'passwd' is not beside the picture"),
    "loras": (request(loras=7), "loras: 7 is not a list of LoRAs"),
    "plan": (request(scheduler="/etc/tuned_scheduler.json"), "scheduler: 'tuned_scheduler.json' is not beside"),
    "steps": (request(num_inference_steps=10**9), "num_inference_steps: 1000000000 must be at most 1000"),
    "nonsense": (b"parameters\0a\nSteps: 20, Sampler: Euler, Seed: x", "seed: 'x' is not a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_is_one_line(name: str, tmp_path: Path) -> None:
    text, message = HOSTILE[name]
    path = tmp_path / "a.png"
    path.write_bytes(hostile(text, b"zTXt" if name == "bomb" else b"tEXt"))
    done = here("replay", path, "-o", tmp_path / "out", "--clip", "none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr and str(path) in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["image", "init_image"])
def test_of_a_path_in_a_picture_only_the_name_is_used(field: str, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    for folder, colour in ((tmp_path / "private", "red"), (tmp_path, "blue")):
        Image.new("RGB", (16, 16), colour).save(folder / "start.png")
    path = tmp_path / "a.png"
    path.write_bytes(hostile(request(strength=0.5, **{field: str(tmp_path / "private" / "start.png")})))
    _, (row,) = read_pictures([path])
    assert row.image == str(tmp_path / "start.png")


def test_no_network_and_no_other_folder_for_a_name_in_a_picture(tmp_path: Path) -> None:
    for model in ("owner/model", "/etc", "..", 7, None):
        text = json.dumps({"model": model, "request": {"prompt": "a"}}).encode()
        (tmp_path / "a.png").write_bytes(hostile(b"genkit\0" + text))
        done = here("replay", tmp_path / "a.png", "-o", tmp_path / "out")
        assert done.returncode == 2 and "--model: " in done.stderr and not (tmp_path / "out").exists()


def test_the_model_of_a_run_is_found(sd: Path, tmp_path: Path) -> None:
    picture = one(tmp_path / "run", {"num_inference_steps": 2}, model=str(sd))
    assert json.loads(Image.open(picture).text["genkit"])["model"] == "tiny"  # type: ignore[attr-defined]
    assert result(replay(picture, tmp_path / "a", options=options()))["result"] == "identical"
    moved = Path(shutil.move(picture, tmp_path / "moved.png"))
    with pytest.raises(InputError, match=r"--model: .*moved.png names 'tiny', which is not here"):
        replay(moved, tmp_path / "b", options=options())
    assert result(replay(moved, tmp_path / "b", model=str(sd), options=options()))["result"] == "identical"
    emoji = one(tmp_path / "emoji", SMALL)
    shutil.copytree(sd, tmp_path / "tiny")
    with pytest.raises(InputError, match="a run has one model"):
        replay([moved, emoji], tmp_path / "c", options=options())


def test_input_pictures_and_loras(sd: Path, tmp_path: Path) -> None:
    Image.effect_noise((16, 16), 80).convert("RGB").save(tmp_path / "start.png")
    (tmp_path / "loras").mkdir()
    lora = peft(sd, pairs(sd), tmp_path / "loras/style.safetensors")
    row: dict[str, Any] = {"num_inference_steps": 4, "image": str(tmp_path / "start.png"), "strength": 0.5}
    picture = one(tmp_path / "run", {**row, "loras": [{"file": str(lora), "weight": 0.8}]}, model=str(sd))
    with pytest.raises(InputError, match=r"image: 'start.png' is not beside the picture; give image=FILE"):
        replay(picture, tmp_path / "a", options=options())
    shutil.copy(tmp_path / "start.png", picture.parent)
    with pytest.raises(InputError, match=r"loras: 'style.safetensors' is not beside .*--lora-dir"):
        replay(picture, tmp_path / "a", options=options())
    found = replay(picture, tmp_path / "a", options=options(lora_dir=str(tmp_path / "loras")))
    assert (result(found)["result"], result(found)["lacking"], result(found)["changed"]) == ("identical", [], [])
    shutil.copy(lora, picture.parent)
    given = replay(picture, tmp_path / "b", {"image": str(tmp_path / "start.png")}, options=options())
    assert result(given)["largest"] == 0
    peft(sd, pairs(sd, seed=1), picture.parent / "style.safetensors")
    with pytest.raises(InputError, match=r"style.safetensors: .* has SHA-256 .*another picture would be drawn"):
        replay(picture, tmp_path / "c", options=options())
    other = result(replay(picture, tmp_path / "c", other_weights=True, options=options()))
    assert other["result"] == "differs" and "style.safetensors" in other["changed"][0]


def foreign(path: Path, text: str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    return path


def test_infotext_of_automatic1111_on_a_single_file(tmp_path: Path) -> None:
    folder = folder_of("SD 1", tmp_path / "folder")
    file = tmp_path / "model.safetensors"
    convert(inspect_model(folder), file)
    lora = peft(folder, pairs(folder, scale=0.05), tmp_path / "style.safetensors")
    digits, own = sha256(file)[:10], sha256(lora, weights_only=True)[:12]
    text = (
        "a \\(red\\) fox <lora:style:0.5>\nSteps: 2, Sampler: Euler a, CFG scale: 5, Seed: 1, Size: 64x64, "
        f'Model hash: {digits}, Model: model, Lora hashes: "style: {own}", Version: v1.10.1'
    )
    picture = foreign(tmp_path / "a.png", text)
    report = replay(picture, tmp_path / "a", options=options())
    found = result(report)
    assert (found["weights"], found["guessed"], found["lacking"]) == ("same", [], [])
    assert any("drawn on a GPU" in note for note in found["notes"])
    record = read_picture_settings(tmp_path / "a" / found["file"])
    assert record.fields["prompt"] == "a \\(red\\) fox" and record.fields["loras"][0]["weight"] == 0.5
    for changed, message in (
        (text.replace(digits, "0123456789"), "model hash"),
        (text.replace(own, "0" * 12), "style"),
    ):
        foreign(picture, changed)
        with pytest.raises(InputError, match=f"{message}.*another picture would be drawn"):
            replay(picture, tmp_path / "b", options=options())
    foreign(picture, text.replace("Model: model", "Model: folder"))
    found = result(replay(picture, tmp_path / "b", options=options()))
    assert "cannot be compared with a folder" in found["weights"]


def test_what_is_guessed_and_what_is_lacking_is_said(demo: Path, tmp_path: Path) -> None:
    text = "a (red:1.3) fox\nSteps: 2, CFG scale: 5, Size: 64x64, Clip skip: 2, Tiling: True, Version: v1.10.1"
    picture = foreign(tmp_path / "a.png", text)
    refused = here("replay", picture, "-o", tmp_path / "out", "--clip", "none")
    assert refused.returncode == 2 and "--model: " in refused.stderr and "names no model" in refused.stderr
    command = ("replay", picture, "-o", tmp_path / "out", "--clip", "none", "--model", "emoji")
    plan = here(*command, "--dry-run").stdout
    assert "guessed: scheduler: the model's own, ddim" in plan and not (tmp_path / "out").exists()
    done = here(*command)
    assert done.returncode == 0
    for words in ("guessed: seed: ", "not the same picture: tiling", "weights: not recorded"):
        assert words in done.stdout
    row = json.loads((tmp_path / "out/requests.jsonl").read_text())
    assert (row["syntax"], row["clip_skip"], row["prompt"]) == ("a1111", 2, "a (red:1.3) fox")


def test_old_records_are_replayed(demo: Path, tmp_path: Path) -> None:
    texts = dict(Image.open(demo / "images/000001-00.png").text)  # type: ignore[attr-defined]
    record = json.loads(texts["genkit"])
    for name in ("weights", "config", "device", "dtype", "attention", "torch", "format"):
        del record[name]
    info = PngImagePlugin.PngInfo()
    info.add_text("genkit", json.dumps({**record, "fingerprint": None}))
    Image.open(demo / "images/000001-00.png").save(tmp_path / "old.png", pnginfo=info)
    found = result(replay(tmp_path / "old.png", tmp_path / "out", options=options()))
    assert found["weights"] == "not recorded" and found["largest"] <= 1
    record["request"]["prompt"] += " and more"
    record["fingerprint"] = "0" * 16
    info = PngImagePlugin.PngInfo()
    info.add_text("genkit", json.dumps(record))
    Image.open(demo / "images/000001-00.png").save(tmp_path / "old.png", pnginfo=info)
    assert "fingerprint" in result(replay(tmp_path / "old.png", tmp_path / "b", options=options()))["lacking"][0]


def test_the_infotext_alone_is_enough(demo: Path, tmp_path: Path) -> None:
    """As model sites hand pictures out: they drop what is no `parameters`."""
    for path in (demo / "images").iterdir():
        foreign(tmp_path / path.name, Image.open(path).text["parameters"])  # type: ignore[attr-defined]
    shots, rows = read_pictures(find_pictures([tmp_path]))
    own, _ = read_pictures(find_pictures([demo]))
    assert [shot.lacking + shot.guessed for shot in shots] == [()] * 20 and rows.notes == ()
    for shot, other in zip(shots, own, strict=True):
        scheduler = other.row.scheduler or "ddim"  # the model's own
        one, two = (scheduler_options(value) for value in (shot.row.scheduler or {}, scheduler))
        fields = {name: value for name, value in other.row if name not in ("scheduler", "num_images")}
        assert (one, {name: getattr(shot.row, name) for name in fields}) == (two, fields)


@pytest.mark.parametrize("form", [("jpeg", 80), ("webp", 60), ("webp", 100)])
def test_lossy_pictures_are_compared_as_they_were_written(form: tuple[str, int], tmp_path: Path) -> None:
    picture = one(tmp_path / "run", SMALL, format=form[0], quality=form[1])
    assert result(replay(picture, tmp_path / "out", options=options()))["result"] == "identical"


def test_models_without_prompts_and_rows_of_several_pictures(tmp_path: Path) -> None:
    model = tiny_ddpm(tmp_path / "ddpm")
    generate([Request(id="a", num_images=3, num_inference_steps=2)], tmp_path / "run", model=str(model), quiet=True)
    assert replay(tmp_path / "run", tmp_path / "out", options=options())["identical"] == 3


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(demo: Path, tmp_path: Path) -> None:
    pictures = sorted(map(str, (demo / "images").iterdir()))[:6]
    command = ["replay", *pictures, "-o", str(tmp_path / "out"), "--clip", "none", "--batch-size", "1", "steps=8"]
    child = start([*holding(2), *command])
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out/images").glob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(200) == 130
    drawn = len(list((tmp_path / "out/images").glob("*.png")))
    report = json.loads((tmp_path / "out/replay.json").read_text())
    assert 0 < drawn < 6 and sum(p["result"] == "not drawn" for p in report["pictures"]) == 6 - drawn
    done = here(*command, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["new"] == 6 - drawn


def test_a_run_is_never_replayed_into_itself(demo: Path, tmp_path: Path) -> None:
    for command in (("replay", demo), ("generate", "--from-images", demo)):
        done = here(*command, "-o", demo)
        assert done.returncode == 2 and "is to be read; name another folder" in done.stderr


# -- generate --from-images --------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_as_rows(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in (2, 10, 1):
        shutil.copy(demo / f"images/{n:06d}-00.png", folder / f"p{n}.png")
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    command = ("generate", "--from-images", folder, "-o", tmp_path / "run", "--steps", "3", "--clip", "none")
    done = here(*command)
    assert done.returncode == 0, done.stderr
    assert "left out: 1 of 4 pictures" in done.stderr and "plain.png: holds no settings" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/requests.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["p1", "p2", "p10"] and {row["num_inference_steps"] for row in rows} == {3}
    assert rows[0]["scheduler"] == "dpmpp_2m_karras"
    assert json.loads(here(*command, "--json").stdout)["new"] == 0
    single = here("generate", "--from-images", folder / "p2.png", "-o", tmp_path / "b", "--dry-run", "--json")
    assert json.loads(single.stdout)["rows"] == 1
    for words, message in (
        (("--prompt", "x"), "--prompt, --from-images: give one of them, not both"),
        (("--model", "nix"), "no model of that name"),
        (("--steps", "0"), "--num-inference-steps: 0"),
    ):
        refused = here("generate", "--from-images", folder, "-o", tmp_path / "c", *words)
        assert refused.returncode == 2 and message in refused.stderr
    (tmp_path / "none").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "none/plain.png")
    refused = here("generate", "--from-images", tmp_path / "none", "-o", tmp_path / "c")
    assert refused.returncode == 2 and "plain.png: holds no settings" in refused.stderr


def test_other_models_of_pictures_are_told(sd: Path, demo: Path, tmp_path: Path) -> None:
    done = here("generate", "--from-images", demo, "-o", tmp_path / "run", "--model", sd, "--dry-run")
    assert "000000-00.png and 19 more: not the same picture: " in done.stdout
    assert "model.safetensors has SHA-256" in done.stdout
    foreign(tmp_path / "a.png", "a fox\nSteps: 2, Sampler: Euler, CFG scale: 5, Seed: 1, Size: 64x64, Model: dream")
    done = here("generate", "--from-images", tmp_path / "a.png", "-o", tmp_path / "run", "--model", sd, "--dry-run")
    assert "a.png: not the same picture: drawn with the model 'dream'" in done.stdout
    same = here("generate", "--from-images", demo, "-o", tmp_path / "run", "--dry-run")
    assert "notes" not in same.stdout


def test_ids_are_the_names_of_files(demo: Path, tmp_path: Path) -> None:
    whole = next((demo / "images").iterdir()).read_bytes()
    names = ("a b.png", "A_B.png", "con.png", "...png", "猫.png", "a_b.jfif", "x" * 120 + ".png")
    for name in names:
        (tmp_path / name).write_bytes(whole)
    _, rows = read_pictures([tmp_path / name for name in names])
    assert [row.id for row in rows] == [
        "a_b", "A_B-2", "picture-con", "picture-..", "_", "a_b-3", "x" * 90,
    ]  # fmt: skip


def test_pictures_of_comfyui_and_invokeai(tmp_path: Path) -> None:
    graph = sd15(seed=3, steps=2, cfg=5)
    graph["5"]["inputs"] |= {"width": 64, "height": 64}
    data = {
        "generation_mode": "txt2img", "positive_prompt": "a (red)++ fox", "negative_prompt": "", "width": 64,
        "height": 64, "seed": 3, "steps": 2, "cfg_scale": 5, "scheduler": "euler",
        "model": {"key": "k", "hash": "blake3:ab", "name": "Dreamshaper 8", "base": "sd-1", "type": "main"},
    }  # fmt: skip
    for name, value in (("prompt", graph), ("invokeai_metadata", data)):
        info = PngImagePlugin.PngInfo()
        info.add_text(name, json.dumps(value))
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png", pnginfo=info)
    with pytest.raises(InputError, match=r"names 'v1-5-pruned-emaonly.ckpt', which is not here"):
        model_of(read_pictures([tmp_path / "prompt.png"])[0])
    report = replay(tmp_path, tmp_path.parent / "out-of-both", model="emoji", options=options())
    comfyui, invokeai = report["pictures"][1], report["pictures"][0]
    assert (comfyui["guessed"], comfyui["lacking"], comfyui["weights"]) == ([], [], "not recorded")
    assert invokeai["lacking"] == ["syntax of prompt: drawn as plain text"]
    assert "'blake3:ab' cannot be compared" in invokeai["weights"] and invokeai["result"] == "differs"


# -- --no-metadata -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_pictures_without_metadata(form: str, tmp_path: Path) -> None:
    command = ("generate", "--prompt", "a fox", "-o", tmp_path / "run", "--clip", "none", "--format", form, "-n", "2")
    small = ("--steps", "2", "--width", "64", "--height", "64")
    done = here(*command, *small, "--no-metadata", "--max-total-images", "1")
    assert done.returncode == 1
    first = next((tmp_path / "run/images").iterdir())
    picture = Image.open(first)
    assert not picture.getexif() and not getattr(picture, "text", {}) and b"genkit" not in first.read_bytes()
    assert json.loads((tmp_path / "run/requests.jsonl").read_text())["prompt"] == "a fox"
    assert here(*command, *small).returncode == 0  # not binding: the rest of the run has its settings
    second = sorted((tmp_path / "run/images").iterdir())[1]
    assert read_picture_settings(second).fields["prompt"] == "a fox" and first.exists()
    assert read_image(first).size == (64, 64)


def test_replay_imports_no_torch_before_it_draws(demo: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from genkit import cli\n"
        f"code = cli.run(['replay', {str(demo)!r}, '-o', {str(tmp_path / 'x')!r}, '--dry-run'])\n"
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'diffusers', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
