"""What expressions read of a picture's classes and answers: p_class['tabby'], answer['is it red?']. Without a model.

scores["classes"] is {label: p} of the labels of a classifier that have at least FLOOR, most probable first; which there
are is in run.json. scores["answers"] is {question: text}. Null, as a whole or of one question, is what a network
said whose result was no number.
"""

from __future__ import annotations

import dataclasses
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from genkit.errors import InputError, nearest, shown

FIELDS = frozenset({"classes", "answers"})  # of scores; no numbers
FLOOR = 1e-4  # p below it is not stored, and is read as 0
MOST_QUESTION = 500  # characters


def stored_classes(labels: Sequence[str], odds: Sequence[float]) -> dict[str, float] | None:
    """Return what a record holds of a picture's classes: p to 6 decimals; None where one is no number."""
    if any(p != p for p in odds):
        return None
    kept = [(label, round(p, 6)) for label, p in zip(labels, odds, strict=True) if round(p, 6) >= FLOOR]
    return dict(sorted(kept, key=lambda one: -one[1]))


def plain(text: str) -> str:
    """Return a text as answers are compared: without regard to case, blanks around it and punctuation at its end."""
    return " ".join(text.casefold().split()).rstrip(string.punctuation + " ")


def check_question(question: Any) -> str:
    """Return a question to ask of pictures. Raises InputError for one that asks nothing, or is no single line."""
    if not isinstance(question, str) or not plain(question):
        raise InputError(f"{shown(question)} is no question: give one such as 'is the cat asleep?'")
    if len(question) > MOST_QUESTION or any(ord(c) < 32 for c in question):
        raise InputError(f"{shown(question)} is longer than {MOST_QUESTION} characters, or holds control characters")
    return question


def check_questions(questions: Collection[str]) -> None:
    """Raise InputError for a question that is none, and for two that are the same."""
    seen: dict[str, str] = {}
    for question in questions:
        key = plain(check_question(question))
        if key in seen:
            raise InputError(f"{shown(seen[key])} and {shown(question)} are the same question: give one of them")
        seen[key] = question


def check_classes(used: Iterable[str], labels: Collection[str]) -> None:
    """Raise InputError for a label of p_class that the classifier does not have, naming the one that was meant."""
    for label in used:
        if label not in labels:
            raise InputError(f"p_class[{shown(label)}]: {no_such(label, labels)}")


def no_such(label: str, labels: Collection[str]) -> str:
    """Return "no such label", and which was perhaps meant: the nearest, or one of several names, as ImageNet has."""
    close, wanted = nearest(label, labels), label.casefold().strip()
    if wanted:
        named = [x for x in labels if wanted in [part.strip() for part in x.casefold().split(",")]]
        within = named or ([] if close else [x for x in labels if wanted in x.casefold()])
        close = f" (did you mean {within[0]!r}?)" if within else close
    first = ", ".join(shown(x) for x in list(labels)[:3])
    return f"no such label of the classifier{close or f'; it has {len(labels)}, such as {first}'}"


def p_class(label: str) -> Callable[[Mapping[str, Any]], float]:
    """Return the function of a picture's scores that p_class[label] is. It raises InputError if unknown."""

    def value(scores: Mapping[str, Any]) -> float:
        why = unclassified(scores)
        if why is not None:
            raise InputError(f"p_class[{shown(label)}]: {why}")
        return float(scores["classes"].get(label, 0.0))

    return value


def answer(question: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the function of a picture's scores that answer[question] is, as `plain` has it. It raises InputError."""

    def value(scores: Mapping[str, Any]) -> str:
        why = unanswered(scores, question)
        if why is not None:
            raise InputError(f"answer: {why}")
        return plain(scores["answers"][question])

    return value


def unclassified(scores: Mapping[str, Any]) -> str | None:
    """Return why a picture's classes are not known, or None if they are."""
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
    """Which classes and answers of many pictures are compared: labels, and of each question one answer, as `plain`."""

    labels: tuple[str, ...] = ()
    answers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def numbers(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """Return them as numbers of one picture, by their expressions; of an answer whether it is given, 1 or 0."""
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
    """Return the `most` classes most probable over all pictures, and the most frequent answer to each question."""
    total: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = {}
    for one in scores:
        total.update(one.get("classes") or {})
        for question, text in (one.get("answers") or {}).items():
            if isinstance(text, str) and plain(text):
                answers.setdefault(question, Counter())[plain(text)] += 1
    first = {question: min(found, key=lambda text: (-found[text], text)) for question, found in answers.items()}
    return Said(tuple(label for label, _ in total.most_common(most)), first)
