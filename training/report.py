"""The report of a training run: a summary line, and index.html with losses, scores and samples."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.durable import disk, write_whole
from genkit.pages.look import look
from genkit.training.checkpoint import read_log
from genkit.training.evaluate import TIMES, overfit_since

WIDTH, HEIGHT, POINTS = 760, 220, 400  # of a curve: size in pixels, and maximum number of points
POLICY = "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'"
STYLE = (
    "body{max-width:1100px;margin:0 auto;padding:20px clamp(12px,2.5vw,32px) 48px}h1{font-size:22px;margin:0 0 14px}"
    "h2{font-size:17px;margin:28px 0 10px}section,figure{background:var(--card);border:1px solid var(--line);"
    "border-radius:14px;padding:14px 16px;margin:14px 0;overflow-x:auto}img,svg{max-width:100%;border-radius:8px}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:5px 14px 5px 0;text-align:right;"
    "white-space:nowrap}th,small,figcaption{color:var(--soft);font-weight:400}th{border-bottom:1px solid var(--line)}"
    "figcaption{overflow-wrap:anywhere}.best{font-weight:650}.warning{color:var(--warn)}"
    "polyline{fill:none;stroke:var(--accent);stroke-width:1.5}circle{fill:var(--bad)}text{font-size:12px;fill:currentColor}"
)


def described(outcome: Any, folder: Path) -> str:
    """Return the summary of a run as text."""
    lines = [f"step {outcome.step}: {outcome.reason}; {outcome.rate:.1f} images/s"]
    figures = [f"{k} {v:.4g}" for k, v in outcome.scores.items() if isinstance(v, float)]
    lines += [f"best: step {outcome.scores['step']}: {', '.join(figures)}"] if figures else []
    lines += [f"overfit since step {outcome.overfit}"] if outcome.overfit is not None else []
    lines += (
        [f"run the same command again to continue from step {outcome.step}"]
        if outcome.exit_code
        else [f"model in {folder}"]
    )
    return "\n".join([*lines, f"losses and samples: {folder / 'index.html'}"])


def write_page(
    out: Path, title: str, scores: Mapping[int, Mapping[str, Any]], prompts: Sequence[str], best: int
) -> None:
    """Write index.html of a training run: without scripts, all text escaped. Raises HostError."""
    losses = [(line["step"], line["loss"]) for line in read_log(out / "log.jsonl")]
    held = [(step, found["loss"]) for step, found in sorted(scores.items()) if found.get("loss") is not None]
    names = [f"{10 * k} to {10 * k + 10} %" for k in range(TIMES)]
    tenths = {s: dict(zip(names, found.get("loss_by_time", []), strict=False)) for s, found in scores.items()}
    by_time = f"<h2>Loss by noise level, 100 % is noise</h2>{table(tenths, best)}" if any(tenths.values()) else ""
    since = overfit_since(scores)
    warning = (
        ""
        if since is None
        else f"<p class=warning>Overfit since step {since}: the loss on held-out pictures rises.</p>"
    )
    caption = " · ".join(prompts)
    sheets = "".join(
        f'<figure><img src="samples/{path.name}" alt="samples" loading="lazy"><figcaption>step {int(path.stem)}: '
        f"{html.escape(caption)}</figcaption></figure>"
        for path in sorted((out / "samples").glob("*.png"), reverse=True)
    )
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
        f"<title>{html.escape(title)}</title><style>{look()}{STYLE}</style><h1>{html.escape(title)}</h1>{warning}"
        f"{curve(losses, held)}{table(scores, best)}{sheets}{by_time}</html>\n"
    )
    with disk(out):
        write_whole(out / "index.html", page.encode("utf-8", "backslashreplace"))


def table(scores: Mapping[int, Mapping[str, Any]], best: int) -> str:
    """Return an HTML table of all metrics, a row for each step, that of `best` in bold."""
    figures = {name for found in scores.values() for name, value in found.items() if isinstance(value, int | float)}
    names = sorted(figures, key=lambda name: (name != "loss", name))
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ("step", *names))
    rows = "".join(
        f"<tr{' class=best' if step == best else ''}><td>{step}</td>"
        + "".join(f"<td>{_measured(found, n)}</td>" for n in names) + "</tr>"
        for step, found in sorted(scores.items())
    )  # fmt: skip
    return f"<section><table><tr>{head}</tr>{rows}</table></section>"


def curve(losses: Sequence[tuple[int, float]], held: Sequence[tuple[int, float]]) -> str:
    """Return a section with an SVG of the smoothed training loss, and of the validation loss as points."""
    if len(losses) < 2:
        return ""
    every = max(1, len(losses) // POINTS)
    parts = [losses[i : i + every] for i in range(0, len(losses), every)]
    line = [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]
    values = [loss for _, loss in [*line, *held]]
    low, high, last = min(values), max(values), max(step for step, _ in [*line, *held])

    def at(step: int, loss: float) -> tuple[float, float]:
        share = (loss - low) / (high - low or 1)
        return 50 + (WIDTH - 60) * step / last, 10 + (HEIGHT - 40) * (1 - share)

    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in (at(*point) for point in held))
    labels = f'<text x="0" y="20">{high:.3g}</text><text x="0" y="{HEIGHT - 30}">{low:.3g}</text>'
    labels += f'<text x="50" y="{HEIGHT - 8}">loss by step, 0 to {last}; dots: held-out pictures</text>'
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"><polyline points="{drawn}"/>{dots}{labels}</svg>'
    return f"<section>{svg}</section>"


def _measured(found: Mapping[str, Any], name: str) -> str:
    """Return a metric as text, with its interval if there is one."""
    value, ends = found.get(name), found.get(f"{name}_interval") or [None]
    text = "" if value is None else "–" if value != value else f"{value:.4g}"
    return text if None in ends else f"{text} <small>{ends[0]:.4g} – {ends[1]:.4g}</small>"
