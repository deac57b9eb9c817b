"""Recipes: files and key=value changes, what is refused and how it is said, and `genkit train` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genkit import cli
from genkit.errors import InputError
from genkit.training.recipe import read_recipe
from tests.colours import colour_folder
from tests.tiny import tiny_stable_diffusion

RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.yaml"))
PLAIN = "task: text-to-image\nmodel: emoji\ndata: {path: pictures}\n"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_house_is_one(path: Path) -> None:
    found = read_recipe(path)
    assert found.plain["task"] == found.task
    assert "genkit train" in path.read_text(), "says how it is started"


@pytest.mark.parametrize(
    ("change", "section", "key", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("learning_rate=5.0e-4", "train", "learning_rate", 5e-4),
        ("batch_size=2", "train", "batch_size", 2),
        ("data.captions=['a {caption}', '{caption}']", "data", "captions", ["a {caption}", "{caption}"]),
        ("data.validation=0", "data", "validation", 0.0),
        ("ema=0.5", "train", "ema", 0.5),
        ("evaluate.prompts=[a fox, 'yes']", "evaluate", "prompts", ["a fox", "yes"]),
        ("resolution=[64, 32]", "data", "resolution", [64, 32]),
        ("max_seconds=null", "train", "max_seconds", None),
    ],
)
def test_changes_on_the_command_line(tmp_path: Path, change: str, section: str, key: str, value: Any) -> None:
    (tmp_path / "r.yaml").write_text(PLAIN)
    found = getattr(getattr(read_recipe(tmp_path / "r.yaml", [change]), section), key)
    assert found == value and type(found) is type(value)


def test_a_number_with_an_exponent_is_one_in_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(PLAIN + "train: {learning_rate: 2e-4}\n")
    assert read_recipe(tmp_path / "r.yaml").train.learning_rate == 2e-4


def test_paths_of_a_file_are_beside_it_and_those_of_changes_are_not(tmp_path: Path) -> None:
    for name in ("pictures", "held", "base"):
        (tmp_path / name).mkdir()
    text = "task: dreambooth\nmodel: base\nprior: {prompt: a dog, path: pictures}\n"
    (tmp_path / "r.yaml").write_text(text + "data: {path: [pictures, other], validation: held}\n")
    found = read_recipe(tmp_path / "r.yaml")
    assert found.model == str(tmp_path / "base") and found.data.validation == str(tmp_path / "held")
    assert found.data.path == [str(tmp_path / "pictures"), "other"]
    assert found.prior is not None and found.prior.path == str(tmp_path / "pictures")
    assert read_recipe(tmp_path / "r.yaml", ["data.path=pictures"]).data.path == "pictures"


def test_a_recipe_of_the_house_is_found_when_it_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lora: is absent; genkit's own lies in .*recipes/lora\.yaml"):
        read_recipe(tmp_path / "lora")


def test_the_home_folder_and_odd_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("task: clip\nmodel: ~/base\ndata: {path: 'a/**b', cache_folder: ~/kept}\n")
    found = read_recipe(tmp_path / "r.yaml", ["data.validation=~/held"])
    assert (found.model, found.data.path) == (str(tmp_path / "base"), "a/**b")
    assert (found.data.validation, found.data.cache_folder) == (str(tmp_path / "held"), str(tmp_path / "kept"))
    for odd in ("a" * 5000, '"a\\0b"'):
        (tmp_path / "r.yaml").write_text(f"task: clip\nmodel: {odd}\ndata: {{path: {odd}}}\n")
        assert read_recipe(tmp_path / "r.yaml").data.path == odd.replace('"', "").replace("\\0", "\0")


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (PLAIN + "trian: {steps: 3}\n", [], "trian: unknown key (did you mean 'train'?)"),
        (PLAIN + "train: {step: 3}\n", [], "train.step: unknown key (did you mean 'steps'?)"),
        (PLAIN, ["train.lerning_rate=1"], "train.lerning_rate: unknown key (did you mean 'learning_rate'?)"),
        (PLAIN, ["lerning_rate=1"], "'lerning_rate': unknown key (did you mean 'train.learning_rate'?)"),
        (PLAIN, ["every=3"], "'every': is in several sections: say evaluate.every or save.every"),
        (PLAIN, ["steps"], "'steps': is not like train.steps=1000"),
        (PLAIN, ["train..steps=3"], "'train..steps': is not like train.steps=1000"),
        (PLAIN, ["train=3"], "train: 3: input should be a valid mapping"),
        ("task: clip\nmodel: emoji-clip\ndata: {path: x, cache: 2}\n", [], "data.cache: 2: has no effect in task clip"),
        (PLAIN, ["data.path=['']"], "data.path.0: '': string should have at least 1 character"),
        (PLAIN, ["resolution=[64, 5]"], "data.resolution.1: 5: input should be greater than or equal to 8"),
        ("task: clip\nmodel: emoji-clip\ndata: {path: ''}\n", [], "data.path: '': string should have at least 1"),
        (PLAIN, ["steps=3.5"], "train.steps: 3.5: input should be a valid integer"),
        (PLAIN, ["steps='3'"], "train.steps: '3': input should be a valid integer"),
        (PLAIN, ["steps=0"], "train.steps: 0: input should be greater than or equal to 1"),
        (PLAIN, ["ema=1"], "train.ema: 1: input should be less than 1"),
        (PLAIN, ["learning_rate=.nan"], "'.nan': YAML readers disagree"),
        (PLAIN, ["task=lora"], "lora: is missing; `lora: {rank: 8}` will do"),
        (PLAIN, ["task=lorra"], "task: 'lorra': input should be 'unconditional', 'text-to-image', 'lora'"),
        (PLAIN, ["task=lorra"], "'clip' or 'detector' (did you mean 'lora'?)"),
        (
            PLAIN,
            ["metrics=[fdi]"],
            "evaluate.metrics.0: 'fdi': input should be 'clip', 'fid', 'kid' or 'cmmd' (did you mean ",
        ),
        (PLAIN, ["lora.rank=4"], "lora: has no effect in task text-to-image; it belongs to lora, dreambooth"),
        (PLAIN, ["model.name=x"], "model.name: model is 'emoji', which has no parts"),
        (PLAIN, ["lr_warmup_steps=1000"], "train.lr_warmup_steps: 1000 of only 1000 steps"),
        (PLAIN, ["betas=[0.9, 1.0]"], "train.betas.1: 1.0: input should be less than 1"),
        (PLAIN, ["snr_gamma=5", "debiased=true"], "objective: snr_gamma and debiased are two weights; take one"),
        (PLAIN, ["objective.mean=1"], "objective.mean, std: are of logit_normal"),
        (PLAIN, ["task=clip", "caption_dropout=0.1"], "data.caption_dropout: 0.1: has no effect in task clip"),
        (PLAIN, ["task=unconditional", "prompts=[x]"], "evaluate.prompts: ['x']: has no effect in task uncond"),
        (PLAIN, ["task=lora", "lora.rank=4", "train.text_encoder=true"], "in task lora; it is lora.text_encoder"),
        (PLAIN, ["task=dreambooth", "prior.prompt=x", "buckets=true"], "data.buckets: not with prior"),
        (PLAIN, ["evaluate.features=inception", "metrics=[cmmd]"], "evaluate.metrics: cmmd is a distance of CLIP's"),
        (PLAIN, ["evaluate.best=fid"], "evaluate.best: 'fid' is not among evaluate.metrics"),
        (PLAIN + "model: x\n", [], "r.yaml:4: 'model': key is given twice"),
        ("task: clip\nmodel: emoji-clip\n", [], "data: is missing"),
        ("- a\n", [], "holds ['a'], not a recipe; it begins with `task:`"),
        ("task: [\n", [], "not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, changes: list[str], message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_recipe(tmp_path / "r.yaml", changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_trains_goes_on_draws_and_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    tiny_stable_diffusion(tmp_path / "base")
    colour_folder(tmp_path / "pictures", 8)
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text("task: text-to-image\nmodel: base\ndata: {path: pictures, validation: 0.25}\n")
    words = ["train", str(recipe), "batch_size=2", "evaluate.num_inference_steps=1", "-o", str(out), "--device", "cpu"]
    assert cli.run([*words, "steps=2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["step"] == 2 and told["scores"]["loss"] > 0
    assert cli.run([*words, "steps=3"]) == 0, "more steps of the same run"
    said = capsys.readouterr()
    assert "going on from step 2 of 3" in said.err and "model in" in said.out
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert cli.run([*words, "steps=3", "learning_rate=2e-4"]) == 2
    assert "recipe.train.learning_rate: was 0.0001, is now 0.0002" in capsys.readouterr().err
    drawn = ["generate", "--prompt", "a red picture", "--model", str(out), "-o", str(tmp_path / "run"), "--steps", "1"]
    assert cli.run([*drawn, "--device", "cpu"]) == 0

    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options))
            return "https://hub/of/mine"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    capsys.readouterr()
    assert cli.run([*words, "steps=3", "--push-to-hub", "me/mine"]) == 0
    assert "https://hub/of/mine" in capsys.readouterr().out
    assert calls[0] == ("me/mine", {"exist_ok": True, "private": True})
    assert calls[1][1]["folder_path"] == str(out) and "checkpoints/*" in calls[1][1]["ignore_patterns"]
