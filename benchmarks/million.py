"""A run of a million pictures: `genkit filter` and its exports, beside DuckDB and Polars on the same records.

    python benchmarks/million.py -o runs/million                      250,000 rows of 4 pictures: 600 MB of records
    python benchmarks/million.py -o runs/few --rows 25000 --export    also as a folder, WebDataset and Parquet

The run folder is made up: records as genkit writes them, and real small PNGs, hard links to a few. Columns: seconds of
the whole process, of which on the CPU, its peak of resident memory, and MB written. DuckDB and Polars, where they are
installed, read results.jsonl and write a line for each picture, with `kept` and `rank`: no reasons, no gallery, no look
at whether pictures are there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from genkit.durable import json_line
from genkit.rows.request import Request
from genkit.rows.result import Result

KINDS, LINKS = 16, 60_000  # different pictures; names of one file, of which file systems have 65,000
BLOCK = 1000  # rows in a subfolder
WORDS = (
    "a red fox",
    "in the snow",
    "a green apple",
    "watercolor",
    "at dusk",
    "a quiet harbour",
    "long shadows",
    "birds",
)
DUCKDB = """
import duckdb, sys
duckdb.sql(f'''copy (
    select id, index, file, scores.clip > 0.3 and r <= 1 as kept, case when scores.clip > 0.3 then r end as rank
    from (select *, row_number() over (partition by id, scores.clip > 0.3 order by scores.clip desc, index) as r
          from (select *, row_number() over () as line from read_json('{sys.argv[1]}/results.jsonl', format='nd'))
          qualify row_number() over (partition by id, index order by line desc) = 1)
    order by id, index) to '{sys.argv[2]}' (format json)''')
"""
POLARS = """
import polars as pl, sys
clip = pl.col("scores").struct.field("clip")
best = pl.when(clip > 0.3).then(clip).rank("ordinal", descending=True).over("id")
(pl.scan_ndjson(f"{sys.argv[1]}/results.jsonl").unique(["id", "index"], keep="last").sort("id", "index")
    .with_columns(rank=best).with_columns(kept=(pl.col("rank") <= 1).fill_null(False))
    .select("id", "index", "file", "kept", "rank").collect().write_ndjson(sys.argv[2]))
"""


def make(folder: Path, rows: int, images: int) -> None:
    """Write a run folder, unless it is there."""
    if (folder / "run.json").exists():
        return
    rnd = random.Random(0)
    (folder / "images").mkdir(parents=True)
    pictures = [_png(rnd) for _ in range(KINDS)]
    links = [
        [folder / f".{kind}-{n}.png" for n in range(-(-rows * images // (KINDS * LINKS)))] for kind in range(KINDS)
    ]
    for kind, paths in enumerate(links):
        for path in paths:
            path.write_bytes(pictures[kind])
    hashes = [hashlib.sha256(data).hexdigest() for data in pictures]
    made = 0
    with open(folder / "requests.jsonl", "w") as asked, open(folder / "results.jsonl", "w") as found:
        for n in range(rows):
            under = f"images/{n // BLOCK:03d}/" if rows > BLOCK else "images/"
            if n % BLOCK == 0:
                (folder / under).mkdir(exist_ok=True)
            prompt = " ".join(rnd.choice(WORDS) for _ in range(8))
            fields = {"num_images": images, "num_inference_steps": 20, "width": 512, "height": 512}
            row = Request(id=f"{n:06d}", prompt=prompt, seed=n, **fields)
            asked.write(json_line(row.to_json()))
            fingerprint = row.fingerprint()
            for k in range(images):
                kind, file = made % KINDS, f"{under}{row.id}-{k:02d}.png"
                os.link(links[kind][made // (KINDS * LINKS)], folder / file)
                scores = {
                    "clip": round(rnd.gauss(0.3, 0.05), 6), "clip_margin": round(rnd.gauss(0.1, 0.05), 6),
                    "clip_z": round(rnd.gauss(0, 1), 6), "sharpness": round(rnd.random() * 500, 4),
                    "brightness": round(rnd.random(), 6), "nan": False, "flat": False,
                }  # fmt: skip
                record = Result(
                    str(row.id), k, n + k, file=file, bytes=len(pictures[kind]), sha256=hashes[kind], width=512,
                    height=512, scores=scores, steps=20, nfe=40, seconds=1.234, prompt=prompt, fingerprint=fingerprint,
                )  # fmt: skip
                found.write(json_line(record.to_json()))
                made += 1
    binding = {"seed": 0, "model": {"name": "none", "weights": {}}}
    (folder / "run.json").write_text(json.dumps({"binding": binding, "info": {"genkit": "a benchmark"}}))


def _png(rnd: random.Random) -> bytes:
    file = io.BytesIO()
    small = Image.frombytes("RGB", (4, 4), rnd.randbytes(48))
    small.resize((64, 64), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def measured(name: str, command: list[str], written: list[Path]) -> str:
    """Run a command and return its line of the table. Raises where it fails."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    if status:
        raise SystemExit(f"{' '.join(command[:6])}: failed")
    size = sum(p.stat().st_size for top in written for p in (top.rglob("*") if top.is_dir() else [top]) if p.is_file())
    cpu = usage.ru_utime + usage.ru_stime
    return f"| {name} | {wall:.1f} | {cpu:.1f} | {usage.ru_maxrss / 1024:.0f} | {size / 1e6:.0f} |"


def lines(run: Path, export: bool) -> Iterator[str]:
    """Yield the lines of the table."""
    genkit = [sys.executable, "-m", "genkit", "filter", str(run)]
    asked = ["--where", "clip > 0.3", "--rank-by", "clip", "--keep", "1"]
    kept = [run / "selection.json", run / "gallery", run / "index.html"]
    yield measured("genkit filter: selection.json, gallery", [*genkit, *asked], kept)
    for form in ("folder", "webdataset", "parquet") if export else ():
        out = run / f"kept-{form}"
        yield measured(f"the same with -o, --format {form}", [*genkit, *asked, "-o", str(out), "--format", form], [out])
    for peer, code in (("duckdb", DUCKDB), ("polars", POLARS)):
        if importlib.util.find_spec(peer):
            out = run / f"{peer}.jsonl"
            version = importlib.import_module(peer).__version__
            yield measured(f"{peer} {version}: kept and rank", [sys.executable, "-c", code, str(run), str(out)], [out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--export", action="store_true")
    options = parser.parse_args()
    make(options.out, options.rows, options.images)
    size = (options.out / "results.jsonl").stat().st_size / 1e6
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} when it began\n")
    print(f"{options.rows:,} rows of {options.images} pictures, {size:.0f} MB of records\n")
    print("| | seconds | CPU seconds | peak MB | MB written |\n|---|---|---|---|---|")
    for line in lines(options.out, options.export):
        print(line, flush=True)


if __name__ == "__main__":
    main()
