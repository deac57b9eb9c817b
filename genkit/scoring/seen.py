"""Compile the parts of expressions that read stored boxes, colours, classes and answers."""

from __future__ import annotations

import ast

from genkit.errors import InputError, shown
from genkit.scoring.boxes import MEASURES, check_color, check_threshold, check_word, reader
from genkit.scoring.said import FLOOR, answer, check_question, p_class, plain
from genkit.scoring.terms import NUMBER, TRUTH, Scope, Term, Value, quoted


def color(node: ast.Compare, scope: Scope) -> Term:
    """Compile color['cat'] == 'red', or !=; both are false for a picture without such a box."""
    sides = [node.left, *node.comparators]
    if len(sides) != 2 or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
        raise InputError(f"{quoted(node)}: a colour is compared with == or !=, as in color['car'] == 'red'")
    found, text = sides if isinstance(sides[0], ast.Subscript) else sides[::-1]
    if not isinstance(text, ast.Constant):
        raise InputError(f"{quoted(node)}: the colour goes in quotes, as in color['car'] == 'red'")
    assert isinstance(found, ast.Subscript)
    value, wanted, same = measured(found, scope), check_color(text.value), isinstance(node.ops[0], ast.Eq)
    return Term(lambda scores: (color := value(scores)) is not None and (color == wanted) is same, TRUTH)


def measured(node: ast.Subscript | ast.Call, scope: Scope) -> Value:
    """Compile count['cat'], count['cat', 0.3] or left_of('cat', 'dog', 0.3) to a function of the scores."""
    if isinstance(node, ast.Subscript):
        name, parts = (
            getattr(node.value, "id", ""),
            node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice],
        )
    else:
        name, parts = getattr(node.func, "id", ""), node.args
    count = MEASURES[name].words
    usage = (
        f"{name}['cat'] or {name}['cat', 0.3]" if count == 1 else f"{name}('cat', 'dog') or {name}('cat', 'dog', 0.3)"
    )
    if not all(isinstance(part, ast.Constant) for part in parts) or not count <= len(parts) <= count + 1:
        raise InputError(f"{quoted(node)}: is written {usage}")
    values = [part.value for part in parts if isinstance(part, ast.Constant)]
    try:
        words = tuple(check_word(word) for word in values[:count])
        threshold = check_threshold(values[count]) if len(values) > count else None
    except InputError as error:
        raise InputError(f"{quoted(node)}: {error}") from None
    if len(set(words)) < len(words):
        raise InputError(f"{quoted(node)}: compares {shown(words[0])} with itself")
    scope.seen.append((words, threshold))
    return reader(name, words, threshold)


def class_of(node: ast.Subscript, scope: Scope) -> Term:
    """Compile p_class['tabby'], a number from 0 to 1."""
    label = _text(node, "the label goes in quotes, as in p_class['tabby']")
    if not label.strip():
        raise InputError(f"{quoted(node)}: names no label, as in p_class['tabby']")
    scope.classes.append(label)
    return Term(p_class(label), NUMBER, 0.0, 1.0, floor=FLOOR)


def answered(node: ast.Compare, scope: Scope) -> Term:
    """Compile answer['is it red?'] == 'yes', or !=; both texts are normalised by `plain`."""
    usage = "is compared with == or != and a text, as in answer['is it red?'] == 'yes'"
    sides = [node.left, *node.comparators]
    if len(sides) != 2 or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
        raise InputError(f"{quoted(node)}: an answer {usage}")
    found, text = sides if reads(sides[0], "answer") else sides[::-1]
    if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
        raise InputError(f"{quoted(node)}: an answer {usage}")
    assert isinstance(found, ast.Subscript)
    try:
        question = check_question(_text(found, "the question goes in quotes, as in answer['is it red?']"))
    except InputError as error:
        raise InputError(f"{quoted(found)}: {error}") from None
    wanted, same = plain(text.value), isinstance(node.ops[0], ast.Eq)
    if not wanted:
        raise InputError(f"{quoted(node)}: {shown(text.value)} is no answer")
    scope.questions.append(question)
    value = answer(question)
    return Term(lambda scores: (value(scores) == wanted) is same, TRUTH)


def reads(node: ast.AST, name: str) -> bool:
    """Return whether a subexpression is name[…]."""
    return isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == name


def _text(node: ast.Subscript, usage: str) -> str:
    if not (isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)):
        raise InputError(f"{quoted(node)}: {usage}")
    return node.slice.value


COMPARED = {"color": color, "answer": answered}  # values that are texts, and can only be compared
