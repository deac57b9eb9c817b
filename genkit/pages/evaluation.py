"""Pages without scripts: an evaluation with its failures, worst task first, and the leaderboard of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from genkit.pages import look

MOST = 60  # failures shown of a task
EACH = 2  # of a prompt


def evaluation_page(found: Mapping[str, Any], name: str) -> str:
    """Return the page of an evaluation.json; pictures are linked relative to the run folder, whose name is `name`."""
    suite, model = escape(found["suite"]["name"]), escape(found["model"]["name"])
    parts = [f'<h1>{model} on {suite}</h1><p class="soft">{escape(_told(found))}</p>']
    head = ["task", "prompts", "pictures", "right", "prompts with one right"]
    lines = [[escape(t["task"]), t["prompts"], t["images"], *_shares(t)] for t in found["tasks"]]
    parts.append(_table(head, [*lines, ["mean of tasks", "", "", *_shares(found["overall"])]], last=True))
    parts += [f"<p>{line}</p>" for line in _figures(found)]
    for task in sorted(found["tasks"], key=lambda t: t["right"]):
        parts += _failures(task, [row for row in found["rows"] if row["task"] == task["task"]])
    return _page(f"{name}: {found['suite']['name']}", "\n".join(parts))


def leaderboard_page(found: Mapping[str, Any], links: Sequence[str]) -> str:
    """Return the page of a leaderboard. links: for each entry the URL of its page, or ""."""
    tasks = list(found["entries"][0]["tasks"])
    head = ["", "model", "ranks (95 %)", "mean of tasks", *map(escape, tasks)]
    lines = []
    for entry, link in zip(found["entries"], links, strict=True):
        name = escape(entry["name"])
        name = f'<a href="{escape(link)}">{name}</a>' if link else name
        cells = [_share(entry["tasks"][task]["right"], entry["tasks"][task]["interval"]) for task in tasks]
        ranks = "–".join(map(str, dict.fromkeys(entry["ranks"])))
        lines.append([str(entry["rank"]), name, ranks, _share(entry["right"], entry["interval"]), *cells])
    pairs = [
        [escape(p["a"]), escape(p["b"]), f"{p['better']:.1%}", f"{p['difference']:+.1%}", _ends(p["interval"]),
         escape(p["verdict"])]
        for p in found["pairs"]
    ]  # fmt: skip
    body = [f"<h1>Suite {escape(found['suite']['name'])}</h1>", _table(head, lines)]
    body.append(f"<h2>Pairs</h2><p class='soft'>{found['resamples']:,} resamples of the prompts, the same for both</p>")
    body.append(_table(["A", "B", "A better in", "A − B", "(95 %)", ""], pairs))
    body += [f"<p>{escape(note)}</p>" for note in found["notes"]]
    return _page(f"Leaderboard: {found['suite']['name']}", "\n".join(body))


def _told(found: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items() if value is not None)
    return f"{found['suite']['rows']:,} prompts; {settings}; seed {found['seed']}; genkit {found['genkit']}"


def _figures(found: Mapping[str, Any]) -> Iterator[str]:
    if found["clip"] is not None:
        yield f"mean clip {found['clip']['mean']:.4f}"
    against = found.get("against")
    if against is not None:
        values = ", ".join(f"{name} {against[name][0]:.4g}" for name in ("fid", "kid", "cmmd") if name in against)
        yield f"{escape(values)}, to {against['pictures']:,} pictures of {escape(against['folder'])}"
        yield from map(escape, against["notes"])
    for name, what in (("failed", "failed"), ("unknown", "lack a score that their expression reads")):
        if found[name]:
            yield f"{found[name]:,} pictures {what}, and count as wrong"


def _failures(task: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    wrong = [(row, image) for row in rows for image in [i for i in row["images"] if not i["right"]][:EACH]]
    count = sum(not image["right"] for row in rows for image in row["images"])
    if not count:
        return
    yield f"<h2>{escape(task['task'])}: {task['right']:.1%} right, {count:,} wrong</h2><div class='grid'>"
    for row, image in wrong[:MOST]:
        yield _card(row, image)
    left = count - len(wrong[:MOST])
    yield "</div>" + (f"<p class='soft'>… and {left:,} more; index.html has all pictures</p>" if left else "")


def _card(row: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    found = [f"{name} = {_value(value)}" for name, value in image["found"].items()]
    found += [f"failed: {image['failed']}"] if "failed" in image else []
    found += [f"unknown: {', '.join(image['unknown'])}"] if "unknown" in image else []
    source = quote(str(image["file"])) if image["file"] else ""
    picture = f'<img src="{escape(source)}" alt="" loading="lazy">' if source else ""
    lines = "".join(f"<span>{escape(line)}</span>" for line in found)
    asked = f'<b dir="auto">{escape(row["prompt"])}</b><code>{escape(row["verify"])}</code>'
    return f"<figure>{picture}<figcaption>{asked}{lines}</figcaption></figure>"


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _shares(shares: Mapping[str, Any]) -> list[str]:
    return [_share(shares["right"], shares["interval"]), _share(shares["any"], shares["any_interval"])]


def _share(value: float, ends: Sequence[float]) -> str:
    return f'<meter value="{value:.4f}"></meter>{value:.1%}<small>{_ends(ends)}</small>'


def _ends(ends: Sequence[float]) -> str:
    return " to ".join(f"{x:.1%}" for x in ends)


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]], last: bool = False) -> str:
    """Return a table; its cells are HTML. last: whether the last line is a sum."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    rows = ["".join(f"<td>{cell}</td>" for cell in line) for line in lines]
    classes = ["" for _ in rows[:-1]] + [' class="last"' if last else ""]
    body = "".join(f"<tr{kind}>{row}</tr>" for kind, row in zip(classes, rows, strict=True))
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _page(title: str, body: str) -> str:
    """Return the page; its policy allows no scripts, its own style, and pictures beside it."""
    template = look.template("evaluation")
    parts = {"policy": look.policy(template, look.LOCAL), "title": escape(title), "body": body}
    return look.filled(template, parts)
