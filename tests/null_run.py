"""A run whose pictures are arithmetic: what the tests of the run folder interrupt.

    python -m tests.null_run FOLDER ROWS IMAGES THREADS SECONDS [FUNCTION:WHEN:N]

The last argument kills the process at the N-th call of os.FUNCTION: before it, after it, or half-way through a write.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from genkit.errors import HostError
from genkit.files import run_path
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.run import Run

CONFIG = {"binding": {"seed": 0, "model": {"name": "null", "weights": {"unet": "0" * 64}}}, "info": {"genkit": "test"}}


def rows_of(count: int, images: int = 1, **fields: Any) -> list[Request]:
    """Rows r0, r1, …, each with its own prompt and seed."""
    return [
        Request(id=f"r{n}", prompt=f"picture {n}", seed=1000 * n, num_images=images, **fields) for n in range(count)
    ]


def png(row: Request, index: int) -> bytes:
    """The picture of (row, index): a few noisy pixels that depend on the prompt and the seed alone."""
    noise = hashlib.sha512(f"{row.prompt}/{row.seed_of(index)}".encode()).digest()
    file = io.BytesIO()
    Image.frombytes("RGB", (4, 5), noise[:60]).save(file, "PNG")
    return file.getvalue()


def result_of(row: Request, index: int, **fields: Any) -> Result:
    """Its record before it is saved."""
    return Result(str(row.id), index, row.seed_of(index), prompt=row.prompt, **{"scores": {"clip": 0.5}, **fields})


def draw(folder: Path, rows: Sequence[Request], threads: int = 1, seconds: float = 0.0) -> list[tuple[str, int]]:
    """Draw what is missing; return it, sorted. `seconds`: what a picture takes, at most."""
    drawn: list[tuple[str, int]] = []

    def one(row: Request, index: int) -> None:
        time.sleep(random.uniform(0, seconds))
        scores = {"clip": 0.5, **({"p": dict.fromkeys(row.labels, 0.5)} if row.labels else {})}
        run.save(result_of(row, index, scores=scores), png(row, index))
        drawn.append((str(row.id), index))

    with Run.open(folder, CONFIG, rows) as run:
        print("open", flush=True)
        with ThreadPoolExecutor(threads) as pool:
            missing = [(r, k) for r in rows for k in range(r.num_images) if (str(r.id), k) not in run.done]
            for future in [pool.submit(one, row, index) for row, index in missing]:
                future.result()
    return sorted(drawn)


def kill_at(function: str, when: str, count: int) -> None:
    """Arrange for this process to die at the `count`-th call of os.`function`."""
    real: Callable[..., Any] = getattr(os, function)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "half":
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        outcome = real(*args, **kwargs) if calls < count or when == "after" else None
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome

    setattr(os, function, counted)


def main(folder: str, rows: str, images: str, threads: str, seconds: str, kill: str = "") -> int:
    if kill.startswith("limit:"):  # no file may grow beyond so many bytes: what a full disk is to a process
        limit = int(kill.removeprefix("limit:"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    elif kill:
        function, when, count = kill.split(":")
        kill_at(function, when, int(count))
    print("ready", flush=True)
    try:
        draw(run_path(folder), rows_of(int(rows), int(images)), int(threads), float(seconds))
    except HostError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
