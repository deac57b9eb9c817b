"""Expressions over classes and answers: what they are, what is refused, and what is unknown."""

from __future__ import annotations

import math
from typing import Any

import pytest

from genkit.errors import InputError
from genkit.rows.request import Request
from genkit.rows.result import Result, value_of
from genkit.scoring.gates import Expression, check_row, check_seen, passes, unknown_scores
from genkit.scoring.said import check_classes, check_questions, plain, said_of, stored_classes

SCORES: dict[str, Any] = {
    "clip": 0.4, "classes": {"tabby, tabby cat": 0.7, "dog": 0.2999},
    "answers": {"is it asleep?": " Yes!! ", "how many?": "2", "which colour?": None},
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [
    ("p_class['dog'] > 0.2", True),
    ("p_class['dog'] > 0.3 or p_class['tabby, tabby cat'] >= 0.7", True),
    ("p_class['house'] > 0", False),
    ("p_class['house'] < 0.1 and clip > 0.3", True),
    ("answer['is it asleep?'] == 'yes'", True),
    ("'YES.' == answer['is it asleep?']", True),
    ("answer['is it asleep?'] != 'yes'", False),
    ("not answer['how many?'] == '3'", True),
    ("answer['how many?'] == '2' and p_class['dog'] - 0.5 * p_class['house'] > 0.1", True),
])  # fmt: skip
def test_values(text: str, value: bool) -> None:
    gate = Expression(text)
    assert passes(gate, SCORES) is value and gate.decides


def test_what_an_expression_needs_and_does_not_know() -> None:
    gate = Expression("p_class['dog'] > 0.2 and (answer['how many?'] == '2' or answer['which colour?'] == 'red')")
    assert gate.classes == ("dog",) and gate.questions == ("how many?", "which colour?")
    assert gate.senses == ("classifier", "captioner") and not gate.needs_scorer and not gate.names
    assert not passes(gate, SCORES)
    assert unknown_scores(gate, SCORES) == ["answer: the answer to 'which colour?' was no text: no numbers"]
    assert unknown_scores(Expression("p_class['dog'] > 0.2"), {"classes": None}) == [
        "p_class: the classifier's scores were no numbers"
    ]
    assert unknown_scores(gate, {})[-1] == "p_class: this image was not classified"
    order = Expression("-p_class['dog']")
    assert value_of(Result("a", 0, 0, scores=SCORES), order) == -0.2999
    assert math.isnan(value_of(Result("a", 0, 0), order))


@pytest.mark.parametrize(("text", "message"), [
    ("p_class > 0.5", "p_class: name the label, as in p_class['tabby']"),
    ("answer == 'yes'", "answer: name the question, as in answer['is it red?'] == 'yes'"),
    ("answer['is it red?']", "is a text: compare it, as in"),
    ("answer['is it red?'] > 'a'", "compared with == or !="),
    ("answer['is it red?'] == 2", "compared with == or !="),
    ("answer['is it red?'] == '!'", "'!' is no answer"),
    ("answer[''] == 'yes'", "'' is no question"),
    ("answer[3] == 'yes'", "the question goes in quotes"),
    ("p_class[3] > 0.1", "the label goes in quotes"),
    ("p_class[''] > 0.1", "names no label"),
    ("p_class['dog'] > 2", "never true"),
    ("p_class['dog'] > 0.00005", "what is below 0.0001 is stored as 0: compare with more"),
    ("0.00005 > p_class['dog']", "what is below 0.0001 is stored as 0: compare with more"),
    ("pclass['dog'] > 0.5", "brackets belong to p, p_class, answer, count"),
])  # fmt: skip
def test_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Expression(text)
    assert message in str(error.value)


def test_rows_name_the_option_that_is_missing_and_the_nearest_label() -> None:
    for gate, senses, message in (
        ("p_class['dog'] > 0.5", (), "give --classifier"),
        ("answer['is it red?'] == 'yes'", ("classifier",), "give --captioner"),
        ("p_class['tabby'] > 0.5", ("classifier",), r"did you mean 'tabby, tabby cat'\?"),
        ("p_class['dgo'] > 0.5", ("classifier",), r"did you mean 'dog'\?"),
    ):
        with pytest.raises(InputError, match=message):
            check_row(gate, None, None, (), senses, ["tabby, tabby cat", "dog"])
    with pytest.raises(InputError, match="it has 2, such as 'a', 'b'"):
        check_classes(["zebra"], ["a", "b"])
    gate_of = Expression("answer['is it blue?'] == 'yes'")
    with pytest.raises(InputError, match=r"--where: .* was not asked of this image \(did you mean 'is it asleep"):
        check_seen("--where", gate_of, [SCORES])


def test_questions_of_a_row() -> None:
    row = Request(prompt="x", ask=["is it red?"], gate="answer['is it big?'] == 'yes' and answer['is it red?'] != 'no'")
    assert row.questions == ["is it red?", "is it big?"] and row.asked.questions == ("is it red?", "is it big?")
    assert row.fingerprint() == Request(prompt="x").fingerprint()
    for ask, message in (
        ([], "must not be empty"),
        (["is it red?", " Is it  red "], "are the same question"),
        (["  "], "is no question"),
        (["a\nb?"], "control characters"),
        (["is it red? " * 60], "longer than 500"),
    ):
        with pytest.raises(InputError, match=message):
            Request(prompt="x", ask=ask)
    check_questions(["is it red?", "is it blue?"])


def test_what_is_stored_and_compared() -> None:
    assert stored_classes(["a", "b", "c"], [0.00009, 0.25, 0.7499999]) == {"c": 0.75, "b": 0.25}
    assert stored_classes(["a"], [math.nan]) is None
    assert plain("  A Red\tFox.!? ") == "a red fox" and plain("...") == ""
    said = said_of([SCORES, {"classes": {"house": 1.0}, "answers": {"how many?": "3"}}, {"classes": None}], most=2)
    assert said.labels == ("house", "tabby, tabby cat")
    assert said.numbers(SCORES) == {
        "p_class['house']": 0.0, "p_class['tabby, tabby cat']": 0.7, "answer['is it asleep?'] == 'yes'": 1.0,
        "answer['how many?'] == '2'": 1.0,
    }  # fmt: skip
