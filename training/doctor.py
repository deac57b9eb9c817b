"""The data doctor: checks every picture and caption of a data set before anything is trained on it."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import statistics
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from genkit.datasets.config import Data
from genkit.datasets.duplicates import Fingerprint, alike, fingerprint_all, joined
from genkit.datasets.example import Example, Examples
from genkit.datasets.report import NAMED, Finding, Report
from genkit.datasets.sources import TABLES, left_out, read_examples, split
from genkit.durable import disk, write_whole
from genkit.errors import InputError, nearest, shown
from genkit.pictures.images import SUFFIXES
from genkit.training.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from genkit.components import ModelInfo

SAMPLES = 20  # samples without a picture that are named in a line
UNCAPTIONED = ("unconditional", "autoencoder")  # tasks that read no captions


@dataclasses.dataclass(frozen=True)
class Case:
    """A data set under examination: the training set, then the validation set; the recipe and its model, if known.

    train: size of the training set. notes, lacking: those of Examples. buckets: indices of pictures by (width, height).
    """

    data: Data
    pictures: Sequence[Example]
    train: int
    fingerprints: Sequence[Fingerprint]
    recipe: Recipe | None
    info: ModelInfo | None
    task: Any = None
    notes: Sequence[str] = ()
    lacking: Sequence[str] = ()
    buckets: dict[tuple[int, int], list[int]] = dataclasses.field(default_factory=dict)

    def named(self, numbers: Sequence[int]) -> str:
        """Return the names of the first pictures, for a line of the report."""
        names = [self.pictures[i].key for i in numbers[:NAMED]]
        return ", ".join(names) + (", …" if len(numbers) > NAMED else "")


def examine(
    data: Data, train: Sequence[Example], held: Sequence[Example] = (), recipe: Recipe | None = None,
    info: ModelInfo | None = None, *, read: Examples | None = None, quiet: bool = True,
) -> Report:  # fmt: skip
    """Return the report on a data set. recipe, info: of the training run, if known. read: for its notes."""
    pictures, read = [*train, *held], Examples() if read is None else read
    case = Case(data, pictures, len(train), fingerprint_all(pictures, quiet), recipe, info)
    case = dataclasses.replace(case, notes=read.notes, lacking=read.lacking)
    findings = []
    if recipe is not None and info is not None:
        from genkit.training.estimate import task_on_shapes

        try:
            case = dataclasses.replace(case, task=task_on_shapes(recipe, info))
            case = dataclasses.replace(case, buckets=_bucketed(case, recipe, case.task))
        except InputError as error:
            findings.append(Finding("error", str(error)))
    findings += [finding for check in CHECKS for finding in check(case)]
    facts = {name: value for name, fact in FACTS.items() if (value := fact(case))}
    findings.sort(key=lambda f: f.level)
    return Report(pictures, case.fingerprints, case.train, case.buckets, facts, findings)


def diagnose(path: str | None, recipe_path: Path | None, *, quiet: bool = False) -> Report:
    """Return the report on a data set, by default that of the recipe. Raises InputError as readers do."""
    if recipe_path is None:
        if path is None:
            raise InputError("DATA: is missing; or say --recipe, which names its own")
        if not path:
            raise InputError("DATA: is empty")
        data = Data.model_validate({"path": path, "validation": 0.0})
        found = read_examples(data)
        return examine(data, found, read=found, quiet=quiet)
    recipe = read_recipe(recipe_path, () if path is None else [f"data.path={json.dumps(path)}"])
    found = read_examples(recipe.data)
    train, held = split(found, recipe.data)
    from genkit.training.control import model_of
    from genkit.training.tasks import KINDS

    info = model_of(recipe, KINDS.get(recipe.task, "text-to-image"))
    return examine(recipe.data, train, held, recipe, info, read=found, quiet=quiet)


def check_data(
    recipe: Recipe, train: Sequence[Example], held: Sequence[Example], info: ModelInfo, folder: Path,
    say: Callable[[str], None], *, read: Examples | None = None, quiet: bool = False,
) -> None:  # fmt: skip
    """Examine a data set before training, unless neither it nor the recipe's `data` has changed since the last time.

    Writes the report to doctor.html in `folder`. Raises InputError for errors that must be fixed.
    """
    sums = hashlib.sha256(json.dumps([recipe.task, recipe.plain["data"], recipe.train.batch_size, len(train)]).encode())
    states: dict[str, tuple[int, int]] = {}
    for example in (*train, *held):
        for path, *_ in example.places:
            if path not in states:
                try:
                    status = os.stat(path)
                    states[path] = (status.st_size, status.st_mtime_ns)
                except OSError:  # a broken link, which is reported below
                    states[path] = (-1, 0)
            sums.update(json.dumps([example.key, example.caption, example.place, states[path]]).encode())
    known, fingerprint = folder / ".doctor", sums.hexdigest()
    if known.exists() and known.read_text("utf-8") == fingerprint:
        return
    report = examine(recipe.data, train, held, recipe, info, read=read, quiet=quiet)
    page = write_page(report, folder / "doctor.html")
    for note in () if read is None else read.notes:
        say(note)
    for finding in report.findings:
        say(f"{finding.level}: {finding.text}")
    if report.errors:
        more = f" (and {len(report.errors) - 1} more)" if len(report.errors) > 1 else ""
        about = "data: " if report.errors[0].groups else ""  # an error of the recipe names its key itself
        raise InputError(f"{about}{report.errors[0].text}{more}; see {page}")
    with disk(known):
        write_whole(known, fingerprint.encode())


def _bucketed(case: Case, recipe: Recipe, task: Any) -> dict[tuple[int, int], list[int]]:
    """Return the indices of the readable training pictures by the size they are trained at. Raises InputError."""
    from genkit.training.scenes import pictures_of

    numbers = [i for i in range(case.train) if not case.fingerprints[i].problem]
    made = pictures_of(recipe, [case.pictures[i] for i in numbers], task)
    return {shape: [numbers[i] for i in members] for shape, members in sorted(made.buckets.items())}


def _unreadable(case: Case) -> Iterator[Finding]:
    """Unreadable pictures, and samples without a picture: up to a share of data.broken they are left out."""
    bad = [i for i, fingerprint in enumerate(case.fingerprints) if fingerprint.problem]
    count = len(case.fingerprints) + len(case.lacking)
    few = len(bad) + len(case.lacking) <= case.data.broken * count
    level, end = ("warning", ": they are left out") if few else ("error", "")
    if bad:
        listed = "; ".join(case.fingerprints[i].problem for i in bad[:NAMED]) + ("; …" if len(bad) > NAMED else "")
        text = f"{len(bad)} of {len(case.fingerprints)} pictures cannot be read: {listed}"
        yield Finding(level, text + end, [[i] for i in bad])
    if case.lacking:
        listed = ", ".join(case.lacking[:SAMPLES]) + (", …" if len(case.lacking) > SAMPLES else "")
        advice = "" if few else f"; data.broken, {case.data.broken:g}, says how many may"
        yield Finding(level, f"{len(case.lacking)} of {count} samples have no picture: {listed}{end}{advice}")


def _apart(case: Case) -> Iterator[Finding]:
    """Folders or archives that are not trained on: val, test."""
    for note in case.notes:
        if "trained on" in note:
            yield Finding("warning", note)


def _lines(case: Case) -> Iterator[Finding]:
    long = [i for i, example in enumerate(case.pictures) if "\n" in (example.caption or "")]
    if long:
        text = f"{len(long)} captions have several lines, which are read as one caption: {case.named(long)}"
        yield Finding("warning", text, [[i] for i in long])


def _uncaptioned(case: Case) -> Iterator[Finding]:
    missing = [i for i, example in enumerate(case.pictures) if not example.caption]
    if not missing or (case.recipe is not None and case.recipe.task in UNCAPTIONED):
        return
    allowed = case.data.missing_captions == "empty"
    text = f"{len(missing)} of {len(case.pictures)} pictures have no caption: {case.named(missing)}"
    hint = _mistaken(case.pictures[missing[0]], case.data)
    end = "" if allowed else "; if that is meant: data.missing_captions: empty"
    yield Finding("warning" if allowed else "error", text + hint + end, [[i] for i in missing])


def _left_out(case: Case) -> Iterator[Finding]:
    files = left_out(case.data)
    if files:
        listed = ", ".join(files[:NAMED]) + (", …" if len(files) > NAMED else "")
        kinds = "linked folders, and pictures that are no PNG, JPEG, WebP or JPEG XL"
        yield Finding("warning", f"{len(files)} files are left out: {listed}: {kinds}, are not read")


def _mistaken(example: Example, data: Data) -> str:
    """Return a hint to where the caption may be: a column of another name, or a file beside the picture."""
    texts = [name for name, value in example.fields.items() if isinstance(value, str) and value]
    if texts:
        return (
            f" (it has {', '.join(map(shown, texts[:6]))}: data.caption names the column){nearest(data.caption, texts)}"
        )
    path = Path(example.place[0])
    if example.place[1] < 0:
        return ""
    stem = PurePosixPath(example.key.rpartition("!")[2]).stem
    if example.place[2] < 0:
        beside = sorted(os.listdir(path.parent))
    else:
        with tarfile.open(path, "r:") as tar:
            beside = sorted(PurePosixPath(name).name for name in tar.getnames())
    files = [n for n in beside if not n.startswith(".") and PurePosixPath(n).suffix.lower() not in SUFFIXES]
    table = next((n for n in files if n in TABLES), None)
    if table is not None and not example.fields:
        return f" (no line of {table} speaks of it)"
    if f"{stem}.txt" in files:
        return f" ({shown(f'{stem}.txt')} is empty)"
    close = [n for n in files if n.startswith(stem)] or difflib.get_close_matches(f"{stem}.txt", files[:5000], 1, 0.7)
    return f" (beside it is {shown(close[0])}; its caption is looked for in {shown(f'{stem}.txt')})" if close else ""


def _twins(case: Case) -> Iterator[Finding]:
    """Duplicates among the training pictures, and between them and the validation set."""
    same: dict[str, list[int]] = defaultdict(list)
    for i, fingerprint in enumerate(case.fingerprints):
        if not fingerprint.problem:
            same[fingerprint.digest].append(i)
    groups = [g for g in same.values() if len(g) > 1]
    pairs = alike(case.fingerprints)
    inside = [g for g in ([i for i in g if i < case.train] for g in groups) if len(g) > 1]
    if inside:
        extra = sum(len(g) - 1 for g in inside)
        differ = sum(len({case.pictures[i].caption for i in g}) > 1 for g in inside)
        other = f", {differ} of them under different captions" if differ else ""
        text = f"copies of a picture, byte for byte: {extra}, of {len(inside)} pictures{other}: {case.named(inside[0])}"
        yield Finding("warning", text, inside)
    near = joined([p for p in pairs if p[1] < case.train])
    if near:
        count = sum(map(len, near))
        text = (
            f"{count} pictures look alike, in {len(near)} groups, the largest of {len(near[0])}: {case.named(near[0])}"
        )
        yield Finding("warning", text, near)
    members = {i: g for g in groups for i in g}
    crossed = [(a, b) for g in groups for a in g if a < case.train for b in g if b >= case.train]
    crossed += [
        (a, b) for x, y in pairs for a in members.get(x, [x]) for b in members.get(y, [y]) if a < case.train <= b
    ]
    leaked = sorted({b: a for a, b in reversed(crossed)}.items())
    if leaked:
        text = f"{len(leaked)} of {len(case.pictures) - case.train} held-out pictures are trained on, or look like one"
        text += f" that is: {case.named(leaked[0])}: the validation loss is better than it should be"
        advice = "; data.validation_by keeps pictures of one field's value together"
        text += advice if case.data.validation_by is None else ""
        yield Finding("warning", text, [(b, a) for b, a in leaked])


def _small(case: Case) -> Iterator[Finding]:
    if case.recipe is None:
        yield from _tiny(case)
        return
    most: list[tuple[float, int]] = []
    for (width, height), members in case.buckets.items():
        for i in members:
            w, h = case.fingerprints[i].size
            most.append((max(width / w, height / h), i))
    small = sorted((pair for pair in most if pair[0] > 1), reverse=True)
    if small:
        numbers = [i for _, i in small]
        sizes = [f"{case.pictures[i].key} ({'x'.join(map(str, case.fingerprints[i].size))})" for i in numbers[:NAMED]]
        text = f"{len(small)} pictures are smaller than they are trained at, and blown up to {small[0][0]:.1f} times"
        yield Finding("warning", f"{text}: {', '.join(sizes)}", [[i] for i in numbers])


def _tiny(case: Case) -> Iterator[Finding]:
    """Without a recipe: pictures with less than a tenth of the median area."""
    areas = {
        i: fingerprint.size[0] * fingerprint.size[1]
        for i, fingerprint in enumerate(case.fingerprints)
        if not fingerprint.problem
    }
    usual = statistics.median(areas.values()) if areas else 0
    tiny = sorted((i for i, area in areas.items() if area * 10 < usual), key=lambda i: areas[i])
    if tiny:
        sizes = [f"{case.pictures[i].key} ({'x'.join(map(str, case.fingerprints[i].size))})" for i in tiny[:NAMED]]
        listed = ", ".join(sizes) + (", …" if len(tiny) > NAMED else "")
        yield Finding("warning", f"{len(tiny)} pictures are tiny beside the others: {listed}", [[i] for i in tiny])


def _long(case: Case) -> Iterator[Finding]:
    """Captions that are too long for the text encoder with any of the templates."""
    limit, counts = _tokens(case)
    long = sorted((i for i, count in counts.items() if count > limit), key=lambda i: -counts[i])
    if long:
        text = f"{len(long)} captions are longer than the {limit} tokens that are read, up to {counts[long[0]]}"
        yield Finding("warning", f"{text}: {case.named(long)}: what is past them is cut off", [[i] for i in long])


def _tokens(case: Case) -> tuple[int, dict[int, int]]:
    """Return the token limit, and the length of each picture's longest caption, with start and end token."""
    if case.task is None or case.task.tokenizer is None:
        return 0, {}
    from genkit.components.text import expand_tokens
    from genkit.training.data import BACKGROUNDS, HUES, filled, usable, worded

    tokenizer = case.task.tokenizer
    data, counts = case.data, {}
    colour = max(HUES, key=len) if data.recolour is not None and data.recolour.share else ""
    for i, example in enumerate(case.pictures):
        values = {**example.fields, "caption": example.caption or ""}
        values |= {"caption": list(example.captions)} if example.captions else {}
        longest = {k: max(map(str, v), key=len) if isinstance(v, list) and v else v for k, v in values.items()}
        texts = {worded(data, template, longest, colour) for template in usable(data, values)}
        if data.background.share:
            ground = max(BACKGROUNDS, key=len)
            texts = {filled(data.background.caption, {"caption": t, "background": ground}) for t in texts}
        counts[i] = max(len(ids) for ids in tokenizer(expand_tokens(tokenizer, texts), verbose=False).input_ids)
    return tokenizer.model_max_length, counts


