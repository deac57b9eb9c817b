"""Which images are kept, at what rank, and why not the others: a pure decision on recorded scores."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.datasets.export import Target, export
from genkit.durable import disk, json_pieces, write_whole
from genkit.errors import InputError, nearest, shown
from genkit.pages.gallery import write_gallery
from genkit.rows.request import Request, Result
from genkit.runs.records import SELECTION, Key, read_config, read_results, read_rows
from genkit.scoring.gates import Expression
from genkit.scoring.names import ALONE
from genkit.selection.picking import NONE, Known, Picking, choose, read_known

HARD_LINES = 10  # hard rows that are named at the end of a run; selection.json has all


@dataclasses.dataclass(frozen=True)
class Weigher:
    """The images `found` of a row whose gate or order reads `sim`, which is known only as they are chosen."""

    found: Sequence[Result]
    gate: Expression | None
    order: Expression | None
    keep: int | None

    @property
    def moving(self) -> bool:
        """Whether the order depends on sim, and not only what passes."""
        return self.keep is not None and _reads_sim(self.order)

    def __call__(self, k: int, sim: float) -> float:
        """Return what image k is ranked by at that sim; NaN where it does not pass, or is not to be ranked."""
        r = _seen(self.found[k], sim)
        if not passes(self.gate, r.scores):
            return math.nan
        value = value_of(r, self.order)
        return -math.inf if value != value and self.keep is None else value

    def refusal(self, k: int, sim: float | None) -> str | None:
        """Return why image k is out at that sim, None: unknown; or None where that is not why."""
        value = self(k, math.nan if sim is None else sim)
        by = "nan: no score to rank by" if self.gate is None else f"gate: {self.gate.text}"
        return None if value == value else f"{by} (no sim)" if sim is None else f"{by} (sim {sim:.3f})"


@dataclasses.dataclass
class Judged:
    """A row's images by number, what is against each whatever the others are, and those with a value, best first.

    weigh: where the row decides on `sim`; values and ranked are then those of a row that keeps none yet.
    """

    request: Request
    found: list[Result]
    reasons: list[str | None]
    values: list[float]  # NaN: nothing to rank by
    ranked: list[int]
    keep: int | None
    hard: dict[str, Any] | None = None
    weigh: Weigher | None = None

    def candidates(self) -> list[int]:
        """Return the places in `found` of what may be kept, best first."""
        if self.keep is not None:
            return self.ranked
        return self.ranked + [k for k, r in enumerate(self.reasons) if r is None and self.values[k] != self.values[k]]


def decide(
    rows: Sequence[Request],
    results: Iterable[Result],
    where: str | None = None,
    rank_by: str | None = None,
    keep: int | None = None,
    picking: Picking = NONE,
    known: Known | None = None,
) -> dict[str, Any]:
    """Return {"kept", "of", "where", …, "hard": […], "images": {"<id>-<k>": {…, "kept", "rank", "reason"}}}.

    An image is kept when it is done, passes its row's gate, and is among the best `keep` of the row by `rank_by`
    (default: the clip score where there is one, else the order of drawing). `where`, `rank_by` and `keep` stand in for
    those of every row. NaN passes no gate and has no rank. Rank 1 is the best; an image that fails its gate has none.
    picking, known: what thins out those that pass, and the embeddings that it looks at. "hard": rows that drew
    `max_images` and lack some that pass. `sim` is the cosine to the nearest picture that the row has chosen so far, one
    after the other. Raises InputError for an expression that does not hold together, or reads a `sim` that is unknown.
    """
    of_row: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        of_row[result.id].append(result)
    labels = {label for row in rows for label in row.labels or ()}
    names = {name for found in of_row.values() for r in found for name in r.scores} - {"p"}
    asked_gate, asked_order = (None if text is None else Expression(text, labels, names) for text in (where, rank_by))
    compiled = functools.cache(lambda text, labels: Expression(text, labels, names=None))  # checked when it was drawn
    judged = []
    for row in rows:
        own = None if row.labels is None else tuple(row.labels)
        gate = asked_gate or (None if row.gate is None else compiled(row.gate, own))
        order = asked_order or (None if row.rank_by is None else compiled(row.rank_by, own))
        found = sorted(of_row.get(str(row.id), ()), key=lambda r: r.index)
        judged.append(_judge(row, found, gate, order, keep, ahead=where is not None or keep is not None))
    chosen, notes = choose(judged, picking, known)
    images: dict[str, dict[str, Any]] = {}
    for row_, kept_ in zip(judged, chosen, strict=True):
        images.update(_verdicts(row_, kept_, notes))
    kept = sum(image["kept"] for image in images.values())
    options = {"where": where, "rank_by": rank_by, "keep": keep, **picking.to_json()}
    hard = [row.hard for row in judged if row.hard is not None]
    return {"kept": kept, "of": len(images), **options, "hard": hard, "images": images}


def passes(gate: Expression | None, scores: Mapping[str, Any]) -> bool:
    """Return whether an image with these scores passes: never where a score that the gate reads is NaN or absent."""
    return gate is None or (not _unknown(gate, scores) and bool(gate(scores)))


def _unknown(expression: Expression, scores: Mapping[str, Any]) -> list[str]:
    """Return the scores that an expression reads and that are NaN (null in a record) or absent."""
    found = [name for name in expression.names if (value := scores.get(name)) is None or value != value]
    if expression.labels:
        odds = scores.get("p") or {}
        found += [f"p[{x!r}]" for x in expression.labels if (value := odds.get(x)) is None or value != value]
    return sorted(found) if len(found) > 1 else found


def _judge(
    row: Request, found: list[Result], gate: Expression | None, order: Expression | None, keep: int | None, ahead: bool
) -> Judged:
    """Say what is against each image of a row. ahead: images drawn ahead of what the row needed count as well."""
    weigh = None
    if _reads_sim(gate) or _reads_sim(order):
        weigh = Weigher(found, gate, order, keep or row.keep)
        found, gate = [_seen(r, ALONE) for r in found], None if _reads_sim(gate) else gate
    passed = [r.status == "done" and passes(gate, r.scores) for r in found]
    most = row.max_images or row.num_images
    count = most if ahead else _needed(row, found, passed)
    reasons = [_refusal(r, ok, gate, most, count) for r, ok in zip(found, passed, strict=True)]
    values = [math.nan if reason else value_of(r, order) for r, reason in zip(found, reasons, strict=True)]
    ranked = sorted((k for k, value in enumerate(values) if value == value), key=lambda k: (-values[k], k))
    judged = Judged(row, found, reasons, values, ranked, keep or row.keep, weigh=weigh)
    if row.max_images is not None and not ahead and sum(r.index < most for r in found) == most:
        lack = (row.keep or 0) - sum(passed[:most])
        judged.hard = _hard(judged, order, passed, lack) if lack > 0 else None
    return judged


def _reads_sim(expression: Expression | None) -> bool:
    return expression is not None and "sim" in expression.names


def _seen(r: Result, sim: float) -> Result:
    return dataclasses.replace(r, scores={**r.scores, "sim": sim})


def _needed(row: Request, found: Sequence[Result], passed: Sequence[bool]) -> int:
    """Return how many images of a row count: up to the first by which `keep` of them passed.

    A row may have drawn more, ahead of its results; how many depends on the order in which they came.
    """
    if row.max_images is None:
        return row.num_images
    lack = row.keep or 0
    for r, ok in zip(found, passed, strict=True):
        lack -= ok
        if lack <= 0:
            return min(row.max_images, max(row.num_images, r.index + 1))
    return row.max_images


def _refusal(r: Result, passed: bool, gate: Expression | None, most: int, count: int) -> str | None:
    """Return why an image is out whatever the others of its row are."""
    if r.status != "done":
        return f"{r.status}: {r.reason}" if r.reason else r.status
    if r.index >= most:
        return f"not among the {most} that the row asks for now"
    if r.index >= count:
        return f"drawn ahead: the first {count} were enough"
    if gate is None or passed:
        return None
    return f"gate: {gate.text}" + "".join(f" (no {name})" for name in _unknown(gate, r.scores)[:1])


def _hard(judged: Judged, order: Expression | None, passed: Sequence[bool], lack: int) -> dict[str, Any]:
    """Return the report of a row that drew all it may and lacks some; names the best of those that failed its gate."""
    most = judged.request.max_images or 0
    failed = [k for k, r in enumerate(judged.found) if r.status == "done" and r.index < most and not passed[k]]
    worth = {k: value for k in failed if (value := value_of(judged.found[k], order)) == value}
    best = sorted(worth, key=lambda k: (-worth[k], k))[:lack]
    for k in best:
        judged.reasons[k] = f"{judged.reasons[k]}; among the best that failed"
    rate = {"passed": sum(passed[:most]), "drawn": most, "pass_rate": round(sum(passed[:most]) / most, 4)}
    return {
        "id": str(judged.request.id),
        "keep": judged.request.keep,
        **rate,
        "best": [_name(judged.found[k]) for k in best],
    }


def value_of(r: Result, order: Expression | None) -> float:
    """Return what an image is ranked by; NaN where that is unknown."""
    if order is not None:
        return math.nan if _unknown(order, r.scores) else float(order(r.scores))
    if "clip" not in r.scores:
        return -float(r.index)
    return math.nan if r.scores["clip"] is None else float(r.scores["clip"])


def _verdicts(row: Judged, chosen: list[int], notes: Mapping[Key, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    ranks = {k: place for place, k in enumerate(row.ranked, 1)}
    kept = set(chosen)
    for k, r in enumerate(row.found):
        note = dict(notes.get((r.id, r.index), ())) if notes else {}
        rank, reason, out, about = ranks.get(k), row.reasons[k], note.pop("out", None), note.pop("about", None)
        if k in kept:
            reason = "kept"
        elif reason is None:
            lower = "nan: no score to rank by" if rank is None else f"rank {rank} of {len(row.ranked)}, keep {row.keep}"
            reason = out or lower
        if about:
            reason = f"{reason}; {about}"
        verdict = {"id": r.id, "index": r.index, "file": r.file, "kept": k in kept, "rank": rank, "reason": reason}
        yield _name(r), verdict | note if note else verdict


def _name(r: Result) -> str:
    return f"{r.id}-{r.index:02d}"


def hard_lines(selection: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each of the first hard rows, and one for the number of the others."""
    for row in selection["hard"][:HARD_LINES]:
        best = f"; the best that failed: {', '.join(row['best'][:3])}" if row["best"] else ""
        share = f"{row['passed']} of {row['drawn']} passed ({row['pass_rate']:.0%}), keep {row['keep']}"
        yield f"row {row['id']}: hard: {share}{best}"
    if len(selection["hard"]) > HARD_LINES:
        yield f'… and {len(selection["hard"]) - HARD_LINES} more hard rows: see "hard" in {SELECTION}'


