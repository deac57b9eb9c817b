"""Prompt files that are wrong: each is refused in one line that names file, line and field."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from genkit.errors import InputError
from genkit.rows.prompts import read_prompts
from genkit.rows.rowfiles import MAX_BYTES
from tests.promptfiles import refusal, row, with_pictures, write

SUFFIXES = ("txt", "jsonl", "csv", "yaml")
GOOD = row(prompt="a")

# (case, file, content, place after the file's name, words of the message)
BAD: list[tuple[str, str, str | bytes, str, str]] = [
    *[(f"1-empty-{s}", f"a.{s}", b"", ":", "is empty") for s in SUFFIXES],
    *[(f"2-blank-{s}", f"a.{s}", b"\n \n\t\r\n\n", ":", "is empty") for s in SUFFIXES],
    *[(f"3-bom-{s}", f"a.{s}", b"\xef\xbb\xbf", ":", "is empty") for s in SUFFIXES],
    ("2-comments", "a.txt", "# one\n\n  # two\n", ":", "holds no rows"),
    ("2-header-only", "a.csv", "prompt,seed\n", ":", "holds no rows"),
    ("2-yaml-comment", "a.yaml", "# nothing\n", ":1:", "holds None"),
    *[(f"5-{codec}-{s}", f"a.{s}", "a cat".encode(codec), ":", "UTF-16")
      for codec in ("utf-16", "utf-16-le", "utf-16-be") for s in SUFFIXES],
    *[(f"6-latin1-{s}", f"a.{s}", b"a\nb\ncaf\xe9\nd\n", ":3:", "byte 0xe9 is not UTF-8") for s in SUFFIXES],
    *[(f"7-cut-utf8-{s}", f"a.{s}", "a\n日本".encode()[:-1], ":2:", "is not UTF-8") for s in SUFFIXES],
    ("8-surrogate-json", "a.jsonl", GOOD + r'{"prompt": "a\ud800"}', ":2:", "half a surrogate pair"),
    ("8-surrogate-key", "a.jsonl", r'{"a\ud800": 1}', ":1:", "unknown field"),
    ("8-surrogate-csv", "a.csv", 'prompt,meta\na,"{""a"": ""\\ud800""}"', ":2:", "meta: "),
    ("8-surrogate-bytes", "a.txt", b"a\xed\xa0\x80", ":1:", "is not UTF-8"),
    ("8-surrogate-yaml", "a.yaml", 'requests:\n- prompt: "\\ud800"\n', ":2:", ""),
    *[(f"9-nul-{s}", f"a.{s}", b"a\nb\0c\n", ":2:", "NUL") for s in SUFFIXES],
    ("9-nul-escape", "a.jsonl", r'{"prompt": "a\u0000b"}', ":1:", "prompt: 'a\\x00b' holds a NUL"),
    *[(f"10-yaml-{ord(c):x}", "a.yaml", f"requests:\n- prompt: a{c}b\n", ":2:", "") for c in "\u2028\x85\x1c\x0b"],
    *[(f"11-cr-{s}", f"a.{s}", b"prompt\ra\rb\r", ":1:", "carriage return") for s in SUFFIXES],
    ("11-cr-mixed", "a.txt", b"a\r\nb\rc\r\n", ":2:", "carriage return"),
    *[(f"13-long-{n}", n, c, p, "at most 100000 characters") for n, c, p in (
        ("a.txt", "ok\n" + "x" * 10**7, ":2:"), ("a.jsonl", row(prompt="x" * 10**7), ":1:"),
        ("a.yaml", "requests:\n- prompt: " + "x" * 10**6, ":2:"))],
    ("13-long-key", "a.jsonl", '{"' + "k" * 10**6 + '": 1}', ":1:", "unknown field"),
    ("14-long-cell", "a.csv", 'prompt\na\n"' + "x" * 300_000 + '"\n', ":3:", "longer than 131072"),
    ("15-open-quote", "a.csv", 'prompt,seed\na,1\n"b,2\nc,3\nd,4\n', ":3:", "opened and never closed"),
    ("15-quote-in-text", "a.csv", 'prompt,seed\n"a" b,1\n', ":2:", "after a closing quote"),
    ("15-open-quote-header", "a.csv", 'prompt,"seed\na,1\n', ":1:", "opened and never closed"),
    ("16-header-twice", "a.csv", "prompt,seed,prompt\na,1,b\n", ":1:", "'prompt' is there twice"),
    ("16-header-alias", "a.csv", "prompt,steps,num_inference_steps\na,,\n", ":1:", "num_inference_steps: given twice"),
    ("16-header-blank", "a.csv", "prompt,,seed\na,1,2\n", ":1:", "has no name"),
    ("16-header-unknown", "a.csv", "promt,seed\na,1\n", ":1:", "'promt': unknown field (did you mean 'prompt'?)"),
    ("16-two-lists", "a.csv", 'prompt,loras\na,"[""x""], ""y"": 1"\n', ":2:", "loras: "),
    ("17-short", "a.csv", "prompt,seed\na,1\nb\n", ":3:", "1 cells under 2 columns"),
    ("17-long", "a.csv", "prompt,seed\na,1\nb, c,3\n", ":3:", "3 cells under 2 columns"),
    ("18-json", "a.jsonl", '{"seed": 1, "prompt": "a", "seed": 2}', ":1:", "'seed': key is given twice"),
    ("18-json-inside", "a.jsonl", '{"prompt": "a", "meta": {"k": 1, "k": 2}}', ":1:", "'k': key is given twice"),
    ("18-alias", "a.jsonl", row(steps=1, num_inference_steps=2), ":1:", "num_inference_steps: given twice"),
    ("18-yaml", "a.yaml", "requests:\n- prompt: a\n  seed: 1\n  seed: 2\n", ":4:", "'seed': key is given twice"),
    ("18-yaml-top", "a.yaml", "requests: [{seed: 1}]\nrequests: []\n", ":2:", "'requests': key is given twice"),
    *[(f"19-{v}", "a.jsonl", GOOD + f'{{"guidance_scale": {v}}}', ":2:", "") for v in
      ("Infinity", "-Infinity", "1e400", "-1e400")],
    ("19-csv-large", "a.csv", "prompt,guidance_scale\na,1e400\n", ":2:", "guidance_scale: inf must be finite"),
    ("19-yaml-nan", "a.yaml", "requests:\n- guidance_scale: .nan\n", ":2:", "'.nan': YAML readers disagree"),
    ("20-json", "a.jsonl", '{"seed": ' + "9" * 5000 + "}", ":1:", "digits"),
    ("20-csv", "a.csv", "seed\n" + "9" * 5000 + "\n", ":2:", "seed: "),
    ("20-yaml", "a.yaml", "requests:\n- seed: " + "9" * 5000, ":2:", ""),
    ("21-json", "a.jsonl", GOOD + '{"meta": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, ":2:", "nested too deeply"),
    ("21-json-list", "a.jsonl", '{"seed": ' + "[" * 100_000, ":1:", "nested too deeply"),
    ("21-json-levels", "a.jsonl", '{"meta": {"a": ' + "[" * 300 + "]" * 300 + "}}", ":1:", "meta: "),
    ("21-yaml", "a.yaml", "requests: " + "[" * 100_000, ":1:", "levels of nesting"),
    ("21-yaml-braces", "a.yaml", "requests: " + "{a: " * 100_000, ":1:", "levels of nesting"),
    ("22-array", "a.jsonl", '[{"prompt": "a"}, {"prompt": "b"}]', ":1:", "a JSON array"),
    ("22-array-lines", "a.jsonl", '[\n{"prompt": "a"},\n{"prompt": "b"}\n]\n', ":1:", "a JSON array"),
    ("22-pretty", "a.jsonl", '{\n  "prompt": "a"\n}\n', ":1:", "one whole object"),
    ("22-commas", "a.jsonl", '{"prompt": "a"},\n{"prompt": "b"}\n', ":1:", "not JSON"),
    *[(f"23-{v}", "a.jsonl", GOOD + v, ":2:", "") for v in ('"a cat"', "7", "null", "true", "a cat", "{", "{'a': 1}")],
    ("23-yaml-text", "a.yaml", "requests:\n- prompt: a\n- a cat\n", ":2:", "row 1: 'a cat' is not a mapping"),
    ("23-yaml-nothing", "a.yaml", "requests: []\n", ":1:", "requests: []"),
    ("23-yaml-top", "a.yaml", "a cat\n", ":1:", "holds 'a cat'"),
    ("23-yaml-defaults", "a.yaml", "defaults: 7\nrequests: [{prompt: a}]\n", ":1:", "defaults: 7 is not a mapping"),
    ("24-json", "a.jsonl", GOOD + row(promt="a"), ":2:", "'promt': unknown field (did you mean 'prompt'?)"),
    ("24-yaml", "a.yaml", "requests:\n- prompt: a\n- promt: b\n", ":3:", "did you mean 'prompt'?"),
    ("24-yaml-defaults", "a.yaml", "requests: [{prompt: a}]\ndefaults:\n  stesp: 3\n", ":3:", "defaults: 'stesp'"),
    ("24-yaml-top", "a.yaml", "default:\n  steps: 3\nrequests: [{prompt: a}]\n", ":1:", "did you mean 'defaults'?"),
    ("24-yaml-number", "a.yaml", "requests:\n- 7: a\n", ":2:", "'7': unknown field"),
    ("25-list", "a.jsonl", row(prompt=["a"]), ":1:", "prompt: ['a'] must be text"),
    ("25-number", "a.jsonl", row(prompt=7), ":1:", "prompt: 7 must be text"),
    ("25-empty", "a.jsonl", row(prompt=""), ":1:", "prompt: '' is empty"),
    ("25-blank", "a.jsonl", row(prompt=" \n\u2003"), ":1:", "is empty"),
    ("25-yaml-number", "a.yaml", "requests:\n- prompt: 1984\n", ":2:", "prompt: 1984 must be text"),
    ("25-yaml-defaults", "a.yaml", "defaults: {prompt: ''}\nrequests: [{seed: 1}]\n", ":1:", "defaults: prompt: ''"),
    ("26-twice", "a.jsonl", row(id="x") + row(id="y") + row(id="x"), ":3:", "id: 'x' is the id of line 1 too"),
    ("26-numbered", "a.jsonl", row(id="000001") + row(prompt="a"), ":2:", "id: '000001' is the id of line 1 too"),
    ("26-one-line", "a.yaml", "requests: [{id: a}, {id: a}]\n", ":1:", "id: 'a' is the id of line 1 too"),
    ("26-defaults", "a.yaml", "defaults: {id: a}\nrequests: [{seed: 1}]\n", ":1:", "defaults: id: "),
    *[(f"27-{v[:9]}", "a.jsonl", GOOD + row(id=v), ":2:", "id: ") for v in
      ("../../x", "/abs", "CON", "a/b", "x" * 300, ".", "..", "a b", "nul.png")],
    ("28-case", "a.jsonl", row(id="Fox") + row(id="fox"), ":2:", "id: 'fox' is the id of line 1 too"),
    ("28-case-up", "a.jsonl", row(id="fox") + row(id="FOX"), ":2:", "id: 'FOX' is the id of line 1 too"),
    ("28-nfc", "a.jsonl", row(id="caf\u00e9"), ":1:", "id: 'caf\\xe9'"),
    ("28-nfd", "a.jsonl", row(id="cafe\u0301"), ":1:", "id: 'cafe\\u0301'"),
    *[(f"29-{v}", "a.jsonl", GOOD + f'{{"seed": {v}}}', ":2:", "seed: ") for v in
      ("-2", "1.5", '"7"', "true", str(2**32), str(2**53 + 1), str(2**64))],
    *[(f"29-csv-{v}", "a.csv", f"prompt,seed\na,{v}\n", ":2:", "seed") for v in
      ("-2", "1.5", "0x10", "1_000", "true", str(2**32), "١", "1e3", '"1,,2"', '"[1,-2]"')],
    *[(f"29-yaml-{v}", "a.yaml", f"requests:\n- seed: {v}\n", ":2:", "") for v in
      ("-2", "1.5", "'7'", "true", "010", "1e3")],
    *[(f"30-{v}", "a.jsonl", GOOD + f'{{"steps": {v}}}', ":2:", "num_inference_steps: ") for v in (0, -1, 1001, 1e9)],
    *[(f"31-{v}", "a.jsonl", GOOD + f'{{"cfg_scale": {v}}}', ":2:", "guidance_scale: ") for v in
      (-1, 1e30, '"7"', "true")],
    *[(f"32-{v}", "a.jsonl", GOOD + f'{{"width": {v}}}', ":2:", "width: ") for v in (0, 7, 65_536, '"512"')],
    ("32-size", "a.csv", "prompt,size\na,512\n", ":2:", 'size: \'512\' is not like "512x512"'),
    *[(f"33-{v}", "a.jsonl", GOOD + f'{{"n": {v}}}', ":2:", "num_images: ") for v in (0, 10**9)],
    ("34-path", "a.txt", "ok\na cat --outpath_samples /etc\n", ":2:", "'--outpath_samples': "),
    ("34-start", "a.txt", '--prompt "a cat" --outpath_samples /etc\n', ":1:", "--outpath_samples: "),
    ("34-kohya", "a.txt", "a cat --w 512 --h tall\n", ":1:", "height: 'tall' is not a whole number"),
    ("34-unknown", "a.txt", "a cat --width 512\n", ":1:", "`width` is a field of .jsonl"),
    ("37-absent", "a.jsonl", GOOD + row(image="none.png"), ":2:", "image: "),
    ("37-folder", "a.jsonl", row(image="."), ":1:", "is a folder"),
    ("37-fifo", "a.jsonl", row(init_image="fifo"), ":1:", "a pipe"),
    ("37-zero", "a.jsonl", row(image="/dev/zero"), ":1:", "a pipe, socket or device"),
    *[(f"37-{v[:5]}", "a.jsonl", row(image=v), ":1:", "is a URL") for v in
      ("file:///etc/hosts", "http://169.254.169.254/a.png", "data:image/png;base64,AAAA", "s3://b/a.png")],
    ("37-link-out", "a.jsonl", row(image="in/out.png"), ":1:", "leads out of its folder"),
    ("37-mask", "a.jsonl", row(image="good.png", mask_image="text.png"), ":1:", "mask_image: "),
    ("37-nul", "a.jsonl", row(image="a\0.png"), ":1:", "image: "),
    ("37-long-name", "a.jsonl", row(image="x" * 5000), ":1:", "image: "),
    ("37-yaml-defaults", "a.yaml", "defaults: {image: none.png}\nrequests: [{prompt: a}]", ":1:", "defaults: image: "),
    ("38-gz", "a.txt.gz", b"\x1f\x8b\x08\0", ":", "unknown kind of file '.gz'"),
    ("38-gz-renamed", "a.txt", b"\x1f\x8b\x08\1\1\1", ":1:", "byte 0x8b is not UTF-8"),
    ("38-json", "a.json", GOOD, ":", "holds no graph of ComfyUI"),
    ("38-no-suffix", "prompts", GOOD, ":", "unknown kind of file ''"),
    ("89-tag", "a.yaml", "requests:\n- prompt: !!python/object/apply:os.system ['true']\n", ":2:", "tags are not read"),
    ("89-tag-plain", "a.yaml", "requests:\n- seed: !!int '7'\n", ":2:", "tags are not read"),
    ("89-bomb", "a.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nrequests: [*b]\n", ":1:", "anchors and aliases"),
    ("89-merge", "a.yaml", "requests:\n- <<: {seed: 1}\n  prompt: a\n", ":2:", "'<<': unknown field"),
    *[(f"89-word-{v}", "a.yaml", f"requests:\n- seed: 1\n  prompt: {v}\n", ":3:", "write it in quotes") for v in
      ("no", "Yes", "on", "OFF", "y", "010", "1e3", "1_000", "0x1F", "0o17", "12:30", "2020-01-01", ".inf", "1.2.3")],
    ("89-two-documents", "a.yaml", "requests: [{seed: 1}]\n---\nrequests: [{seed: 2}]\n", ":2:", "a second doc"),
    ("89-not-yaml", "a.yaml", "requests: [{prompt: a}\n", ":", "not YAML"),
    ("89-tab", "a.yaml", "requests:\n\t- prompt: a\n", ":2:", "not YAML"),
    ("89-key", "a.yaml", "requests:\n- [a, b]: c\n", ":2:", "a key must be text"),
    ("55-gate", "a.jsonl", row(gate="clip > 2"), ":1:", "gate: 'clip > 2' is never true"),
    ("csv-meta", "a.csv", "prompt,meta\na,[1]\n", ":2:", "meta: "),
    ("csv-labels", "a.csv", 'prompt,labels\na,"a,,b"\n', ":2:", "labels: "),
    ("yaml-default-value", "a.yaml", "defaults:\n  steps: 0\nrequests:\n- prompt: a\n", ":4:", "(line 2: defaults)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "at", "words"), [case[1:] for case in BAD], ids=[ascii(c[0])[1:-1] for c in BAD]
)
def test_bad_files(tmp_path: Path, name: str, data: str | bytes, at: str, words: str) -> None:
    path = write(with_pictures(tmp_path), name, data)
    message = refusal(path)
    assert message.startswith(f"{path}{at}" if at == ":" else f"{path}{at} "), message
    assert words in message, message


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_BYTES + 1)


NO_FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("38-absent", lambda p: None, "is absent"),
    ("38-folder", lambda p: p.mkdir(), "is a folder, not a file"),
    ("38-fifo", lambda p: os.mkfifo(p), "is a pipe"),
    ("38-device", lambda p: p.symlink_to("/dev/zero"), "device"),
    ("38-loop", lambda p: p.symlink_to(p), "leads back to itself"),
    ("13-too-large", sparse, "more than 128 MiB"),
]


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in NO_FILES], ids=[case[0] for case in NO_FILES])
@pytest.mark.parametrize("name", ["a.txt", "a.yaml"])
def test_what_is_no_prompt_file(tmp_path: Path, name: str, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / name)
    assert words in refusal(tmp_path / name)


def test_38_a_folder_without_suffix_is_called_a_folder(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


def test_39_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.txt", "a cat\n" * 1000)
    real = os.fstat
    sizes = iter([0, 0])

    def grows(handle: int) -> os.stat_result:
        with open(path, "ab") as file:
            file.write(b"x" * (1 - next(sizes, 0)))
        return real(handle)

    monkeypatch.setattr(os, "fstat", grows)
    assert "changed while it was read" in refusal(path)


def test_39_a_writer_beside(tmp_path: Path) -> None:
    """A file rewritten without end is read whole or refused, never half a row."""
    path = write(tmp_path, "a.jsonl", GOOD * 10)
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            path.write_text(GOOD * random.choice([1, 5, 10]))

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(200):
            try:
                rows = read_prompts(path)
            except InputError:
                continue
            assert {r.prompt for r in rows} == {"a"}
    finally:
        stop.set()
        thread.join()