def _uneven(case: Case) -> Iterator[Finding]:
    if case.recipe is None or not case.buckets:
        return
    size = case.recipe.train.batch_size
    few = [(shape, m) for shape, m in case.buckets.items() if len(m) * case.data.repeat < size]
    if few and len(case.buckets) > 1:
        shapes = ", ".join(f"{w}x{h} ({len(m)})" for (w, h), m in few[:6]) + (", …" if len(few) > 6 else "")
        text = (
            f"{len(few)} of {len(case.buckets)} buckets do not fill a batch of {size}, and make shorter ones: {shapes}"
        )
        yield Finding("warning", text, [m for _, m in few])
    elif few:
        yield Finding(
            "warning", f"{len(few[0][1])} pictures do not fill a batch of {size}: every batch is of all of them"
        )


def _held(case: Case) -> Iterator[Finding]:
    held, by = len(case.pictures) - case.train, case.data.validation_by
    asked = 0.0 if isinstance(case.data.validation, str) else case.data.validation  # a data set of its own: nothing
    wanted = asked * len(case.pictures)
    if asked and abs(held - wanted) > 1 and not wanted / 2 <= held <= wanted * 2:
        text = f"{held} of {len(case.pictures)} pictures are held out, where data.validation asks for {asked:g} of them"
        why = "each is by the hash of its name, so that it stays where it is as the data set grows"
        if by is not None:
            values = len({str(example.fields.get(by)) for example in case.pictures})
            why = f"{by} has {values} values, and each is held out or trained on as a whole"
        yield Finding("warning", f"{text}: {why}; data.validation takes the path of a data set, too")


