"""The answer of a search as a page without scripts: pictures, scores and captions; it holds small copies of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from genkit.durable import disk, write_whole
from genkit.errors import InputError, shown
from genkit.files import local
from genkit.pages import look
from genkit.pictures.images import read_image

SIDE = 320  # pixels of a small copy
SUFFIX = ".html"


def check_page(path: Path) -> None:
    """Raise InputError if the page cannot be written there."""
    local(path, "--page")
    if path.suffix.lower() != SUFFIX or path.is_dir():
        raise InputError(f"--page: {shown(str(path))} is not a file that ends in {SUFFIX}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--page: {shown(str(path.parent))} is no folder")


def write_page(path: Path, query: Mapping[str, Any], results: Sequence[Mapping[str, Any]], about: str) -> None:
    """Write the page. query, results: as in `studies.search.Found`; about: a line below. Raises HostError."""
    template = look.template("search")
    asked = "".join(
        f'<dt>{name}</dt><dd dir="auto">{escape(str(value))}</dd>' for name, values in query.items() for value in values
    )
    cards = "".join(_card(number, result) for number, result in enumerate(results, 1))
    parts = {"policy": look.policy(template, "img-src data:"), "query": asked, "cards": cards, "about": escape(about)}
    with disk(path):
        write_whole(path, look.filled(template, parts).encode("utf-8", "backslashreplace"))


def _card(number: int, result: Mapping[str, Any]) -> str:
    try:
        picture = read_image(result["file"])
        picture.thumbnail((SIDE, SIDE))
        kept = io.BytesIO()
        picture.save(kept, "webp", quality=80)
        small = base64.b64encode(kept.getvalue()).decode()
        shown_ = f'<img src="data:image/webp;base64,{small}" alt="" loading="lazy">'
    except InputError:  # changed meanwhile
        shown_ = '<i class="broken">unreadable</i>'
    return (
        f'<figure>{shown_}<figcaption><b>{number}</b> <span class="score">{result["score"]:.4f}</span>'
        f'<span class="caption" dir="auto">{escape(result["caption"])}</span>'
        f'<small dir="auto">{escape(result["file"])}</small></figcaption></figure>'
    )
