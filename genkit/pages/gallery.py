"""RUN/index.html: all images with scores and the reason why each was kept or not; needs no server."""

from __future__ import annotations

import html
import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.durable import disk, json_pieces, write_whole
from genkit.pages import look
from genkit.pictures.metadata import without_folders
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.records import GALLERY
from genkit.selection.decide import image_name

# Characters to escape in JSON within HTML: "</script>" would end the block, "<!--" would change its parsing.
_HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
SETTINGS_OF_IMAGE = ("seed", "index", "file", "status", "scores", "width", "height", "nfe", "seconds")
_settings_of = operator.attrgetter(*SETTINGS_OF_IMAGE)


def write_gallery(
    folder: Path,
    rows: Sequence[Request],
    results: Iterable[Result],
    selection: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Path:
    """Write index.html of a run folder and return its path.

    selection: from `decide`; config: run.json. The page contains its style and script and loads images by relative
    path; its content security policy allows nothing else. Raises HostError.
    """
    images = _images(results, selection["images"])
    # As in the pictures, without folders: galleries are passed on, and folders are private
    stated = ((row, without_folders(row.to_json())) for row in rows)
    settings = ((str(row.id), {k: v for k, v in fields.items() if k != "id"}) for row, fields in stated)
    return write_page(folder, json_pieces(about(folder, config), {"rows": settings}, {"images": images}))


def write_page(folder: Path, data: Iterable[str], large: bool = False) -> Path:
    """Write index.html with the JSON `data`, in pieces, and return its path. Raises HostError.

    large: whether the images are in files that the page loads.
    """
    more = look.script("gallery_large") if large else ""
    template = look.template("gallery").replace("{{large}}\n", f"{more}\n")
    parts = {"policy": look.policy(template, look.LOCAL, loads=large), "title": html.escape(folder.resolve().name)}
    before, after = (look.filled(half, parts) for half in template.split("{{data}}"))
    pieces = itertools.chain([before], map(within_html, data), [after])
    path = folder / GALLERY
    with disk(path):
        write_whole(path, (text.encode("utf-8", "backslashreplace") for text in pieces))
    return path


def within_html(text: str) -> str:
    for character, escape in _HTML.items():
        text = text.replace(character, escape)
    return text


def _images(results: Iterable[Result], decisions: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the data of each image for the page, by row, then by image number."""
    found = {image_name(r): r for r in results}
    ranked = Counter(d["id"] for d in decisions.values() if d["rank"] is not None)
    for key, decision in decisions.items():
        record = dict(zip(SETTINGS_OF_IMAGE, _settings_of(found[key]), strict=True))
        verdict = {field: decision[field] for field in ("id", "kept", "rank", "reason")}
        yield record | verdict | {"of": ranked[decision["id"]]}


def about(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of the run itself."""
    model = config["binding"].get("model") or {}
    info = config["info"]
    made = f"Made with genkit {info.get('genkit', '')}, begun {str(info.get('started', ''))[:10]}"
    model_name = model.get("name", "") if isinstance(model, Mapping) else str(model)
    return {"name": folder.resolve().name, "model": model_name, "made": made}
