"""Expressions over an image's scores, for `gate`, `--where` and `rank_by`: parsed and checked, never run by `eval`.

"clip > 0.3 and not nan"    "p['a cat'] > 0.5 or p['a dog'] > 0.5"    "0.7 * clip + 0.3 * p['a cat']"    "-p['a dog']"
"count['cat'] == 2 and left_of('cat', 'dog')"    "color['car', 0.3] == 'red'": boxes of a detector, see boxes.py.
"p_class['tabby'] > 0.5 and answer['is it asleep?'] == 'yes'": labels of a classifier and answers of a captioner, see
said.py.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.scoring.boxes import BRACKETS, MEASURES, RELATIONS, lacking
from genkit.scoring.names import CLIP_SCORES, SCORES, check_computed, check_labels
from genkit.scoring.said import check_classes, unanswered, unclassified
from genkit.scoring.seen import COMPARED, class_of, measured, reads
from genkit.scoring.terms import EITHER, NUMBER, TRUTH, Scope, Scores, Term, quoted, score

MAX_LENGTH = 2000
MAX_DEPTH = 100
MAX_NUMBER = 1e9


class Expression:
    """An expression over scores, checked once and then called for every image.

    Names: those of names.py with their ranges (clip, sharpness, nan, …), p['label'] (0 to 1) for each of `labels`, and
    the additional scores in `names` (None: any name, for rows that are read before the scorers are known). Operators:
    and, or, not, comparisons (also chained), + - * /, min, max, abs, parentheses. Raises InputError for anything else,
    and for a comparison that is always or never true ("clip > 2").

    Attributes names, labels: those used; words: those that a detector looks for, in order of appearance; seen: (words,
    threshold) of each function of boxes; classes: labels in p_class; questions: those in answer; senses: the vision
    models that it needs; by_name: whether it uses nothing but scores with a name; needs_scorer: whether it uses a CLIP
    score; decides: whether its value is true or false, as that of a gate must be, and not a number.
    """

    def __init__(self, text: str, labels: Collection[str] | None = None, names: Collection[str] | None = ()) -> None:
        self.text = text
        added = {name: Term(score(name), EITHER) for name in names or () if name not in _KNOWN}
        scope = Scope(labels, {**_KNOWN, **added}, anything=names is None)
        term = _build(_parsed(text), scope, 0)
        self._value = term.value
        self.decides = term.kind != NUMBER
        self.names, self.labels = frozenset(scope.used), frozenset(scope.used_labels)
        self.seen = tuple(dict.fromkeys(scope.seen))
        self.words = tuple(dict.fromkeys(word for words, _ in self.seen for word in words))
        self.classes, self.questions = tuple(dict.fromkeys(scope.classes)), tuple(dict.fromkeys(scope.questions))
        used = {"detector": self.words, "classifier": self.classes, "captioner": self.questions}
        self.senses = tuple(name for name, what in used.items() if what)
        self.by_name = not (self.labels or self.seen or self.classes or self.questions)
        self.needs_scorer = bool(CLIP_SCORES & self.names or self.labels)

    def __call__(self, scores: Scores) -> bool | float:
        """Return the value for one image; after a division by zero that is False of a gate, and NaN of a number.

        Raises InputError naming a missing score.
        """
        try:
            return self._value(scores)
        except ZeroDivisionError:
            return False if self.decides else math.nan

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


def check_row(gate: str | None, rank_by: str | None, labels: Collection[str] | None, computed: Collection[str],
              senses: Collection[str] = (), classes: Collection[str] | None = None) -> None:  # fmt: skip
    """Raise InputError for invalid labels, and for a score that is unknown or not among the `computed` ones.

    senses: the vision models of the run: "detector", "classifier", "captioner". classes: the classifier's labels, if
    they are known.
    """
    if labels is not None:
        check_labels(labels)
    ranked = {*computed, "sim"}  # sim is known only once all images of a row are drawn
    for field, text, there in (("gate", gate, computed), ("rank_by", rank_by, ranked)):
        if text is None:
            continue
        try:
            expression = Expression(text, labels, computed)
            if classes is not None:
                check_classes(expression.classes, classes)
        except InputError as error:
            raise InputError(f"{field}: {error}") from None
        check_computed(field, text, expression.names, bool(expression.labels), there, expression.senses, senses)


def _parsed(text: str) -> ast.expr:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{shown(text)} is no expression; write for example clip > 0.3")
    if len(text) > MAX_LENGTH:
        raise InputError(f"{shown(text)} is longer than {MAX_LENGTH} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. Python's SyntaxWarning for "0.5and"
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "it is nested too deeply, or holds what no expression can"
        raise InputError(f"{shown(text)} is not an expression: {' '.join(str(reason).split())}{_meant(text)}") from None


def _meant(text: str) -> str:
    """Return a hint for operators of other languages, or ""; quoted labels are ignored."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "''", text)
    found = next((word for sign, word in _SPELLINGS.items() if re.search(sign, plain)), None)
    return "" if found is None else f"; {found}"


