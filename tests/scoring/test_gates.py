"""Expressions over scores: what they compute, and that nothing but scores, numbers and operators gets through."""

from __future__ import annotations

import random
import string
from typing import Any

import pytest

from genkit.errors import InputError
from genkit.scoring.gates import Expression

LABELS = ["a cat", "a dog", "it's"]
SCORES: dict[str, Any] = {"clip": 0.3, "p": {"a cat": 0.9, "a dog": 0.1, "it's": 0.5}, "nan": False, "flat": True}

VALUES = [
    ("clip > 0.25", True),
    ("clip >= 0.3 and not nan", True),
    ("clip > 0.3", False),
    ("0.2 < clip < 0.9", True),
    ("0.2 < clip < 0.3", False),
    ("p['a dog'] > 0.5 or p['a cat'] > 0.5", True),
    ("p['a dog'] > 0.5 and p['a cat'] > 0.5", False),
    ('p["it\'s"] == 0.5', True),
    ("flat", True),
    ("not (nan or flat)", False),
    ("nan or not flat or clip < 0.5", True),
    ("-clip", -0.3),
    ("+clip", 0.3),
    ("0.5 * clip + 0.5 * p['a cat']", 0.6),
    ("p['a cat'] - p['a dog']", 0.8),
    ("clip / p['a dog']", 3.0),
    ("(clip + 1) * 2", 2.6),
    ("max(p['a cat'], p['a dog'], clip)", 0.9),
    ("min(p['a cat'], p['a dog'])", 0.1),
    ("abs(clip - 0.5)", 0.2),
    ("clip != 0.3", False),
    ("clip / (p['a dog'] - 0.1) > 0", False),  # a division by zero passes no gate
    ("clip / (p['a dog'] - 0.1) != 5", False),
    ("not (clip / (p['a dog'] - 0.1) > 5)", False),
    ("1000000000 * " * 40 + "2 / 3 * clip > 7", True),  # more than a float holds
]


@pytest.mark.parametrize(("text", "value"), VALUES, ids=[text for text, _ in VALUES])
def test_values(text: str, value: bool | float) -> None:
    found = Expression(text, labels=LABELS)(SCORES)
    assert found == (value if isinstance(value, bool) else pytest.approx(value))
    assert type(found) is type(value)


