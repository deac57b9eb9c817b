"""Kept pictures as a folder, WebDataset, Parquet: read by what people use, killed half-way, refused where needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import genkit.datasets.export
import genkit.datasets.shards
from genkit.datasets.export import Target
from genkit.errors import HostError, InputError
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.run import Run
from genkit.studies.filter import refilter
from tests.null_run import CONFIG, png, result_of

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "a fox",
    '=HYPERLINK("http://x")',
    "<script>alert(1)</script>\x1b[31m",
    'line\nbreak\u2028, "quoted"',
    "é" * 300,
]
IDS = ["plain", "a.b.c", "..x", "-dash", "n" * 100]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [Request(id=i, prompt=p, num_images=2, seed=7) for i, p in zip(IDS, HOSTILE, strict=True)]
    with Run.open(tmp_path / "run", CONFIG, rows) as made:
        for n, row in enumerate(rows):
            for k in range(2):
                scores = {"clip": (2 * n + k) / 10, "flat": False, **({"p": {"=1+1": 0.25}, "odd": None} if n else {})}
                made.save(result_of(row, k, scores=scores, meta={"set": "<b>"} if n else None), png(row, k))
    return tmp_path / "run"


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    """Read the tars as the format is defined: what shares a name up to its first dot is one sample."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None and suffix not in found.setdefault(key, {})
                found[key][suffix] = file.read()
    return found


