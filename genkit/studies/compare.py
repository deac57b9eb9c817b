"""`genkit compare`: two runs of the same rows, compared picture by picture for every score."""

from __future__ import annotations

import html
import itertools
import math
import os
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from genkit.durable import disk, json_line, json_pieces, write_whole
from genkit.errors import HostError, InputError
from genkit.files import local
from genkit.pages import look
from genkit.pages.gallery import within_html
from genkit.progress import Steps
from genkit.rows.result import Result
from genkit.runs.records import GALLERY
from genkit.scoring.boxes import counts
from genkit.scoring.said import NOTHING, Said, said_of
from genkit.selection.intervals import mean_interval, share_interval
from genkit.storage import StoragePath
from genkit.studies.pairs import Pair, Paired, Side, pair_runs
from genkit.studies.preferences import by_eye, described

PAGE, TABLE, FIGURES = "compare.html", "compare.jsonl", "comparison.json"
PAGE_BYTES = 4_000_000  # of pairs on the page, which a browser reads whole
TOLD = 256  # pairs between two updates of the progress bar
RANKED = 6  # scores whose largest differences are on the page of a large comparison
NAMED = 10  # names of unpaired pictures in the report
LINES = 30  # scores in the terminal: with different labels in each row there may be very many
# Fields of a row that do not change its pixels, or that are equal within a pair anyway.
_ASIDE = {*"id prompt seed num_images keep rank_by gate max_images labels detect ask meta".split()}  # noqa: SIM905


