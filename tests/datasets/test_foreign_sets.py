"""Data sets as other tools leave them: img2dataset, kohya's scripts, `datasets`, spreadsheets, Windows."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from genkit import InputError
from genkit.datasets.config import Data
from genkit.datasets.example import Examples
from genkit.datasets.sources import read_examples, repeated, split
from genkit.training.doctor import examine


def png(number: int = 0, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 67 % 256, number * 31 % 256, 90)).save(data, kind)
    return data.getvalue()


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def tar(path: Path, *members: tuple[str, bytes | None]) -> None:
    """Write a tar file; None is a folder, and b"-> name" a hard link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            elif data.startswith(b"-> "):
                info.type, info.linkname = tarfile.LNKTYPE, data[3:].decode()
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def read(path: Path, **data: Any) -> Examples:
    return read_examples(Data.model_validate({"path": str(path), **data}))


def captions(path: Path) -> dict[str, str | None]:
    return {e.key: e.caption for e in read(path)}


def listing(path: Path, count: int = 2) -> None:
    """Write the Parquet file that img2dataset leaves beside each shard."""
    table = {"key": [f"{k:09}" for k in range(count)], "url": ["u"] * count, "status": ["success"] * count}
    pq.write_table(pa.table(table), path)


def test_img2dataset_files(tmp_path: Path) -> None:
    for n in range(2):
        put(tmp_path / f"00000/00000000{n}.jpg", png(n, "JPEG"))
        put(tmp_path / f"00000/00000000{n}.txt", f"a cat {n}")
        put(tmp_path / f"00000/00000000{n}.json", '{"caption": "a cat", "url": "u"}')
    listing(tmp_path / "00000.parquet")
    put(tmp_path / "00000_stats.json", "{}")
    found = read(tmp_path)
    assert [e.caption for e in found] == ["a cat 0", "a cat 1"] and "1 Parquet files without pictures" in found.notes[0]


def test_img2dataset_tars(tmp_path: Path) -> None:
    for shard in range(2):
        members = [(f"{shard}{n:08}.{x}", d) for n in range(2) for x, d in (
            ("jpg", png(n, "JPEG")), ("txt", b"a cat"), ("json", b'{"caption": "a cat", "url": "u"}'))]  # fmt: skip
        tar(tmp_path / f"{shard:05}.tar", *members)
        listing(tmp_path / f"{shard:05}.parquet")
        put(tmp_path / f"{shard:05}_stats.json", "{}")
    found = read(tmp_path)
    assert len(found) == 4 and all(e.caption == "a cat" and e.fields == {"url": "u"} for e in found)


