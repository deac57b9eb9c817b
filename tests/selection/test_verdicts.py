"""Deciding on a folder row by row gives the bytes that deciding on all records at once gives."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.million import make
from genkit.durable import json_line
from genkit.errors import InputError
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.columns import Wanted
from genkit.runs.embeddings import Store
from genkit.runs.records import read_config, read_results, read_rows
from genkit.runs.table import GONE, Kept, Table, read_row_table
from genkit.selection.choose import read_known
from genkit.selection.decide import decide, write_selection
from genkit.selection.picking import Picking
from genkit.studies.filter import refilter
from tests.null_run import CONFIG, png

WORDS = ["a red fox", 'a "quoted" fox', "füchse im Schnee", "a\nline", "狐", "{braces}", "back\\slash", "\u2028", ""]
LABELS = ["a red fox", "a {cat}", 'a "dog"']


def random_run(folder: Path, seed: int) -> Path:
    """A run whose lines are of all sorts: out of order, superseded, damaged, of other rows, of other tools."""
    rnd = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(CONFIG))
    rows, lines, vectors = [], [], []
    for n in range(12):
        images = rnd.choice([1, 2, 5])
        fields: dict[str, Any] = {"num_images": images}
        if rnd.random() < 0.5:
            fields |= {"keep": rnd.randint(1, images), "gate": rnd.choice(["clip > 0.3", "not flat", "plugin < 2"])}
            if rnd.random() < 0.4:
                fields["max_images"] = images + 1
        if rnd.random() < 0.5:
            fields |= {"labels": LABELS, "rank_by": rnd.choice(["p['a red fox']", "clip_z - clip", "sharpness"])}
        rows.append(Request(id=rnd.choice("abC.-") + f"{n}", prompt=rnd.choice(WORDS), seed=n, **fields))
        for k in range(images + 2):
            lines += [record(rnd, rows[-1], k) for _ in range(rnd.choice([1, 1, 1, 2]))]
    lines += [record(rnd, Request(id="gone", num_images=1), 0)]
    rnd.shuffle(lines)
    with open(folder / "results.jsonl", "wb") as file:
        for line in lines:
            found = json.loads(line)
            if found["status"] == "done" and rnd.random() < 0.93:
                (folder / found["file"]).write_bytes(png(rows[0], found["index"]))
            odd = rnd.random()
            if odd < 0.05:
                file.write(line[: len(line) // 2].encode() + b"\n")
            elif odd < 0.1:
                file.write(json.dumps(found | {"newer": 1}, indent=None, separators=(",", ":")).encode() + b"\n")
            else:
                file.write(line.encode())
            vectors.append((found["id"], found["index"], found["sha256"]))
        file.write(lines[0].encode()[:-9])
    (folder / "requests.jsonl").write_text("".join(json_line(row.to_json()) for row in rows))
    with Store(folder, 8) as store:
        for row_id, index, digest in vectors:
            if digest and rnd.random() < 0.9:
                vector = np.array([rnd.gauss(0, 1) for _ in range(8)])
                store.add(row_id, index, digest, (vector / np.linalg.norm(vector)).astype(np.float16))
    return folder


def record(rnd: random.Random, row: Request, k: int) -> str:
    value = lambda: rnd.choice([None, round(rnd.gauss(0.3, 0.2), rnd.choice([1, 4])), rnd.randint(0, 2)])  # noqa: E731
    scores: dict[str, Any] = {"clip": value(), "clip_z": value(), "sharpness": value(), "flat": rnd.random() < 0.3}
    if rnd.random() < 0.8:
        scores["plugin"] = rnd.choice([1, True, None, 2.5])
    if row.labels and rnd.random() < 0.9:
        scores["p"] = {label: value() for label in row.labels}
    if rnd.random() < 0.1:
        scores = {}
    status = rnd.choice(["done"] * 8 + ["failed", "pruned", "replaced"])
    file, digest = (f"images/{row.id}-{k:02d}.png", f"{rnd.randint(0, 40):064x}") if status == "done" else (None, None)
    reason = None if status == "done" else rnd.choice([None, "nan", "«why»"])
    found = Result(
        str(row.id), k, k, status, reason, file, 100, digest, 64, 64, scores, 4, 8, 0.5, row.prompt, row.meta
    )
    found.fingerprint = "0123456789abcdef"
    return json_line(found.to_json())


def at_once(folder: Path, out: Path, picking: Picking, **options: Any) -> bytes:
    """What `decide` says of all records in memory."""
    rows, config = read_rows(folder), read_config(folder)
    asked = {row.id for row in rows}
    results = [r for r in read_results(folder) if r.id in asked]
    for k, r in enumerate(results):
        if r.status == "done" and not (folder / str(r.file)).exists():
            results[k] = dataclasses.replace(r, status="failed", reason=GONE, file=None)
    orders = [options.get("where"), options.get("rank_by"), *(row.rank_by for row in rows)]
    known = read_known(folder, config or {}, results, picking, orders)
    out.mkdir(exist_ok=True)
    write_selection(out, decide(rows, results, picking=picking, known=known, **options))
    return (out / "selection.json").read_bytes()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"where": "clip > 0.3", "rank_by": "clip", "keep": 1},
    {"where": "clip > 0.2 and not flat or plugin == 1", "keep": 2},
    {"where": "p['a red fox'] > 0.2", "rank_by": "max(p['a {cat}'], clip) / clip_z"},
    {"rank_by": "-sharpness", "keep": 3},
    {"where": "sim < 0.6", "rank_by": "clip - 0.5 * sim", "keep": 2},
]
PICKINGS = [Picking(), Picking(dedupe=0.8), Picking(diverse=0.5, dedupe=1.0)]


@pytest.mark.parametrize("seed", range(4))
def test_the_selection_is_that_of_all_records_at_once(seed: int, tmp_path: Path) -> None:
    folder = random_run(tmp_path / "run", seed)
    for options in OPTIONS:
        for picking in PICKINGS:
            if picking.diverse is not None and ("keep" not in options or "sim" in options.get("rank_by", "")):
                continue
            expected = at_once(folder, tmp_path / "once", picking, **options)
            refilter(folder, picking=picking, **options)
            assert (folder / "selection.json").read_bytes() == expected, (options, picking)


def test_a_table_reads_what_the_records_say(tmp_path: Path) -> None:
    folder = random_run(tmp_path / "run", 7)
    table = Table(folder, read_row_table(folder), Wanted())
    asked = {row.id for row in read_rows(folder)}
    expected = {(r.id, r.index): r for r in read_results(folder) if r.id in asked}
    found = {(r.id, r.index): r for r in table.whole(range(len(table)))}
    assert found.keys() == expected.keys()
    gone = {key for key, r in expected.items() if r.status == "done" and not (folder / str(r.file)).exists()}
    assert all(found[key] == r for key, r in expected.items() if key not in gone)
    assert {key for key, r in found.items() if r.reason == GONE} == gone and gone
    some = Kept(table, [3, 1, 2])
    assert [r.id for r in some] == [some[k].id for k in range(3)] == [r.id for r in some[0:3]]
    assert list(table.rows.prompts()) == [(row.id, row.prompt) for row in read_rows(folder)]


ODD: list[dict[str, Any]] = [
    {"prompt": "x\x00y"}, {"seed": 2**32}, {"seed": -1}, {"id": "con"}, {"id": "..."}, {"prompt": "x" * 100_001},
    {"stesp": 3}, {"prompt": 5}, {"seed": 1.5}, {"seed": [1]}, {"negative_prompt": None}, {"num_images": 0},
]  # fmt: skip


@pytest.mark.parametrize("line", ODD, ids=str)
def test_a_row_like_a_checked_one_is_checked_too(line: dict[str, Any], tmp_path: Path) -> None:
    plain = Request(id="r0", prompt="x", seed=1, num_images=2).to_json()
    three = [plain, plain | {"id": "r1"}, plain | {"id": "r2"} | line]
    (tmp_path / "requests.jsonl").write_text("".join(map(json_line, three)))
    with pytest.raises(InputError) as expected:
        read_rows(tmp_path)
    with pytest.raises(InputError) as refused:
        read_row_table(tmp_path)
    assert str(refused.value) == str(expected.value)


def test_a_run_that_never_drew_has_an_empty_selection(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text(
        json_line(Request(id="r0").to_json()) + json_line(Request(id="r1").to_json())
    )
    (tmp_path / "run.json").write_text(json.dumps(CONFIG))
    assert refilter(tmp_path, where="clip > 0.3") == {"run": str(tmp_path), "rows": 2, "images": 0, "kept": 0}
    assert json.loads((tmp_path / "selection.json").read_text())["images"] == {}


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text(2 * json_line(Request(id="r0").to_json()))
    with pytest.raises(InputError, match=r"requests\.jsonl:2: id: 'r0' is that of an earlier row"):
        read_row_table(tmp_path)


@pytest.mark.slow
def test_fifty_thousand_pictures_take_little_memory_and_are_decided_alike(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make(folder, rows=12_500, images=4)
    options = ["--where", "clip > 0.3", "--rank-by", "clip", "--keep", "1"]
    command = [sys.executable, "-m", "genkit", "filter", str(folder), *options]
    plain = peak(command)
    found = (folder / "selection.json").read_bytes()
    assert found == at_once(folder, tmp_path / "once", Picking(), where="clip > 0.3", rank_by="clip", keep=1)
    assert plain < 120, "MB; all records in memory take more than twice that"
    assert len(list((folder / "gallery").glob("*/images/*/*.js"))) == 500
    for form in ("folder", "webdataset"):
        assert peak([*command, "-o", str(tmp_path / form), "--format", form]) < plain + 50
    with tarfile.open(tmp_path / "webdataset/000000.tar") as tar:
        names = [Path(name).name for name in tar.getnames() if name.endswith(".png")]
    lines = [json.loads(line) for line in (tmp_path / "folder/metadata.jsonl").open()]
    assert names == [line["file_name"] for line in lines]
    assert len(names) == json.loads(found)["kept"]


def peak(command: list[str]) -> float:
    """The most MB of memory that a command has at a time, as a small process sees it that starts it."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=-3);"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024
