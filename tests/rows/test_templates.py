"""Templates become rows: each with its own expansion, LoRAs of its tags, and what was written beside what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from genkit import InputError, Request
from genkit.rows.prompting import plain, scripted
from genkit.rows.templates import expanded


def row(prompt: str, **fields: Any) -> Request:
    return Request(**{"id": "r", "syntax": "a1111", "prompt": prompt, **fields})


def texts(rows: list[Request]) -> list[str]:
    return [r.prompt for r in rows]


def test_plain_rows_stay_plain() -> None:
    given = Request(id="r", prompt="a {red|green} (fox:1.2) <lora:x>")
    assert expanded(given, 0) == [given] and given.plain_prompt == given.prompt


def test_an_expansion_depends_on_its_row_alone() -> None:
    words = "{" + "|".join(f"w{i}" for i in range(50)) + "}"
    one = expanded(row(words, id="a", expansions=3), 7)
    assert [r.id for r in one] == ["a-1", "a-2", "a-3"] and len(set(texts(one))) > 1
    assert expanded(row(words, id="a", expansions=3), 7) == one
    assert texts(expanded(row(words, id="b", expansions=3), 7)) != texts(one)
    assert texts(expanded(row(words, id="a", expansions=3), 8)) != texts(one)
    assert texts(expanded(row(words, id="a", expansions=5), 7))[:3] == texts(one)
    assert all(r.template == {"prompt": words} and r.expansions is None for r in one)
    assert [r for found in one for r in expanded(found, 7)] == one  # as a run is read again


def test_all_combinations_and_their_ids() -> None:
    rows = expanded(row("{e$$a|b} fox", negative_prompt="{e$$c|d}", expansions=2, seed=5, num_images=3), 0)
    assert texts(rows) == ["a fox"] * 4 + ["b fox"] * 4
    assert [r.negative_prompt for r in rows] == ["c", "c", "d", "d"] * 2
    assert [r.id for r in rows] == [f"r-{i}" for i in range(1, 9)]
    assert [r.seed for r in rows] == [5 + 3 * i for i in range(8)]
    (single,) = expanded(row("a fox", seed=5), 0)
    assert (single.id, single.seed) == ("r", 5)


def test_wildcards_and_loras_are_found(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "colour.txt").write_text("red\n")
    (tmp_path / "l" / "deep").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / "l" / "style.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "l" / "deep" / "v2.safetensors", metadata={"ss_output_name": "given"})
    (tmp_path / "l" / "deep" / "loop").symlink_to(tmp_path / "l")
    (found,) = expanded(
        row("a __colour__ fox <lora:style:0.5:0.8>, <lora:given>", loras=[{"file": "/x.safetensors"}]),
        0, tmp_path / "w", tmp_path / "l",
    )  # fmt: skip
    assert found.prompt == "a red fox ,"
    assert [(Path(lora["file"]).name, lora["weight"], lora["text_weight"]) for lora in found.loras or ()] == [
        ("x.safetensors", 1.0, 1.0), ("style.safetensors", 0.8, 0.5), ("v2.safetensors", 1.0, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ("a <lora:style>", {}, "prompt: <lora:style>: is looked for in --lora-dir, and none is given"),
        ("a <lora:stile>", {"lora": True}, "prompt: <lora:stile>: .* 'stile.safetensors' \\(did you mean 'style'"),
        ("a <lora:old>", {"lora": True}, "prompt: <lora:old>: .*old.ckpt may hold code; convert it to .safetensors"),
        ("a <lora:twice>", {"lora": True}, "prompt: <lora:twice>: is the name of .* and of"),
        ("a", {"negative_prompt": "<lora:style>"}, "negative_prompt: <lora:style>: LoRAs are named in the prompt"),
        ("a __colour__", {}, "prompt: .*colour"),
        ("a {red", {}, "prompt: "),
        ("a", {"prompt_2": "b"}, 'prompt_2: does not go with syntax "a1111"'),
        ("a", {"syntax": None, "expansions": 2}, "expansions: texts of a template"),
        ("{e$$a|b}" * 30, {}, "combinations, more than"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, prompt: str, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("style", "twice", "deep/twice"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "old.ckpt").touch()
    folder = tmp_path if fields.pop("lora", None) else None
    with pytest.raises(InputError, match=message) as caught:
        expanded(row(prompt, **fields), 0, None, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"syntax": "a111"}, "syntax: 'a111' is no syntax \\(did you mean 'a1111'"),
        ({"clip_skip": 0}, "clip_skip: 0 must be at least 1"),
        ({"template": {"prmpt": "x"}}, "template: .*has no 'prmpt'"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(prompt="a", **fields)


def test_what_each_call_reads() -> None:
    def read(prompt: str, steps: int, calls: int) -> list[tuple[float, list[tuple[int, str]]]]:
        script = scripted(prompt, "", steps, calls)
        return [(w, [(c, "".join(t for t, _ in chunks[0])) for c, chunks in texts]) for w, texts in script.prompts]

    assert read("a fox", 8, 8) == [(1.0, [(0, "a fox")])]
    assert read("[a:b:0.5]", 8, 8) == [(1.0, [(0, "a"), (4, "b")])]
    assert read("[a:b:0.5]", 8, 15) == [(1.0, [(0, "a"), (8, "b")])]  # heun: two calls a step, one at the last
    assert read("[a|b]", 4, 4) == [(1.0, [(0, "a"), (1, "b"), (2, "a"), (3, "b")])]
    assert read("[a:b:0]", 4, 4) == [(1.0, [(0, "b")])]
    assert read("a :2 AND [b:c:1]", 4, 4) == [(2.0, [(0, "a")]), (1.0, [(0, "b"), (1, "c")])]


def test_scores_read_the_plain_text() -> None:
    assert plain(r"a (red:1.3) [fox], [young:old:0.5] \(one\)") == "a red fox, old (one)"
    assert plain("a fox AND a tree :0.5") == "a fox, a tree" and plain("a BREAK b") == "a b"
    assert row("a (red) fox").plain_prompt == "a red fox"
