"""Expressions over boxes: counted, measured, placed and coloured from what a record holds, without a model."""

from __future__ import annotations

from typing import Any

import pytest

from genkit.errors import InputError
from genkit.rows.request import Request
from genkit.scoring.boxes import counts, iou, separate
from genkit.scoring.gates import Expression, check_row, passes, unknown_scores

SIZE = [100, 50]
BOXES = [
    ["cat", 0.9, 0, 10, 20, 30, "red"],
    ["cat", 0.8, 1, 10, 20, 30, "red"],  # the same cat
    ["cat", 0.5, 60, 10, 80, 30, "grey"],
    ["cat", 0.2, 0, 0, 100, 50, "white"],
    ["dog", 0.7, 70, 12, 90, 32, "brown"],
    ["a cup", 0.6, 72, 40, 78, 48, "blue"],
]
SCORES: dict[str, Any] = {
    "clip": 0.4,
    "boxes": BOXES,
    "detected": {"words": ["cat", "dog", "a cup", "horse"], "size": SIZE, "threshold": 0.3, "floor": 0.05},
}
VALUES = [
    ("count['cat']", 2),
    ("count['cat', 0.1]", 3),
    ("count['cat', 0.6] == 1", True),
    ("count['horse']", 0),
    ("count['cat'] + count['dog'] >= 3 and clip > 0.3", True),
    ("area['dog']", 0.08),
    ("area['cat']", 0.16),
    ("area['cat', 0.1]", 1.0),
    ("area['horse']", 0.0),
    ("left_of('cat', 'dog')", True),
    ("right_of('cat', 'dog')", False),
    ("right_of('dog', 'cat')", True),
    ("above('dog', 'a cup')", True),
    ("below('a cup', 'dog', 0.5)", True),
    ("below('dog', 'a cup')", False),
    ("left_of('cat', 'horse')", False),
    ("not left_of('cat', 'horse')", True),
    ("overlap('cat', 'dog')", 0.0),
    ("overlap('cat', 'horse') > 0.1", False),
    ("color['cat'] == 'red'", True),
    ("color['cat', 0.1] != 'red'", False),
    ("'Blue' == color['a cup']", True),
    ("color['horse'] == 'red'", False),
    ("color['horse'] != 'red'", False),
    ("color['dog'] == 'gray'", False),
]


@pytest.mark.parametrize(("text", "value"), VALUES, ids=[text for text, _ in VALUES])
def test_values(text: str, value: float) -> None:
    found = Expression(text)(SCORES)
    assert found == (value if isinstance(value, bool) else pytest.approx(value))
    assert isinstance(found, bool) is isinstance(value, bool)


REFUSED = [
    ("count", "name what is looked for, as in count['cat']"),
    ("left_of", "name what is looked for, as in left_of('cat', 'dog')"),
    ("count('cat') > 1", "takes square brackets, as in count['cat']"),
    ("left_of['cat', 'dog']", "takes round brackets"),
    ("count['cat'] < 0", "never true: \"count['cat']\" is 0 to inf"),
    ("area['cat'] > 1", "never true"),
    ("count[''] > 1", "nothing to look for"),
    ("count[3] > 1", "nothing to look for"),
    ("count['cat', 2] > 1", "2 is no threshold: a number above 0 and below 1"),
    ("count['cat', 'dog'] > 1", "'dog' is no threshold"),
    ("count[clip] > 1", "is written count['cat'] or count['cat', 0.3]"),
    ("left_of('cat')", "is written left_of('cat', 'dog')"),
    ("left_of('cat', 'cat')", "compares 'cat' with itself"),
    ("leftof('cat', 'dog')", "did you mean 'left_of'?"),
    ("color['cat']", "is a colour: compare it, as in color['car'] == 'red'"),
    ("color['cat'] > 'red'", "compared with == or !="),
    ("color['cat'] == red", "the colour goes in quotes"),
    ("color['cat'] == 'crimson'", "'crimson' is no basic colour"),
    ("color['cat'] == 'gren'", "did you mean 'green'?"),
    ("left_of('cat', 'dog') + 1 > 2", "is true or false, not a number"),
    ("width['cat'] > 2", "brackets belong to p, p_class, answer, count, area, color only"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text for text, _ in REFUSED])
def test_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Expression(text)
    assert message in str(error.value)


def test_what_was_not_looked_for_passes_nothing_and_says_so() -> None:
    gate = Expression("count['cow'] == 0")
    assert gate.words == ("cow",) and gate.decides and not gate.needs_scorer
    assert not passes(gate, SCORES) and not passes(Expression("not left_of('cow', 'cat')"), SCORES)
    assert unknown_scores(gate, SCORES) == ["boxes: 'cow' was not looked for in this image"]
    assert unknown_scores(gate, {"clip": 1.0}) == ["boxes: this image was not searched with a detector"]
    assert not passes(Expression("count['cat'] >= 1 or clip > 0"), {**SCORES, "boxes": None})  # no numbers
    low = Expression("count['cat', 0.01] > 0")
    assert "score less than 0.05 are not stored" in unknown_scores(low, SCORES)[0]
    cut = {**SCORES, "detected": {**SCORES["detected"], "floor": 0.4}}  # more boxes than are stored
    assert not passes(Expression("count['cat'] > 0"), cut) and passes(Expression("count['cat', 0.45] > 0"), cut)
    with pytest.raises(InputError, match="count: 'cow' was not looked for"):
        gate(SCORES)


def test_overlap_and_counts() -> None:
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert len(separate([["x", 1.0, 0, 0, 2, 2], ["x", 0.9, 1, 0, 3, 2], ["x", 0.8, 0, 0, 2, 2.1]])) == 2
    assert counts(SCORES) == {"cat": 2, "dog": 1, "a cup": 1, "horse": 0}
    assert counts({"clip": 1.0}) == {}


def test_words_of_rows() -> None:
    row = Request(prompt="x", detect=["a cup"], gate="count['cat'] == 2", rank_by="area['dog'] + area['cat']")
    assert row.sought == ["a cup", "cat", "dog"]
    assert Request(prompt="x").sought == [] and Request(prompt="x", gate="clip > 0.1").sought == []
    assert row.fingerprint() == Request(prompt="x").fingerprint()
    for words, message in ((["a", "a"], "must be different"), ([" "], "nothing to look for"), ([], "")):
        with pytest.raises(InputError, match=rf"detect: .*{message}"):
            Request(prompt="x", detect=words)
    check_row("count['cat'] == 2", None, None, (), {"detector"})
    with pytest.raises(
        InputError, match="needs boxes of what pictures show, and there is no detector: give --detector"
    ):
        check_row("count['cat'] == 2", None, None, ())


def test_ten_thousand_boxes_are_counted_quickly() -> None:
    boxes = [["cat", 0.9, x, y, x + 1, y + 1, "red"] for x in range(100) for y in range(100)]
    scores = {"boxes": boxes, "detected": {**SCORES["detected"], "size": [100, 100]}}
    assert Expression("area['cat']")(scores) == pytest.approx(1.0)
