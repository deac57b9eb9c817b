"""Exact search among random unit vectors: genkit's beside numpy's and, where it is installed, faiss'.

    python benchmarks/search.py                       1e5 and 1e6 vectors of 512 numbers in float16, one query, k = 20
    python benchmarks/search.py --count 300000 --width 768

Columns: seconds of one query (median of five), memory that the vectors take for it, and the share of the true nearest
that it finds. numpy widens a chunk to float32 and multiplies; genkit multiplies in float16 by torch and repeats the few
that may be nearest in float64 (`genkit.selection.index.top`), from a memory-mapped file. faiss holds float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from genkit.runs.embeddings import Store, by_content
from genkit.selection.index import top

K, TIMES, PART = 20, 5, 20_000


def write(folder: Path, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mapped vectors of an index with `count` random unit vectors, and a query near one of them."""
    random = np.random.default_rng(0)
    with Store(folder, width) as store, open(store.path, "ab") as file:
        for start in range(0, count, PART):
            records = np.zeros(min(PART, count - start), store.dtype)
            plain = random.standard_normal((len(records), width), dtype=np.float32)
            records["vector"] = plain / np.linalg.norm(plain, axis=1, keepdims=True)
            records["sha256"] = [f"{start + n:064x}".encode() for n in range(len(records))]
            file.write(records.tobytes())
        store.count = count
    vectors = by_content(folder)[1]
    query = vectors[7].astype(np.float64) + 0.05 * random.standard_normal(width)
    return vectors, query / np.linalg.norm(query)


def numpy_top(vectors: np.ndarray, query: np.ndarray) -> list[int]:
    """Search in float32, 1024 vectors at a time, which stay in the cache of a core."""
    scores, narrow = np.empty(len(vectors), np.float32), query.astype(np.float32)
    for start in range(0, len(vectors), 1024):
        np.dot(vectors[start : start + 1024].astype(np.float32), narrow, out=scores[start : start + 1024])
    near = np.argpartition(-scores, K)[:K]
    return near[np.argsort(-scores[near])].tolist()


def contestants(vectors: np.ndarray, query: np.ndarray) -> Iterator[tuple[str, float, Callable[[], list[int]]]]:
    """Yield (name, GiB, search)."""
    rows, half = np.arange(len(vectors)), vectors.shape[0] * vectors.shape[1] * 2 / 2**30
    yield "genkit, exact, float16 mapped", half, lambda: [at for at, _ in top(vectors, rows, query, K)]
    yield "numpy, exact, float16 mapped", half, lambda: numpy_top(vectors, query)
    if importlib.util.find_spec("faiss") is None:
        return
    import faiss

    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    wide, narrow = np.ascontiguousarray(vectors, dtype=np.float32), query.astype(np.float32)[None]
    flat: Any = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(wide)
    yield "faiss IndexFlatIP, exact, float32", 2 * half, lambda: flat.search(narrow, K)[1][0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads; faiss is {'' if _faiss() else 'not '}there\n"
    )
    print("| vectors | search | seconds | GiB | of the nearest 20 |\n|---|---|---|---|---|")
    for count in options.count:
        with tempfile.TemporaryDirectory() as folder:
            vectors, query = write(Path(folder), count, options.width)
            exact = np.concatenate(
                [vectors[n : n + PART].astype(np.float64) @ query for n in range(0, count, PART)]
            )  # fmt: skip
            nearest = set(np.argsort(-exact)[:K].tolist())
            for name, size, search in contestants(vectors, query):
                search()
                seconds = []
                for _ in range(TIMES):
                    began = time.perf_counter()
                    found = search()
                    seconds.append(time.perf_counter() - began)
                right = len(nearest & set(found)) / K
                middle = statistics.median(seconds)
                print(f"| {count:,} x {options.width} | {name} | {middle:.3f} | {size:.2f} | {right:.0%} |")


def _faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


if __name__ == "__main__":
    main()