def _build(node: ast.AST, scope: Scope, depth: int) -> Term:
    builder = _BUILDERS.get(type(node))
    if builder is None:
        raise InputError(
            f"{quoted(node)}: {_REFUSED.get(type(node), 'only scores, numbers, comparisons, + - * / and or not')}"
        )
    if depth > MAX_DEPTH:
        raise InputError(f"more than {MAX_DEPTH} levels of nesting")
    return builder(node, scope, depth + 1)


def _number(node: ast.AST, scope: Scope, depth: int) -> Term:
    """Compile a subexpression that must be a number."""
    term = _build(node, scope, depth)
    if term.kind == TRUTH:
        raise InputError(f"{quoted(node)} is true or false, not a number")
    return term


def _truth(node: ast.AST, scope: Scope, depth: int) -> Term:
    """Compile a subexpression that must be true or false."""
    term = _build(node, scope, depth)
    if term.kind == NUMBER:
        raise InputError(f"{quoted(node)} is a number, not true or false; compare it with one")
    return term


def _bool_op(node: ast.BoolOp, scope: Scope, depth: int) -> Term:
    values = [_truth(part, scope, depth).value for part in node.values]
    every = all if isinstance(node.op, ast.And) else any
    return Term(lambda scores: every(value(scores) for value in values), TRUTH)


def _unary(node: ast.UnaryOp, scope: Scope, depth: int) -> Term:
    if isinstance(node.op, ast.Not):
        truth = _truth(node.operand, scope, depth).value
        return Term(lambda scores: not truth(scores), TRUTH)
    if isinstance(node.op, ast.Invert):
        raise InputError(f"{quoted(node)}: write `not`")
    term = _number(node.operand, scope, depth)
    if isinstance(node.op, ast.UAdd):
        return term
    return Term(lambda scores: -term.value(scores), NUMBER, -term.high, -term.low)


