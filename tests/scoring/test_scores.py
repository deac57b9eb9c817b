"""Scores beside plain CLIP: relative to other captions, of the pixels, by a head, and by scorers of others."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy.ndimage import laplace

from genkit import ClipScorer, InputError, Request, TextToImage, generate
from genkit.job.plan import plan_job
from genkit.options import Options
from genkit.rows.result import Result
from genkit.runs.records import read_config, read_results
from genkit.scoring import plugins
from genkit.scoring.aesthetic import Head, check_head
from genkit.scoring.captions import GENERAL
from genkit.scoring.measures import measures
from genkit.scoring.names import SHARPEST
from genkit.scoring.panel import Panel, half
from genkit.scoring.plugins import find_scorers
from genkit.scoring.relative import FEW, MOST, Yardstick
from tests.tiny import tiny_clip, tiny_stable_diffusion

PROMPTS = [
    f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("fox", "car", "hat", "egg", "cup", "bus")
]
TWO = [Request(id=p, prompt=f"a {p} fox", seed=1, num_inference_steps=2) for p in ("red", "blue")]


@pytest.fixture(scope="module")
def clip() -> ClipScorer:
    return ClipScorer.from_pretrained("emoji-clip", device="cpu")


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    gen = TextToImage.from_pretrained("emoji", device="cpu")
    found = [
        gen(p, seed=1, num_inference_steps=6).results[0].pixels for p in ("a red fox", "a green apple", "a blue car")
    ]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


# -- relative to other captions ----------------------------------------------------------------------------------------


def test_margin_and_z_are_what_they_say(clip: ClipScorer, pictures: torch.Tensor) -> None:
    panel = Panel(clip, PROMPTS)
    found = panel.scores(pictures[:1], ["a red fox"], [None])[0]
    image = half(clip.embed_images(pictures[:1]))[0].astype(np.float64)
    image /= np.linalg.norm(image)
    texts = clip.embed_texts(["a red fox", *(p for p in PROMPTS if p != "a red fox")]).numpy() @ image
    assert len(texts) == 18
    assert found["clip"] == pytest.approx(texts[0], abs=1e-6)
    assert found["clip_margin"] == pytest.approx(texts[0] - texts[1:].max(), abs=1e-6)
    assert found["clip_z"] == pytest.approx((texts[0] - texts[1:].mean()) / texts[1:].std(), abs=1e-3)
    assert found["clip_margin"] > 0 and found["clip_z"] > 1, "it is a red fox"
    wrong = panel.scores(pictures[:1], ["a blue bus"], [None])[0]
    assert wrong["clip_margin"] < 0 and wrong["clip_z"] < found["clip_z"]
    assert found["embedding"].shape == (256,) and found["embedding"].dtype == np.float16


def test_scores_do_not_depend_on_batch_mates_or_the_order_of_rows(clip: ClipScorer, pictures: torch.Tensor) -> None:
    prompts = ["a red fox", "a green apple", "a blue car"]
    labels = [["a fox", "a car"], None, ["a car", "a hat"]]
    together = Panel(clip, [*PROMPTS, *prompts]).scores(pictures, prompts, labels)
    other = Panel(clip, [*reversed(PROMPTS), *prompts, *prompts])
    for k in (2, 0, 1):
        alone = other.scores(pictures[k : k + 1], prompts[k : k + 1], labels[k : k + 1])[0]
        pairs = [(alone, together[k])] + ([(alone["p"], together[k]["p"])] if labels[k] else [])
        assert alone.keys() == together[k].keys()
        for a, b in pairs:
            assert {n: v for n, v in a.items() if isinstance(v, float)} == pytest.approx(
                {n: v for n, v in b.items() if isinstance(v, float)}, abs=1e-3
            )


def test_which_captions_are_compared_with(clip: ClipScorer) -> None:
    many = [f"thing {n}" for n in range(400)]
    first, second = Yardstick(clip, many), Yardstick(clip, [*many[::-1], "  Thing 3"])
    assert first.keys == second.keys and len(first.keys) == MOST, "a fixed choice of the run's prompts, none twice"
    chosen = first.keys[0]
    assert 0 not in first.others(chosen.upper()) and len(first.others(chosen)) == MOST - 1
    assert len(first.others("something else")) == MOST
    few = Yardstick(clip, ["a red fox", "a blue whale", "A red  fox"])
    named = [few.keys[n] for n in few.others("a red fox")]
    assert named[0] == "a blue whale" and len(named) > FEW, "general captions join a few"
    assert "something red" in few.keys and "something red" not in named, "but none that the prompt may be one of"
    assert not set(GENERAL) & set(Yardstick(clip, PROMPTS).keys)


def test_one_prompt_alone_has_all_scores_and_no_prompt_has_none(clip: ClipScorer, pictures: torch.Tensor) -> None:
    panel = Panel(clip, ["a red fox"])
    found = panel.scores(pictures[:2], ["a red fox", ""], [None, ["a fox", "a car"]])
    assert {"clip", "clip_margin", "clip_z"} < found[0].keys() and "p" not in found[0]
    assert "clip" not in found[1] and sum(found[1]["p"].values()) == pytest.approx(1, abs=1e-5)
    assert panel.names == {"clip", "clip_margin", "clip_z", "sharpness", "brightness", "nan", "flat"}


def test_the_pixels_are_embedded_once_and_the_captions_once(
    clip: ClipScorer, pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = clip.embed_pixels
    monkeypatch.setattr(clip, "embed_pixels", lambda x: calls.append(len(x)) or whole(x))  # type: ignore[func-returns-value]
    panel = Panel(clip, PROMPTS, Head(np.ones(256), 1.0))
    panel.scores(pictures, ["a red fox"] * 3, [["a fox", "a car"]] * 3)
    assert calls == [3]
    texts: list[int] = []
    encode = clip.texts._encode
    monkeypatch.setattr(clip.texts, "_encode", lambda t: texts.append(len(t)) or encode(t))  # type: ignore[func-returns-value]
    panel.scores(pictures, ["a red fox"] * 3, [["a fox", "a car"]] * 3)
    assert texts == []


# -- of the pixels -----------------------------------------------------------------------------------------------------


def test_sharpness_and_brightness_as_scipy_and_paper_have_them(pictures: torch.Tensor) -> None:
    found = measures(pictures)
    for picture, scores in zip(pictures.numpy().astype(float), found, strict=True):
        luma = (77 * picture[0] + 150 * picture[1] + 29 * picture[2]) / 256
        assert scores["sharpness"] == pytest.approx(laplace(luma)[1:-1, 1:-1].var(), rel=1e-6)
        assert scores["brightness"] == pytest.approx(luma.mean() / 255, abs=1e-6)
    assert measures(pictures[1:2]) == found[1:2]


def test_the_ends_of_their_ranges() -> None:
    board = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = 255
    assert measures(board)[0]["sharpness"] == SHARPEST, "nothing is sharper than a chessboard of pixels"
    white = torch.full((2, 3, 5, 9), 255, dtype=torch.uint8)
    assert measures(white) == [{"sharpness": 0.0, "brightness": 1.0}] * 2
    assert measures(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)) == [{"sharpness": 0.0, "brightness": 0.0}]


# -- a head ------------------------------------------------------------------------------------------------------------


def head_file(path: Path, **tensors: Any) -> Path:
    whole = {"weight": np.full((1, 8), 2.0, np.float32), "bias": np.array([5.0], np.float32), **tensors}
    save_file({name: np.ascontiguousarray(value) for name, value in whole.items() if value is not None}, path)
    return path


def test_a_head_is_a_dot_product(tmp_path: Path) -> None:
    weight = np.arange(8, dtype=np.float32)[None]
    head = Head.load(head_file(tmp_path / "h.safetensors", weight=weight))
    assert head(np.full(8, 0.5)) == pytest.approx(28 / 2 + 5)


BAD_HEADS = [
    ({"weight": np.zeros((1, 9), np.float32)}, r"weight has shape \[1, 9\], not \[1, 8\]"),
    ({"weight": np.zeros((2, 8), np.float32)}, r"weight has shape \[2, 8\]"),
    ({"bias": None}, "'bias' is absent"),
    ({"more": np.zeros(1, np.float32)}, "'more' does not belong there"),
    ({"bias": np.zeros(1, np.int32)}, "bias is I32"),
]


@pytest.mark.parametrize(("tensors", "words"), BAD_HEADS, ids=[words for _, words in BAD_HEADS])
def test_a_head_that_does_not_fit_is_refused_before_loading(
    tmp_path: Path, tensors: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        check_head(head_file(tmp_path / "h.safetensors", **tensors), 8)
    (tmp_path / "h.safetensors").write_bytes(b"pickle")
    with pytest.raises(InputError, match="--aesthetic: "):
        check_head(tmp_path / "h.safetensors", 8)


def test_a_run_with_a_head_gates_on_it_and_stays_with_it(tmp_path: Path, model: Path, tiny: Path) -> None:
    head = head_file(tmp_path / "h.safetensors")
    rows = [r.model_copy(update={"gate": "aesthetic > -100 and sharpness < 1e6"}) for r in TWO]
    options: dict[str, Any] = {"model": str(model), "clip": str(tiny), "device": "cpu", "quiet": True}
    summary = generate(rows, tmp_path / "run", aesthetic=str(head), **options)
    assert summary.kept == 2
    for r in read_results(tmp_path / "run"):
        assert set(r.scores) == {"clip", "clip_margin", "clip_z", "aesthetic", "sharpness", "brightness", "nan", "flat"}
    with pytest.raises(InputError, match="aesthetic"):
        generate(rows, tmp_path / "run", **options)
    head_file(head, bias=np.array([6.0], np.float32))
    with pytest.raises(InputError, match=r"was begun otherwise: aesthetic: "):
        generate(rows, tmp_path / "run", aesthetic=str(head), **options)


# -- scorers of others -------------------------------------------------------------------------------------------------


def redness(pictures: torch.Tensor, prompts: list[str]) -> dict[str, Any]:
    mean = pictures.float().mean(dim=(2, 3)) / 255
    pictures.zero_()  # on its own copy
    return {"redness": mean[:, 0] - mean[:, 1:].mean(dim=1)}


def lengths(pictures: torch.Tensor, prompts: list[str]) -> dict[str, Any]:
    return {"letters": [len(p) for p in prompts], "long": [len(p) > 9 for p in prompts]}


lengths.names = ("letters", "long")  # type: ignore[attr-defined]


def broken(pictures: torch.Tensor, prompts: list[str]) -> dict[str, Any]:
    raise RuntimeError("no GPU\nfor you")


def test_a_scorer_writes_on_its_own_copy(pictures: torch.Tensor) -> None:
    before = pictures.clone()
    found = Panel(scorers=find_scorers([redness])).scores(pictures, [""] * 3, [None] * 3)
    assert (pictures == before).all() and found[0]["redness"] > found[1]["redness"]


def install(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    found = EntryPoints(EntryPoint(name, value, plugins.GROUP) for name, value in values.items())
    monkeypatch.setattr(plugins, "entry_points", lambda group: found.select(group=group))


def test_functions_score_a_run_and_gates_know_their_names(tmp_path: Path, model: Path) -> None:
    rows = [r.model_copy(update={"gate": "long and letters > 9", "rank_by": "redness"}) for r in TWO]
    rows[0] = rows[0].model_copy(update={"labels": None})
    summary = generate(
        rows, tmp_path / "run", model=str(model), clip="none", device="cpu", quiet=True, scorers=[redness, lengths]
    )
    assert (summary.images, summary.kept, summary.failed) == (2, 1, 0)
    found = {r.id: r.scores for r in read_results(tmp_path / "run")}
    assert (found["red"]["letters"], found["red"]["long"], found["blue"]["long"]) == (9.0, False, True)
    assert all(-1 <= s["redness"] <= 1 and s["brightness"] > 0 for s in found.values())
    assert (read_config(tmp_path / "run") or {})["binding"]["scorers"] == ["redness", "lengths"]
    assert not (tmp_path / "run" / "embeddings.npy").exists()


def test_a_scorer_that_raises_fails_neither_run_nor_image(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = generate(TWO, tmp_path / "run", model=str(model), clip="none", device="cpu", scorers=[broken, redness])
    assert (summary.images, summary.failed) == (2, 0)
    assert all(r.scores["broken"] is None and r.scores["redness"] is not None for r in read_results(tmp_path / "run"))
    assert capsys.readouterr().err.count("scorer broken: RuntimeError: no GPU; no such score\n") == 1


ODD = [
    ({"odd": [1.0]}, "1 numbers for 3"),
    ({"even": [1.0] * 3}, "it gave"),
    ([1, 2, 3], "in place of"),
    ({"odd": ["a", "b", "c"]}, "could not convert"),
    ({"odd": [[1], [2], [3]]}, "TypeError"),
    (None, "NoneType"),
]


@pytest.mark.parametrize(("answer", "words"), ODD, ids=[words for _, words in ODD])
def test_what_a_scorer_gives_is_checked(answer: Any, words: str) -> None:
    def odd(pictures: torch.Tensor, prompts: list[str]) -> Any:
        return answer

    panel = Panel(scorers=find_scorers([odd]))
    pictures = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    for _ in range(2):
        assert [s["odd"] for s in panel.scores(pictures, ["a"] * 3, [None] * 3)] == [None] * 3
    assert len(panel.notes) == 1 and words in panel.notes[0]


def test_a_scorer_that_fails_is_told_of_at_once(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gate on its score passes nothing: the run would draw all that it may before anybody knew."""
    told: list[bool] = []

    def watching(pictures: torch.Tensor, prompts: list[str]) -> Any:
        told.append("scorer broken" in capsys.readouterr().err)
        return {"watching": [0.0] * len(prompts)}

    row = TWO[0].model_copy(update={"keep": 1, "gate": "broken > 0.5", "max_images": 3, "labels": None})
    scorers = [broken, watching]
    generate([row], tmp_path, model=str(model), clip="none", device="cpu", scorers=scorers, batch_size=1)
    assert len(told) == 3 and told.count(True) == 1 and not told[0]