@pytest.mark.parametrize("column", ["jpg", "png", "image"])
def test_img2dataset_parquet(column: str, tmp_path: Path) -> None:
    table = {
        "key": ["0", "1", "2"], "caption": ["a cat", None, "a dog"], column: [png(0), None, png(2)],
        "status": ["success", "failed_to_download", "success"],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    found = read(tmp_path)
    assert [e.caption for e in found] == ["a cat", "a dog"] and [e.read().size for e in found] == [(16, 16)] * 2
    assert found.lacking == ("00000.parquet!000001 (failed_to_download)",)


def test_a_parquet_file_without_pictures_alone_is_an_error(tmp_path: Path) -> None:
    listing(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has no column image"):
        read(tmp_path)


@pytest.mark.parametrize("column", ["caption", "text", "captions of it"])
def test_several_captions_a_picture(column: str, tmp_path: Path) -> None:
    cells = [["a cat", " one cat ", ""], ["a dog"]]
    pictures = [{"bytes": png(n), "path": None} for n in range(2)]
    pq.write_table(pa.table({"image": pictures, column: cells}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", caption=column)
    assert found[0].captions == ("a cat", "one cat") and (found[1].caption, found[1].captions) == ("a dog", ())
    assert "1 pictures have several captions" in found.notes[0]
    put(tmp_path / "s/0.png", png())
    put(tmp_path / "s/metadata.jsonl", json.dumps({"file_name": "0.png", column: cells[0]}) + "\n")
    assert read(tmp_path / "s", caption=column)[0].captions == ("a cat", "one cat")
    put(tmp_path / "s/metadata.jsonl", json.dumps({"file_name": "0.png", column: ["a", 3]}) + "\n")
    with pytest.raises(InputError, match=r"\['a', 3\] is not a text"):
        read(tmp_path / "s", caption=column)


def test_one_of_several_captions_is_drawn_at_each_visit(tmp_path: Path) -> None:
    from genkit.training.data import Pictures

    put(tmp_path / "0.png", png())
    put(tmp_path / "metadata.jsonl", '{"file_name": "0.png", "text": ["a cat", "one cat", "the cat"]}\n')
    data = Data.model_validate({"path": str(tmp_path)})
    pictures = Pictures(read_examples(data), data, (16, 16), 8, seed=1)
    drawn = [pictures.batch([0], epoch).captions[0] for epoch in range(40)]
    assert set(drawn) == {"a cat", "one cat", "the cat"}
    assert drawn == [Pictures(read_examples(data), data, (16, 16), 8, 1).batch([0], e).captions[0] for e in range(40)]


def test_folders_of_kohyas_scripts(tmp_path: Path) -> None:
    for folder, count in (("10_ohwx man", 2), ("3_a dog", 1)):
        for n in range(count):
            put(tmp_path / folder / f"{n}.png", png(n + count))
    put(tmp_path / "10_ohwx man" / "1.txt", "ohwx man in a hat")
    found = read(tmp_path)
    assert {e.key: (e.caption, e.repeat) for e in found} == {
        "10_ohwx man/0.png": ("ohwx man", 10), "10_ohwx man/1.png": ("ohwx man in a hat", 10),
        "3_a dog/0.png": ("a dog", 3),
    }  # fmt: skip
    assert "10_ohwx man: 10 repeats of 'ohwx man'" in found.notes[0]
    visits = repeated(found)
    assert len(visits) == 23 and len({e.key for e in visits}) == 23
    report = examine(Data.model_validate({"path": str(tmp_path)}), found, read=found)
    assert report.facts["pictures"] == "3: 3 to train on in 23 visits an epoch, 0 held out"
    assert "kohya" in report.facts["assumed"] and not report.errors


def test_folders_that_only_begin_with_numbers_are_classes(tmp_path: Path) -> None:
    for folder in ("1_cat", "dog"):
        put(tmp_path / folder / "0.png", png())
    assert captions(tmp_path) == {"1_cat/0.png": "1 cat", "dog/0.png": "dog"}


@pytest.mark.parametrize("held", ["val", "test", "validation"])
def test_splits_side_by_side(held: str, tmp_path: Path) -> None:
    for part in ("train", held):
        for label in ("cat", "dog"):
            put(tmp_path / part / label / "0.png", png(len(part) + len(label)))
    found = read(tmp_path)
    assert {e.key: e.caption for e in found} == {"train/cat/0.png": "cat", "train/dog/0.png": "dog"}
    findings = examine(Data.model_validate({"path": str(tmp_path)}), found, read=found).findings
    assert any(f.level == "warning" and f"and not {held} beside it" in f.text for f in findings)
    assert {e.caption for e in read(tmp_path / held)} == {"cat", "dog"}, "which may be named"


def test_splits_of_archives(tmp_path: Path) -> None:
    for n, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        pq.write_table(pa.table({"image": [png(n)], "text": [name]}), tmp_path / f"{name}.parquet")
    found = read(tmp_path)
    assert [e.caption for e in found] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert "not trained on" in found.notes[0]


def test_a_class_that_is_called_train_is_a_class(tmp_path: Path) -> None:
    for folder in ("train", "plane"):
        put(tmp_path / folder / "0.png", png())
    assert set(captions(tmp_path).values()) == {"train", "plane"}


def test_hard_links_and_folders_in_a_tar(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", ("d", None), ("d/0.png", png()), ("d/0.txt", b"a cat"), ("d/1.png", b"-> d/0.png"),
        ("d/1.txt", b"-> d/0.txt"))  # fmt: skip
    found = read(tmp_path / "a.tar")
    assert [e.caption for e in found] == ["a cat"] * 2 and found[0].data() == found[1].data() == png()
    tar(tmp_path / "b.tar", ("1.png", b"-> /etc/passwd"))
    with pytest.raises(InputError, match=r"'1.png': links to what is not there before it"):
        read(tmp_path / "b.tar")


@pytest.mark.parametrize("name", ["img\\0.png", "./img/0.png", "sub/../img/0.png", "img//0.png"])
def test_file_names_of_other_systems(name: str, tmp_path: Path) -> None:
    put(tmp_path / "img/0.png", png())
    put(tmp_path / "metadata.jsonl", json.dumps({"file_name": name, "text": "a cat"}) + "\n")
    assert captions(tmp_path) == {"img/0.png": "a cat"}


def test_a_table_in_a_folder_beside_the_pictures(tmp_path: Path) -> None:
    put(tmp_path / "img/0.png", png())
    put(tmp_path / "meta/metadata.csv", "file_name,text\n../img/0.png,a cat\n")
    assert captions(tmp_path) == {"img/0.png": "a cat"}
    for name in ("../../0.png", "/etc/passwd", "..\\..\\0.png"):
        put(tmp_path / "meta/metadata.jsonl", json.dumps({"file_name": name}) + "\n")
        (tmp_path / "meta/metadata.csv").unlink(missing_ok=True)
        with pytest.raises(InputError, match="leads out of the folder"):
            read(tmp_path)


@pytest.mark.parametrize("rows", [",\r\n,\r\n", "\r\n\r\n", " , \r\n"])
def test_empty_rows_of_a_spreadsheet(rows: str, tmp_path: Path) -> None:
    put(tmp_path / "0.png", png())
    put(tmp_path / "metadata.csv", "\ufefffile_name,text\r\n0.png,a cat\r\n" + rows)
    assert captions(tmp_path) == {"0.png": "a cat"}


@pytest.mark.parametrize("name", ["a.jfif", "A.JPG", "a.JpEg", "A.PNG"])
def test_suffixes(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, png(kind="PNG" if name.endswith("PNG") else "JPEG"))
    put(tmp_path / f"{name.split('.')[0]}.TXT", "a cat")
    found = read(tmp_path)
    assert [e.caption for e in found] == ["a cat"] and found[0].read().size == (16, 16)


def test_bytes_after_the_end_of_a_picture(tmp_path: Path) -> None:
    for n, (kind, name) in enumerate((("PNG", "a.png"), ("JPEG", "b.jpg"))):
        put(tmp_path / name, png(n, kind) + bytes(4096))
    assert not examine(Data.model_validate({"path": str(tmp_path), "missing_captions": "empty"}), read(tmp_path)).errors


def test_captions_of_several_lines_are_said(tmp_path: Path) -> None:
    for n, text in enumerate(("a red fox\na fox in the snow", "a cat\n", "a dog")):
        put(tmp_path / f"{n}.png", png(n))
        put(tmp_path / f"{n}.txt", text)
    (finding,) = examine(Data.model_validate({"path": str(tmp_path)}), read(tmp_path)).findings
    assert finding.text == "1 captions have several lines, which are read as one caption: 0.png"


@pytest.mark.parametrize(("share", "level"), [(0.01, "error"), (0.2, "warning")])
def test_samples_without_a_picture(share: float, level: str, tmp_path: Path) -> None:
    members = [(f"{n:03}.{x}", d) for n in range(20) for x, d in (("png", png(n)), ("txt", b"a cat"))
               if not (x == "png" and n in (3, 9))]  # fmt: skip
    tar(tmp_path / "a.tar", *members)
    found = read(tmp_path / "a.tar")
    assert found.lacking == ("a.tar!003 (has txt)", "a.tar!009 (has txt)") and len(found) == 18
    data = Data.model_validate({"path": str(tmp_path), "broken": share})
    texts = [(f.level, f.text) for f in examine(data, found, read=found).findings if "have no picture" in f.text]
    assert len(texts) == 1 and texts[0][0] == level and "2 of 20 samples" in texts[0][1] and "a.tar!009" in texts[0][1]


def test_a_picture_that_tears_in_the_night_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from genkit.training.data import Pictures

    for n in range(10):
        put(tmp_path / f"{n}.png", png(n))
    data = Data.model_validate({"path": str(tmp_path), "broken": 0.1})
    pictures = Pictures(read(tmp_path), data, (16, 16), 8, seed=1)
    put(tmp_path / "4.png", png(4)[:60])
    batch = pictures.batch([3, 4, 5], epoch=0)
    assert batch.keys == ["3.png", "5.png", "5.png"] and "left out: 4.png" in caplog.text
    assert pictures.batch([4], epoch=1).keys == ["5.png"] and caplog.text.count("left out") == 1
    put(tmp_path / "5.png", b"")
    with pytest.raises(InputError, match=r"5\.png"):
        pictures.batch([5], epoch=2)


def test_one_picture_is_trained_on(tmp_path: Path) -> None:
    put(tmp_path / "0.png", png())
    data = Data.model_validate({"path": str(tmp_path)})
    assert [len(part) for part in split(read_examples(data), data)] == [1, 0]


def test_home_and_variables_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", str(tmp_path))
    put(tmp_path / "my set é/0.png", png())
    for name in ("~/my set é", "$SETS/my set é", "${SETS}/*"):
        assert len(read_examples(Data.model_validate({"path": name}))) == 1
