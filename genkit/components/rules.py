"""Rules for config values: each tests a value and says in words what passes; `check_config` applies a table of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from genkit.errors import InputError, nearest, shown

UNUSED = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})
CODE = frozenset({"auto_map", "custom_pipeline", "trust_remote_code", "custom_pipelines"})
LIST_LIMIT = 16  # no network has more blocks
NAMED = 6  # keys named in a note


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test of a value, and its description for error messages ("a whole number from 1 to 64")."""

    text: str
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Key:
    """The rule for a config key's value, and the default that the library uses where the key is absent."""

    rule: Rule
    default: Any


def whole(low: int, high: int) -> Rule:
    """An integer from `low` to `high`; neither true nor 1.0."""
    return Rule(f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def real(low: float, high: float, *, above: bool = False) -> Rule:
    """An integer or float from `low` to `high`, never NaN; with `above`, `low` itself is excluded."""

    def holds(v: Any) -> bool:
        return type(v) in (int, float) and (low < v if above else low <= v) and v <= high

    return Rule(f"a number {'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}", holds)


def choice(*words: Any) -> Rule:
    """One of the given strings, numbers, None or booleans; 1 does not pass for True."""
    text = " or ".join(json.dumps(w) if w is None or isinstance(w, bool) else repr(w) for w in words)
    return Rule(text, lambda v: any(v == w and type(v) is type(w) for w in words))


def either(*rules: Rule) -> Rule:
    """A value that passes any of the rules."""
    return Rule(" or ".join(rule.text for rule in rules), lambda v: any(rule.holds(v) for rule in rules))


def optional(rule: Rule) -> Rule:
    """A value that passes the rule, or None."""
    return either(rule, choice(None))


def many(rule: Rule, least: int = 1, most: int = LIST_LIMIT) -> Rule:
    """A list of `least` to `most` values that each pass the rule."""
    length = f"{least}" if least == most else f"{least} to {most}"
    return Rule(
        f"a list of {length}, each {rule.text}",
        lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(rule.holds, v)),
    )


def one_or_many(rule: Rule) -> Rule:
    """A value that passes the rule, or a list of them (one for each block)."""
    return either(rule, many(rule))


FLAG = choice(True, False)
ANYTHING = Rule("anything", lambda v: True)
TEXT = Rule("a text of at most 1000 characters", lambda v: isinstance(v, str) and len(v) <= 1000)


def refuse_code(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a key that names code to run, such as auto_map."""
    for key, value in config.items():
        hub_kernel = key.startswith("_attn_implementation") and isinstance(value, str) and "/" in value
        if hub_kernel or (key in CODE and value is not None and value is not False):
            raise InputError(f"{where}: {key}: {shown(value)}: code that comes with a model is never run")


def _plain(value: Any, rule: Rule) -> Any:
    """Return what a value that another tool wrote comes to: 4.0 is 4, null for a flag false, and false or [] null."""
    if isinstance(value, float) and value.is_integer() and rule.holds(int(value)):
        return int(value)
    if value is None and rule is FLAG:
        return False
    return None if value in (False, [], {}, "") and rule.holds(None) else value


def check_config(
    config: Mapping[str, Any],
    keys: Mapping[str, Key],
    where: str,
    unused: Mapping[str, Rule] | None = None,
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """Return the values of `keys` in `config`, with defaults filled in.

    unused: rules for further keys that are accepted and not returned. notes: for a file that another tool wrote; keys
    that are in neither table are left out and noted, and values are read as `_plain` says. Without it they are errors.
    Raises InputError with `where`, the key, its value and what it may be, or the nearest known key.
    """
    unused = unused or {}
    refuse_code({key: value for key, value in config.items() if key not in unused}, where)
    checked = {name: key.default for name, key in keys.items()}
    left_out = []
    for name, value in config.items():
        if name in UNUSED or name in CODE:
            continue
        rule = keys[name].rule if name in keys else unused.get(name)
        if rule is None:
            if notes is None:
                raise InputError(f"{where}: {shown(name)}: unknown key{nearest(name, keys)}")
            asks = not (value is None or value is False or value in ([], {}, ""))
            left_out += [f"{shown(name).strip(chr(39))}{nearest(name, keys)}"] if asks else []
            continue
        if notes is not None and not rule.holds(value):
            value = _plain(value, rule)
            if value is None and name in unused:
                continue
        if not rule.holds(value):
            raise InputError(f"{where}: {name}: {shown(value)} is not {rule.text}")
        if name in keys:  # transformers' configs refuse the integer 1 for 1.0
            checked[name] = float(value) if type(keys[name].default) is float and type(value) is int else value
    if left_out and notes is not None:
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        notes.append(f"{where}: not used, as no network here knows it: {', '.join(left_out[:NAMED])}{more}")
    return checked