def write_selection(folder: Path, selection: Mapping[str, Any]) -> None:
    """Write selection.json of a run folder, whole or not at all. Raises HostError."""
    with disk(folder / SELECTION):
        rest = {name: value for name, value in selection.items() if name != "images"}
        pieces = json_pieces(rest, {"images": selection["images"].items()})
        write_whole(folder / SELECTION, (text.encode("utf-8", "backslashreplace") for text in pieces))


def refilter(
    folder: Path,
    where: str | None = None,
    rank_by: str | None = None,
    keep: int | None = None,
    out: Path | None = None,
    picking: Picking = NONE,
    target: Target | None = None,
) -> dict[str, Any]:
    """Decide again on a run's recorded scores: `genkit filter`. Rewrites selection.json and index.html; returns counts.

    where, rank_by, keep stand in for every row's gate, rank_by and keep. out, target: a folder for copies of what is
    kept, and in what form, see `export`. Reads no model (but for a reference folder), needs no lock. Raises InputError
    for a folder that is no run and for an unknown score.
    """
    if keep is not None and not 1 <= keep <= 100_000:
        raise InputError(f"--keep: {keep} is not within 1 to 100000")
    picking.check()
    target = target or Target()
    target.check(out)
    config = read_config(folder)
    if config is None:
        raise InputError(f"{shown(str(folder))}: holds no run.json: not a run folder")
    collecting = gc.isenabled()
    gc.disable()  # nothing made here is garbage before the end, and looking for it takes half of the time
    try:
        rows = read_rows(folder)
        asked = {str(row.id) for row in rows}
        results = _present(folder, [r for r in read_results(folder) if r.id in asked])
        _check(rows, results, where, rank_by)
        picking.check_rows(keep is not None or any(row.keep is not None for row in rows))
        known = read_known(folder, config, results, picking, [where, rank_by, *(row.rank_by for row in rows)])
        selection = decide(rows, results, where, rank_by, keep, picking, known)
        summary = {"run": str(folder), "rows": len(rows), "images": len(results), "kept": selection["kept"]}
        if out is not None:
            found = {_name(r): r for r in results}  # in the order of the rows, whenever each was finished
            kept = [found[name] for name, image in selection["images"].items() if image["kept"]]
            summary |= {"out": str(out), "copied": export(folder, kept, out, target)}
        write_selection(folder, selection)
        write_gallery(folder, rows, results, selection, config)
    finally:
        if collecting:
            gc.enable()
    return summary