def test_nan_from_a_scorer_is_null() -> None:
    def odd(pictures: torch.Tensor, prompts: list[str]) -> Any:
        return {"odd": np.array([np.nan, 1.0])}

    found = Panel(scorers=find_scorers([odd])).scores(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["", ""], [None] * 2)
    assert [s["odd"] for s in found] == [None, 1.0]


def test_scorers_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, redness="tests.scoring.test_scores:redness", gone="no_such_module:f", number="math:pi")
    plugin = find_scorers(["redness"])[0]
    assert (plugin.name, plugin.names) == ("redness", ("redness",))
    for name, words in [
        ("rednes", r"no such scorer \(did you mean 'redness'\?\); installed: gone, number, redness"),
        ("gone", "gone cannot be loaded: ModuleNotFoundError"),
        ("number", "'number' is no function"),
    ]:
        with pytest.raises(InputError, match=words):
            find_scorers([name])


def test_features_of_inception_need_their_library() -> None:
    if importlib.util.find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is there")
    with pytest.raises(InputError, match=r"evaluate.features: inception needs torch-fidelity \(pip install"):
        plugins.find_features("inception", "evaluate.features", "cpu")


def test_names_that_collide_are_refused() -> None:
    def clip_z(pictures: Any, prompts: Any) -> Any: ...

    clip_z.names = 5  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="'clip_z': its names are 5, not texts"):
        find_scorers([clip_z])
    del clip_z.names  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="'clip_z', which is one of genkit already"):
        find_scorers([clip_z])
    with pytest.raises(InputError, match="'redness', which is one of scorer 'redness' already"):
        find_scorers([redness, redness])
    with pytest.raises(InputError, match="cannot be a score's name"):
        find_scorers([lambda pictures, prompts: {}])


