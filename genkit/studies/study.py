"""`genkit study`: the gain of best-of-N selection and of pruning on the model and prompts of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genkit.device.devices import check_device
from genkit.durable import disk, json_line, write_whole
from genkit.errors import InputError, shown
from genkit.progress import Steps
from genkit.rows.request import Request
from genkit.rows.result import value_of
from genkit.runs.records import read_config, read_results, read_rows
from genkit.selection.intervals import wilson
from genkit.studies.early_scores import MARKS, Watched, order_of

DRAWS = (1, 2, 4, 8)
KEEP = 0.5  # share of a row's images that pruning keeps
ENOUGH = 8  # rows needed for advice
WORTH, LOST = 1.1, 0.2  # advice needs at least this gain, and at most this share of rows that lose their best image
EACH = 8  # images redrawn of each row, if it has so many
RESAMPLES = 1000
STUDY = "study.json"

Figure = Callable[[np.ndarray], float]
Interval = list[float | None]  # value, low, high; for a single row low and high are None


def study_run(run: Path, prune: bool, images: int, device: str = "auto", quiet: bool = False) -> dict[str, Any]:
    """Study a run folder, write its study.json, and return its contents. prune: redraw about `images` images.

    Raises InputError for a folder that is not a run, has no scores, or whose model has changed.
    """
    if not 8 <= images <= 100_000:
        raise InputError(f"--images: {images} is not within 8 to 100000")
    check_device(device, "auto")
    if read_config(run) is None:
        raise InputError(f"{shown(str(run))}: holds no run.json: not a run folder")
    with Steps(quiet=quiet) as progress:
        progress(0, 1 + len(DRAWS), "reading the run")
        scores = recorded_scores(run)
        found: dict[str, Any] = {"run": str(run), "best_of": best_of_n(list(scores.values()), progress)}
    if prune:
        from genkit.studies.redraw import redraw

        watched, look = redraw(run, chosen(run, scores, images), device, quiet)
        found["prune"] = pruning(watched, look)
        found["advice"] = advice(found["prune"])
    with disk(run / STUDY):
        write_whole(run / STUDY, json_line(found).encode())
    return found


def recorded_scores(run: Path) -> dict[str, list[float]]:
    """Return the ranking scores of each row with at least two finished images, in the order of drawing."""
    rows = {str(row.id): row for row in read_rows(run)}
    found: dict[str, list[float]] = {row_id: [] for row_id in rows}
    for r in sorted(read_results(run, say=True), key=lambda r: r.index):
        if r.status == "done" and r.id in rows and (rows[r.id].rank_by or "clip" in r.scores):
            found[r.id].append(value_of(r, order_of(rows[r.id])))
    whole = {row_id: [v for v in values if v == v] for row_id, values in found.items()}
    enough = {row_id: values for row_id, values in whole.items() if len(values) > 1}
    if not enough:
        raise InputError(f"{shown(str(run))}: no row has two scored images or more; draw some with --num-images 8")
    return enough


def chosen(run: Path, scores: dict[str, list[float]], images: int) -> list[Request]:
    """Return rows to redraw, spread evenly over the run, each with up to EACH images, about `images` in total."""
    rows = [row for row in read_rows(run) if str(row.id) in scores and row.num_images > 2]
    if not rows:
        raise InputError(f"{shown(str(run))}: no row of three images or more to redraw; draw some with --num-images 8")
    each = min(EACH, max(row.num_images for row in rows))
    full = [row for row in rows if row.num_images >= each]
    count = min(len(full), max(2, images // each))
    picked = [full[k * len(full) // count] for k in range(count)]
    return [_first(row, each) for row in picked]


def _first(row: Request, images: int) -> Request:
    """Return the row with only its first images, and without keep, gate, max_images and prune."""
    stated = {name: getattr(row, name) for name in row.model_fields_set}
    for name in ("keep", "gate", "max_images", "prune"):
        stated.pop(name, None)
    seed = row.seed[:images] if isinstance(row.seed, list) else row.seed
    return Request(**{**stated, "num_images": images, "seed": seed})


def expected_best(values: Sequence[float], k: int) -> float:
    """Return the expected maximum of k of the values, drawn without replacement: the value of best-of-k."""
    ordered = np.sort(np.asarray(values))
    ways = np.array([math.comb(place, k - 1) for place in range(len(ordered))], dtype=float)
    return float(ordered @ ways / ways.sum())


def best_of_n(rows: Sequence[Sequence[float]], progress: Steps) -> dict[str, Any]:
    """Return for 1, 2, 4 and 8 draws the expected best of a row, and the gain over a single draw."""
    found: dict[str, Any] = {}
    for done, k in enumerate(DRAWS, 1):
        progress(done, 1 + len(DRAWS), f"resampling the best of {k}")
        best = np.array([(expected_best(values, 1), expected_best(values, k)) for values in rows if len(values) >= k])
        if len(best):
            gain = interval(best, lambda f: float((f[:, 1] - f[:, 0]).mean()))
            found[str(k)] = {"rows": len(best), "best": interval(best, lambda f: float(f[:, 1].mean())), "gain": gain}
    progress(1 + len(DRAWS), 1 + len(DRAWS), "the best of N")
    return found


def pruning(rows: Sequence[Watched], look: float) -> dict[str, Any]:
    """Return the cost and gain of pruning to the better half of a row's images, for each mark.

    correlation: Spearman's, of early and final scores within rows. false_kill: share of rows whose best image would be
    pruned. effective: the N of the best-of-N with the same expected score. cost: in images; look: the time of decoding
    and scoring as a share of an image's. worth: effective / cost; above 1 pruning gains more than the same work without
    it. All but cost are [value, low, high], 95 %.
    """
    n = len(rows[0].final)
    best = np.array([[expected_best(row.final.tolist(), k) for k in range(1, n + 1)] for row in rows])
    marks = []
    for m, after in enumerate(MARKS):
        left = np.array([_survivor(row, m) for row in rows])
        alike = np.array([_spearman(row.early[:, m], row.final) for row in rows])
        cost = n * (after * (1 - look) + look) + _going_on(n) * (1 - after * (1 - look))
        found = interval(np.column_stack([left, best]), effective)
        killed = sum(bool(score < row.final.max()) for score, row in zip(left, rows, strict=True))
        marks.append(
            {
                "after": after,
                "correlation": interval(alike, lambda f: float(f.mean())),
                "false_kill": [round(x, 4) for x in (killed / len(rows), *wilson(killed, len(rows)))],
                "effective": found,
                "cost": round(cost, 2),
                "worth": [None if value is None else round(value / cost, 4) for value in found],
            }
        )
    return {"rows": len(rows), "images": n, "keep": KEEP, "look": round(look, 4), "marks": marks}


def _going_on(n: int) -> int:
    return math.ceil(n * KEEP)


def _survivor(row: Watched, mark: int) -> float:
    """Return the best final score among the images that pruning keeps at the mark."""
    from genkit.sampling.pruning import survivors

    stay = survivors(dict(enumerate(row.early[:, mark].tolist())), _going_on(len(row.final)))
    return float(row.final[sorted(stay)].max())


def effective(rows: np.ndarray) -> float:
    """Return the N of the best-of-N with the same expected score as pruning, between 1 and n.

    rows: (rows, 1 + n): the best score after pruning, then the expected best of 1 to n draws.
    """
    left, *best = rows.mean(axis=0).tolist()
    return float(np.interp(left, best, np.arange(1, len(best) + 1)))


def advice(found: dict[str, Any]) -> str:
    """Return a sentence: prune if the gain is surely WORTH or more, and surely at most LOST rows lose their best image.

    The second bound is needed because a bootstrap over rows that all kept their best image has no spread.
    """
    if found["rows"] < ENOUGH:
        return f"too few to say: {found['rows']} rows were redrawn, {ENOUGH} are the least; give --images more"
    sure = [m for m in found["marks"] if m["worth"][1] >= WORTH and m["false_kill"][2] <= LOST]
    best = max(sure or found["marks"], key=lambda m: m["worth"][0])
    worth, low, high = best["worth"]
    lost, _, most = best["false_kill"]
    measured = (
        f"after {best['after']:.0%} of the steps it buys {worth:.2f} times ({low:.2f} to {high:.2f}) what the same "
        f"work buys without, and loses the best image of {lost:.0%} (up to {most:.0%}) of rows"
    )
    if sure:
        return f'prune: {{"after": {best["after"]}, "keep": {KEEP}}}: {measured}'
    return f"do not prune: at best, {measured}; sure to be over {WORTH} and under {LOST:.0%} would be worth it"


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation; 0 if one of them is constant."""
    ranks = [(np.unique(v, return_inverse=True)[1]).astype(float) for v in (a, b)]
    if any(rank.std() == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def interval(rows: np.ndarray, figure: Figure) -> Interval:
    """Return [figure, low, high]: 95 %, from a bootstrap over the first axis of `rows`."""
    if len(rows) < 2:
        return [round(figure(rows), 4), None, None]
    rng = np.random.default_rng(0)
    resampled = [figure(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return [round(figure(rows), 4), round(float(low), 4), round(float(high), 4)]


def described(found: dict[str, Any]) -> str:
    """Return the study as text."""
    lines = ["best of    score (95 %)               over one draw       rows"]
    for k, f in found["best_of"].items():
        lines.append(f"{k:>7}    {_range(f['best']):<25}  {_range(f['gain']):<22}  {f['rows']:>3}")
    if "prune" in found:
        p = found["prune"]
        look = f"a look takes {p['look']:.1%} of an image's time"
        lines += ["", f"pruning to the better half, {p['rows']} rows of {p['images']} images redrawn; {look}:"]
        lines += ["after   rank correlation         best one given up        as good as best of       costs  worth"]
        lines += [
            f"{m['after']:>5.0%}   {_range(m['correlation']):<23}  {_range(m['false_kill']):<23}  "
            f"{_range(m['effective']):<23}  {m['cost']:>5}  {_range(m['worth'])}"
            for m in p["marks"]
        ]
        lines += ["", found["advice"]]
    return "\n".join(lines)


def _range(found: Sequence[float | None]) -> str:
    if found[1] is None:
        return f"{found[0]:.3f} (of one row)"
    return f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"
