"""Whether the scores in a record have the types that genkit writes, so that expressions can read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_PLAIN = frozenset({float, bool, type(None)})
_LARGEST = 10**300  # float() raises for whole numbers that are much larger


def well_formed(scores: Mapping[str, Any]) -> bool:
    """Return whether every score is a number, true, false or null, or has the form in boxes.py or said.py.

    Lists and objects under other names, as a newer genkit may write, are passed over.
    """
    for name, value in scores.items():
        if type(value) in _PLAIN:
            if value is not None and name in _FORMS:
                return False
        elif not _FORMS.get(name, _other)(value):
            return False
    return True


def _number(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is int and -_LARGEST < value < _LARGEST)


def _known(value: Any) -> bool:
    return value is not None and _number(value)


def _text(value: Any) -> bool:
    return isinstance(value, str | None)


def _other(value: Any) -> bool:
    return _number(value) or isinstance(value, dict | list)


def _object_of(form: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(form, value.values()))


def _detected(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    words, size = value.get("words"), value.get("size")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return False
    sound = isinstance(size, list) and len(size) == 2 and all(map(_known, size))
    return sound and _known(value.get("threshold")) and _known(value.get("floor"))


def _boxes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_box, value))


def _box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) < 6:
        return False
    return isinstance(box[0], str) and _number(box[1]) and all(map(_known, box[2:6])) and all(map(_text, box[6:]))


_FORMS: dict[str, Callable[[Any], bool]] = {
    "p": _object_of(_number),
    "classes": _object_of(_known),
    "answers": _object_of(_text),
    "detected": _detected,
    "boxes": _boxes,
}
