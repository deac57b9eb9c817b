"""The labels of a classifier, from its config: checked before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from genkit.errors import InputError, nearest, shown

MOST = 100_000  # labels
LONGEST = 1000  # characters of a label
PROBLEMS = ("single_label_classification", "multi_label_classification")


def check_problem(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a problem_type that is not a classification."""
    problem = config.get("problem_type")
    if problem not in (None, *PROBLEMS):
        raise InputError(
            f"{where}: problem_type: {shown(problem)} is not {' or '.join(PROBLEMS)}{nearest(problem, PROBLEMS)}"
        )


def read_labels(config: Mapping[str, Any], where: str, notes: list[str]) -> tuple[str, ...]:
    """Return the labels of id2label, in the order of the logits.

    Duplicates, such as the two cranes of ImageNet, get their index appended, with a note. Raises InputError for labels
    that are empty or contradict num_labels or label2id, and for a config that is not a classifier's.
    """
    check_problem(config, where)
    found = _texts(config.get("id2label"), config.get("num_labels"), where, notes)
    number = config.get("num_labels")
    if number is not None and number != len(found):
        raise InputError(f"{where}: num_labels: {shown(number)} is not {len(found)}, the number of id2label")
    labels = numbered(found, f"{where}: id2label", notes)
    twice = {label for label, count in Counter(found).items() if count > 1}
    _check_back(config.get("label2id"), found, twice, where)
    return labels


def numbered(found: Sequence[Any], where: str, notes: list[str]) -> tuple[str, ...]:
    """Return the labels, with the index appended to duplicates, and a note of that.

    where: file and key, for messages. Raises InputError for anything that is not a label.
    """
    for n, label in enumerate(found):
        if not isinstance(label, str) or not label.strip() or len(label) > LONGEST or "\x00" in label:
            raise InputError(f"{where}: {n}: {shown(label)} is no label, a text of 1 to {LONGEST} characters")
    twice = {label for label, count in Counter(found).items() if count > 1}
    labels = [f"{label} ({n})" if label in twice else label for n, label in enumerate(found)]
    if len(set(labels)) < len(labels):
        raise InputError(f"{where}: {shown(sorted(twice)[0])} is there more than once")
    if twice:
        told = ", ".join(shown(label) for label, before in zip(labels, found, strict=True) if before in twice)
        notes.append(f"{where}: labels that are there more than once have their number: {told[:200]}")
    return tuple(labels)


def _texts(stated: Any, number: Any, where: str, notes: list[str]) -> list[str]:
    if stated is None:  # transformers does not write id2label where it has the default labels
        count = 2 if number is None else number
        if type(count) is not int or not 1 <= count <= MOST:
            raise InputError(f"{where}: num_labels: {shown(count)} is not a number from 1 to {MOST}")
        notes.append(f"{where}: id2label: is absent: labels are called LABEL_0 to LABEL_{count - 1}")
        return [f"LABEL_{n}" for n in range(count)]
    if not isinstance(stated, Mapping) or not 1 <= len(stated) <= MOST:
        raise InputError(f"{where}: id2label: {shown(stated)} is not an object of 1 to {MOST} labels")
    found: list[str] = []
    for n in range(len(stated)):
        if str(n) not in stated:
            raise InputError(f"{where}: id2label: has {len(stated)} labels, and none of the number {n}")
        found.append(stated[str(n)])
    return found


def _check_back(stated: Any, labels: list[str], twice: Collection[str], where: str) -> None:
    """Raise InputError where label2id contradicts id2label."""
    if stated is None:
        return
    if not isinstance(stated, Mapping):
        raise InputError(f"{where}: label2id: {shown(stated)} is not an object")
    for n, label in enumerate(labels):
        if label not in twice and str(stated.get(label)) != str(n):
            said = shown(stated[label]) if label in stated else "absent"
            raise InputError(f"{where}: label2id: {shown(label)} is {said}, and {n} by id2label")