# -- what a run will not compute is refused before anything loads ------------------------------------------------------

NOT_COMPUTED = [
    ({"gate": "clip_z > 1"}, {"clip": "none"}, "gate: 'clip_z > 1' needs a CLIP model"),
    ({"rank_by": "clip_margin"}, {"clip": "none"}, "rank_by: 'clip_margin' needs a CLIP model"),
    ({"gate": "p['a'] > 0.5", "labels": ["a", "b"]}, {"clip": "none"}, "needs a CLIP model"),
    ({"gate": "aesthetic > 5"}, {}, "give --aesthetic FILE"),
    ({"gate": "rednes > 0.5"}, {"scorers": (redness,)}, r"'rednes': no such score \(did you mean 'redness'\?\)"),
    ({"gate": "brightness > 1.5"}, {}, "never true: 'brightness' is 0 to 1"),
]


@pytest.mark.parametrize(("fields", "options", "words"), NOT_COMPUTED, ids=[words for *_, words in NOT_COMPUTED])
def test_a_score_that_the_run_will_not_have_is_refused(
    fields: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        plan_job([Request(prompt="a red fox", **fields)], Options(**options), {})


def test_the_same_in_python(model: Path) -> None:
    gen = TextToImage.from_pretrained(model, device="cpu")
    with pytest.raises(InputError, match="needs a CLIP model"):
        list(gen.stream([Request(prompt="a", gate="clip > 0.5")]))
    results: list[Result] = list(gen.stream(TWO, scorer=Panel(scorers=find_scorers([redness]))))
    assert {"redness", "sharpness", "nan"} <= results[0].scores.keys() and results[0].embedding is None
    with_clip = list(gen.stream(TWO, scorer=ClipScorer.from_pretrained("emoji-clip", device="cpu")))
    assert "clip_z" in with_clip[0].scores and "embedding" not in with_clip[0].scores
    assert np.linalg.norm(with_clip[0].embedding.astype(float)) == pytest.approx(1, abs=1e-3)
    assert "embedding" not in json.dumps(with_clip[0].to_json())


def dark(pictures: torch.Tensor) -> torch.Tensor:
    """A feature network that cannot do dark pictures."""
    if int(pictures.float().mean(dim=(1, 2, 3)).min()) < 10:
        raise RuntimeError("too dark\nto see")
    return pictures.float().mean(dim=(2, 3))


ODD_FEATURES: list[tuple[Any, str]] = [
    (dark, "RuntimeError: too dark"),
    (lambda pictures: [1.0, 2.0], "AttributeError: 'list' object has no attribute 'double'"),
    (lambda pictures: pictures.float().mean(dim=(1, 2, 3)), r"it gave \(1,\) in place of \(1, D of 2 or more\)"),
    (lambda pictures: pictures.float().mean(dim=(1, 2, 3))[:, None], "it gave one feature: 2 are needed"),
    (lambda pictures: pictures.float().mean(dim=(2, 3)) / pictures.amax(dim=(2, 3)), "NaN or infinity"),
]


@pytest.mark.parametrize(("network", "words"), ODD_FEATURES, ids=[words for _, words in ODD_FEATURES])
def test_a_feature_network_that_fails_is_named_with_the_picture(network: Any, words: str) -> None:
    pictures = torch.full((3, 3, 4, 4), 100, dtype=torch.uint8)
    pictures[1] = 0
    features = plugins.Features("mine", "--features", network)
    with pytest.raises(InputError, match=rf"^--features: mine: [abc]\.png: .*{words}$") as caught:
        features(pictures, ["a.png", "b.png", "c.png"])
    assert ("b.png" in str(caught.value)) == (network in (ODD_FEATURES[0][0], ODD_FEATURES[-1][0]))


def test_a_feature_network_gives_as_many_features_each_time() -> None:
    features = plugins.Features("flat", "--features", lambda pictures: pictures.flatten(1))
    assert features(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["a", "b"]).shape == (2, 48)
    with pytest.raises(InputError, match=r"flat: c: ValueError: it gave \(1, 12\) in place of \(1, 48\)"):
        features(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ["c"])