def _arithmetic(node: ast.BinOp, scope: Scope, depth: int) -> Term:
    apply = _ARITHMETIC.get(type(node.op))
    if apply is None:
        raise InputError(f"{quoted(node)}: {_REFUSED.get(type(node.op), 'of arithmetic there is + - * / only')}")
    left, right = _number(node.left, scope, depth), _number(node.right, scope, depth)
    divides = isinstance(node.op, ast.Div)
    if divides and right.low == right.high == 0:
        raise InputError(f"{quoted(node)}: division by zero")
    if divides and right.low <= 0 <= right.high:
        low, high = -math.inf, math.inf
    else:
        corners = [apply(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
        low, high = (-math.inf, math.inf) if any(map(math.isnan, corners)) else (min(corners), max(corners))
    return Term(lambda scores: apply(left.value(scores), right.value(scores)), NUMBER, low, high)


def _compare(node: ast.Compare, scope: Scope, depth: int) -> Term:
    nodes = [node.left, *node.comparators]
    for name, build in COMPARED.items():
        if any(reads(part, name) for part in nodes):
            return build(node, scope)
    terms = [_number(part, scope, depth) for part in nodes]
    tests = []
    for i, op in enumerate(node.ops):
        test = _COMPARISONS.get(type(op))
        if test is None:
            raise InputError(f"{quoted(node)}: to compare there is < <= > >= == != only")
        left, right = terms[i], terms[i + 1]
        for one, other in ((left, right), (right, left)):
            if 0 < other.low == other.high < one.floor:
                raise InputError(f"{quoted(node)}: what is below {one.floor:g} is stored as 0: compare with more")
        outcomes = {test(a, b) for a, b in _extremes(left, right)}
        if len(outcomes) == 1:
            always = "always" if outcomes.pop() else "never"
            known = [
                f"{quoted(n)} is {t.low:g} to {t.high:g}"
                for n, t in zip(nodes[i:], (left, right), strict=False)
                if t.low < t.high
            ]
            because = f": {', '.join(known)}" if known else ""
            raise InputError(f"{quoted(ast.Compare(nodes[i], [op], [nodes[i + 1]]))} is {always} true{because}")
        tests.append(test)
    values = [term.value for term in terms]
    if len(tests) == 1:  # the usual case, made fast
        (test,), (left_of, right_of) = tests, values
        return Term(lambda scores: test(left_of(scores), right_of(scores)), TRUTH)

    def holds(scores: Scores) -> bool:
        found = [value(scores) for value in values]
        return all(test(a, b) for test, a, b in zip(tests, found, found[1:], strict=False))

    return Term(holds, TRUTH)


def _extremes(left: Term, right: Term) -> list[tuple[float, float]]:
    """Return pairs of values that cover all outcomes of a comparison that the two ranges allow."""
    pairs = [(left.low, right.high), (left.high, right.low)]
    meet = max(left.low, right.low)
    if meet <= min(left.high, right.high):  # the ranges overlap, so equality is possible
        pairs.append((meet, meet))
    return pairs


def _name(node: ast.Name, scope: Scope, depth: int) -> Term:
    if node.id == "p":
        raise InputError("p: name the label, as in p['a cat']")
    if node.id in _BRACKETED and node.id not in scope.known:
        raise InputError(f"{node.id}: {_BRACKETED[node.id]}")
    if node.id in MEASURES and node.id not in scope.known:
        ends = "('cat', 'dog')" if node.id in RELATIONS else "['cat']"
        raise InputError(f"{node.id}: name what is looked for, as in {node.id}{ends}")
    if node.id not in scope.known and scope.anything:
        scope.known[node.id] = Term(score(node.id), EITHER)
    if node.id not in scope.known:
        close = nearest(node.id, [*scope.known, "p", *_BRACKETED, *MEASURES])
        there = ", ".join([*list(scope.known)[:20], "p['label']"])
        raise InputError(f"{shown(node.id)}: no such score{close}; there are {there}")
    scope.used.add(node.id)
    return scope.known[node.id]


def _subscript(node: ast.Subscript, scope: Scope, depth: int) -> Term:
    name = node.value.id if isinstance(node.value, ast.Name) else ""
    if name in BRACKETS:
        found = measured(node, scope)
        if name == "color":
            raise InputError(f"{quoted(node)}: is a colour: compare it, as in color['car'] == 'red'")
        return Term(found, NUMBER, 0.0, MEASURES[name].high)
    if name in RELATIONS:
        raise InputError(f"{quoted(node)}: takes round brackets, as in {name}('cat', 'dog')")
    if name == "p_class":
        return class_of(node, scope)
    if name == "answer":
        raise InputError(f"{quoted(node)}: is a text: compare it, as in answer['is it red?'] == 'yes'")
    if name != "p":
        known = ", ".join(["p", *_BRACKETED, *BRACKETS])
        raise InputError(f"{quoted(node)}: brackets belong to {known} only, as in p['a cat']")
    if not (isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)):
        raise InputError(f"{quoted(node)}: the label goes in quotes, as in p['a cat']")
    label = node.slice.value
    if scope.labels is None:
        raise InputError(f"p[{shown(label)}]: there are no labels; give them in `labels`")
    if label not in scope.labels:
        raise InputError(f"p[{shown(label)}]: no such label{nearest(label, scope.labels)}")
    scope.used_labels.add(label)

    def value(scores: Scores) -> float:
        found = (scores.get("p") or {}).get(label)
        if found is None:
            raise InputError(f"p[{shown(label)}]: this image has no such score; was it scored with that label?")
        return float(found)

    return Term(value, NUMBER, 0.0, 1.0)


def _constant(node: ast.Constant, scope: Scope, depth: int) -> Term:
    if isinstance(node.value, bool) or not isinstance(node.value, int | float):
        raise InputError(
            f"{quoted(node)}: is not a number; labels stand in p['…'], and true and false need no comparing"
        )
    if not abs(node.value) <= MAX_NUMBER:
        raise InputError(f"{quoted(node)}: is larger than {MAX_NUMBER:g}")
    number = float(node.value)  # products of whole numbers may become too large to be divided or compared
    return Term(lambda scores: number, NUMBER, number, number)


def _call(node: ast.Call, scope: Scope, depth: int) -> Term:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in RELATIONS and not node.keywords:
        measure = MEASURES[name]
        return Term(measured(node, scope), TRUTH if measure.truth else NUMBER, 0.0, measure.high)
    if name in BRACKETS:
        raise InputError(f"{quoted(node)}: takes square brackets, as in {name}['cat']")
    if name not in _FUNCTIONS:
        known = ", ".join([*_FUNCTIONS, *RELATIONS])
        raise InputError(
            f"{quoted(node)}: there are no functions but {known}{nearest(name, [*_FUNCTIONS, *RELATIONS])}"
        )
    function, least, most = _FUNCTIONS[name]
    if node.keywords or not least <= len(node.args) <= most:
        raise InputError(f"{quoted(node)}: {name} takes {least if least == most else f'{least} or more'} values")
    terms = [_number(part, scope, depth) for part in node.args]
    values = [term.value for term in terms]
    low, high = (function(*ends) for ends in ([t.low for t in terms], [t.high for t in terms]))
    if name == "abs":
        low, high = (0.0 if terms[0].low <= 0 <= terms[0].high else min(low, high)), max(low, high)
    return Term(lambda scores: function(*(value(scores) for value in values)), NUMBER, low, high)


_KNOWN = {name: Term(score(name), TRUTH if s.truth else NUMBER, s.low, s.high) for name, s in SCORES.items()}
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (min, 2, 20),
    "max": (max, 2, 20),
    "abs": (abs, 1, 1),
}
_BRACKETED = {
    "p_class": "name the label, as in p_class['tabby']",
    "answer": "name the question, as in answer['is it red?'] == 'yes'",
}
_REFUSED: dict[type[ast.AST], str] = {
    ast.Attribute: "there are no attributes; a label is p['a cat']",
    ast.NamedExpr: "nothing can be assigned",
    ast.Pow: "there are no powers",
    ast.BitAnd: "write `and`",
    ast.BitOr: "write `or`",
    ast.JoinedStr: "a label is plain text",
}
_SPELLINGS = {
    "&&": "write `and`",
    r"\|\|": "write `or`",
    r"!(?!=)": "write `not`",
    "[\u2018\u2019\u201c\u201d]": "write straight quotes, ' or \"",
    "=>|=<": "write >= or <=",
    r"(?<![<>=!])=(?!=)": "to compare write ==",
    r"\b(AND|OR|NOT)\b": "write and, or, not in small letters",
}
_BUILDERS: dict[type[ast.AST], Callable[[Any, Scope, int], Term]] = {
    ast.BoolOp: _bool_op,
    ast.UnaryOp: _unary,
    ast.BinOp: _arithmetic,
    ast.Compare: _compare,
    ast.Name: _name,
    ast.Subscript: _subscript,
    ast.Constant: _constant,
    ast.Call: _call,
}


