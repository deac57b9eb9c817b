"""The doctor's report as a self-contained page without scripts: facts, findings with thumbnails, some pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape

from genkit.datasets.report import Report
from genkit.errors import InputError
from genkit.pages import look

SIDE = 112  # pixels of a thumbnail
MOST, SOME = 48, 60  # pictures of a finding, and of the data set as a whole
LONG = 300  # characters of a caption


def page(report: Report) -> str:
    """Return the report as HTML. Names and captions are escaped; its policy allows no scripts and no loads."""
    template = look.template("doctor")
    parts = {
        "policy": look.policy(template, "img-src data:"),
        "facts": "".join(_facts(report)),
        "findings": "".join(_findings(report)),
    }
    spread = range(0, len(report.pictures), max(1, -(-len(report.pictures) // SOME)))
    parts["pictures"] = "".join(_card(report, i) for i in spread)
    return look.filled(template, parts)


def _facts(report: Report) -> Iterator[str]:
    for name, value in report.facts.items():
        yield f'<dt>{escape(name)}</dt><dd dir="auto">{escape(value)}</dd>'


def _findings(report: Report) -> Iterator[str]:
    if not report.findings:
        yield '<p class="fine">Nothing is wrong.</p>'
    for finding in report.findings:
        heading = f'<b>{finding.level}</b> <span dir="auto">{escape(finding.text)}</span>'
        yield f'<section class="{finding.level}"><h2>{heading}</h2>'
        left, groups = MOST, []
        for group in finding.groups:
            if left <= 0:
                break
            cards = "".join(_card(report, i) for i in group[:left])
            groups.append(f'<div class="group">{cards}</div>' if len(group) > 1 else cards)
            left -= len(group)
        more = len(finding.groups) - len(groups)
        yield f'<div class="grid">{"".join(groups)}</div>' if groups else ""
        yield (f"<p>… and {more:,} more; genkit doctor --json names them all</p>" if more else "") + "</section>"


def _card(report: Report, number: int) -> str:
    example = report.pictures[number]
    caption = example.caption or ""
    caption = caption if len(caption) <= LONG else caption[:LONG] + "…"
    small = base64.b64encode(_thumbnail(report, number)).decode()
    shown = f'<img src="data:image/webp;base64,{small}" alt="">' if small else '<i class="broken">unreadable</i>'
    fingerprint = report.fingerprints[number]
    size = escape(fingerprint.problem.removeprefix(f"{example.key}: ")) or "×".join(map(str, fingerprint.size))
    size += ", held out" if number >= report.train else ""
    return (
        f'<figure>{shown}<figcaption><span dir="auto">{escape(caption) or "<i>no caption</i>"}</span>'
        f'<small dir="auto">{escape(example.key)}</small><small>{size}</small></figcaption></figure>'
    )


def _thumbnail(report: Report, number: int) -> bytes:
    if report.fingerprints[number].problem:
        return b""
    try:
        picture = report.pictures[number].read()
    except InputError:  # changed meanwhile
        return b""
    picture.thumbnail((SIDE, SIDE))
    kept = io.BytesIO()
    picture.save(kept, "webp", quality=70)
    return kept.getvalue()
