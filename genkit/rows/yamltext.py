"""YAML as data only: mappings, lists, text, numbers, true, false, null. Ambiguous spellings are errors."""

from __future__ import annotations

import re
from typing import Any

from genkit.errors import InputError, shown

MAX_DEPTH = 20  # of lists and mappings within each other

_PLAIN = (
    (re.compile(r"|~|null|Null|NULL"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?(0|[1-9][0-9]{0,99})"), int),
    (re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?"), float),
)
_EXPONENT = re.compile(r"[-+]?(0|[1-9][0-9]{0,15})[eE][-+]?[0-9]{1,3}")
# Words that YAML 1.1 and 1.2 read differently: no is false or "no", 010 is 8 or 10, 1:30 is 90 or text.
_AMBIGUOUS = re.compile(
    r"(?i:y|n|yes|no|on|off|[-+]?\.(inf|nan))|[-+]?[0-9][0-9_.]*([eE][-+]?[0-9]*)?|[-+]?0[box][0-9a-fA-F_]+"
    r"|[-+]?[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?|=|<<"
)
# Control characters, which YAML forbids, and line separators that only YAML treats as such.
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class Cut(str):
    """An unquoted text that is followed by a comment on its line, which may have been meant as a part of the text."""


class Block(dict[Any, Any]):
    """A YAML mapping that knows the line (from 1) where it starts."""

    line = 0


def parse_yaml(text: str, where: str, exponents: bool = False) -> Any:
    """Return the one document in `text`: Blocks, lists, str, int, float, bool, None.

    exponents: 1e-4 is a number, as YAML 1.2 has it, and not the text of YAML 1.1. Raises InputError naming `where` and
    the line for bad YAML, a key given twice, anchors and aliases, tags, words that YAML 1.1 and 1.2 read differently,
    and nesting past MAX_DEPTH.
    """
    import yaml

    odd = _ODD.search(text)
    if odd:
        line = text.count("\n", 0, odd.start()) + 1
        raise InputError(
            f"{where}:{line}: {shown(odd[0])} cannot stand in YAML; write it as an escape in double quotes"
        )
    builder = _Builder(where, exponents, text)
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            builder.add(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 1
        reason = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", error)).split())
        raise InputError(f"{where}:{line}: not YAML: {reason}") from None
    return builder.document


class _Builder:
    """Builds values from the parser's events, with a stack of its own: no file can exhaust Python's."""

    def __init__(self, where: str, exponents: bool, text: str) -> None:
        self.where, self.exponents, self.lines = where, exponents, text.split("\n")
        self.document: Any = None
        self._documents = 0
        self._open: list[Block | list[Any]] = []
        self._keys: list[Any] = []  # for each open collection, the key that waits for its value

    def add(self, event: Any) -> None:
        """Take the next event of yaml.parse."""
        line = event.start_mark.line + 1
        kind = type(event).__name__
        if kind == "AliasEvent" or getattr(event, "anchor", None):
            raise self._error(line, f"{shown(event.anchor)}: anchors and aliases (& and *) are not read; write it out")
        if getattr(event, "tag", None) not in (None, "!"):
            raise self._error(line, f"{shown(event.tag)}: tags are not read; write the plain value")
        handler = _HANDLERS.get(kind)
        if handler is not None:
            handler(self, event, line)

    def start_document(self, event: Any, line: int) -> None:
        """Count it: one file is one document."""
        self._documents += 1
        if self._documents > 1:
            raise self._error(line, "a second document; a prompt file holds one")

    def scalar(self, event: Any, line: int) -> None:
        """Store a scalar: text when it is a key, quoted or a block, else what it plainly says."""
        plain = event.implicit[0] and not self._expects_key()
        value = self._plain(event.value, line) if plain else event.value
        if plain and isinstance(value, str):
            rest = self.lines[event.end_mark.line][event.end_mark.column :]
            value = Cut(value) if rest.lstrip().startswith("#") else value
        self._store(value, line)

    def start(self, event: Any, line: int) -> None:
        """Open a list or a mapping."""
        if len(self._open) >= MAX_DEPTH:
            raise self._error(line, f"more than {MAX_DEPTH} levels of nesting")
        if type(event).__name__ == "MappingStartEvent":
            block = Block()
            block.line = line
            self._push(block, line)
        else:
            self._push([], line)

    def end(self, event: Any, line: int) -> None:
        """Close the innermost list or mapping."""
        self._open.pop()
        self._keys.pop()

    def _expects_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1], Block) and self._keys[-1] is _NO_KEY

    def _push(self, value: Block | list[Any], line: int) -> None:
        self._store(value, line)
        self._open.append(value)
        self._keys.append(_NO_KEY)

    def _store(self, value: Any, line: int) -> None:
        if not self._open:
            self.document = value
            return
        target = self._open[-1]
        if isinstance(target, list):
            target.append(value)
        elif self._expects_key():
            if not isinstance(value, str):
                raise self._error(line, f"{shown(value)}: a key must be text")
            if value in target:
                raise self._error(line, f"{shown(value)}: key is given twice")
            self._keys[-1] = value
        else:
            target[self._keys[-1]] = value
            self._keys[-1] = _NO_KEY

    def _plain(self, text: str, line: int) -> Any:
        for pattern, convert in _PLAIN:
            if pattern.fullmatch(text):
                return convert(text)
        if self.exponents and _EXPONENT.fullmatch(text):
            return float(text)
        if _AMBIGUOUS.fullmatch(text):
            raise self._error(line, f"{shown(text)}: YAML readers disagree on what this is; write it in quotes")
        return text

    def _error(self, line: int, message: str) -> InputError:
        return InputError(f"{self.where}:{line}: {message}")


_NO_KEY = object()
_HANDLERS = {
    "DocumentStartEvent": _Builder.start_document,
    "ScalarEvent": _Builder.scalar,
    "SequenceStartEvent": _Builder.start,
    "MappingStartEvent": _Builder.start,
    "SequenceEndEvent": _Builder.end,
    "MappingEndEvent": _Builder.end,
}
