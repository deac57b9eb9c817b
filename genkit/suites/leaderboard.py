"""`genkit leaderboard`: rank models by their evaluations of one suite, with bootstrap confidence."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from genkit.durable import disk, write_whole
from genkit.errors import InputError, shown
from genkit.files import local, place, read_json, run_path
from genkit.pages.evaluation import leaderboard_page
from genkit.runs.records import RESULTS, read_results
from genkit.storage import StoragePath
from genkit.suites.evaluate import EVALUATION, PAGE
from genkit.suites.verdicts import pictures_hash

RESAMPLES = 10_000
MEMORY = 2**22  # counts of prompts in resamples that are drawn together
SURE = 0.95
MAX_BYTES = 2**28
_PARTS = {"suite": dict, "model": dict, "judge": dict, "settings": dict, "tasks": list, "overall": dict, "rows": list,
          "pictures": str}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """An evaluation: its file, its displayed name, and its content."""

    path: Path
    name: str
    found: Mapping[str, Any]

    def shares(self, task: str, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return for each row of a task the numbers of its right pictures and of all its pictures."""
        rows = {row["id"]: row["right"] for row in self.found["rows"] if row["task"] == task}
        right = [rows[row_id] for row_id in ids]
        return np.array([sum(r) for r in right], float), np.array([len(r) for r in right], float)


