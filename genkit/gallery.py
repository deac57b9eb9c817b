"""RUN/index.html: every image, what it scored, and why it was kept or not, on one page that needs no server."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from genkit.durable import disk, json_line, write_whole
from genkit.records import GALLERY
from genkit.request import Request, Result

# What must not stand in a JSON block within HTML: "</script>" would end it, "<!--" would change how it is read.
_HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
_SETTINGS_OF_IMAGE = ("seed", "index", "file", "status", "scores", "width", "height", "nfe", "seconds")


def write_gallery(
    folder: Path,
    rows: Sequence[Request],
    results: Iterable[Result],
    selection: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Path:
    """Write index.html of a run folder and return its path.

    selection: as from `decide`; config: run.json. The page holds its style and script, loads images by relative path,
    and its policy lets nothing else run or load. Raises HostError.
    """
    template = files("genkit").joinpath("gallery.html").read_text("utf-8")
    data = json_line(_data(folder.resolve().name, rows, results, selection, config)).strip()
    for character, escape in _HTML.items():
        data = data.replace(character, escape)
    parts = {"policy": _policy(template), "title": html.escape(folder.resolve().name), "data": data}
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    path = folder / GALLERY
    with disk(path):
        write_whole(path, page.encode("utf-8", "backslashreplace"))
    return path


def _data(
    name: str,
    rows: Sequence[Request],
    results: Iterable[Result],
    selection: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the page shows. An image stands in the order of its row, then of its number."""
    decisions = selection["images"]
    found = {f"{r.id}-{r.index:02d}": r for r in results}
    ranked = Counter(d["id"] for d in decisions.values() if d["rank"] is not None)
    images = []
    for key, decision in decisions.items():
        record = {field: getattr(found[key], field) for field in _SETTINGS_OF_IMAGE}
        verdict = {field: decision[field] for field in ("id", "kept", "rank", "reason")}
        images.append({**record, **verdict, "of": ranked[decision["id"]]})
    settings = {str(row.id): {k: v for k, v in row.to_json().items() if k != "id"} for row in rows}
    model = config["binding"].get("model") or {}
    info = config["info"]
    made = f"Made with genkit {info.get('genkit', '')}, begun {str(info.get('started', ''))[:10]}"
    model_name = model.get("name", "") if isinstance(model, Mapping) else str(model)
    return {"name": name, "model": model_name, "made": made, "rows": settings, "images": images}


def _policy(template: str) -> str:
    """Return a Content-Security-Policy that allows the template's own style and script, by hash, and local images."""
    hashes = {}
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        assert inside is not None
        hashes[tag] = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
    allowed = [f"{tag}-src 'sha256-{digest}'" for tag, digest in hashes.items()]
    return "; ".join(["default-src 'none'", "img-src 'self' file:", *allowed, "base-uri 'none'", "form-action 'none'"])
