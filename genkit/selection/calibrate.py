"""Fit a gate to labelled pictures: the lowest threshold of a score above which enough pictures are good."""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from genkit.durable import disk, json_line, write_whole
from genkit.errors import InputError, nearest, shown
from genkit.files import read_json
from genkit.rows.result import Result, value_of
from genkit.runs.records import read_config, read_results, read_rows
from genkit.scoring.gates import Expression, check_seen, passes
from genkit.scoring.names import names_of
from genkit.selection.decide import image_name
from genkit.selection.intervals import at_least, clopper_pearson
from genkit.selection.votes import read_labels

GATES = "gates.json"
CANDIDATES = 8  # thresholds that are tested; more of them widen the interval
FEWEST = 10  # labelled pictures above a threshold


@dataclasses.dataclass(frozen=True)
class Fit:
    """A threshold, the number of labelled pictures above it, and of good ones among them.

    low, high: confidence interval of the precision, valid for the chosen threshold, too.
    """

    threshold: str
    above: int
    good: int
    low: float
    high: float

    @property
    def precision(self) -> float:
        """The share of good pictures among the labelled ones above the threshold."""
        return self.good / self.above


def candidates(values: Sequence[float], fewest: int) -> list[int]:
    """Return how many of the `values` (sorted, highest first) are above each threshold to look at: few to many.

    At most CANDIDATES, in equal ratios, each at least `fewest`, never between equal values. They depend on the scores
    only, not on the labels, which the interval requires.
    """
    most = len(values) - 1
    cuts = [k for k in range(fewest, most + 1) if values[k - 1] > values[k]]
    if not cuts:
        return []
    steps = max(1, CANDIDATES - 1)
    wanted = [cuts[0] * (cuts[-1] / cuts[0]) ** (i / steps) for i in range(CANDIDATES)]
    return sorted({min(cuts, key=lambda k: abs(k - aim)) for aim in wanted})


def fit(scored: Sequence[tuple[float, bool]], confidence: float, fewest: int) -> list[Fit]:
    """Return a Fit for each candidate threshold, strictest first.

    scored: (score, good) of labelled pictures that are a random sample of those to be judged, not NaN. Given the score
    of the first picture below, those above a cut are independent draws from all pictures above that score; so the exact
    binomial interval of Clopper and Pearson holds at each cut, and, at confidence 1 - (1 - confidence) / candidates, at
    all of them together (Bonferroni). It is then valid for a threshold chosen on the same labels: "Learn then Test",
    Angelopoulos, Bates, Candes, Jordan and Lei 2021, arXiv:2110.01052.
    """
    ranked = sorted(scored, key=lambda pair: -pair[0])
    cuts = candidates([value for value, _ in ranked], fewest)
    fits = []
    for k in cuts:
        good = sum(good for _, good in ranked[:k])
        low, high = clopper_pearson(good, k, 1 - (1 - confidence) / len(cuts))
        fits.append(Fit(_between(ranked[k][0], ranked[k - 1][0]), k, good, low, high))
    return fits


def chosen(fits: Sequence[Fit], precision: float, confidence: float, sure: bool) -> Fit | None:
    """Return the loosest threshold whose precision on the labels is at least the asked one, or None.

    sure: the true precision must also be at least the asked one with the given confidence. Thresholds are tested from
    the strictest on (exact binomial) until one fails: fixed-sequence testing, section 3.2 of the same paper, which
    needs no correction for many thresholds.
    """
    if not sure:
        return next((f for f in reversed(fits) if f.precision >= precision), None)
    best = None
    for found in fits:
        if at_least(found.good, found.above, precision) > 1 - confidence:
            break
        best = dataclasses.replace(found, low=precision, high=1.0)
    return best


def _between(low: float, high: float) -> str:
    """Return the shortest decimal number t with low <= t < high, so that `> t` separates them."""
    exact, limit = Decimal(repr(low)), Decimal(repr(high))
    for digits in range(18):
        rounded = exact.quantize(Decimal(1).scaleb(-digits), ROUND_CEILING)
        if rounded < limit:
            return format(rounded + 0, "f")
    return format(exact, "f")


def fewest_above(precision: float, confidence: float, sure: bool) -> int:
    """Return how many labelled pictures must be above a threshold for the precision to be testable.

    With fewer than 1 / (1 - precision) a single bad one is too many; with `sure`, so many good ones in a row must be
    improbable at a lower precision.
    """
    luck = math.log(1 - confidence) / math.log(precision) if sure else 1 / (1 - precision)
    return max(FEWEST, math.ceil(round(luck, 9)))


