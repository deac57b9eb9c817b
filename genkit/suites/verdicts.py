"""Judge the pictures of a suite by their stored scores; accuracies with confidence intervals."""

from __future__ import annotations

import ast
import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from genkit.errors import InputError
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.scoring.gates import Expression, passes, unknown_scores
from genkit.selection.intervals import mean_interval, share_interval, wilson
from genkit.suites.suite import Suite

Range = tuple[float, float, float]  # value, low, high: 95 %


def judge_rows(suite: Suite, rows: Sequence[Request], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return for each row {"id", "task", "prompt", "verify", "right", "images"}.

    right: 1 or 0 for each of its images, in order; 0 for an image that failed or lacks a score that the expression
    uses. images: {"index", "file", "right", "found": values of parts of the expression}, with "unknown" for missing
    scores and "failed" for a failed image. rows: those of the run.
    """
    found: dict[str, dict[int, Result]] = defaultdict(dict)
    for r in results:
        found[r.id][r.index] = r
    judged = []
    for row, task in zip(rows, suite.tasks, strict=True):
        labels = None if row.labels is None else tuple(row.labels)
        drawn = [found[str(row.id)][k] for k in range(row.num_images) if k in found[str(row.id)]]
        images = [_image(str(row.gate), labels, r) for r in drawn]
        told = {"id": row.id, "task": task, "prompt": row.plain_prompt, "verify": row.gate}
        judged.append({**told, "right": [int(image["right"]) for image in images], "images": images})
    return judged


def _image(text: str, labels: tuple[str, ...] | None, r: Result) -> dict[str, Any]:
    expression, parts = _compiled(text, labels)
    told: dict[str, Any] = {"index": r.index, "file": r.file, "right": False, "found": {}}
    if r.status != "done":
        return {**told, "failed": r.reason or r.status}
    unknown = unknown_scores(expression, r.scores)
    told |= {"unknown": unknown} if unknown else {"right": passes(expression, r.scores)}
    for name, part in parts:
        if not unknown_scores(part, r.scores):
            value = part(r.scores)
            told["found"][name] = round(value, 4) if isinstance(value, float) else value
    return told


@functools.cache
def _compiled(text: str, labels: tuple[str, ...] | None) -> tuple[Expression, list[tuple[str, Expression]]]:
    """Return the expression, and its measured parts by their source: names, p['…'] and function calls."""
    parts: dict[str, Expression] = {}
    for node in _measured(ast.parse(text.strip(), mode="eval").body):
        name = ast.unparse(node)
        try:
            parts[name] = Expression(name, labels, names=None)
        except InputError:  # not an expression on its own
            continue
    return Expression(text, labels, names=None), list(parts.items())


def _measured(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Name | ast.Subscript | ast.Call):
        yield node
    elif not isinstance(node, ast.Constant):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from _measured(child)


def pictures_hash(results: Sequence[Result]) -> str:
    """Return a hash of the pictures and their contents, by which an evaluation is matched with its run."""
    told = sorted(f"{r.id} {r.index} {r.status} {r.sha256}\n" for r in results)
    return hashlib.sha256("".join(told).encode("utf-8", "backslashreplace")).hexdigest()


def task_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each task, in order of appearance, the shares of right pictures and of rows with a right picture.

    The interval of the pictures accounts for correlation within a prompt (`share_interval`); that of the rows is
    Wilson's.
    """
    groups: dict[str, list[list[int]]] = defaultdict(list)
    for row in rows:
        groups[row["task"]].append(row["right"])
    return [{"task": task, **_shares(found)} for task, found in groups.items()]


def _shares(found: Sequence[Sequence[int]]) -> dict[str, Any]:
    share, *ends = share_interval([row for row in found if row]) if any(found) else (0.0, 0.0, 1.0)
    hit = sum(any(row) for row in found)
    return {
        "prompts": len(found), "images": sum(map(len, found)), "right": _rounded(share), "interval": _all(ends),
        "any": _rounded(hit / len(found)), "any_interval": _all(wilson(hit, len(found))),
    }  # fmt: skip


def overall(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over the tasks, with intervals combined from those of the tasks."""
    found: dict[str, Any] = {}
    for name, ends in (("right", "interval"), ("any", "any_interval")):
        value, low, high = mean_of([(task[name], *task[ends]) for task in tasks])
        found |= {name: _rounded(value), ends: _all((low, high))}
    return found


def mean_of(parts: Sequence[Range]) -> Range:
    """Return the mean of independent estimates, with an interval from theirs (Zou and Donner 2008, equation 8)."""
    n = len(parts)
    value = math.fsum(part[0] for part in parts) / n
    below, above = (math.sqrt(math.fsum((part[0] - part[k]) ** 2 for part in parts)) / n for k in (1, 2))
    return value, max(0.0, value - below), min(1.0, value + above)


def mean_score(name: str, rows: Sequence[Request], results: Sequence[Result]) -> dict[str, Any] | None:
    """Return the mean of a score, its interval and the number of pictures; None if no picture has the score."""
    groups: dict[str, list[float]] = defaultdict(list)
    counted = {str(row.id): row.num_images for row in rows}
    for r in results:
        value = r.scores.get(name)
        if r.status == "done" and value is not None and r.index < counted.get(r.id, 0):
            groups[r.id].append(float(value))
    if not groups:
        return None
    mean, *ends = mean_interval(list(groups.values()))
    return {"mean": _rounded(mean), "interval": _all(ends), "images": sum(map(len, groups.values()))}


def _rounded(x: float) -> float | None:
    return round(x, 6) if math.isfinite(x) else None


def _all(ends: Sequence[float]) -> list[float | None]:
    return [_rounded(x) for x in ends]