def leaderboard(places: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Compare evaluations of one suite: run folders, or their evaluation.json; return ranks and pairs.

    {"suite", "resamples", "entries": best first, {"name", "rank", "ranks", "right", "interval", "tasks", …}, "pairs":
    {"a", "b", "better", "difference", "interval", "verdict"}, "notes"}. better: the share of bootstrap resamples (of
    prompts within tasks, the same for both models) in which A is above B; ties count half. out: an .html file to
    write. Raises InputError for files that are not evaluations or are older than their run's pictures, and for
    evaluations of different suites or with different judges.
    """
    page = None if out is None else run_path(out)
    local(page)
    if page is not None and (page.is_dir() or page.suffix.lower() not in (".html", ".htm")):
        raise InputError(f"--out: {shown(str(page))} is not the name of an .html file")
    if page is not None and not page.absolute().parent.is_dir():
        raise InputError(f"--out: {shown(str(page.parent))} is no folder")
    entries = _named([_read(run_path(path)) for path in places])
    if len(entries) < 2:
        raise InputError("RUN: one evaluation is no comparison; give two or more")
    _check_alike(entries)
    found = _compared(entries)
    if page is not None:
        links = {e.name: _link(e, page) for e in entries}
        text = leaderboard_page(found, [links[entry["name"]] for entry in found["entries"]])
        with disk(page):
            write_whole(page, text.encode("utf-8", "backslashreplace"))
    return found


def _read(path: Path) -> tuple[Path, Mapping[str, Any]]:
    file = path / EVALUATION if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise InputError(f"{place(path)}: holds no {EVALUATION}; genkit evaluate writes it")
    found = read_json(file, MAX_BYTES)
    if not all(isinstance(found.get(name), kind) for name, kind in _PARTS.items()) or not _sound(found):
        raise InputError(f"{place(file)}: is not the {EVALUATION} of genkit evaluate")
    run = file.parent
    if file.name == EVALUATION and (run / RESULTS).is_file():
        ids = {row["id"]: len(row["right"]) for row in found["rows"]}
        drawn = [r for r in read_results(run) if r.index < ids.get(r.id, 0)]
        if pictures_hash(drawn) != found["pictures"]:
            raise InputError(f"{place(file)}: is older than the pictures of its run; genkit evaluate judges them again")
    return file, found


def _sound(found: Mapping[str, Any]) -> bool:
    """Return whether an evaluation.json holds everything that is read here."""
    try:
        rows = all(set(row["right"]) <= {0, 1} for row in found["rows"])
        texts = [found["suite"]["name"], found["suite"]["sha256"], found["model"]["name"]]
        texts += [row[name] for row in found["rows"] for name in ("id", "task")]
        named = (("right", "interval"), ("any", "any_interval"))
        shares = [(s[value], *s[ends]) for s in (*found["tasks"], found["overall"]) for value, ends in named]
        numbers = all(len([float(x) for x in share]) == 3 for share in shares)
        tasks = {task["task"] for task in found["tasks"]} == {row["task"] for row in found["rows"]} != set()
    except (TypeError, KeyError, ValueError):
        return False
    return rows and numbers and tasks and "rows" in found["suite"] and all(isinstance(text, str) for text in texts)


def _named(read: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[Entry]:
    """Return the entries named after their models, with the folder appended where two models have one name."""
    models = [Path(found["model"]["name"]).name or found["model"]["name"] for _, found in read]
    names = [
        model if models.count(model) == 1 else f"{model} ({place(path.parent if path.name == EVALUATION else path)})"
        for model, (path, _) in zip(models, read, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: is given twice")
    return [Entry(path, name, found) for name, (path, found) in zip(names, read, strict=True)]


def _check_alike(entries: Sequence[Entry]) -> None:
    """Raise InputError, naming the two files, for another suite, other rows or another judge."""
    first = entries[0]
    for other in entries[1:]:
        one, two = (e.found["suite"] for e in (first, other))
        if one["sha256"] != two["sha256"]:
            told = " and ".join(f"{s.get('name')} ({s['sha256'][:12]}…)" for s in (one, two))
            raise InputError(f"{place(other.path)}: is of another suite than {place(first.path)}: {told}")
        own, others = ({(row["id"], row["task"]) for row in e.found["rows"]} for e in (first, other))
        for row in sorted(own ^ others)[:1]:
            raise InputError(
                f"{place(other.path)}: rows: {shown(row[0])} of task {shown(row[1])} is only in one of it "
                f"and {place(first.path)}"
            )
        judges = first.found["judge"], other.found["judge"]
        for name in sorted({*judges[0], *judges[1]}):
            if judges[0].get(name) != judges[1].get(name):
                raise InputError(f"{place(other.path)}: was judged by another {name} than {place(first.path)}")


def _compared(entries: Sequence[Entry]) -> dict[str, Any]:
    found = entries[0].found
    ids: dict[str, list[str]] = {}
    for row in found["rows"]:
        ids.setdefault(row["task"], []).append(row["id"])
    resampled = _resampled(entries, ids)  # (entries, RESAMPLES): the mean of the tasks
    ranks = 1 + (resampled[None] > resampled[:, None]).sum(axis=1)  # ties share the better rank
    whole = [
        float(np.mean([np.divide(*map(np.sum, e.shares(task, own))) for task, own in ids.items()])) for e in entries
    ]
    order = sorted(range(len(entries)), key=lambda k: -whole[k])
    lines = []
    for k in order:
        e = entries[k]
        low, high = np.quantile(ranks[k], [(1 - SURE) / 2, (1 + SURE) / 2], method="nearest")
        tasks = {t["task"]: {n: t[n] for n in ("right", "interval", "any", "any_interval")} for t in e.found["tasks"]}
        lines.append({
            "name": e.name, "file": str(e.path), "rank": 1 + sum(other > whole[k] for other in whole),
            "ranks": [int(low), int(high)], "right": e.found["overall"]["right"],
            "interval": e.found["overall"]["interval"], "tasks": tasks, "clip": e.found.get("clip"),
            "settings": e.found["settings"],
        })  # fmt: skip
    pairs = [_pair(entries, whole, resampled, a, b) for a, b in itertools.combinations(order, 2)]
    suite = {name: found["suite"][name] for name in ("name", "sha256", "rows")}
    return {"suite": suite, "resamples": RESAMPLES, "entries": lines, "pairs": pairs, "notes": _notes(entries, ids)}


def _resampled(entries: Sequence[Entry], ids: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Return the mean over the tasks in each bootstrap resample, (entries, RESAMPLES).

    Prompts are resampled within tasks, each with all its pictures, and equally for every entry.
    """
    rng = np.random.default_rng(0)
    total = np.zeros((len(entries), RESAMPLES))
    for task, own in ids.items():
        shares = [e.shares(task, own) for e in entries]
        together = max(1, MEMORY // len(own))
        for start in range(0, RESAMPLES, together):
            part = slice(start, min(start + together, RESAMPLES))
            size = part.stop - start
            counts = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=size)  # how often each is drawn
            for k, (right, of) in enumerate(shares):
                total[k, part] += (counts @ right) / np.maximum(counts @ of, 1)
    return total / len(ids)


def _pair(entries: Sequence[Entry], whole: Sequence[float], resampled: np.ndarray, a: int, b: int) -> dict[str, Any]:
    gap = resampled[a] - resampled[b]
    gap[np.abs(gap) < 1e-9] = 0  # equal up to the rounding of their sums
    low, high = np.quantile(gap, [(1 - SURE) / 2, (1 + SURE) / 2])
    better = float((gap > 0).mean() + (gap == 0).mean() / 2)
    name = entries[a].name if low > 0 else entries[b].name if high < 0 else None
    return {
        "a": entries[a].name, "b": entries[b].name, "better": round(better, 4),
        "difference": round(whole[a] - whole[b], 6), "interval": [round(float(low), 6), round(float(high), 6)],
        "verdict": "not told apart" if name is None else f"{name} is better, 95 % sure",
    }  # fmt: skip


def _notes(entries: Sequence[Entry], ids: Mapping[str, Sequence[str]]) -> list[str]:
    notes = []
    alone = [task for task, own in ids.items() if len(own) == 1]
    if alone:
        notes.append(f"{', '.join(alone)}: of one prompt, whose luck no resample shows")
    for name in entries[0].found["settings"]:
        values = [e.found["settings"].get(name) for e in entries]
        if any(value != values[0] for value in values):
            told = ", ".join(f"{e.name} {value}" for e, value in zip(entries, values, strict=True))
            notes.append(f"{name} differs: {told}")
    if len(entries) > 2:
        notes.append("each pair by itself: of twenty pairs of equals, one looks different")
    return notes


def _link(entry: Entry, page: Path) -> str:
    """Return the URL of the entry's page, relative to the leaderboard; "" if it has none."""
    there = entry.path.parent / PAGE
    if isinstance(there, StoragePath) or entry.path.name != EVALUATION or not there.is_file():
        return ""
    return quote(os.fsencode(os.path.relpath(there.resolve(), page.resolve().parent)))


def described(found: Mapping[str, Any]) -> str:
    """Return a leaderboard as text."""
    tasks = list(found["entries"][0]["tasks"])
    lines = [f"suite {found['suite']['name']}: {found['suite']['rows']:,} prompts"]
    table = [("rank", "(95 %)", "model", "mean of tasks", "(95 %)", *tasks)]
    for entry in found["entries"]:
        span = "-".join(map(str, dict.fromkeys(entry["ranks"])))
        shares = [f"{entry['tasks'][task]['right']:.1%}" for task in tasks]
        row = str(entry["rank"]), span, entry["name"], f"{entry['right']:.1%}", _ends(entry["interval"]), *shares
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(f"{cell:<{wide}}" for cell, wide in zip(row, widths, strict=True)).rstrip() for row in table]
    for p in found["pairs"]:
        gap = f"by {p['difference']:+.1%} ({_ends(p['interval'], '+.1%')})"
        lines.append(f"{p['a']} above {p['b']} in {p['better']:.1%} of resamples, {gap}: {p['verdict']}")
    return "\n".join([*lines, *found["notes"]])


def _ends(ends: Sequence[float], form: str = ".1%") -> str:
    return " to ".join(format(x, form) for x in ends)