def calibrate(
    folder: Path,
    labels: Path,
    precision: float,
    score: str | None = None,
    where: str | None = None,
    *,
    bad: Path | None = None,
    others_bad: bool = False,
    confidence: float = 0.95,
    sure: bool = False,
    name: str = "calibrated",
) -> dict[str, Any]:
    """Fit a gate on labelled pictures of a run, write it to RUN/gates.json under `name`, and return what it says.

    score: expression to threshold; default clip_z if the run has it, else clip. where: an additional gate; only
    pictures that pass it are used. Labelled pictures must be a random sample of the run's, as `genkit label` shows
    them. Raises InputError for unsuitable labels, and if no threshold reaches the precision.
    """
    for option, share in (("--precision", precision), ("--confidence", confidence)):
        if not 0.01 <= share <= 0.9999:
            raise InputError(f"{option}: {share:g} is not within 0.01 to 0.9999")
    if not name or not name.replace("-", "").replace("_", "").isalnum() or len(name) > 100:
        raise InputError(f"--name: {shown(name)} is not made of letters, digits, - and _")
    pictures, known, texts = read_pictures(folder)
    score = score or _default(pictures)
    order, gate = _expressions(score, where, known, texts)
    check_asked(folder, "--score", score, pictures)
    check_asked(folder, "--where", where, pictures)
    found = read_labels(labels, bad, others_bad, pictures)
    values = {key: value_of(r, order) for key, r in pictures.items() if passes(gate, r.scores)}
    judged = [(values[key], good) for key, good in found.good.items() if key in values]
    scored = [pair for pair in judged if pair[0] == pair[0]]
    fewest = fewest_above(precision, confidence, sure)
    _enough(scored, precision, fewest, str(labels))
    fits = fit(scored, confidence, fewest)
    best = chosen(fits, precision, confidence, sure)
    separation = _separation(scored)
    summary = {
        "score": score, "where": where, "asked": precision, "confidence": confidence, "sure": sure,
        "labelled": len(scored), "labelled_good": sum(good for _, good in scored),
        "tied": found.tied, "stale": found.stale, "without_score": len(found.good) - len(scored),
        "separation": round(separation, 4),
    }  # fmt: skip
    if best is None:
        raise InputError(_hopeless(fits, score, precision, separation, values, sure, confidence))
    summary |= _described(best, score, where, values, len(pictures), scored)
    save_gate(folder, name, summary)
    return {"name": name, **summary}


def check_asked(folder: Path, option: str, text: str | None, pictures: Mapping[str, Result]) -> None:
    """Raise InputError, naming the option, for what vision models were not asked about any picture of a run."""
    config = read_config(folder)
    if text is None or config is None:
        return
    classes = (config["binding"].get("classifier") or {}).get("labels")
    labels = {label for r in pictures.values() for label in r.scores.get("p") or ()}
    check_seen(option, Expression(text, labels, names=None), [r.scores for r in pictures.values()], classes)


def read_pictures(folder: Path) -> tuple[dict[str, Result], set[str], set[str]]:
    """Return a run's finished pictures by name, the names of their scores, and the labels in p."""
    if read_config(folder) is None:
        raise InputError(f"{shown(str(folder))}: holds no run.json: not a run folder")
    asked = {str(row.id) for row in read_rows(folder)}
    pictures = {image_name(r): r for r in read_results(folder, say=True) if r.status == "done" and r.id in asked}
    if not pictures:
        raise InputError(f"{shown(str(folder))}: has no finished picture")
    known = names_of(r.scores for r in pictures.values())
    return pictures, known, {label for r in pictures.values() for label in r.scores.get("p") or ()}


def _default(pictures: Mapping[str, Result]) -> str:
    with_z = sum(r.scores.get("clip_z") is not None for r in pictures.values())
    return "clip_z" if 2 * with_z > len(pictures) else "clip"


def checked_gate(where: str, known: set[str], labels: set[str]) -> Expression:
    """Return --where as an Expression, which must be true or false. Raises InputError."""
    gate = _checked("--where", where, known, labels)
    if not gate.decides:
        raise InputError(f"--where: {shown(where)} is a number, not true or false; compare it with one")
    return gate


def _checked(option: str, text: str, known: set[str], labels: set[str]) -> Expression:
    """Return an Expression over scores of this run. Raises InputError, naming the option."""
    try:
        expression = Expression(text, labels, known)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None
    for name in sorted(expression.names - known):
        raise InputError(f"{option}: {shown(name)}: no picture of this run has that score{nearest(name, known)}")
    return expression


def _expressions(
    score: str, where: str | None, known: set[str], texts: set[str]
) -> tuple[Expression, Expression | None]:
    order = _checked("--score", score, known, texts)
    _checked("--score", f"({score}) + 0", known, texts)  # raises unless it is a number
    return order, None if where is None else checked_gate(where, known, texts)