def passes(gate: Expression | None, scores: Mapping[str, Any]) -> bool:
    """Return whether an image passes the gate; False if a score that the gate uses is NaN or absent."""
    return gate is None or (is_known(gate, scores) and bool(gate(scores)))


def is_known(expression: Expression, scores: Mapping[str, Any]) -> bool:
    """Return whether an image has all scores that the expression uses, and none of them is NaN."""
    for name in expression.names:
        if (value := scores.get(name)) is None or value != value:
            return False
    return expression.by_name or not unknown_scores(expression, scores)


def unknown_scores(expression: Expression, scores: Mapping[str, Any]) -> list[str]:
    """Return the scores used by an expression that are NaN (null in a record) or absent."""
    found = []
    for name in expression.names:
        if (value := scores.get(name)) is None or value != value:
            found.append(name)
    if expression.labels:
        odds = scores.get("p") or {}
        found += [f"p[{x!r}]" for x in expression.labels if (value := odds.get(x)) is None or value != value]
    found += [f"boxes: {why}" for words, least in expression.seen if (why := lacking(scores, words, least)) is not None]
    if expression.classes and (why := unclassified(scores)) is not None:
        found.append(f"p_class: {why}")
    found += [f"answer: {why}" for q in expression.questions if (why := unanswered(scores, q)) is not None]
    return sorted(found) if len(found) > 1 else found


def check_seen(
    option: str, expression: Expression, scores: Collection[Scores], classes: Collection[str] | None = None
) -> None:
    """Raise InputError, naming the option, if no image of a run has stored what an expression needs of vision models.

    classes: the labels of the run's classifier, if it has one.
    """
    if classes is not None:
        try:
            check_classes(expression.classes, classes)
        except InputError as error:
            raise InputError(f"{option}: {error}") from None
    checks: list[tuple[str, Callable[[Scores], str | None]]] = [
        ("detected", lambda found, words=words, least=least: lacking(found, words, least))  # type: ignore[misc]
        for words, least in expression.seen
    ]
    checks += [("classes", unclassified)] if expression.classes else []
    checks += [("answers", lambda found, q=q: unanswered(found, q)) for q in expression.questions]  # type: ignore[misc]
    for field, check in checks:
        reasons = [check(found) for found in scores]
        if reasons and None not in reasons:
            told = next((why for found, why in zip(scores, reasons, strict=True) if found.get(field)), reasons[0])
            raise InputError(f"{option}: {shown(expression.text)}: {told}, nor in any other of this run")