def test_webdataset_shards_hold_every_kept_picture_with_its_caption(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert refilter(run, where="clip > 0.05", out=out, target=Target("webdataset", 6000))["copied"] == 9
    found = samples(out)
    assert len(found) == 9
    for sample in found.values():
        told = json.loads(sample["json"])
        row = Request(id=told["id"], prompt=told["text"], seed=7)
        assert set(sample) == {"png", "txt", "json"}
        assert sample["txt"].decode() == told["text"] == HOSTILE[IDS.index(told["id"])]
        assert sample["png"] == png(row, told["index"])
        assert told["scores"]["clip"] > 0.05
    assert sorted(shards(out)) == [f"{n:06d}.tar" for n in range(len(shards(out)))] and len(shards(out)) > 2
    assert all(len(data) <= 6000 + 10240 for data in shards(out).values()), "but for the end mark of a tar"
    assert "100 %  of the pictures are in shards" in capsys.readouterr().err


def test_a_library_reads_the_shards(run: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    refilter(run, out=tmp_path / "out", target=Target("webdataset", 6000))
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(read) == 10
    assert all(sample["txt"] == sample["json"]["text"] and sample["png"].size == (4, 5) for sample in read)


def test_parquet_has_pictures_captions_and_scores(run: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out"
    assert refilter(run, out=out, target=Target("parquet", 6000))["copied"] == 10
    tables = [parquet.read_table(path) for path in sorted(out.glob("*.parquet"))]
    assert len(tables) > 2 and len({table.schema for table in tables}) == 1
    first = parquet.read_metadata(out / "000000.parquet").row_group(0).column(0)
    assert first.path_in_schema == "image.bytes" and first.statistics is None, "or they hold two whole pictures"
    rows = [row for table in tables for row in table.to_pylist()]
    assert [(row["id"], row["index"]) for row in rows] == [(i, k) for i in IDS for k in range(2)]
    for row in rows:
        assert row["image"]["bytes"] == png(Request(id=row["id"], prompt=row["text"], seed=7), row["index"])
        assert row["image"]["path"] == f"{row['id']}-{row['index']:02d}.png"
        assert row["score_flat"] is False and isinstance(row["score_clip"], float)
        assert "score_odd" not in row
    assert json.loads(rows[2]["p"]) == {"=1+1": 0.25} and rows[0]["p"] is None
    assert json.loads(rows[2]["meta"]) == {"set": "<b>"}


def test_datasets_sees_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "out"
    refilter(run, out=out, target=Target("parquet", 6000))
    read = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(read.features["image"], datasets.Image) and len(read) == 10
    assert isinstance(read[0]["image"], Image.Image) and read[0]["image"].size == (4, 5)
    assert read["text"][2] == HOSTILE[1] and read["score_clip"][9] == 0.9


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_a_second_export_rewrites_only_what_changed(form: str, run: Path, tmp_path: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    out, target = tmp_path / "out", Target(form, 6000)
    refilter(run, out=out, target=target)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name[0] != "."}
    refilter(run, out=out, target=target)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name[0] != "."} == before
    assert refilter(run, where="clip < 0.35", out=out, target=target)["copied"] == 4
    assert 0 < len(shards(out)) < len(before)
    fresh = tmp_path / "fresh"
    refilter(run, where="clip < 0.35", out=fresh, target=target)
    assert shards(out) == shards(fresh)


def test_one_shard_holds_what_fits_and_a_picture_larger_than_a_shard_has_its_own(run: Path, tmp_path: Path) -> None:
    refilter(run, out=tmp_path / "one", target=Target("webdataset"))
    assert list(shards(tmp_path / "one")) == ["000000.tar"]
    refilter(run, out=tmp_path / "many", target=Target("webdataset", 1000))
    assert len(shards(tmp_path / "many")) == 10
    refilter(run, where="clip > 5 * clip + 1", out=tmp_path / "none", target=Target("webdataset"))
    assert shards(tmp_path / "none") == {}


CHILD = """
import itertools, sys, time
from pathlib import Path
import genkit.datasets.export, genkit.datasets.shards
from genkit.datasets.export import Target
from genkit.studies.filter import refilter
real = genkit.datasets.export.picture
seen = itertools.count(1)
def until(folder, r):
    if next(seen) == int(sys.argv[4]):
        print("now", flush=True)
        time.sleep(3600)  # until it is killed
    return real(folder, r)
genkit.datasets.export.picture = genkit.datasets.shards.picture = until
size = None if sys.argv[3] == "folder" else 6000
refilter(Path(sys.argv[1]), out=Path(sys.argv[2]), target=Target(sys.argv[3], size))
"""


@pytest.mark.parametrize("form", ["folder", "webdataset", "parquet"])
@pytest.mark.parametrize("pictures", [1, 4, 9])
def test_a_killed_export_leaves_whole_files_only_and_goes_on(
    form: str, pictures: int, run: Path, tmp_path: Path
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    whole, out, target = tmp_path / "whole", tmp_path / "out", Target(form, None if form == "folder" else 6000)
    refilter(run, out=whole, target=target)
    command = [sys.executable, "-c", CHILD, str(run), str(out), form, str(pictures + 1)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "now\n"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    left = shards(out)
    assert left.items() <= shards(whole).items() and len(left) < len(shards(whole))
    stamps = {name: (out / name).stat().st_mtime_ns for name in left}
    assert refilter(run, out=out, target=target)["copied"] == 10
    assert shards(out) == shards(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in left} == stamps, "what was whole was not written again"
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_an_export_goes_on_for_another_choice_and_leaves_nothing_of_the_first(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    refilter(run, where="clip < 0.45", out=out)
    taken: list[str] = []

    def breaks(folder: Path, r: Result) -> bytes:
        taken.append(r.id)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return real(folder, r)

    real = genkit.datasets.export.picture
    monkeypatch.setattr("genkit.datasets.export.picture", breaks)
    with pytest.raises(KeyboardInterrupt):
        refilter(run, out=out)
    assert len(list(out.glob("*.png"))) == 7
    assert refilter(run, where="clip > 0.35", out=out)["copied"] == 6
    assert len(taken) == 3 + 3, "what is there as it should be is not copied again"
    fresh = tmp_path / "fresh"
    refilter(run, where="clip > 0.35", out=fresh)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in fresh.iterdir()}


def test_a_table_is_read_whatever_the_rows_say_in_meta(tmp_path: Path) -> None:
    """`datasets` reads metadata.jsonl with this: a column has one type."""
    reader = pytest.importorskip("pyarrow.json")
    rows = [Request(id=f"r{n}", prompt=f"p{n}") for n in range(3)]
    with Run.open(tmp_path / "run", CONFIG, rows) as made:
        for row, meta in zip(rows, ({"a": 1}, {"a": "x", "b": [1, "x"]}, None), strict=True):
            made.save(result_of(row, 0, scores={"clip": 0.5, "p": {row.prompt: 0.5}}, meta=meta), png(row, 0))
    refilter(tmp_path / "run", out=tmp_path / "out")
    table = reader.read_json(tmp_path / "out" / "metadata.jsonl").to_pydict()
    assert table["file_name"] == ["r0-00.png", "r1-00.png", "r2-00.png"]
    assert table["meta"] == ['{"a": 1}', '{"a": "x", "b": [1, "x"]}', None]


def test_pictures_of_another_format_keep_their_ending_and_the_order_is_that_of_the_rows(tmp_path: Path) -> None:
    rows = [Request(id=f"r{n}", prompt=f"p{n}") for n in range(3)]
    with Run.open(tmp_path / "run", CONFIG, rows) as made:
        for row in reversed(rows):
            made.save(result_of(row, 0), png(row, 0), ".webp")
    refilter(tmp_path / "run", out=tmp_path / "out", target=Target("webdataset"))
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert tar.getnames()[::3] == ["r0-00.webp", "r1-00.webp", "r2-00.webp"]


@pytest.mark.parametrize("form", ["folder", "webdataset"])
def test_a_damaged_picture_is_never_exported(form: str, run: Path, tmp_path: Path) -> None:
    path = run / "images" / "plain-00.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(HostError, match=r"plain-00\.png: is damaged"):
        refilter(run, out=tmp_path / "out", target=Target(form))
    assert shards(tmp_path / "out") == {}


@pytest.mark.parametrize("what", ["mine.txt", "changed", "manifest"])
def test_somebody_elses_folder_is_left_alone(what: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refilter(run, out=out, target=Target("webdataset", 6000))
    if what == "changed":
        with open(out / "000001.tar", "ab") as file:
            file.write(b"more")
    else:
        (out / (".export.json" if what == "manifest" else what)).write_text("mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="--out: "):
        refilter(run, where="clip > 0.4", out=out, target=Target("webdataset", 6000))
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_parquet_without_pyarrow_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = genkit.datasets.shards.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "pyarrow" else real(name, *a))
    with pytest.raises(HostError, match="pip install pyarrow"):
        refilter(run, out=tmp_path / "out", target=Target("parquet"))
    assert not (tmp_path / "out").exists() and not (run / "selection.json").exists()


REFUSED: dict[str, tuple[tuple[str, str | None], bool, str]] = {
    "form": (("webdatset", None), True, "--format: 'webdatset' is none of folder, webdataset, parquet (did you mean"),
    "no folder": (("webdataset", None), False, "--format: needs -o"),
    "folder": (("folder", "5MB"), True, "--shard-size: is for --format webdataset and parquet"),
    "unit": (("webdataset", "5 parsecs"), True, "--shard-size: '5 parsecs' is not like 500MB"),
    "small": (("webdataset", "5"), True, "--shard-size: 5 bytes is not within"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, run: Path, tmp_path: Path) -> None:
    given, out, text = REFUSED[case]
    with pytest.raises(InputError) as refused:
        refilter(run, out=tmp_path / "out" if out else None, target=Target.of(*given))
    assert str(refused.value).startswith(text)
    assert not (tmp_path / "out").exists()


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"500MB": 500_000_000, "2gb": 2 * 10**9, "4 KiB": 4096, "5000": 5000}
    assert {text: Target.of("webdataset", text).shard_size for text in sizes} == sizes