def _enough(scored: Sequence[tuple[float, bool]], precision: float, fewest: int, labels: str) -> None:
    if len(scored) <= fewest:
        raise InputError(
            f"{labels}: labels {len(scored)} pictures that have the score; a precision of {precision:g} takes at least"
            f" {fewest} above the threshold and one below, usually twice as many"
        )
    kinds = {good for _, good in scored}
    if len(kinds) == 1:
        kind = "good" if kinds.pop() else "bad"
        raise InputError(f"{labels}: all {len(scored)} labelled pictures are {kind}: there is nothing to tell apart")


def _separation(scored: Sequence[tuple[float, bool]]) -> float:
    """Return the probability that a good picture scores above a bad one, ties counted half (AUC)."""
    good, bad = ([value for value, kind in scored if kind is wanted] for wanted in (True, False))
    bad.sort()
    return sum(bisect_left(bad, a) + bisect_right(bad, a) for a in good) / (2 * len(good) * len(bad))


def _hopeless(
    fits: Sequence[Fit], score: str, precision: float, separation: float, values: Mapping[str, float], sure: bool,
    confidence: float,
) -> str:  # fmt: skip
    """Return why there is no threshold, and the best achievable precision."""
    asked = f"{precision:g} with a confidence of {confidence:g}" if sure else f"{precision:g}"
    if not fits:
        return f"--score: {score}: too many labelled pictures have the same value to choose a threshold"
    best = max(fits, key=lambda f: (f.precision, f.above))
    share = _share(values, best.threshold)
    hint = f"; good pictures have lower values than bad ones: try -({score})" if separation < 0.4 else ""
    return (
        f"no threshold of {score} reaches a precision of {asked}: the best is {best.precision:.3f}"
        f" ({best.low:.3f} to {best.high:.3f}) at {score} > {best.threshold}, which {share:.1%} of the pictures pass;"
        f" the score ranks a good picture above a bad one in {separation:.0%} of pairs{hint}"
    )


def _share(values: Mapping[str, float], threshold: str) -> float:
    return sum(value > float(threshold) for value in values.values()) / max(1, len(values))


def _described(
    best: Fit, score: str, where: str | None, values: Mapping[str, float], pictures: int,
    scored: Sequence[tuple[float, bool]],
) -> dict[str, Any]:  # fmt: skip
    test = f"{score} > {best.threshold}"
    passed = sum(value > float(best.threshold) for value in values.values())
    return {
        "expression": test if where is None else f"({where}) and {test}",
        "precision": round(best.precision, 4), "low": round(best.low, 4), "high": round(best.high, 4),
        "above": best.above, "above_good": best.good,
        "good_kept": round(best.good / sum(good for _, good in scored), 4),
        "passed": passed, "pictures": pictures, "pass_rate": round(passed / pictures, 4),
    }  # fmt: skip


def save_gate(folder: Path, name: str, gate: Mapping[str, Any]) -> None:
    """Add or replace a gate in RUN/gates.json. Raises InputError, HostError."""
    path = folder / GATES
    with disk(path):
        gates = read_json(path) if path.exists() else {}
        pretty = json.dumps(json.loads(json_line(gates | {name: dict(gate)})), ensure_ascii=False, indent=1)
        write_whole(path, f"{pretty}\n".encode())


def named_gate(folder: Path, text: str | None) -> str | None:
    """Return the expression of "@name" in RUN/gates.json; any other text unchanged."""
    if text is None or not text.startswith("@"):
        return text
    path = folder / GATES
    gates = read_json(path) if path.is_file() else {}
    gate = gates.get(text[1:])
    if not isinstance(gate, dict) or not isinstance(gate.get("expression"), str):
        raise InputError(f"{shown(text)}: no such gate in {path}{nearest(text[1:], gates)}")
    return gate["expression"]


def report(found: Mapping[str, Any]) -> str:
    """Return the outcome of `calibrate` as text."""
    interval = f"{found['low']:.3f} to {found['high']:.3f} at {found['confidence']:.0%}"
    if found["sure"]:
        interval = f"at least {found['asked']:g} with a confidence of {found['confidence']:.0%}"
    odd = [f"{found[key]} {text}" for key, text in _ODD.items() if found[key]]
    lines = [
        f"gate        {found['expression']}",
        f"precision   {found['precision']:.3f} ({interval}): {found['above_good']} of {found['above']} labelled"
        " pictures above it are good",
        f"passes      {found['passed']:,} of the run's {found['pictures']:,} pictures ({found['pass_rate']:.1%}),"
        f" {found['good_kept']:.0%} of the good ones",
        f"labels      {found['labelled']}, of which {found['labelled_good']} are good"
        + "".join(f"; {text}" for text in odd),
        f"score       {found['score']}: ranks a good picture above a bad one in {found['separation']:.0%} of pairs",
    ]
    return "\n".join(lines)


_ODD = {
    "tied": "left out: as many votes for as against",
    "stale": "left out: votes on pictures drawn anew since",
    "without_score": "left out: without the score, or not passing --where",
}