REFUSED = [
    ("clip > nan", "'nan' is true or false, not a number"),  # case 55, as are the next four
    ("clip > 2", "is never true: 'clip' is -1 to 1"),
    ("clip > -5", "is always true: 'clip' is -1 to 1"),
    ("clip <= 1", "always true"),
    ("p['a cat'] > 1", "never true"),
    ("clip == 2", "never true"),
    ("clip != 2", "always true"),
    ("100 * clip > 300", "never true"),
    ("abs(clip) >= 0", "always true"),
    ("-p['a cat'] > 0", "never true"),
    ("max(p['a cat'], p['a dog']) > 1.5", "never true"),
    ("0.2 < clip < 7", "always true"),
    ("1 < 2", "always true"),
    ("clip > 1e999", "larger than"),
    ("clip > " + "9" * 300, "larger than"),
    ("clip > 1j", "not a number"),
    ("clip and nan", "'clip' is a number, not true or false"),
    ("not clip", "'clip' is a number"),
    ("nan == False", "is true or false, not a number"),
    ("flat + 1", "is true or false, not a number"),
    ("True", "is not a number"),
    ("clop > 0.5", "no such score (did you mean 'clip'?)"),
    ("p > 0.5", "name the label"),
    ("p['a catt'] > 0.5", "no such label (did you mean 'a cat'?)"),
    ("p[0] > 0.5", "in quotes"),
    ("p[clip] > 0.5", "in quotes"),
    ("clip['a cat'] > 0.5", "brackets belong to p"),
    ("p['a cat'].real > 0.5", "no attributes"),
    ("().__class__", "no attributes"),
    ("__import__('os').system('true')", "no functions but min, max, abs"),
    ("(lambda: 1)()", "no functions"),
    ("lambda: 1", "only scores"),
    ("[x for x in (1, 2)]", "only scores"),
    ("{}", "only scores"),
    ("(clip := 1)", "nothing can be assigned"),
    ("clip ** 2 > 0.5", "no powers"),
    ("9 ** 9 ** 9", "no powers"),
    ("clip % 2 > 0.5", "+ - * / only"),
    ("clip & nan", "write `and`"),
    ("~nan", "write `not`"),
    ("clip in p", "p: name the label"),
    ("clip in clip", "to compare there is"),
    ("clip is clip", "to compare there is"),
    ("clip > 'a cat'", "not a number"),
    ("f'{clip}' > 1", "plain text"),
    ("clip if nan else 1", "only scores"),
    ("min(clip)", "min takes 2"),
    ("abs(clip, clip)", "abs takes 1"),
    ("min(clip, clip, key=abs)", "min takes 2"),
    ("clip / 0 > 1", "division by zero"),
    ("", "is no expression"),
    ("   ", "is no expression"),
    ("clip > 0.3 and", "is not an expression"),
    ("clip > 0.3 && not nan", "write `and`"),
    ("clip > 0.3 || not nan", "write `or`"),
    ("clip > 0.3 AND not nan", "write and, or, not in small letters"),
    ("!nan", "write `not`"),
    ("p['a cat'] = 0.3", "to compare write =="),
    ("p[\u2018a cat\u2019] > 0.3", "write straight quotes"),
    ("clip => 0.3", "write >= or <="),
    ("p['a && b'] > 0.3 clip", "is not an expression: invalid syntax"),
    ("import os", "is not an expression"),
    ("clip; nan", "is not an expression"),
    ("clip\nnan", "is not an expression"),
    ("clip > \x00", "is not an expression"),
    ("clip > \ud800", "is not an expression"),
    ("(" * 400 + "clip" + ")" * 400, "is not an expression"),
    ("-" * 1900 + "clip", "levels of nesting"),
    ("clip + " * 200 + "clip", "levels of nesting"),
    ("not " * 400 + "nan", "levels of nesting"),
    ("clip > 0.3" + " " * 2000, "longer than 2000"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[ascii(text)[1:40] for text, _ in REFUSED])
def test_refused(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        Expression(text, labels=LABELS)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_what_it_uses() -> None:
    e = Expression("clip > 0.3 and not nan or p['a dog'] > 0.1", labels=LABELS)
    assert (e.names, e.labels, e.needs_scorer, e.decides) == ({"clip", "nan"}, {"a dog"}, True, True)
    e = Expression("not flat")
    assert (e.names, e.labels, e.needs_scorer, e.decides) == ({"flat"}, frozenset(), False, True)
    assert Expression("p['a cat']", labels=LABELS).needs_scorer
    assert not Expression("clip", labels=LABELS).decides


def test_labels_must_be_known() -> None:
    with pytest.raises(InputError, match="there are no labels; give them in `labels`"):
        Expression("p['a cat'] > 0.5")


@pytest.mark.parametrize("text", ["clip > 0.3", "p['a cat'] > 0.3", "nan"])
@pytest.mark.parametrize("scores", [{}, {"clip": None, "p": None, "nan": None}, {"p": {"a dog": 1.0}}])
def test_a_missing_score_is_an_error(text: str, scores: dict[str, Any]) -> None:
    name = text.split(" >")[0]
    with pytest.raises(InputError, match="no such score") as caught:
        Expression(text, labels=LABELS)(scores)
    assert str(caught.value).startswith(name)


def test_names_of_the_caller() -> None:
    names = ["sharpness", "ok", "clip"]
    assert Expression("sharpness > 12 and ok", names=names)({"sharpness": 13.5, "ok": True}) is True
    assert Expression("not ok", names=names)({"ok": True}) is False
    with pytest.raises(InputError, match="never true"):  # clip keeps its range
        Expression("clip > 2", names=names)
    with pytest.raises(InputError, match=r"did you mean 'sharpness'\?"):
        Expression("sharpnes > 2", names=names)


def test_nan_passes_no_threshold() -> None:
    for text in ("clip > 0.1", "clip < 0.1", "clip >= 0.1", "0 < clip < 0.9"):
        assert Expression(text)({"clip": float("nan")}) is False


def test_noise_is_refused_or_computed() -> None:
    rng = random.Random(0)
    parts = ["clip", "p", "['a cat']", "nan", "not ", " and ", " or ", "<", ">=", "==", "0.5", "7", "(", ")", "+", "-",
             "*", "/", "min", ",", "'", "[", "\\", "**", "lambda", ":", "if", "else", ".", "é", "\n", "#", "1e9", "0x",
             "_"]  # fmt: skip
    computed = 0
    for _ in range(4000):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 9)))
        if rng.random() < 0.2:
            text += rng.choice(string.printable)
        try:
            value = Expression(text, labels=LABELS)(SCORES)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(value, bool | int | float)
            computed += 1
    assert computed > 20
