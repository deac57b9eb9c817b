"""What pydantic finds wrong with a row, in one line that names the field, its value, and what is allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pydantic import ValidationError

from genkit.errors import InputError, nearest, shown

LISTED = ("loras", "controls")  # lists of objects with paths, which clients of a server are not to see
# pydantic's error types and genkit's messages for them, which follow the value.
_COMPLAINTS = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing_size"), "must be a whole number"),
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "string_type": "must be text",
    "string_unicode": "holds half a surrogate pair, which no file can store",
    "string_too_long": "must have at most {max_length} characters",
    "list_type": "must be a list",
    "dict_type": "must be an object of fields",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}


def complaint(error: ValidationError, fields: Collection[str], aliases: Mapping[str, str]) -> str:
    """Return pydantic's most specific error on a row as "field: value must be …". fields, aliases: names of a row's."""
    found = error.errors(include_url=False)
    # Of the branches of a union, the one that matched furthest.
    worst = max((e for e in found if e["loc"][:1] == found[0]["loc"][:1]), key=lambda e: len(e["loc"]))
    context = worst.get("ctx", {})
    known = _COMPLAINTS.get(worst["type"])
    message = worst["msg"].removeprefix("Value error, ") if known is None else known.format(**context)
    if not worst["loc"]:
        return message
    field = str(worst["loc"][0])
    if worst["type"] == "extra_forbidden":
        close = f" (did you mean {aliases[field]!r}?)" if field in aliases else nearest(field, fields)
        return f"{shown(field)}: unknown field{close}"
    if isinstance(context.get("error"), InputError) or field in LISTED:  # it names the value itself
        return f"{field}: {message}"
    item = "".join(f"[{part}]" for part in worst["loc"][1:] if isinstance(part, int))
    return f"{field}{item}: {shown(worst['input'])} {message}"
