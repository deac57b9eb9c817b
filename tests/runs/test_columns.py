"""Lines that are read many at once say what each of them says alone."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from genkit.durable import json_line
from genkit.rows.result import Result
from genkit.runs.columns import Lines, Wanted

WANTED = Wanted(frozenset({"clip", "flat"}), labels=frozenset({"a cat"}), hashes=True)


def line(n: int, **fields: Any) -> bytes:
    scores = {"clip": n / 10, "flat": n % 2 == 0, "p": {"a cat": 0.25, "a dog": 0.75}}
    file, fields = f"images/r{n}-00.png", {"scores": scores, "prompt": "a fox", **fields}
    found = Result(f"r{n}", 0, n, file=file, bytes=9, sha256=f"{n:064x}", width=8, height=8, **fields)
    return json_line(found.to_json()).encode("utf-8", "backslashreplace")


ODD = {
    "failed": line(3, status="failed", reason="nan"),
    "with a meta": line(3, meta={"a": 1}),
    "not UTF-8": line(3, prompt="a fox").replace(b"fox", b"f\xffx"),
    "half a line": line(3)[:200] + b"\n",
    "empty": b"\n",
    "of no row": line(3).replace(b"r3", b"r9"),
    "spaced otherwise": json.dumps(json.loads(line(3)), separators=(",", ":")).encode() + b"\n",
    "not a number": line(3).replace(b'"clip": 0.3', b'"clip": NaN'),
    "scores with a text that goes on": line(3).replace(b'"clip": 0.3', b'"clip": "{'),
    "scores that are no JSON": line(3).replace(b'"clip": 0.3', b'"clip": 0.3.3'),
    "two objects as scores": line(3, scores={"a": "{"}).replace(b'{"a": "{"}', b'{"a": "{"},{"b": "}"}'),
    "other scores": line(3, scores={"flat": None}),
}


def columns(blocks: list[list[bytes]]) -> dict[str, Any]:
    lines = Lines([f"r{n}" for n in range(6)], WANTED)
    lines.read(blocks)
    return (
        {name: value for name, value in vars(lines).items() if name != "rows"}
        | {"shape": None, "shapes": None}
        | {"of": [list(lines.shapes)[shape] for shape in lines.shape]}
    )


@pytest.mark.parametrize("odd", ODD)
def test_a_line_among_others_says_what_it_says_alone(odd: str) -> None:
    lines = [line(0), line(1), ODD[odd], line(2), line(4, prompt='Füchse "im" Schnee'), line(5)]
    alone = columns([[one] for one in lines])
    assert columns([lines]) == alone == columns([lines[:3], lines[3:]])
    assert [alone["row"][at] for at in (0, 1, -3, -2, -1)] == [0, 1, 2, 4, 5]
    assert alone["offset"][-1] == sum(map(len, lines[:-1]))
    assert [alone["plain"][at] for at in (0, 1, -3, -2, -1)] == [1] * 5


def test_a_block_of_all_sorts() -> None:
    rnd = random.Random(0)
    lines = [rnd.choice([*ODD.values(), *map(line, range(6))]) for _ in range(500)]
    assert columns([lines]) == columns([[one] for one in lines])
