"""A run folder with made-up scores and small real pictures: what calibrate, label and compare look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from genkit.rows.request import Request
from genkit.runs.run import Run
from tests.null_run import CONFIG, png, result_of


def judged_run(
    folder: Path, scores: Callable[[int, int], dict[str, Any]], rows: int = 4, images: int = 5, **fields: Any
) -> Path:
    """Write a run of `rows` x `images`; scores(row, image) gives what an image is said to have."""
    asked = [
        Request(**{"id": f"r{n}", "prompt": f"picture {n}", "seed": 10 * n, "num_images": images, **fields})
        for n in range(rows)
    ]
    with Run.open(folder, CONFIG, asked) as run:
        for n, row in enumerate(asked):
            for k in range(images):
                run.save(result_of(row, k, scores=scores(n, k)), png(row, k))
    return folder
