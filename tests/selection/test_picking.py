"""The best K that differ, near duplicates within and across rows, and a folder of references."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genkit.errors import InputError
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.run import Run
from genkit.selection.choose import Known
from genkit.selection.decide import decide
from genkit.selection.diversity import Candidates, nearest, pick
from genkit.selection.picking import Picking
from genkit.studies.filter import refilter
from tests.null_run import CONFIG, png, result_of, rows_of

RNG = np.random.default_rng(0)


def unit(n: int, width: int = 64, spread: float = 1.0) -> np.ndarray:
    """Vectors about one direction, as CLIP's are."""
    x = np.ones(width) + spread * RNG.standard_normal((n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def plain(n: int, scores: list[float], keep: int) -> list[Candidates]:
    return [Candidates(range(n), scores, keep)]


def greedy(vectors: np.ndarray, scores: list[float], keep: int, weight: float) -> list[int]:
    """The formula of `pick`, written out pair by pair."""
    x = vectors.astype(np.float64)
    n = len(x)
    cosine = [[float(x[i] @ x[j]) for j in range(n)] for i in range(n)]
    m = np.mean([cosine[i][j] for i in range(n) for j in range(n) if i != j])
    top, mean = max(scores), sum(scores) / n
    taken: list[int] = []
    while len(taken) < keep:
        worth = {}
        for i in set(range(n)) - set(taken):
            c = max(((cosine[i][j] - m) / (1 - m) for j in taken), default=0.0)
            worth[i] = (scores[i] - mean) / (top - mean) - weight * c
        taken.append(max(worth, key=lambda i: worth[i]))
    return taken


@pytest.mark.parametrize("weight", [0.2, 0.5, 1.0])
def test_diverse_choices_are_those_of_the_formula(weight: float) -> None:
    vectors, scores = unit(30), sorted(RNG.uniform(0.2, 0.4, 30).tolist(), reverse=True)
    chosen, _ = pick(plain(30, scores, 6), vectors, range(30), [None] * 30, weight)
    assert chosen == [greedy(vectors, scores, 6, weight)]
    scaled, _ = pick(plain(30, [100 * s - 7 for s in scores], 6), vectors, range(30), [None] * 30, weight)
    assert scaled == chosen, "LAMBDA means the same for any scale of the score"


def test_diversity_spreads_the_choice_and_lambda_0_is_the_ranking() -> None:
    vectors = np.concatenate([unit(1).repeat(5, axis=0), unit(5)])
    scores = [1 - k / 10 for k in range(5)] + [0.95 - k / 10 for k in range(5)]
    order = sorted(range(10), key=lambda k: -scores[k])
    rows = [Candidates(order, [scores[k] for k in order], 3)]
    ranked, _ = pick(rows, vectors, range(10), [None] * 10, 0.0)
    spread, _ = pick(rows, vectors, range(10), [None] * 10, 1.0)
    assert ranked == [[0, 5, 1]]
    assert spread[0][0] == 0 and all(k >= 5 for k in spread[0][1:]), "of five copies one"


@pytest.mark.parametrize("width", [16, 256])
@pytest.mark.parametrize("block", [3, 1024])
def test_near_duplicates_are_those_of_a_plain_loop(width: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In few dimensions and in many, where most pairs are ruled out by a bound; in one block and in several."""
    monkeypatch.setattr("genkit.selection.diversity.BLOCK", block)
    monkeypatch.setattr("genkit.selection.diversity.CHUNK", 7)
    base = unit(40, width)
    near = (base[:20] + 0.02 * RNG.standard_normal((20, width))).astype(np.float16)
    vectors = np.concatenate([base, near / np.linalg.norm(near.astype(np.float32), axis=1, keepdims=True)])
    vectors = vectors[RNG.permutation(60)].astype(np.float16)
    rows = [Candidates(range(k, k + 6), [0.0] * 6, 6) for k in range(0, 60, 6)]
    chosen, alike = pick(rows, vectors, range(60), [None] * 60, threshold=0.9)
    x = vectors.astype(np.float32)
    taken: list[int] = []
    for place in range(6):  # in turns: the best of every row, the second of every row, …
        for row in rows:
            if all(float(x[row.items[place]] @ x[j]) < 0.9 for j in taken):
                taken.append(row.items[place])
    assert sorted(k for row in chosen for k in row) == sorted(taken)
    assert 5 < len(alike) == 60 - len(taken)
    for item, (other, cosine) in alike.items():
        assert other in taken and cosine >= 0.9 and abs(float(x[item] @ x[other]) - cosine) < 1e-3


def test_a_row_chooses_again_for_a_duplicate_that_another_row_has_kept() -> None:
    vectors = unit(5)
    vectors[3] = vectors[0]
    rows = [Candidates([0, 1], [2.0, 1.0], 1), Candidates([3, 4], [2.0, 1.0], 1)]
    assert pick(rows, vectors, range(5), [None] * 5, threshold=0.95)[0] == [[0], [4]]
    assert pick(rows, vectors, range(5), [None] * 5, diverse=0.3, threshold=0.95)[0] == [[0], [4]]
    vectors[3], vectors[4] = vectors[1], vectors[1]  # what is not kept is in nobody's way
    assert pick(rows, vectors, range(5), [None] * 5, threshold=0.95)[0] == [[0], [3]]


def test_identical_files_need_no_embeddings() -> None:
    rows = [Candidates([0, 1], [2.0, 1.0], 1), Candidates([2, 3], [2.0, 1.0], 2)]
    chosen, alike = pick(rows, np.empty((0, 0), np.float16), [-1] * 4, ["a", "b", "a", "c"], threshold=1.0)
    assert chosen == [[0], [3]] and alike == {2: (0, 1.0)}


def test_nearest_is_another_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genkit.selection.diversity.BLOCK", 4)
    monkeypatch.setattr("genkit.selection.diversity.CHUNK", 3)
    vectors = unit(20)
    cosine = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    np.fill_diagonal(cosine, -2)
    among = [1, 4, 6, 11, 13]
    found = list(nearest(vectors, range(20), vectors[among], among))
    for k, other in enumerate(found):
        assert other is not None and among[other[0]] == among[int(cosine[k][among].argmax())]
    assert list(nearest(vectors, [3], vectors[[3]], [3])) == [None]


# -- as `generate` and `filter` say it --


def made(scores: dict[tuple[str, int], float]) -> list[Result]:
    return [
        Result(i, k, k, scores={"clip": c}, file=f"images/{i}-{k:02d}.png", sha256=f"{i}{k}")
        for (i, k), c in scores.items()
    ]


def test_the_selection_says_what_is_like_what() -> None:
    rows = [Request(id=i, prompt="x", num_images=3, keep=1) for i in "ab"]
    results = made({("a", 0): 0.9, ("a", 1): 0.8, ("a", 2): 0.1, ("b", 0): 0.7, ("b", 1): 0.6, ("b", 2): 0.2})
    vectors = unit(6)
    vectors[3] = vectors[0]
    place = {(r.id, r.index): k for k, r in enumerate(results)}
    known = Known(place, vectors, {("a", 1): ("set/fox.png", 0.99), ("b", 1): ("set/owl.png", 0.6)})
    selection = decide(rows, results, picking=Picking(dedupe=0.95, reference=Path("set")), known=known, keep=2)
    images = selection["images"]
    assert [name for name, image in images.items() if image["kept"]] == ["a-00", "a-02", "b-01", "b-02"]
    assert images["a-01"]["reason"] == "too like reference set/fox.png (0.990)"
    assert images["b-00"]["reason"].startswith("near duplicate of a-00 (1.0")
    assert images["b-01"]["reason"] == "kept; nearest reference set/owl.png (0.600)"
    assert images["b-01"]["reference"] == {"file": "set/owl.png", "sim": 0.6}
    cosine = float(vectors[4].astype(np.float32) @ vectors[5].astype(np.float32))
    assert images["b-01"]["sim"] == pytest.approx(cosine, abs=1e-5)
    assert (selection["dedupe"], selection["reference"]) == (0.95, "set")
    spread = decide(rows, results, picking=Picking(diverse=0.5), known=known)["images"]
    assert " like a-0" in spread["a-01"]["reason"]


def row_of_eight(**fields: Any) -> tuple[Request, list[Result], Known]:
    results = made({("a", k): c for k, c in enumerate((0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2))})
    place = {(r.id, r.index): k for k, r in enumerate(results) if r.index != 7}  # the last one was not embedded
    x = 1 + np.random.default_rng(5).standard_normal((8, 16))
    vectors = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    return Request(id="a", prompt="x", num_images=8, **fields), results, Known(place, vectors, {})


def by_hand(known: Known, results: list[Result], keep: int, weight: float, most: float) -> list[int]:
    """What `clip - weight * sim`, where `sim < most`, takes one after the other."""
    x = np.asarray(known.vectors, np.float64)
    taken: list[int] = []
    while len(taken) < keep:
        sims = {k: max([float(x[k] @ x[j]) for j in taken], default=-1.0) for k in set(range(7)) - set(taken)}
        left = {k: results[k].scores["clip"] - weight * sim for k, sim in sims.items() if sim < most}
        if not left:
            break
        taken.append(max(left, key=lambda k: left[k]))
    return taken


@pytest.mark.parametrize(("keep", "weight", "most"), [(3, 2.0, 2.0), (3, 0.0, 0.55), (4, 2.0, 0.55), (8, 0.0, 0.45)])
def test_sim_is_the_nearest_that_the_row_keeps_so_far(keep: int, weight: float, most: float) -> None:
    row, results, known = row_of_eight()
    where = None if most > 1 else f"sim < {most} and clip > 0"
    rank_by = f"clip - {weight} * sim" if weight else None
    found = decide([row], results, where, rank_by, keep, known=known)["images"]
    expected = by_hand(known, results, keep, weight, most)
    assert 1 < len(expected) < 7, "and it makes a difference"
    assert expected != list(range(len(expected)))
    assert {image["index"] for image in found.values() if image["kept"]} == set(expected)
    if where is not None:
        assert found["a-07"]["reason"].startswith(f"gate: {where} (no sim)")
        refused = [i["reason"] for i in found.values() if f"gate: {where} (sim 0." in i["reason"]]
        assert refused and all(f"like a-0{k}" in r for r in refused for k in [r[-1]])


def test_a_row_may_rank_by_sim_and_without_keep_keeps_all() -> None:
    row, results, known = row_of_eight(rank_by="clip - 2 * sim", keep=3)
    kept = [i["index"] for i in decide([row], results, known=known)["images"].values() if i["kept"]]
    assert kept == sorted(by_hand(known, results, 3, 2.0, 2.0))
    row, *_ = row_of_eight(rank_by="clip - 2 * sim")
    assert decide([row], results, known=known)["kept"] == 8


def test_sim_needs_embeddings_and_does_not_go_with_diverse(run: Path) -> None:
    for options in ({"where": "sim < 0.9"}, {"rank_by": "-sim", "keep": 1}):
        with pytest.raises(InputError, match=r"sim: this run has no embeddings.*genkit score"):
            refilter(run, **options)
    row, results, known = row_of_eight()
    with pytest.raises(InputError, match=r"--diverse: .*reads sim"):
        decide([row], results, "sim < 0.9", keep=2, picking=Picking(diverse=0.5), known=known)


BAD: dict[str, tuple[Picking, str]] = {
    "diverse": (Picking(diverse=1.5), "--diverse: 1.5 is not within 0 to 1"),
    "diverse nan": (Picking(diverse=float("nan")), "--diverse: nan is not within"),
    "dedupe": (Picking(dedupe=95.0), "--dedupe: 95 is not a cosine from 0.5"),
    "no folder": (Picking(reference=Path("nowhere")), "--reference: 'nowhere' is no folder"),
    "no keep": (Picking(diverse=0.5), "--diverse: chooses which to keep of more"),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with Run.open(tmp_path / "run", CONFIG, rows_of(2, 2)) as saved:
        for row in rows_of(2, 2):
            for k in range(2):
                saved.save(result_of(row, k), png(row, k))
    return tmp_path / "run"


@pytest.mark.parametrize("case", BAD)
def test_values_out_of_range_are_refused_and_change_nothing(case: str, run: Path) -> None:
    picking, text = BAD[case]
    with pytest.raises(InputError) as refused:
        refilter(run, picking=picking)
    assert str(refused.value).startswith(text)
    assert not (run / "selection.json").exists()


def test_a_folder_without_pictures_is_no_reference(run: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        refilter(run, picking=Picking(reference=tmp_path / "set"))


def test_a_run_without_embeddings_says_what_to_do(run: Path) -> None:
    pytest.importorskip("genkit.runs.embeddings")
    for picking in (Picking(diverse=0.5), Picking(dedupe=0.9)):
        with pytest.raises(InputError, match=r"no embeddings to compare.*genkit score.*--dedupe 1"):
            refilter(run, keep=1, picking=picking)
    assert refilter(run, picking=Picking(dedupe=1.0))["kept"] == 4


def test_references_are_embedded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded CLIP model: a copy of a reference is found, and the cache follows the content."""
    from PIL import Image

    from genkit.components import inspect_model, weight_hashes
    from genkit.selection import reference

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clip: dict[str, Any] = {"name": "emoji-clip", "weights": weight_hashes(inspect_model("emoji-clip"))}
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for name, colour in (("red.png", "red"), ("sub/blue.png", "blue"), ("copy.png", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / name)
    embedded: list[list[str]] = []
    real = reference._embed

    def counted(files: dict[str, Path], asked: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        embedded.append([path.name for path in files.values()])
        return real(files, asked)

    def vectors() -> np.ndarray:
        files = reference.list_images(folder)
        return reference._embedded(folder, files, [sha256(file.read_bytes()).hexdigest() for file in files], clip)

    monkeypatch.setattr(reference, "_embed", counted)
    first = vectors()
    place = {("a", 0): 0, ("b", 0): 0}
    same = {("a", 0): None, ("b", 0): sha256((folder / "red.png").read_bytes()).hexdigest()}
    found = reference.nearest_references(folder, clip, place, first[[1]], same)
    assert found[("a", 0)][0] == "red.png" and found[("a", 0)][1] == pytest.approx(1, abs=1e-3)
    assert found[("b", 0)] == ("red.png", 1.0), "the same file, for --dedupe 1"
    assert [len(names) for names in embedded] == [2], "identical pictures are one, and the second look is free"
    Image.new("RGB", (32, 32), "green").save(folder / "red.png")
    vectors()
    assert embedded[1:] == [["red.png"]], "only what changed"
    monkeypatch.setattr(reference, "BATCH", 1)
    Image.new("RGB", (32, 32), "black").save(folder / "red.png")
    (folder / "sub/torn.png").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"torn\.png"):
        vectors()
    (folder / "sub/torn.png").unlink()
    vectors()
    assert len(embedded) == 3, "what was embedded before the bad one is kept"
    with pytest.raises(InputError, match="no longer the CLIP model"):
        next(reference._embed({"0": folder / "red.png"}, {**clip, "weights": {"model.safetensors": "0"}}))


def test_generate_refuses_diversity_without_a_clip_model(tmp_path: Path) -> None:
    from genkit.job.plan import plan_job
    from genkit.options import Options

    row = Request(prompt="a fox", num_images=4, keep=2)
    with pytest.raises(InputError, match="--diverse: needs a CLIP model"):
        plan_job([row], Options(clip="none", device="cpu", picking=Picking(diverse=0.5)), {})
    for options, text in (
        (Options(max_total_images=0), "--max-total-images: 0"),
        (Options(max_seconds=-1.0), "--max-seconds: -1"),
        (Options(picking=Picking(diverse=2.0)), "--diverse: 2"),
    ):
        with pytest.raises(InputError, match=text):
            plan_job([row], options, {})
    assert json.dumps(Picking(0.5, 0.9, tmp_path).to_json())