def _counts(case: Case) -> str:
    held = len(case.pictures) - case.train
    clear = sum(fingerprint.transparent for fingerprint in case.fingerprints)
    lies = f"; {clear:,} transparent, on {case.data.background.colour}" if clear else ""
    times = sum(e.repeat for e in case.pictures[: case.train])
    often = f" in {times:,} visits an epoch" if times > case.train else ""
    return f"{len(case.pictures):,}: {case.train:,} to train on{often}, {held:,} held out{lies}"


def _assumed(case: Case) -> str:
    return "; ".join(case.notes)


def _sizes(case: Case) -> str:
    sizes = Counter(fingerprint.size for fingerprint in case.fingerprints if not fingerprint.problem).most_common()
    if len(sizes) <= 4:
        return ", ".join(f"{w}x{h} ({n:,})" for (w, h), n in sizes)
    areas = sorted((size for size, n in sizes for _ in range(n)), key=lambda s: s[0] * s[1])
    picked = [areas[0], areas[len(areas) // 2], areas[-1]]
    return "{} to {}, half of them up to {}".format(*("x".join(map(str, s)) for s in (picked[0], picked[2], picked[1])))


def _captions(case: Case) -> str:
    counts = Counter(example.caption for example in case.pictures if example.caption)
    if not counts:
        return "none"
    words = [len(c.split()) for c, n in counts.items() for _ in range(n)]
    common = ", ".join(f"{shown(c, 40)} ({n})" for c, n in counts.most_common(4))
    spread = f"{min(words)} to {max(words)} words (median {statistics.median(words):.0f})"
    spread = f"{words[0]} words each" if min(words) == max(words) else spread
    return f"{sum(counts.values()):,}, {len(counts):,} distinct; {spread}; most common: {common}"


def _table(case: Case) -> str:
    return ", ".join(f"{w}x{h} ({len(members):,})" for (w, h), members in case.buckets.items())


def _steps(case: Case) -> str:
    if case.recipe is None or not case.buckets:
        return ""
    train, repeat = case.recipe.train, case.data.repeat
    batches = sum(-(-len(m) * repeat // train.batch_size) for m in case.buckets.values())
    epoch = batches / train.gradient_accumulation_steps
    limit = f", or {train.max_seconds:g} s if that is sooner" if train.max_seconds is not None else ""
    return f"{train.steps:,}: {train.steps / epoch:.1f} epochs of {epoch:,.0f} steps{limit}"


def _memory(case: Case) -> str:
    if case.recipe is None or case.info is None or not case.buckets:
        return ""
    from genkit.training.estimate import training_memory

    try:
        found = training_memory(case.recipe, case.info, case.task, max(case.buckets, key=lambda s: s[0] * s[1]))
    except (NotImplementedError, RuntimeError):  # a network that does not run on the meta device
        return "unknown"
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in found.items() if size)
    return f"about {sum(found.values()) / 2**20:,.0f} MiB: {parts}"


def _time(case: Case) -> str:
    """Return a lower bound of the training time: counted operations at the measured speed of a matrix product."""
    if case.recipe is None or case.info is None or not case.buckets:
        return ""
    from genkit.device.devices import pick_device
    from genkit.training.estimate import lasting, speed, training_work
    from genkit.training.tasks import MIXED

    train = case.recipe.train
    try:
        work = training_work(case.recipe, case.task, max(case.buckets, key=lambda s: s[0] * s[1]))
    except (NotImplementedError, RuntimeError):
        return "unknown"
    device, _ = pick_device("auto", "float32")
    rate = speed(device, MIXED[train.mixed_precision])
    pictures = train.batch_size * (2 if case.recipe.prior is not None else 1) * train.gradient_accumulation_steps
    seconds = train.steps * pictures * work / rate
    if train.max_seconds is not None and train.max_seconds < seconds:
        return (
            f"{lasting(train.max_seconds)}, which train.max_seconds allows; all steps take {lasting(seconds)} or more"
        )
    per = f"{pictures * work / 1e9:,.0f} GFLOP a step, at the {rate / 1e9:,.0f} GFLOP/s of a matrix product"
    return f"{lasting(seconds)} or more on {device.type}: {per}; looks and saves come on top"


def write_page(report: Report, path: Path) -> Path:
    """Write the report as a self-contained page with thumbnails, and return its path. Raises HostError."""
    from genkit.pages.doctor import page

    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page(report).encode("utf-8", "backslashreplace"))
    return path


CHECKS = (_unreadable, _left_out, _apart, _uncaptioned, _lines, _twins, _small, _long, _uneven, _held)
FACTS: dict[str, Callable[[Case], str]] = {
    "pictures": _counts, "assumed": _assumed, "sizes": _sizes, "captions": _captions, "buckets": _table,
    "steps": _steps, "memory": _memory, "time": _time,
}  # fmt: skip
