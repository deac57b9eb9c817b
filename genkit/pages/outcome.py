"""selection.json and the gallery of a run as it lies in its folder: one page, or for a large run a page with files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.pages.gallery import write_gallery
from genkit.pages.large import remove_older, write_large_gallery
from genkit.runs.records import read_rows
from genkit.selection.verdicts import Selection, write_selection_file
from genkit.storage import StoragePath

LARGE = 10_000  # images above which the page loads what it shows


def write_outcome(folder: Path, selection: Selection, config: Mapping[str, Any]) -> Path:
    """Write selection.json and index.html of a run folder; return the page's path. Raises HostError."""
    write_selection_file(folder, selection)
    table = selection.table
    stored = isinstance(folder, StoragePath)  # where a page of a thousand objects would be slow to write
    if len(table) > LARGE and not stored:
        return write_large_gallery(folder, selection, config)
    results = list(table.whole(range(len(table))))
    page = write_gallery(folder, read_rows(folder), results, {"images": dict(selection.images())}, config)
    if not stored:
        remove_older(folder)
    return page
