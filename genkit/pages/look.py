"""What all pages share: head, style, how a template is filled in, and the Content-Security-Policy."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files

LOCAL = "img-src 'self' file:"  # of a page that lies beside its pictures

_PLACE = "/* look */\n"  # in a page's <style>
_TOP, _SERVED = "<!-- head -->\n", "<!-- served head -->\n"  # of pages that lie in a folder, and of served ones
_SHARED = re.compile(r"^(?:/\* from (\w+\.css) \*/|// from (\w+\.js))\n", re.MULTILINE)  # of pages of one kind
_START = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
"""
_HEAD = f"""{_START}<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="{{{{policy}}}}">
"""


def look() -> str:
    """Return the style that all pages begin with."""
    return files("genkit.pages").joinpath("look.css").read_text("utf-8")


def template(name: str) -> str:
    """Return the page of that name, with the shared head, style and script in it: it needs no file beside it."""
    text = files("genkit.pages").joinpath(f"{name}.html").read_text("utf-8")
    if _PLACE not in text:
        raise ValueError(f"{name}.html takes in no shared style")
    text = _SHARED.sub(lambda found: files("genkit.pages").joinpath(found[1] or found[2]).read_text("utf-8"), text)
    return text.replace(_TOP, _HEAD, 1).replace(_SERVED, _START, 1).replace(_PLACE, look(), 1)


def script(name: str) -> str:
    """Return a script that some pages take in."""
    return files("genkit.pages").joinpath(f"{name}.js").read_text("utf-8").strip()


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Return a template with each {{name}} replaced by parts[name], which must be escaped already."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def policy(template: str, *sources: str, loads: bool = False) -> str:
    """Return a page's Content-Security-Policy: the template's own style and script, by hash, and directives `sources`.

    loads: whether that script may load other scripts; tags in the page may not, whatever text is filled in.
    """
    allowed = []
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        if inside is not None:
            digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
            allowed.append(f"{tag}-src 'sha256-{digest}'" + (" 'strict-dynamic'" if loads and tag == "script" else ""))
    return "; ".join(["default-src 'none'", *sources, *allowed, "base-uri 'none'", "form-action 'none'"])
