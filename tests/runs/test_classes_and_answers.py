"""Classes and answers of a run: recorded as pictures are drawn, asked again only where they lack, kept when killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from genkit import cli, generate
from genkit.errors import InputError
from genkit.job.load import reopen
from genkit.rows.request import Request
from genkit.runs.records import read_results
from genkit.scoring.panel import Panel
from genkit.scoring.senses import Asked, Senses
from genkit.selection.calibrate import calibrate
from genkit.studies.compare import compare_runs
from genkit.vision.captioner import Captioner
from genkit.vision.classifier import Classifier
from tests.classifiers import LABELS, tiny_classifier
from tests.judged_run import judged_run
from tests.senses import noise, tensor, tiny_blip, tiny_blip_vqa

ROOT = Path(__file__).parents[2]
SMALL = "--steps 1 --width 64 --height 64 --device cpu".split()  # noqa: SIM905
HOW, WHAT = "how many cat in the picture?", "a red fox on the grass?"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_classifier(folder / "cls")
    tiny_blip_vqa(folder / "vqa")
    tiny_blip(folder / "blip")
    return folder


def _scores(run: Path) -> dict[str, dict[str, Any]]:
    return {f"{r.id}-{r.index}": r.scores for r in read_results(run)}


def test_asked_as_drawn_and_again_without_drawing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    run = tmp_path / "run"
    command = ["generate", "--prompt", "a red fox", *SMALL, "-n", "3", "-o", str(run)]
    senses = ["--classifier", "cls", "--captioner", "vqa"]
    assert cli.run([*command, *senses, "--ask", HOW, "--gate", "p_class['red fox'] > 0.1"]) == 0
    before = _scores(run)
    model = Classifier.from_pretrained(models / "cls", device="cpu")
    for r in read_results(run):
        [best] = model.classify([run / str(r.file)], top=5)
        assert r.scores["classes"] == pytest.approx({label: p for label, p in best if p >= 1e-4}, abs=1e-5)
        assert list(r.scores["answers"]) == [HOW]
    capsys.readouterr()
    asked: list[int] = []
    answer = Captioner._answer

    def counted(self: Captioner, encoded: torch.Tensor, *more: Any) -> list[str | None]:
        asked.append(len(encoded))
        return answer(self, encoded, *more)

    monkeypatch.setattr(Captioner, "_answer", counted)
    again = ["--gate", f"answer['{WHAT}'] != 'no' and p_class['dog'] < 0.99", "--ask", HOW]
    assert cli.run([*command, *senses, *again]) == 0
    told = capsys.readouterr()
    assert "3 images are looked at again: rows ask other words or questions" in told.err
    assert "new                0" in told.out and asked == [3]  # one question, of all three at once
    after = _scores(run)
    for name, scores in after.items():
        assert set(scores["answers"]) == {HOW, WHAT}
        assert scores["answers"][HOW] == before[name]["answers"][HOW]
        assert scores["classes"] == before[name]["classes"]
    assert cli.run([*command, *senses, *again]) == 0
    assert asked == [3] and "looked at again" not in capsys.readouterr().err
    _, scorer, _, _ = reopen(run, "cpu")
    assert scorer.senses.names == ("classifier", "captioner")
    assert cli.run([*command, *senses, "--rank-by", "p_class['dog']", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["classifier"], plan["captioner"]) == ("cls", "vqa") and "see the field `ask`" in plan["notes"][-1]
    page = (run / "index.html").read_text()
    assert WHAT in page and '"tabby, tabby cat"' in page
    decided_without_a_model(run, after, monkeypatch, capsys)


def decided_without_a_model(
    run: Path, scores: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("classifier", "captioner"):
        monkeypatch.setitem(sys.modules, f"genkit.vision.{module}", None)
    wanted = sum(one["classes"].get("dog", 0) > 0.2 for one in scores.values())
    assert cli.run(["filter", str(run), "--where", "p_class['dog'] > 0.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == wanted
    text = next(iter(scores.values()))["answers"][HOW]
    if text:
        assert cli.run(["filter", str(run), "--where", f"answer['{HOW}'] == '{text.upper()}.'", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kept"] >= 1
    assert cli.run(["study", str(run)]) == 0
    for where, message in (
        ("p_class['tabby'] > 0.5", "did you mean 'tabby, tabby cat'?"),
        ("answer['is it blue?'] == 'yes'", "'is it blue?' was not asked of this image"),
    ):
        assert cli.run(["filter", str(run), "--where", where]) == 2
        assert message in capsys.readouterr().err


REFUSED: list[tuple[list[str], str]] = [
    (["--classifier", "cls", "--gate", "p_class['tabby'] > 0.5"], "(did you mean 'tabby, tabby cat'?)"),
    (["--gate", "p_class['dog'] > 0.5"], "give --classifier"),
    (["--rank-by", "p_class['dog']"], "give --classifier"),
    (["--classifier", "cls", "--gate", f"answer['{HOW}'] == 'two'"], "give --captioner"),
    (["--ask", HOW], "give --captioner"),
    (["--captioner", "blip", "--ask", HOW], "--captioner: blip captions, and answers no questions: take a Blip"),
    (["--captioner", "cls", "--ask", HOW], "ViTForImageClassification is a classifier, not a captioner"),
    (["--classifier", "vqa"], "BlipForQuestionAnswering is a captioner, not a classifier"),
    (["--captioner", "vqa", "--ask", "a,?,A?"], "--ask: 'a,?' and 'A?' are the same question"),
    (["--captioner", "vqa", "--ask", f"{HOW},"], "--ask: '' is no question"),
    (["--captioner", "vqa", "--ask", "the cat " * 30], "ask: 'the cat the cat"),
    (
        ["--captioner", "vqa", "--gate", f"answer['{'the cat ' * 30}'] == 'x'"],
        "tokens, more than the 40 that vqa",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_refused_before_torch_and_nothing_is_left(
    words: list[str], message: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(models)
    assert cli.run(["generate", "--prompt", "a", *SMALL, "-o", str(tmp_path / "run"), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_pruning_cannot_rank_by_what_is_not_asked_of_unfinished_pictures(models: Path, tmp_path: Path) -> None:
    row = Request(prompt="a", num_images=4, prune={}, rank_by="p_class['dog']")
    with pytest.raises(InputError, match="nothing is classified, and nothing asked: rank_by cannot read them"):
        generate([row], tmp_path / "run", classifier=str(models / "cls"))


def test_unfinished_pictures_are_not_looked_at(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    classify = Classifier.__call__

    def counted(self: Classifier, pictures: torch.Tensor) -> torch.Tensor:
        looked.append(len(pictures))
        return classify(self, pictures)

    monkeypatch.setattr(Classifier, "__call__", counted)
    size = {"num_inference_steps": 4, "width": 64, "height": 64}
    row = Request(id="a", prompt="a fox", num_images=4, prune={}, gate="p_class['dog'] < 0.99", **size)
    generate([row], tmp_path / "run", classifier=str(models / "cls"), device="cpu", quiet=True)
    assert sum(looked) == row.whole == 2


def test_a_run_is_bound_to_weights_and_labels_and_python_does_the_same(models: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"num_inference_steps": 1, "width": 64, "height": 64}
    tables = {"rows.jsonl": json.dumps({"prompt": "a fox", "ask": [HOW, WHAT]}),
              "rows.csv": f'prompt,ask\na fox,"{HOW}, {WHAT}"',
              "rows.yaml": f"- prompt: a fox\n  ask: ['{HOW}', '{WHAT}']"}  # fmt: skip
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    same = {"classifier": str(models / "cls"), "captioner": str(models / "vqa"), "device": "cpu", "quiet": True}
    for name in tables:
        assert generate(tmp_path / name, tmp_path / "run", defaults=fields, **same).exit_code == 0  # type: ignore[arg-type]
    [found] = _scores(tmp_path / "run").values()
    assert list(found["answers"]) == [HOW, WHAT] and set(found["classes"]) <= set(LABELS)
    other = tiny_classifier(tmp_path / "other", labels=(*LABELS[:-1], "pear"))
    with pytest.raises(InputError, match=r"was begun otherwise: .*classifier\.labels: "):
        generate(tmp_path / "rows.jsonl", tmp_path / "run", defaults=fields, **{**same, "classifier": str(other)})  # type: ignore[arg-type]
    row = Request(prompt="a fox", num_inference_steps=2, width=64, height=64, ask=[HOW])
    assert generate([row.filled({"id": "000000"})], tmp_path / "more", **same).new == 1  # type: ignore[arg-type]
    names = compare_runs(tmp_path / "run", tmp_path / "more")["scores"]
    assert sum(name.startswith("p_class[") for name in names) == len(found["classes"])


def test_answers_are_those_of_captions_and_no_numbers_are_null_and_said_once(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vqa, cls = (Captioner.from_pretrained(models / "vqa", device="cpu"), Classifier.from_pretrained(models / "cls"))
    pictures = [tensor(noise(n, 40 + 8 * (n % 2), 48))[0] for n in range(5)]
    asked = [Asked(questions=(HOW, WHAT)), Asked(), Asked(questions=(WHAT,), classify=False), Asked(), Asked()]
    found = Senses(classifier=cls, captioner=vqa).look(pictures, asked)
    for picture, one, scores in zip(pictures, asked, found, strict=True):
        assert ("classes" in scores) is one.classify
        assert scores.get("answers", {}) == {q: vqa(picture[None], q)[0] for q in one.questions}
    with pytest.raises(InputError, match="BlipForConditionalGeneration captions, and answers no questions"):
        Captioner.from_pretrained(models / "blip", device="cpu").answers(pictures[0][None], [[HOW]])
    with torch.no_grad():
        cls.model.classifier.weight.fill_(torch.nan)
        vqa.model.text_decoder.cls.predictions.bias.fill_(torch.nan)
    panel = Panel(senses=Senses(classifier=cls, captioner=vqa))
    batch = torch.stack(pictures[::2])
    for _ in range(2):
        broken = panel.scores(batch, [""] * 3, [None] * 3, [asked[0]] * 3)
    assert all(one["classes"] is None and one["answers"] == {HOW: None, WHAT: None} for one in broken)
    told = panel.news()
    assert len(told) == 2 and "such pictures have no classes" in told[0] and "no answers" in told[1]


def test_gates_are_fitted_to_classes(tmp_path: Path) -> None:
    def scores(n: int, k: int) -> dict[str, Any]:
        return {"classes": {"dog": round(0.1 * n + 0.01 * k, 4)}, "answers": {"is it red?": "Yes." if k else "no"}}

    run = judged_run(tmp_path / "run", scores, rows=10)
    for name, rows in (("good", range(5, 10)), ("bad", range(5))):
        (tmp_path / name).write_text("\n".join(f"r{n}-{k:02d}" for n in rows for k in range(5)))
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert calibrate(run, good, 0.9, "p_class['dog']", bad=bad)["expression"] == "p_class['dog'] > 0.44"
    assert calibrate(run, good, 0.9, "p_class['dog']", "answer['is it red?'] == 'yes'", bad=bad)["score"]
    with pytest.raises(InputError, match=r"--where: .*'is it big\?' was not asked of this image"):
        calibrate(run, good, 0.9, "p_class['dog']", "answer['is it big?'] == 'yes'", bad=bad)


@pytest.mark.slow
def test_a_run_with_all_senses_killed_ten_times(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.killed_senses", str(tmp_path), "40", "10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 10 and found["kills_asking"] >= 1
    assert found["records"] == 40 and found["most_of_one"] == 1  # nothing that was recorded was drawn twice
    assert found["asked_again"] == 40 and found["most_of_one_asked"] == 2  # nor looked at twice
