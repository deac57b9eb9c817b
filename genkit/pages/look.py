"""What all pages share: their head, colours for light and dark, and type; each page takes them in."""

from __future__ import annotations

from importlib.resources import files

_PLACE = "/* look */\n"  # in a page's <style>
_TOP = "<!-- head -->\n"  # of pages that lie in a folder
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="{{policy}}">
"""


def look() -> str:
    """Return the style that all pages begin with."""
    return files("genkit.pages").joinpath("look.css").read_text("utf-8")


def template(name: str) -> str:
    """Return the page of that name, with the shared head and style in it: it needs no file beside it."""
    text = files("genkit.pages").joinpath(f"{name}.html").read_text("utf-8")
    if _PLACE not in text:
        raise ValueError(f"{name}.html takes in no shared style")
    return text.replace(_TOP, _HEAD, 1).replace(_PLACE, look(), 1)


def script(name: str) -> str:
    """Return a script that some pages take in."""
    return files("genkit.pages").joinpath(f"{name}.js").read_text("utf-8").strip()