def compare_runs(a: Path, b: Path, out: Path | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Compare two run folders and write a page that shows them side by side; return the figures and its path.

    All pairs are in compare.jsonl beside the page, which shows PAGE_BYTES of them, see `telling`. out: a new or empty
    folder for the page (index.html), the figures and copies of the pictures that it shows; by default the page is
    B/compare.html and links to the pictures of the runs. Raises InputError for folders that are not runs, and for runs
    without a common picture; HostError.
    """
    local(out)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} is not an empty folder")
    with Steps(quiet=quiet) as progress:
        return _compared(a, b, out, progress)


def _compared(a: Path, b: Path, out: Path | None, progress: Steps) -> dict[str, Any]:
    progress(0, 1, "reading the runs")
    paired = pair_runs(a, b)
    one, two, pairs = paired.one, paired.two, paired.pairs
    said = said_of([r.scores for pair in pairs for r in (pair.a, pair.b)])
    figures: dict[str, Any] = {
        "a": str(a), "b": str(b), "pairs": len(pairs), "prompts": len({pair.group for pair in pairs}),
        "identical": sum(pair.a.sha256 == pair.b.sha256 is not None for pair in pairs),
        "alone": {reason: {"count": len(names), "first": names[:NAMED]} for reason, names in paired.alone.items()},
        "differs": list(differences(one, two)), "scores": score_table(pairs, said, progress), "by_eye": by_eye(paired),
    }  # fmt: skip
    return _write(figures, paired, said, out, progress)


def numbers(r: Result, said: Said = NOTHING) -> dict[str, float]:
    """Return the finite scores of an image, including p['label'], count['word'] and those of `said`."""
    odds = r.scores.get("p")
    flat = {f"p[{label!r}]": value for label, value in odds.items()} if isinstance(odds, dict) else {}
    flat |= {f"count[{word!r}]": number for word, number in counts(r.scores).items()}
    everything = {**{name: value for name, value in r.scores.items() if name != "p"}, **flat}
    found = {
        name: float(value)
        for name, value in everything.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    return found | said.numbers(r.scores)


def score_table(pairs: Sequence[Pair], said: Said, progress: Steps) -> dict[str, dict[str, Any]]:
    """Return for each score: how often B is above A (ties count half), and the mean of B - A.

    Classes are those with the largest total probability; an answer's score is 1 where it is the most frequent one.
    The 95 % intervals account for the correlation between images of one prompt, see `grouped`.
    """
    groups: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for done, pair in enumerate(pairs):
        if done % TOLD == 0:
            progress(done, 2 * len(pairs), "comparing scores")
        one, two = numbers(pair.a, said), numbers(pair.b, said)
        for name in one.keys() & two.keys():
            groups[name][pair.group].append((one[name], two[name]))
    of = {name: sum(map(len, groups[name].values())) for name in groups}
    order = sorted(groups, key=lambda name: (name[:2] == "p[", -of[name] if name[:2] == "p[" else 0, name))
    return {name: _figures(list(groups[name].values())) for name in order}


def _figures(groups: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any]:
    flat = [pair for group in groups for pair in group]
    wins, ties = sum(b > a for a, b in flat), sum(b == a for a, b in flat)
    rate = share_interval([[(b > a) + (b == a) / 2 for a, b in group] for group in groups])
    gain = mean_interval([[b - a for a, b in group] for group in groups])
    return {
        "pairs": len(flat), "a": _rounded(math.fsum(a for a, _ in flat) / len(flat)),
        "b": _rounded(math.fsum(b for _, b in flat) / len(flat)), "b_wins": wins, "ties": ties,
        "win_rate": _rounded(rate[0]), "win_interval": [_rounded(x) for x in rate[1:]],
        "difference": _rounded(gain[0]), "difference_interval": [_rounded(x) for x in gain[1:]],
    }  # fmt: skip


def _rounded(x: float) -> float | None:
    return float(f"{x:.6g}") if math.isfinite(x) else None


def differences(one: Side, two: Side) -> Iterator[dict[str, Any]]:
    """Yield {"what", "a", "b"} for each difference in run.json and in the settings of common rows."""
    for part in ("binding", "info"):
        a, b = (dict(_flat(side.config[part])) for side in (one, two))
        for name in [*a, *(n for n in b if n not in a)]:
            if a.get(name) != b.get(name) and name != "started":
                yield {"what": name, "a": _text(a.get(name)), "b": _text(b.get(name))}
    found: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    both = [(one.rows[row].to_json(), two.rows[row].to_json()) for row in one.rows if row in two.rows]
    for a, b in both:
        for name in (a.keys() | b.keys()) - _ASIDE:
            if a.get(name) != b.get(name):
                found[name].append((a.get(name), b.get(name)))
    for name in sorted(found):
        where = "" if len(found[name]) == len(both) else f" of {len(found[name])} rows"
        yield {"what": name + where, "a": _texts(a for a, _ in found[name]), "b": _texts(b for _, b in found[name])}


def _flat(found: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{under}{name}.")
        else:
            yield under + name, value


def _text(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12] + "…"
    text = "-" if value is None else value if isinstance(value, str) else json_line(value).strip()
    return text if len(text) <= 80 else text[:79] + "…"


def _texts(values: Iterable[Any]) -> str:
    counts = Counter(map(_text, values)).most_common(3)
    return ", ".join(text for text, _ in counts[:2]) + (", …" if len(counts) > 2 else "")


class Lines:
    """The lines of the table of all pairs; writing them collects what the page needs.

    sizes: of each line, in bytes. gains: B - A of each pair by the first scores. rows: by score, those that have it.
    """

    def __init__(self, pairs: Sequence[Pair], said: Said, scores: Collection[str]) -> None:
        self.pairs, self.said = pairs, said
        judging = [name for name in scores if name[:2] != "p[" and name not in ("sharpness", "brightness")]
        self.gains: dict[str, dict[int, float]] = {name: {} for name in judging[:RANKED] or [*scores][:1]}
        self.rows: dict[str, set[str]] = {name: set() for name in scores}
        self.sizes: list[int] = []

    def __call__(self, progress: Steps) -> Iterator[bytes]:
        """Yield the lines in the order of the pairs."""
        for k, pair in enumerate(self.pairs):
            if k % TOLD == 0:
                progress(len(self.pairs) + k, 2 * len(self.pairs), "writing the pairs")
            found = _shown(pair, self.said)
            a, b = found["a"]["scores"], found["b"]["scores"]
            for name in a.keys() & b.keys():
                self.rows[name].add(pair.a.id)
                if name in self.gains:
                    self.gains[name][k] = b[name] - a[name]
            line = json_line(found).encode()
            self.sizes.append(len(line))
            yield line
        progress(2 * len(self.pairs), 2 * len(self.pairs), "writing the pairs")


def _write(figures: Mapping[str, Any], paired: Paired, said: Said, out: Path | None, progress: Steps) -> dict[str, Any]:
    """Write the table and the page, with `out` also copies of pictures and the figures; return figures and paths."""
    one, two, pairs = paired.one, paired.two, paired.pairs
    folder = two.folder if out is None else out
    page, table = folder / (PAGE if out is None else GALLERY), folder / TABLE
    with disk(folder):
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        links = [_links(side, letter, out, folder) for side, letter in ((one, "a"), (two, "b"))]
        lines = Lines(pairs, said, figures["scores"])
        write_whole(table, lines(progress))
        rows = {name: len(found) for name, found in lines.rows.items()}
        about = {"rows": rows, "all_rows": len({pair.a.id for pair in pairs}), "table": TABLE}
        chosen = telling(lines.sizes, lines.gains, PAGE_BYTES)
        shown_pairs = map(lambda k: _linked(_shown(pairs[k], said), pairs[k], links), chosen)
        template = look.template("compare")
        names = [side.folder.resolve().name for side in (one, two)]
        eye = figures["by_eye"] and described(figures["by_eye"], "A", "B")
        parts = {"policy": look.policy(template, look.LOCAL), "title": html.escape(f"{names[0]} and {names[1]}")}
        before, after = (look.filled(half, parts) for half in template.split("{{data}}"))
        head = {"names": names, "eye": eye, **figures, **about}
        data: Iterable[str] = map(within_html, json_pieces(head, {}, {"images": shown_pairs}))
        if out is not None:
            data = [*data]  # copies the pictures, before the page is written
            write_whole(out / FIGURES, json_line(figures).encode())
        pieces = (text for part in ([before], data, [after]) for text in part)
        write_whole(page, (text.encode("utf-8", "backslashreplace") for text in pieces))
    return {**figures, "shown": len(chosen), "page": str(page), "table": str(table)}


def telling(sizes: Sequence[int], gains: Mapping[str, Mapping[int, float]], most: int) -> list[int]:
    """Return which pairs the page shows, in order: all, or as many as have at most `most` bytes together.

    These are in turn, for each score, a pair in which B is furthest ahead, one in which A is, and one of a random
    sample, which stands for the run. sizes: of each pair, in bytes. gains: for each score, B - A of pairs.
    """
    everything = range(len(sizes))
    if sum(sizes) <= most:
        return list(everything)
    sample = iter(random.Random(0).sample(everything, len(sizes)))
    turns: list[Iterator[int]] = [sample]
    for gain in gains.values():
        ranked = sorted(gain, key=lambda k: gain[k])
        turns += [iter(ranked[::-1]), iter(ranked), sample]
    chosen: set[int] = set()
    for turn in itertools.cycle(turns):
        k = next((k for k in turn if k not in chosen), None)
        if k is None:
            continue
        most -= sizes[k]
        if most < 0:
            break
        chosen.add(k)
    return sorted(chosen)


def _shown(pair: Pair, said: Said) -> dict[str, Any]:
    prompt = pair.a.prompt
    sides = {letter: {"scores": numbers(r, said), "width": r.width, "height": r.height, "file": r.file}
             for letter, r in (("a", pair.a), ("b", pair.b))}  # fmt: skip
    cut = prompt if len(prompt) <= 2000 else prompt[:2000] + "…"
    return {"name": pair.name, "prompt": cut, "seed": pair.a.seed, **sides}


def _linked(found: dict[str, Any], pair: Pair, links: Sequence[Callable[[Result], str]]) -> dict[str, Any]:
    """Return a pair with the URLs of its pictures."""
    return found | {letter: {**found[letter], "file": link(r)}
                    for letter, r, link in zip("ab", (pair.a, pair.b), links, strict=True)}  # fmt: skip


def _links(side: Side, letter: str, out: Path | None, page: Path) -> Callable[[Result], str]:
    """Return a function result -> URL of its picture, relative to the page; with `out` it also copies the picture."""
    if out is None:
        base = quote(os.fsencode(_way(side.folder.resolve(), page.resolve())))  # may not be valid Unicode
        return lambda r: f"{base}/{r.file}" if base != "." else str(r.file)
    (out / letter).mkdir(exist_ok=True)

    def copied(r: Result) -> str:
        name = f"{letter}/{Path(str(r.file)).name}"
        source = side.folder / str(r.file)
        if isinstance(source, StoragePath):
            (out / name).write_bytes(source.read_bytes())
        else:
            shutil.copyfile(source, out / name)
        if (out / name).stat().st_size != r.bytes:
            raise HostError(f"{side.folder / str(r.file)}: is damaged; `genkit generate` draws it again")
        return name

    return copied


def _way(folder: Path, page: Path) -> str:
    """Return the relative path from a page's folder to another. Raises InputError if they are in different storages."""
    stored = [isinstance(path, StoragePath) for path in (folder, page)]
    if not any(stored):
        return os.path.relpath(folder, page)
    if not all(stored) or folder.parts[:2] != page.parts[:2]:
        raise InputError(f"{folder}, {page}: are not in one place that links reach: give -o, a folder for copies")
    return os.path.relpath("/" + "/".join(folder.parts[1:]), "/" + "/".join(page.parts[1:]))


def report(found: Mapping[str, Any]) -> str:
    """Return the outcome of `compare_runs` as text."""
    same = f", {found['identical']} of them the same file" if found["identical"] else ""
    lines = [f"A {found['a']}", f"B {found['b']}", f"{found['pairs']:,} pairs of {found['prompts']:,} prompts{same}"]
    for reason, alone in found["alone"].items():
        rest = ", …" if alone["count"] > len(alone["first"]) else ""
        lines.append(f"{alone['count']:,} {reason}: {', '.join(alone['first'])}{rest}")
    if found["by_eye"] is not None:
        lines.append(described(found["by_eye"], "A", "B"))
    lines += [f"differs: {d['what']}: {d['a']} | {d['b']}" for d in found["differs"]] or ["nothing else differs"]
    table = [("score", "pairs", "mean A", "mean B", "B wins", "(95 %)", "B - A", "(95 %)")]
    for name, s in [*found["scores"].items()][:LINES]:
        share = " to ".join(f"{x:.1%}" for x in s["win_interval"])
        gain = " to ".join("?" if x is None else f"{x:+.4g}" for x in s["difference_interval"])
        row = f"{s['pairs']:,}", f"{s['a']:.4g}", f"{s['b']:.4g}", f"{s['win_rate']:.1%}", share
        table.append((name[:40], *row, f"{s['difference']:+.4g}", gain))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(f"{cell:<{wide}}" for cell, wide in zip(row, widths, strict=True)).rstrip() for row in table]
    if len(found["scores"]) > LINES:
        lines.append(f"… and {len(found['scores']) - LINES} more scores, on the page")
    if found["shown"] < found["pairs"]:
        lines.append(f"the page shows {found['shown']:,} of the pairs; all are in {found['table']}")
    return "\n".join([*lines, f"side by side: {found['page']}"])
