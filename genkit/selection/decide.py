"""Which images are kept, at which rank, and why the others are not: a pure function of recorded scores."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.durable import disk, json_pieces, write_whole
from genkit.rows.request import Request
from genkit.rows.result import Result, value_of
from genkit.runs.records import SELECTION, Key
from genkit.runs.table import Row
from genkit.scoring.gates import Expression, is_known, passes, unknown_scores
from genkit.scoring.names import ALONE, names_of
from genkit.selection.choose import Known, choose
from genkit.selection.judged import Judged, Weigher, reads_sim, with_sim
from genkit.selection.picking import NONE, Picking

_VOTES = {True: None, False: "voted bad", None: "no vote"}  # why an image is rejected by its vote
HARD_LINES = 10  # hard rows listed at the end of a run; selection.json has all


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

    An image is kept if it is done, passes its row's gate, and is among the best `keep` of the row by `rank_by`
    (default: clip if there is one, else the order of drawing). `where`, `rank_by` and `keep` override those of every
    row. NaN passes no gate and has no rank. Rank 1 is best; an image that fails its gate has none. picking, known:
    options that thin out the images that pass, and the embeddings for them. "hard": rows that drew `max_images` and of
    which fewer than `keep` pass. `sim` is the cosine to the nearest picture that the row has chosen so far. Raises
    InputError for an invalid expression, or one that uses `sim` without embeddings.
    """
    of_row: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        of_row[result.id].append(result)
    labels = {label for row in rows for label in row.labels or ()}
    names = names_of(r.scores for found in of_row.values() for r in found)
    asked_gate, asked_order = (None if text is None else Expression(text, labels, names) for text in (where, rank_by))
    compiled = functools.cache(lambda text, labels: Expression(text, labels, names=None))
    judged = []
    for row in rows:
        own = None if row.labels is None else tuple(row.labels)
        gate = asked_gate or (None if row.gate is None else compiled(row.gate, own))
        order = asked_order or (None if row.rank_by is None else compiled(row.rank_by, own))
        found = sorted(of_row.get(str(row.id), ()), key=lambda r: r.index)
        judged.append(judge(row, found, gate, order, keep, ahead=where is not None or keep is not None))
    chosen, notes = choose(judged, picking, known)
    images: dict[str, dict[str, Any]] = {}
    for row_, kept_ in zip(judged, chosen, strict=True):
        for r, (is_kept, rank, reason, note) in zip(row_.found, verdicts_of(row_, kept_, notes), strict=True):
            said = {"id": r.id, "index": r.index, "file": r.file, "kept": is_kept, "rank": rank, "reason": reason}
            images[image_name(r)] = said | note
    kept = sum(image["kept"] for image in images.values())
    options = {"where": where, "rank_by": rank_by, "keep": keep, **picking.to_json()}
    hard = [row.hard for row in judged if row.hard is not None]
    return {"kept": kept, "of": len(images), **options, "hard": hard, "images": images}


def judge(
    row: Request | Row,
    found: list[Result],
    gate: Expression | None,
    order: Expression | None,
    keep: int | None,
    ahead: bool,
    votes: Mapping[str, bool] | None = None,
) -> Judged:
    """Judge the images of a row. ahead: images drawn beyond what the row needed count, too.

    votes: whether an image is good, by name; those without a vote are rejected like bad ones.
    """
    weigh = None
    if reads_sim(gate) or reads_sim(order):
        weigh = Weigher(found, gate, order, keep or row.keep)
        found, gate = [with_sim(r, ALONE) for r in found], None if reads_sim(gate) else gate
    voted = [None if votes is None else votes.get(image_name(r)) for r in found]
    passed = [
        r.status == "done" and passes(gate, r.scores) and (votes is None or bool(vote))
        for r, vote in zip(found, voted, strict=True)
    ]
    most = row.max_images or row.num_images
    count = most if ahead else _needed(row, found, passed)
    reasons = [
        None if ok and r.index < count else _refusal(r, ok, gate, most, count)
        for r, ok in zip(found, passed, strict=True)
    ]
    if votes is not None:
        reasons = [reason or _VOTES[vote] for reason, vote in zip(reasons, voted, strict=True)]
    values = [math.nan if reason else value_of(r, order) for r, reason in zip(found, reasons, strict=True)]
    ranked = sorted((k for k, value in enumerate(values) if value == value), key=lambda k: (-values[k], k))
    judged = Judged(row, found, reasons, values, ranked, keep or row.keep, weigh=weigh)
    if row.max_images is not None and not ahead and sum(r.index < most for r in found) == most:
        lack = (row.keep or 0) - sum(passed[:most])
        judged.hard = _hard(judged, order, passed, lack) if lack > 0 else None
    return judged