def _present(folder: Path, results: list[Result]) -> list[Result]:
    """Return the records, failed ones in place of those whose picture was taken away since."""
    names: dict[str, set[str]] = {}
    for k, r in enumerate(results):
        if r.status != "done":
            continue
        under, _, name = str(r.file).rpartition("/")
        if under not in names:  # a listing of each folder is faster than a look at each file
            try:
                names[under] = set(os.listdir(folder / under))
            except OSError:
                names[under] = set()
        if name not in names[under]:
            results[k] = dataclasses.replace(r, status="failed", reason="its file is missing", file=None)
    return results


def _check(rows: Sequence[Request], results: Sequence[Result], where: str | None, rank_by: str | None) -> None:
    """Raise InputError, naming the option, for an expression that is none, or is about a score that no image has."""
    labels = {label for row in rows for label in row.labels or ()}
    known = {name for r in results for name in r.scores} - {"p"} | {"sim"}
    for option, text in (("--where", where), ("--rank-by", rank_by)):
        if text is None:
            continue
        try:
            expression = Expression(text, labels, known)
        except InputError as error:
            raise InputError(f"{option}: {error}") from None
        if option == "--where" and not expression.decides:
            raise InputError(f"{option}: {shown(text)} is a number, not true or false; compare it with one")
        for name in sorted(expression.names - known if results else ()):
            raise InputError(f"{option}: {shown(name)}: no image of this run has that score{nearest(name, known)}")
