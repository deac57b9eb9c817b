"""Which score to use for what: each beside a judge that is not CLIP, the colours of the pixels.

    python benchmarks/selection.py -o runs/selection        # 100 prompts "a COLOUR OBJECT on a BACKGROUND background"
    python benchmarks/scores.py runs/selection

Columns, over the first 8 pictures of each prompt. between/within: the variance of prompts' means over the variance
within a prompt, which is what a threshold shared by all prompts mostly sees. pooled: the chance that a picture with the
asked-for colours scores higher than one without, of any prompts, which is what a gate needs. within: the same between
pictures of one prompt, which is what `rank_by` needs. top half: the share of right pictures in the half with the best
scores. Intervals: 95 %, bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from selection import FIRST, colours, pixels

from genkit.runs.records import read_results
from genkit.studies.score import score_images

SCORES = ("clip", "clip_margin", "clip_z", "p[prompt]", "sharpness", "brightness")
Row = list[tuple[dict[str, float], bool]]  # a prompt's pictures: scores, and whether the colours are right


def judged(folder: Path) -> list[Row]:
    """The run's pictures with all scores, made anew from its stored embeddings, in order of prompts."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "scores.jsonl"
        score_images(folder, None, None, None, out, "emoji-clip", "cpu", "auto")
        scores = {line["file"]: line["scores"] for line in map(json.loads, out.read_text().splitlines())}
    rows: dict[str, Row] = {}
    for r in read_results(folder):
        if r.status == "done" and r.index < FIRST:
            colour, _, background = r.id.split("-")
            right = colours(pixels(folder, r)) == (colour, background)
            p = (r.scores.get("p") or {}).get(r.prompt, math.nan)
            rows.setdefault(r.id, []).append(({**scores[str(folder / str(r.file))], "p[prompt]": p}, right))
    return [rows[name] for name in sorted(rows)]


def higher(right: np.ndarray, wrong: np.ndarray) -> tuple[float, int]:
    """(pairs in which the right picture scores higher, ties half; pairs)"""
    difference = right[:, None] - wrong[None, :]
    return float((difference > 0).sum() + 0.5 * (difference == 0).sum()), difference.size


def split(row: Row, name: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([scores[name] for scores, right in row if right == side]) for side in (True, False))


def ratio(rows: list[Row], name: str) -> float:
    values = [np.array([scores[name] for scores, _ in row]) for row in rows if len(row) > 1]
    within = float(np.mean([v.var(ddof=1) for v in values]))
    mean_size = float(np.mean([len(v) for v in values]))
    return (float(np.var([v.mean() for v in values], ddof=1)) - within / mean_size) / within


def pooled(rows: list[Row], name: str) -> float:
    parts = [split(row, name) for row in rows]
    won, of = higher(*(np.concatenate([part[side] for part in parts]) for side in (0, 1)))
    return won / max(1, of)


def within(rows: list[Row], name: str) -> float:
    pairs = [higher(*split(row, name)) for row in rows]
    return sum(won for won, _ in pairs) / max(1, sum(of for _, of in pairs))


def top_half(rows: list[Row], name: str) -> float:
    flat = sorted(((scores[name], right) for row in rows for scores, right in row), reverse=True)
    return float(np.mean([right for _, right in flat[: len(flat) // 2]]))


def interval(rows: list[Row], figure: Callable[[list[Row], str], float], name: str) -> str:
    draw = np.random.default_rng(0)
    found = [figure([rows[i] for i in draw.integers(len(rows), size=len(rows))], name) for _ in range(200)]
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{figure(rows, name):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of benchmarks/selection.py")
    rows = judged(parser.parse_args().run)
    images = [right for row in rows for _, right in row]
    print(f"{len(images)} pictures of {len(rows)} prompts, {np.mean(images):.0%} with the right colours; ", end="")
    print(platform.processor() or platform.machine())
    figures = (ratio, pooled, within, top_half)
    print(f"{'score':<12}" + "".join(f"{f:<26}" for f in ("between/within", "pooled", "within", "top half")))
    for name in SCORES:
        print(f"{name:<12}" + "".join(f"{interval(rows, figure, name):<26}" for figure in figures))


if __name__ == "__main__":
    main()