def _needed(row: Request | Row, found: Sequence[Result], passed: Sequence[bool]) -> int:
    """Return how many images of a row count: up to the one at which `keep` of them have passed.

    A row may have drawn more while it waited for results; how many depends on timing, so they do not count.
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
    """Return why an image is rejected regardless of the others of its row, or None."""
    if r.status != "done":
        return f"{r.status}: {r.reason}" if r.reason else r.status
    if r.index >= most:
        return f"not among the {most} that the row asks for now"
    if r.index >= count:
        return f"drawn ahead: the first {count} were enough"
    if gate is None or passed or passes(gate, r.scores):
        return None
    refused = f"gate: {gate.text}"
    return refused if is_known(gate, r.scores) else f"{refused} (no {unknown_scores(gate, r.scores)[0]})"


def _hard(judged: Judged, order: Expression | None, passed: Sequence[bool], lack: int) -> dict[str, Any]:
    """Return the report of a row that drew max_images and lacks images that pass, with the best that failed."""
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
        "best": [image_name(judged.found[k]) for k in best],
    }


def verdicts_of(
    row: Judged, chosen: list[int], notes: Mapping[Key, dict[str, Any]]
) -> Iterator[tuple[bool, int | None, str, dict[str, Any]]]:
    """Yield (kept, rank, reason, what else selection.json says) for each image of a row."""
    ranks = {k: place for place, k in enumerate(row.ranked, 1)}
    kept = set(chosen)
    for k, r in enumerate(row.found):
        note = dict(notes.get((r.id, r.index), ())) if notes else {}
        rank, reason = ranks.get(k), row.reasons[k]
        out, about = (note.pop("out", None), note.pop("about", None)) if note else (None, None)
        if k in kept:
            reason = "kept"
        elif reason is None:
            lower = "nan: no score to rank by" if rank is None else f"rank {rank} of {len(row.ranked)}, keep {row.keep}"
            reason = out or lower
        if about:
            reason = f"{reason}; {about}"
        yield k in kept, rank, reason, note


def image_name(r: Result) -> str:
    """Return the name of an image, that of its file without the suffix: "fox-00"."""
    return f"{r.id}-{r.index:02d}"


def hard_lines(hard: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each of the first hard rows, and one for the number of the others."""
    for row in hard[:HARD_LINES]:
        best = f"; the best that failed: {', '.join(row['best'][:3])}" if row["best"] else ""
        share = f"{row['passed']} of {row['drawn']} passed ({row['pass_rate']:.0%}), keep {row['keep']}"
        yield f"row {row['id']}: hard: {share}{best}"
    if len(hard) > HARD_LINES:
        yield f'… and {len(hard) - HARD_LINES} more hard rows: see "hard" in {SELECTION}'


def write_selection(folder: Path, selection: Mapping[str, Any]) -> None:
    """Write selection.json of a run folder, whole or not at all. Raises HostError."""
    with disk(folder / SELECTION):
        rest = {name: value for name, value in selection.items() if name != "images"}
        pieces = json_pieces(rest, {"images": selection["images"].items()})
        write_whole(folder / SELECTION, map(str.encode, pieces))
