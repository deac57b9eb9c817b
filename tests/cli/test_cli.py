"""The command as a user types it: bad usage, a whole run, going on after Ctrl-C, a changed row, selection, scoring."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genkit import cli
from tests.check_run import check_run
from tests.children import holding, start
from tests.grids import thinned
from tests.judged_run import judged_run

ROOT = Path(__file__).parents[2]


def genkit(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "genkit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=250, **options)


def here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, where its start is not what is tested."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(a) for a in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox\na green apple\na pizza\n")
    return file


# -- bad usage: cases 41 to 55 of the list of bad inputs -------------------------------------------------------------

BAD_USAGE: list[tuple[str, list[str], str]] = [
    ("41 no arguments", ["generate"], "--out"),
    ("42 unknown option", ["generate", "{p}", "-o", "{o}", "--stepz", "4"], "--stepz"),
    ("42 unknown command", ["generat"], "generat"),
    ("43 twice", ["generate", "{p}", "-o", "{o}", "--steps", "4", "--num-inference-steps", "5"], "given twice"),
    ("44 both", ["generate", "{p}", "--prompt", "x", "-o", "{o}"], "give one of them, not both"),
    ("44 keep", ["generate", "{p}", "-o", "{o}", "--keep", "3"], "keep: 3 of at most 1 images"),
    ("44 max", ["generate", "{p}", "-o", "{o}", "--max-images", "3"], "max_images: needs `keep` and `gate`"),
    ("45 missing", ["generate", "{p}", "-o"], "requires an argument"),
    ("46 zero", ["generate", "{p}", "-o", "{o}", "--batch-size", "0"], "--batch-size: '0'"),
    ("46 negative", ["generate", "{p}", "-o", "{o}", "--batch-size", "-1"], "--batch-size: '-1'"),
    ("46 huge", ["generate", "{p}", "-o", "{o}", "--batch-size", "1000000"], "--batch-size: '1000000'"),
    ("47 absent", ["generate", "{p}", "-o", "{o}", "--device", "cuda:99"], "cuda:99"),
    ("47 unknown", ["generate", "{p}", "-o", "{o}", "--device", "tpu"], "--device: 'tpu'"),
    ("48 int4", ["generate", "{p}", "-o", "{o}", "--dtype", "int4"], "--dtype: 'int4'"),
    ("48 memory", ["generate", "{p}", "-o", "{o}", "--memory", "lowest"], "--memory: 'lowest' is not auto"),
    ("48 half on cpu", ["generate", "{p}", "-o", "{o}", "--device", "cpu", "--dtype", "fp16"], "float16 on a CPU"),
    ("49 a file", ["generate", "{p}", "-o", "{p}"], "not a folder"),
    ("49 input folder", ["generate", "{p}", "-o", "{d}"], "where the prompt file lies"),
    ("49 root", ["generate", "{p}", "-o", "/"], "/"),
    ("49 long", ["generate", "{p}", "-o", "x" * 4096], "longer than"),
    ("49 space", ["generate", "{p}", "-o", "{o} "], "has a space at an end"),
    ("50 foreign", ["generate", "{p}", "-o", "{f}"], "no run.json"),
    ("51 hex", ["generate", "{p}", "-o", "{o}", "--seed", "0x10"], "--seed"),
    ("51 large", ["generate", "{p}", "-o", "{o}", "--seed", "4294967296"], "--seed: 4294967296"),
    ("54 banana", ["generate", "{p}", "-o", "{o}", "--scheduler", "banana"], "--scheduler: 'banana'"),
    ("55 nan", ["generate", "{p}", "-o", "{o}", "--gate", "clip > nan"], "gate"),
    ("55 two", ["generate", "{p}", "-o", "{o}", "--gate", "clip > 2"], "gate"),
    ("55 minus five", ["generate", "{p}", "-o", "{o}", "--gate", "clip > -5"], "gate"),
    ("rank", ["generate", "{p}", "-o", "{o}", "--rank-by", "clop"], "'clop': no such score (did you mean 'clip'?)"),
    ("gate", ["generate", "{p}", "-o", "{o}", "--gate", "clip_margn > 0"], "did you mean 'clip_margin'?"),
    ("no head", ["generate", "{p}", "-o", "{o}", "--gate", "aesthetic > 5"], "give --aesthetic FILE"),
    ("sim", ["generate", "{p}", "-o", "{o}", "--gate", "sim < 0.9"], "known only once pictures are chosen"),
    ("head", ["generate", "{p}", "-o", "{o}", "--aesthetic", "{d}/none"], "no such file"),
    ("head, no CLIP", ["generate", "{p}", "-o", "{o}", "--aesthetic", "{i}", "--clip", "none"], "give --clip"),
    ("scorer", ["generate", "{p}", "-o", "{o}", "--scorer", "blurr"], "--scorer: 'blurr': no such scorer"),
    ("scorer", ["score", "{i}", "--prompt", "a", "--scorer", "blurr"], "--scorer: 'blurr': no such scorer"),
    (
        "gate without a scorer",
        ["generate", "{p}", "-o", "{o}", "--gate", "clip > 0.2", "--clip", "none"],
        "give --clip",
    ),
    ("steps", ["generate", "{p}", "-o", "{o}", "--steps", "0"], "--num-inference-steps: 0"),
    ("width", ["generate", "{p}", "-o", "{o}", "--width", "100"], "width: 100 is not a multiple of 8 (nearest: 96)"),
    ("strength", ["generate", "{p}", "-o", "{o}", "--strength", "2"], "--strength: 2"),
    ("image", ["generate", "{p}", "-o", "{o}", "--image", "{d}/none.png"], "image: "),
    ("mask", ["generate", "{p}", "-o", "{o}", "--image", "{i}", "--mask-image", "{b}"], "mask_image: "),
    ("model", ["generate", "{p}", "-o", "{o}", "--model", "emojj"], "emoji"),
    ("model is a scorer", ["generate", "{p}", "-o", "{o}", "--model", "emoji-clip"], "CLIP model"),
    ("scorer is a model", ["generate", "{p}", "-o", "{o}", "--clip", "emoji"], "not a CLIP model"),
    ("absent prompts", ["generate", "{d}/none.txt", "-o", "{o}"], "none.txt"),
    ("filter a folder that is no run", ["filter", "{d}", "--where", "clip > 0"], "run"),
    ("score nothing", ["score", "{i}"], "nothing to score against"),
    ("score both", ["score", "{i}", "--prompt", "a", "--prompts", "{p}"], "give one of them"),
    ("classify no label", ["classify", "{i}"], "--labels: missing"),
    ("classify one label", ["classify", "{i}", "--labels", "a"], "single label"),
    ("classify no picture", ["classify", "{f}", "--labels", "a,b"], "no PNG"),
    ("classify a broken picture", ["classify", "{b}", "--labels", "a,b"], "broken.png"),
    ("inspect", ["inspect", "{d}/nothing"], "nothing"),
    ("workers", ["generate", "{p}", "-o", "{o}", "--workers", "2", "--device", "cuda:1", "--dry-run"], "--device"),
    ("interval", ["generate", "{p}", "-o", "{o}", "--guidance-interval", "x"], "--guidance-interval: 'x'"),
    ("LoRA", ["generate", "{p}", "-o", "{o}", "--lora", "x:y"], "--lora: 'y'"),
    ("folder of LoRAs", ["generate", "{p}", "-o", "{o}", "--lora-dir", "{d}/none"], "--lora-dir: "),
    ("idle --loaded", ["serve", "--loaded", "2"], "--loaded: has no effect without --models"),
    ("idle --model", ["interrogate", "{i}", "--model", "emoji"], "--model: has no effect without --generate"),
    ("idle --images", ["study", "{d}", "--images", "8"], "--images: has no effect without --prune"),
]


# Every option that takes one of a few names: a misspelt one, the names that there are, and the nearest.
_DRAW = ["generate", "{p}", "-o", "{o}"]
CHOICES: list[tuple[list[str], str, str]] = [
    ([*_DRAW, "--format-in", "khoya"], "auto, genkit, a1111-lines, infotext, kohya, comfyui", "kohya"),
    ([*_DRAW, "--syntax", "a111"], "none, a1111", "a1111"),
    ([*_DRAW, "--prediction", "v-prediction"], "auto, epsilon, v_prediction, sample", "v_prediction"),
    (["convert", "emoji", "{o}", "--prediction", "epsilom"], "auto, epsilon, v_prediction, sample", "epsilon"),
    ([*_DRAW, "--scheduler", "eular"], "ddim, ddpm, euler", "euler"),
    ([*_DRAW, "--device", "cdua"], "auto, cpu, mps, cuda or cuda:N", "cuda"),
    (["study", "{d}", "--prune", "--device", "mpss"], "auto, cpu, mps, cuda or cuda:N", "mps"),
    ([*_DRAW, "--dtype", "flaot16"], "auto, float32, float16, bfloat16 or int8", "float16"),
    ([*_DRAW, "--attention", "flsh"], "auto, sdpa, flash, cudnn, efficient, xformers, sliced or math", "flash"),
    ([*_DRAW, "--memory", "hihg"], "auto, high or low", "high"),
    ([*_DRAW, "--format", "pgn"], "png, webp, jpeg or jxl", "png"),
    ([*_DRAW, "--batch-size", "atuo"], "auto or a number from 1 to 4096", "auto"),
    ([*_DRAW, "--workers", "2", "--ray", "atuo"], "auto or HOST:PORT", "auto"),
    (["filter", "{d}", "-o", "{o}", "--format", "parqet"], "folder, webdataset, parquet", "parquet"),
    (["caption", "{i}", "--model", "x", "--write", "json"], "txt or jsonl", "jsonl"),
    (["evaluate", "emoji", "--suite", "genevl"], "geneval, emoji", "geneval"),
    (
        ["evaluate", "emoji", "--suite", "emoji", "--against", "{d}", "--features", "incepton"],
        "clip, inception",
        "inception",
    ),
]


@pytest.mark.parametrize(("words", "known", "near"), CHOICES, ids=[" ".join(words[-2:]) for words, *_ in CHOICES])
def test_a_misspelt_choice_names_all_and_the_nearest(prompts: Path, words: list[str], known: str, near: str) -> None:
    Image.new("RGB", (16, 16), "red").save(prompts.parent / "picture.png")
    places = {"p": prompts, "o": prompts.parent / "run", "d": prompts.parent, "i": prompts.parent / "picture.png"}
    said = here(*[word.format(**places) for word in words])
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert said.stderr.startswith(f"genkit: {words[-2]}: {words[-1]!r}") and known in said.stderr
    assert f"(did you mean {near!r}?)" in said.stderr


@pytest.mark.parametrize(("arguments", "words"), [b[1:] for b in BAD_USAGE], ids=[b[0] for b in BAD_USAGE])
def test_bad_usage_is_one_line_and_leaves_nothing(
    prompts: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    folder = prompts.parent
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("years of work")
    Image.new("RGB", (16, 16), "red").save(folder / "picture.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    before = sorted(folder.rglob("*"))
    places = {"p": prompts, "o": folder / "run", "d": folder, "f": folder / "foreign", "i": folder / "picture.png",
              "b": folder / "broken.png"}  # fmt: skip
    code = cli.run([a.format(**places) for a in arguments])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert err.startswith("genkit: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert words in err
    assert out == ""
    assert sorted(folder.rglob("*")) == before, "bad input leaves nothing behind"


def test_52_bare_environment_and_53_odd_outputs(prompts: Path) -> None:
    bare = {"PATH": os.environ["PATH"], "LANG": "C", "PYTHONHASHSEED": "0"}
    arguments: list[str | Path] = ["generate", prompts, "-o", prompts.parent / "run", "--dry-run"]
    assert genkit(*arguments, env=bare).returncode == 0
    command = [sys.executable, "-m", "genkit", *map(str, arguments)]
    full = subprocess.run(
        f"{' '.join(command)} > /dev/full", shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert full.returncode == 3 and "Traceback" not in full.stderr
    closed = subprocess.run(
        f"{' '.join(command)} >&-", shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in closed.stderr


LIGHT = [
    (["--help"], 0),
    (["generate", "--help"], 0),
    (["generate", "{p}", "-o", "{o}", "--dry-run"], 0),
    (["generate", "{bad}", "-o", "{o}", "--dry-run"], 2),
    (["filter", "{d}", "--where", "clip > 0"], 2),
    (["inspect", "emoji"], 0),
]


@pytest.mark.parametrize(("arguments", "code"), LIGHT, ids=lambda a: " ".join(a[:2]) if isinstance(a, list) else "")
def test_what_needs_no_network_does_not_import_torch(prompts: Path, arguments: list[str], code: int) -> None:
    (prompts.parent / "bad.jsonl").write_text('{"promt": "a fox"}\n')
    places = {"p": prompts, "o": prompts.parent / "run", "d": prompts.parent, "bad": prompts.parent / "bad.jsonl"}
    script = (
        "import sys\nfrom genkit import cli\n"
        f"code = cli.run({[a.format(**places) for a in arguments]!r})\n"
        "heavy = [m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == code, result.stderr


def test_dry_run_says_what_it_would_do(prompts: Path) -> None:
    result = genkit(
        "generate", prompts, "-o", prompts.parent / "run", "-n", "4", "--steps", "10", "--dry-run", "--json"
    )
    found = json.loads(result.stdout)
    assert (found["rows"], found["images"], found["network_calls"]) == (3, 12, 12 * 10 * 2)
    assert not (prompts.parent / "run").exists()


# -- runs --------------------------------------------------------------------------------------------------------------

QUICK = ["--steps", "2", "--width", "64", "--height", "64", "--device", "cpu"]


def records(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return {(r["id"], r["index"]): r for r in lines}


def test_a_run_from_prompts_to_gallery_and_a_changed_row(prompts: Path) -> None:
    run = prompts.parent / "run"
    first = genkit("generate", prompts, "-o", run, "-n", "2", "--keep", "1", *QUICK, "--json")
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout)
    assert (summary["images"], summary["new"], summary["kept"], summary["failed"]) == (6, 6, 3, 0)
    check_run(run)
    assert (run / "index.html").stat().st_size > 1000
    made = records(run)
    assert all(r["scores"]["clip"] for r in made.values())
    best = {max((r for r in made.values() if r["id"] == i), key=lambda r: r["scores"]["clip"])["file"] for i, _ in made}
    kept = {i["file"] for i in json.loads((run / "selection.json").read_text())["images"].values() if i["kept"]}
    assert kept == best

    again = here("generate", prompts, "-o", run, "-n", "2", "--keep", "1", *QUICK, "--json")
    assert json.loads(again.stdout)["new"] == 0, "the same command again has nothing to do"

    prompts.write_text("a red fox\na blue apple\na pizza\n")
    changed = here("generate", prompts, "-o", run, "-n", "2", "--keep", "1", *QUICK)
    assert changed.returncode == 0, changed.stderr
    assert "'a green apple' -> 'a blue apple'" in changed.stderr
    check_run(run)
    for key, record in records(run).items():
        assert (record["sha256"] == made[key]["sha256"]) == (key[0] != "000001"), "only the changed row is new"
    assert len(list((run / "replaced").iterdir())) == 2, "its old pictures are set aside, not deleted"

    other = here("generate", prompts, "-o", run, "-n", "2", "--keep", "1", *QUICK, "--seed", "7")
    assert other.returncode == 2 and "seed: 0 -> 7" in other.stderr and "--new-run" in other.stderr
    rounded = here("generate", prompts, "-o", run, "-n", "2", "--keep", "1", *QUICK, "--dtype", "bf16")
    assert rounded.returncode == 2 and "dtype: float32 -> bfloat16" in rounded.stderr
    same = here("generate", prompts, "-o", run, "-n", "2", "--keep", "1", *QUICK, "--dtype", "fp32")
    assert same.returncode == 0, same.stderr
    new = here("generate", prompts, "-o", run, *QUICK, "--seed", "7", "--new-run", "--json")
    assert json.loads(new.stdout)["folder"] == f"{run}-2"

    decided = here("filter", run, "--where", "clip > -1", "--keep", "2", "-o", prompts.parent / "best", "--json")
    assert decided.returncode == 0, decided.stderr
    lines = (prompts.parent / "best" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 6 and {json.loads(line)["text"] for line in lines} == {"a red fox", "a blue apple", "a pizza"}


@pytest.mark.parametrize(("number", "code"), thinned([(signal.SIGINT, 130), (signal.SIGTERM, 143)], 2, unpack=True))
def test_ctrl_c_and_the_same_command_again(prompts: Path, number: signal.Signals, code: int) -> None:
    run = prompts.parent / "run"
    arguments: list[str | Path] = ["generate", prompts, "-o", run, "-n", "4", "--batch-size", "2", *QUICK]
    with start([*holding(3), *map(str, arguments)]) as process:
        journal, deadline = run / "results.jsonl", time.monotonic() + 200
        while time.monotonic() < deadline and not (journal.is_file() and journal.stat().st_size):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    assert "run the same command again" in err
    check_run(run)
    before = records(run)
    assert 0 < len(before) < 12
    second = here(*arguments, "--json")
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["new"] == 12 - len(before)
    check_run(run)
    whole = here("generate", prompts, "-o", prompts.parent / "whole", "-n", "4", "--batch-size", "2", *QUICK)
    assert whole.returncode == 0
    found, expected = records(run), records(prompts.parent / "whole")
    assert {k: (r["seed"], r["status"]) for k, r in found.items()} == {
        k: (r["seed"], r["status"]) for k, r in expected.items()
    }


def test_a_signal_leaves_no_lock_held(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come while the main thread holds a lock of the pool of writers, which they need to end."""
    lock, sent = threading.Lock(), list[signal.Signals]()

    class Pool(ThreadPoolExecutor):
        def submit(self, work: Any, *arguments: Any) -> Any:  # type: ignore[override]
            def locked() -> Any:
                assert lock.acquire(timeout=120)
                lock.release()
                return work(*arguments)

            lock.acquire()
            future = super().submit(locked)
            if not sent:
                sent.append(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            lock.release()
            return future

    monkeypatch.setattr("genkit.runs.writers.ThreadPoolExecutor", Pool)
    run = prompts.parent / "run"
    stopped = here("generate", prompts, "-o", run, "-n", "4", "--batch-size", "2", *QUICK)
    assert stopped.returncode == 143, stopped.stderr
    assert 0 < len(records(run)) < 12
    check_run(run)


def test_a_second_process_on_the_folder_is_refused(prompts: Path) -> None:
    run = prompts.parent / "run"
    command = [sys.executable, "-m", "genkit", "generate", str(prompts), "-o", str(run), "-n", "400", *QUICK]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not (run / "results.jsonl").is_file():
            time.sleep(0.05)
        second = here(*command[3:])
        process.kill()
    assert second.returncode == 3 and "in use by another" in second.stderr


def test_a_failed_image_is_exit_1_and_tried_again(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from genkit.sampling.codec import Codec

    right = Codec.decode

    def broken(self: Codec, latents: torch.Tensor) -> torch.Tensor:
        pictures = right(self, latents)
        pictures[0] = float("nan")
        return pictures

    monkeypatch.setattr(Codec, "decode", broken)
    arguments = ["generate", str(prompts), "-o", str(tmp_path / "run"), *QUICK]
    assert cli.run(arguments) == 1
    assert sorted(r["status"] for r in records(tmp_path / "run").values()) == ["done", "done", "failed"]
    monkeypatch.undo()
    assert cli.run(arguments) == 0
    assert {r["status"] for r in records(tmp_path / "run").values()} == {"done"}


def test_disk_full_is_exit_3_and_leaves_nothing_torn(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import errno

    from genkit import durable

    calls = []

    def full(path: Path, data: bytes) -> None:
        calls.append(path)
        if path.suffix == ".png" and len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        right(path, data)

    right = durable.write_whole
    monkeypatch.setattr("genkit.runs.recorder.write_whole", full)
    arguments = ["generate", str(prompts), "-o", str(tmp_path / "run"), "-n", "2", "--batch-size", "2", *QUICK]
    assert cli.run(arguments) == 3
    monkeypatch.undo()
    check_run(tmp_path / "run")
    assert cli.run(arguments) == 0
    check_run(tmp_path / "run")


def test_score_and_classify_any_folder(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    run = here(
        "generate", "--prompt", "a red fox", "-n", "2", "--steps", "8", "--device", "cpu", "-o", tmp_path / "run"
    )
    assert run.returncode == 0, run.stderr
    for k, file in enumerate(sorted((tmp_path / "run" / "images").iterdir())):
        Image.open(file).resize((90 + 40 * k, 77)).save(pictures / f"{k}.jpg")
    (pictures / "torn.png").write_bytes(file.read_bytes()[:500])
    scored = here(
        "score", pictures, "--prompt", "a red fox", "--labels", "a red fox,a green apple", "-o", tmp_path / "s.jsonl"
    )
    assert scored.returncode == 1 and "torn.png" in scored.stderr, "one picture could not be read"
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and sum("error" in line for line in lines) == 1
    assert all(line["scores"]["p"]["a red fox"] > 0.5 for line in lines if "scores" in line)
    whole = here("score", tmp_path / "run", "--labels", "a red fox,a green apple")
    assert whole.returncode == 0, whole.stderr
    recorded = {r["file"]: r["scores"]["clip"] for r in records(tmp_path / "run").values()}
    for line in map(json.loads, whole.stdout.splitlines()):
        assert line["scores"]["clip"] == pytest.approx(
            recorded[str(Path(line["file"]).relative_to(tmp_path / "run"))], abs=2e-3
        )
    chosen = here("classify", tmp_path / "run", "--labels", "a red fox,a green apple", "--json")
    assert [json.loads(line)["label"] for line in chosen.stdout.splitlines()] == ["a red fox"] * 2


def test_inspect_and_env(tmp_path: Path) -> None:
    found = json.loads(here("inspect", "emoji", "--json").stdout)
    assert found["kind"] == "text-to-image" and found["components"]["unet"]["class"] == "UNet2DConditionModel"
    assert json.loads(here("env", "--json").stdout)["torch"].startswith("2.")


def test_a_dry_run_says_what_is_finished_and_what_would_be_drawn_again(prompts: Path) -> None:
    run = prompts.parent / "run"
    asked = ["generate", str(prompts), "-o", str(run), *QUICK, "--json"]
    assert "finished" not in json.loads(here(*asked, "--dry-run").stdout)
    assert here(*asked).returncode == 0
    plan = json.loads(here(*asked, "-n", "2", "--dry-run").stdout)
    assert (plan["images"], plan["finished"], plan["drawn_again"]) == (6, 3, 0)
    plan = json.loads(here(*asked, "--guidance-scale", "3", "--dry-run").stdout)
    assert (plan["finished"], plan["drawn_again"]) == (3, 3)


def test_a_run_of_another_default_is_refused_and_goes_on_with_its_settings_stated(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red fox\n")
    size = ("--width", "64", "--height", "64")
    command = ("generate", tmp_path / "p.txt", "-o", tmp_path / "run", "--clip", "none", *size)
    assert here(*command, "--steps", "2").returncode == 0
    before = (tmp_path / "run/images/000000-00.png").read_bytes()
    refused = here(*command)
    assert refused.returncode == 2
    assert "run: was begun otherwise: tuned.tuned_scheduler.json: none -> " in refused.stderr
    assert here(*command, "--steps", "2").returncode == 0
    assert (tmp_path / "run/images/000000-00.png").read_bytes() == before
    assert not (tmp_path / "run/replaced").exists()


def test_help_lists_every_command_in_a_section_with_its_whole_summary() -> None:
    text = genkit("--help").stdout
    assert "…" not in text and "..." not in text.replace("[ARGS]...", "")
    sections = re.findall(r"^(\w[\w ]+):$", text, re.MULTILINE)
    assert sections == [
        "Options", "Make pictures", "Look back at runs and choose", "Score pictures", "Train models",
        "Models and this machine",
    ]  # fmt: skip
    assert "broken, small and duplicate pictures and bad captions; exits with 2 on errors." in " ".join(text.split())
    options = genkit("generate", "--help").stdout
    for title in ("Arguments:", "What is drawn:", "Which pictures are kept:", "How it runs:"):
        assert f"\n{title}\n" in options


def test_names_that_are_not_utf_8_are_printed_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, odd = tmp_path / "pictures", tmp_path / os.fsdecode(b"odd\xff")
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / os.fsdecode(b"a\xff.png"))
    (folder / os.fsdecode(b"b\xff.safetensors")).write_bytes(b"none")
    assert cli.run(["doctor", str(folder), "--json"]) == 2
    assert r"a\udcff.png" in capsys.readouterr().out
    assert cli.run(["doctor", str(odd)]) == 2
    assert capsys.readouterr().err.startswith("genkit: DATA: ")
    assert cli.run(["models", str(folder)]) == 0
    assert r"b\udcff: refused" in capsys.readouterr().out
    run = judged_run(tmp_path / "run", lambda n, k: {"clip": (n + k) / 100}, rows=3).rename(odd)
    assert cli.run(["study", str(run), "--json"]) == 0
    assert os.fsencode(json.loads(capsys.readouterr().out)["run"]) == os.fsencode(run)


def test_home_and_variables_in_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "a place é"))
    (tmp_path / "a place é").mkdir()
    Image.new("RGB", (128, 128), "orange").save(tmp_path / "a place é" / "in.png")
    (tmp_path / "rows.txt").write_text("a fox\n")
    plan = [
        "generate",
        "~/rows.txt",
        "-o",
        "${PLACE}/run",
        "--image=$PLACE/in.png",
        "--strength=0.5",
        "--dry-run",
        "--json",
    ]
    assert cli.run(plan) == 0 and json.loads(capfd.readouterr().out)["rows"] == 1
    asked = ["score", "$PLACE", "--prompt", "~/a fox", "--out", "~/scores.jsonl", "--device", "cpu"]
    assert cli.run(asked) == 0
    (line,) = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "~/a fox", "a prompt is no path"


def test_seed_minus_1_is_any_and_the_run_keeps_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--prompt", "a fox", "--seed", "-1", *QUICK, "--json", "-o"]
    assert cli.run([*asked, str(tmp_path / "a")]) == cli.run([*asked, str(tmp_path / "b")]) == 0
    seeds = [json.loads((tmp_path / name / "run.json").read_text())["binding"]["seed"] for name in "ab"]
    assert seeds[0] != seeds[1] and min(seeds) >= 0
    (line,) = (tmp_path / "a" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["seed"] == seeds[0]
    capfd.readouterr()
    assert cli.run([*asked, str(tmp_path / "a")]) == 0 and json.loads(capfd.readouterr().out)["new"] == 0
