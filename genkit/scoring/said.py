"""Stored classes and answers of a picture in expressions: p_class['tabby'], answer['is it red?']. No model is needed.

scores["classes"] is {label: p} for the labels of a classifier with at least FLOOR, most probable first; all its labels
are in run.json. scores["answers"] is {question: text}. Null, for all classes or for one answer, means that the
network's output was NaN.
"""

from __future__ import annotations

import dataclasses
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from genkit.errors import InputError, nearest, shown

FIELDS = frozenset({"classes", "answers"})  # keys of scores whose values are not numbers
FLOOR = 1e-4  # smaller probabilities are not stored, and are read as 0
MOST_QUESTION = 500  # characters


def stored_classes(labels: Sequence[str], odds: Sequence[float]) -> dict[str, float] | None:
    """Return the classes of a picture as they are stored, p to 6 decimals; None if one is NaN."""
    if any(p != p for p in odds):
        return None
    kept = [(label, round(p, 6)) for label, p in zip(labels, odds, strict=True) if round(p, 6) >= FLOOR]
    return dict(sorted(kept, key=lambda one: -one[1]))


def plain(text: str) -> str:
    """Normalise a text for comparison: case-folded, single spaces, without punctuation at its end."""
    return " ".join(text.casefold().split()).rstrip(string.punctuation + " ")


def check_question(question: Any) -> str:
    """Return the question. Raises InputError for one that is empty, too long or not a single line."""
    if not isinstance(question, str) or not plain(question):
        raise InputError(f"{shown(question)} is no question: give one such as 'is the cat asleep?'")
    if len(question) > MOST_QUESTION or any(ord(c) < 32 for c in question):
        raise InputError(f"{shown(question)} is longer than {MOST_QUESTION} characters, or holds control characters")
    return question


def check_questions(questions: Collection[str]) -> None:
    """Raise InputError for an invalid question, and for two that are the same after `plain`."""
    seen: dict[str, str] = {}
    for question in questions:
        key = plain(check_question(question))
        if key in seen:
            raise InputError(f"{shown(seen[key])} and {shown(question)} are the same question: give one of them")
        seen[key] = question


def check_classes(used: Iterable[str], labels: Collection[str]) -> None:
    """Raise InputError, with the nearest label, for a label of p_class that the classifier does not have."""
    for label in used:
        if label not in labels:
            raise InputError(f"p_class[{shown(label)}]: {no_such(label, labels)}")


def no_such(label: str, labels: Collection[str]) -> str:
    """Return "no such label" with a suggestion: the nearest label, or one with that name among its synonyms."""
    close, wanted = nearest(label, labels), label.casefold().strip()
    if wanted:
        named = [x for x in labels if wanted in [part.strip() for part in x.casefold().split(",")]]
        within = named or ([] if close else [x for x in labels if wanted in x.casefold()])
        close = f" (did you mean {within[0]!r}?)" if within else close
    first = ", ".join(shown(x) for x in list(labels)[:3])
    return f"no such label of the classifier{close or f'; it has {len(labels)}, such as {first}'}"


def p_class(label: str) -> Callable[[Mapping[str, Any]], float]:
    """Return the function scores -> p_class[label]. It raises InputError for an image without classes."""

    def value(scores: Mapping[str, Any]) -> float:
        why = unclassified(scores)
        if why is not None:
            raise InputError(f"p_class[{shown(label)}]: {why}")
        return float(scores["classes"].get(label, 0.0))

    return value


def answer(question: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the function scores -> answer[question], after `plain`. It raises InputError for an image without it."""

    def value(scores: Mapping[str, Any]) -> str:
        why = unanswered(scores, question)
        if why is not None:
            raise InputError(f"answer: {why}")
        return plain(scores["answers"][question])

    return value


def unclassified(scores: Mapping[str, Any]) -> str | None:
    """Return why the classes of a picture are not known, or None if they are."""
    if isinstance(scores.get("classes"), Mapping):
        return None
    return "the classifier's scores were no numbers" if "classes" in scores else "this image was not classified"


def unanswered(scores: Mapping[str, Any], question: str) -> str | None:
    """Return why the answer to a question is not known for a picture, or None if it is."""
    found = scores.get("answers")
    if not isinstance(found, Mapping) or question not in found:
        return f"{shown(question)} was not asked of this image{nearest(question, found or ())}"
    return None if isinstance(found[question], str) else f"the answer to {shown(question)} was no text: no numbers"


@dataclasses.dataclass(frozen=True)
class Said:
    """The labels, and for each question the answer (after `plain`), whose frequencies two runs are compared by."""

    labels: tuple[str, ...] = ()
    answers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def numbers(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """Return {expression: number} of one picture: p of each label, and 1 or 0 for whether it has that answer."""
        found = {}
        if unclassified(scores) is None:
            found = {f"p_class[{label!r}]": float(scores["classes"].get(label, 0.0)) for label in self.labels}
        for question, text in self.answers.items():
            if unanswered(scores, question) is None:
                same = plain(scores["answers"][question]) == text
                found[f"answer[{question!r}] == {text!r}"] = float(same)
        return found


NOTHING = Said()


def said_of(scores: Sequence[Mapping[str, Any]], most: int = 10) -> Said:
    """Return the `most` labels with the largest total probability, and the most frequent answer to each question."""
    total: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = {}
    for one in scores:
        total.update(one.get("classes") or {})
        for question, text in (one.get("answers") or {}).items():
            if isinstance(text, str) and plain(text):
                answers.setdefault(question, Counter())[plain(text)] += 1
    first = {question: min(found, key=lambda text: (-found[text], text)) for question, found in answers.items()}
    return Said(tuple(label for label, _ in total.most_common(most)), first)
