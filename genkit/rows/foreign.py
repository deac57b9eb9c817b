"""Prompt files of other tools: AUTOMATIC1111's lines of options and infotext, kohya's suffixes, ComfyUI's graphs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.files import parse_json
from genkit.rows.comfyui import is_graph, read_graph
from genkit.rows.found import Draft, Found, number
from genkit.rows.infotext import SETTINGS, read_infotext
from genkit.rows.plans import scheduler_options
from genkit.rows.prompting import PROMPTS
from genkit.rows.syntax import weighted

Row = tuple[int, dict[str, Any]]  # line number from 1, fields for `canonical`
Reader = Callable[[str, str, list[str]], list[Row]]


def sniff(text: str) -> str | None:
    """Return the form of a prompt file of another tool: a1111-lines, infotext, kohya or comfyui; None for others.

    Lines of prompts without options are of no tool, nor are those with options that neither tool has.
    """
    if text.lstrip().startswith("{"):
        try:
            return "comfyui" if is_graph(json.loads(text)) else None
        except (ValueError, RecursionError):
            return None
    for _, line in _lines(text):
        if SETTINGS.match(line) or line.startswith("Negative prompt:"):
            return "infotext"
        option = re.match(r"--([a-z_]+)\b", line)
        if option:
            return "a1111-lines" if option[1] in (*_FIELDS, *_IDLE, *_REFUSED) else None
        suffix = re.search(r"\s--([A-Za-z]{1,3})(?=\s|$)", line)
        if suffix:
            return "kohya" if suffix[1].lower() in (*_SUFFIXES, *_SUFFIXES_REFUSED) else None
    return None


def numbered_rows(text: str, form: str, where: str, notes: list[str] | None = None) -> list[Row]:
    """Return (number of the first line, fields for `canonical`) of each row of a text in a `form` of `sniff`.

    where: the file's name in errors. notes: receives a line for each thing that was assumed or left out. Raises
    InputError, naming line and option, for an option that is unknown, names a file or folder to write, or asks for what
    genkit lacks.
    """
    if form not in _READERS:
        raise InputError(f"{shown(form)}: no form of rows{nearest(form, _READERS)}; there are {', '.join(_READERS)}")
    rows = _READERS[form](text, where, [] if notes is None else notes)
    if not rows:
        raise InputError(f"{where}: has no row")
    return rows


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the numbered lines that are neither blank nor comments, which begin with # as in genkit's own .txt."""
    numbered = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in numbered if line and not line.startswith("#")]


def _a1111_lines(text: str, where: str, notes: list[str]) -> list[Row]:
    rows = []
    for at, line in _lines(text):
        try:
            options = _options(line) if re.search(r"(?:^|\s)--", line) else {"prompt": line}
            rows.append((at, _fields(options, f"{where}:{at}", notes)))
        except InputError as error:
            raise InputError(f"{where}:{at}: {error}") from None
    return rows


def _options(line: str) -> dict[str, str]:
    """Return the options of a line, split as a shell splits it; a prompt may be several words without quotes."""
    try:
        words = shlex.split(line)
    except ValueError:
        raise InputError("a quote is opened and never closed") from None
    found: dict[str, str] = {}
    at = 0
    while at < len(words):
        name = words[at].removeprefix("--")
        if not words[at].startswith("--"):
            raise InputError(f"{shown(words[at])}: is in front of the options; write --prompt before the prompt")
        end = at + 1
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        values = words[at + 1 : end]
        if name in found:
            raise InputError(f"--{name}: given twice")
        _known(name)
        if not values and name not in _SWITCHES:
            raise InputError(f"--{name}: has no value")
        if len(values) > 1 and name not in ("prompt", "negative_prompt"):
            raise InputError(f"--{name}: {shown(' '.join(values))} is more than one value; put it in quotes")
        found[name] = " ".join(values) if values else "true"
        at = end
    return found


def _known(name: str) -> None:
    """Raise InputError for an option of a line that is not read."""
    if name in _REFUSED:
        raise InputError(f"--{name}: {_REFUSED[name]}")
    if name not in _FIELDS and name not in _IDLE:
        written = re.search("path|dir|file|pattern|prefix|save|out", name)
        hint = "; where pictures go is given to the command" if written else nearest(name, _FIELDS)
        raise InputError(f"{shown('--' + name)}: unknown option{hint}")


def _fields(options: dict[str, str], where: str, notes: list[str]) -> dict[str, Any]:
    draft = Draft("a1111-lines")
    for name, value in options.items():
        if name in _IDLE:
            if value.strip().lower() not in _IDLE[name]:
                raise InputError(f"--{name}: {shown(value)}: genkit has no such thing")
            draft.notes.append(f"--{name} is not used")
        elif name in ("prompt", "negative_prompt"):
            draft.text(name, value)
        elif name == "seed":
            draft.seed(value)
        elif _FIELDS[name] not in ("scheduler", "num_images"):
            draft.put(_FIELDS[name], value)
    counts = [number("num_images", options[name]) for name in ("batch_size", "n_iter") if name in options]
    if counts:
        draft.fields["num_images"] = counts[0] * counts[-1] if len(counts) == 2 else counts[0]
    if "sampler_name" in options:
        draft.scheduler(options["sampler_name"], options.get("scheduler"))
    elif "scheduler" in options:
        draft.fields["schedule"] = options["scheduler"]
    return _row(draft.done(), where, notes)


def _row(found: Found, where: str, notes: list[str], tolerant: bool = False) -> dict[str, Any]:
    """Return the fields. Raises InputError for settings that genkit lacks; if `tolerant`, most become notes."""
    if "sampler" in found.about:
        scheduler_options(found.about["sampler"])  # raises, with the nearest name
    for name in found.lacking:
        if name.startswith("schedule ") or not (tolerant or name == "image"):
            raise InputError(f"asks for {name}, which genkit lacks")
    notes += [f"{where}: {note}" for note in found.notes]
    return found.fields


def _infotext(text: str, where: str, notes: list[str]) -> list[Row]:
    rows: list[Row] = []
    block: list[str] = []
    start = 0
    lines = text.split("\n")
    for at, raw in enumerate(lines, 1):
        line = raw.strip()
        if line and not block:
            if rows and lines[at - 2].strip():
                raise InputError(f"{where}:{at}: {shown(line)}: a blank line is between one infotext and the next")
            if re.match(r"Time taken:|[AR]: [\d.]+ [GM]B", line):  # below the settings in AUTOMATIC1111's window
                notes.append(f"{where}:{at}: {shown(line)} is not used")
                continue
            start = at
        if line or block:
            block.append(line)
        if SETTINGS.match(line):
            try:
                rows.append((start, _row(read_infotext("\n".join(block)), f"{where}:{start}", notes, tolerant=True)))
            except InputError as error:
                raise InputError(f"{where}:{at}: {error}") from None
            block = []
    if any(block):
        raise InputError(f"{where}:{start}: {shown(block[0])}: no line of settings follows, as in 'Steps: 20, Seed: 1'")
    return rows


def _kohya(text: str, where: str, notes: list[str]) -> list[Row]:
    rows = []
    for at, line in _lines(text):
        try:
            rows.append((at, _row(_suffixes(line), f"{where}:{at}", notes)))
        except InputError as error:
            raise InputError(f"{where}:{at}: {error}") from None
    return rows


def _suffixes(line: str) -> Found:
    prompt, *parts = re.split(r"(?:^|\s+)--", line)
    draft = Draft("kohya")
    draft.text("prompt", prompt)
    given: set[str] = set()
    for part in parts:
        name, _, value = part.partition(" ")
        letters, value = name.lower(), value.strip()
        if letters in _SUFFIXES_REFUSED:
            raise InputError(f"--{letters}: {_SUFFIXES_REFUSED[letters]}")
        if letters not in _SUFFIXES:
            raise InputError(
                f"{shown('--' + name)}: unknown option; there are {', '.join('--' + s for s in _SUFFIXES)}"
            )
        if letters in given or not value:
            raise InputError(f"--{letters}: {'given twice' if value else 'has no value'}")
        given.add(letters)
        field = _SUFFIXES[letters]
        if field == "negative_prompt":
            draft.text(field, value)
        elif field == "scheduler":
            draft.scheduler(value)
        elif field == "seed" and "," in value:
            draft.fields["seed"] = [number("seed", seed) for seed in value.split(",")]
        elif field == "seed":
            draft.seed(value)
        else:
            draft.put(field, value)
    return draft.done()


def _comfyui(text: str, where: str, notes: list[str]) -> list[Row]:
    graph = parse_json(text, where, gaps=True)
    try:
        found = read_graph(graph)
        for name, node in graph.items():
            _check_prefix(name, node["inputs"].get("filename_prefix"))
        row = _row(found, where, notes)
        for field in PROMPTS:
            if any(weight != 1 for chunk in weighted(row.get(field, "")) for _, weight in chunk):
                raise InputError(
                    f"{field}: {shown(row[field])} weighs words, which ComfyUI does in a way that genkit lacks"
                )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if "batch_size" in found.about:
        row["num_images"] = found.about["batch_size"]
    return [(1, row)]


def _check_prefix(name: str, prefix: Any) -> None:
    """Raise InputError if a node names where its pictures go; ComfyUI's default, which is in every graph, does not."""
    if prefix not in (None, "ComfyUI"):
        raise InputError(
            f"node {shown(name)}: filename_prefix: {shown(prefix)}: where pictures go is given to the command; take it "
            "out, or leave it at 'ComfyUI'"
        )


_OUTPUT = "names where pictures go; that is given to the command"
_FIELDS = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale", "width": "width", "height": "height", "sampler_name": "scheduler",
    "scheduler": "scheduler", "batch_size": "num_images", "n_iter": "num_images",
}  # fmt: skip
_OFF = ("false", "0", "0.0", "", "none")
# Options that have no effect on a row at these values
_IDLE: dict[str, tuple[str, ...]] = {
    "do_not_save_grid": ("true", "false"), "do_not_save_samples": _OFF, "restore_faces": _OFF, "tiling": _OFF,
    "subseed": ("-1",), "subseed_strength": _OFF, "seed_resize_from_h": ("0", "-1"), "seed_resize_from_w": ("0", "-1"),
}  # fmt: skip
_SWITCHES = ("do_not_save_grid", "do_not_save_samples", "restore_faces", "tiling")
_REFUSED = {
    "outpath_samples": _OUTPUT, "outpath_grids": _OUTPUT,
    "sd_model": "names a model; a run has one, which is given to the command",
    "sampler_index": "counts the samplers of one version; write --sampler_name",
    "styles": "names styles of an installation; write their words into the prompt",
    "prompt_for_display": "is not drawn, and genkit shows the prompt that is; take it out",
}  # fmt: skip
_SUFFIXES = {
    "n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "s": "num_inference_steps",
    "l": "guidance_scale", "t": "strength", "ss": "scheduler",
}  # fmt: skip
_SUFFIXES_REFUSED = {
    "c": "a prompt for CLIP guidance, which genkit lacks", "nl": "a scale of the negative prompt, which genkit lacks",
    "am": "weights of networks that the command names; write a row's `loras`", "i": "names a picture; write `image`",
    "g": "a distilled guidance scale, which genkit lacks", "cn": "names a picture for ControlNet, which genkit lacks",
    "r": "a ratio of Deep Shrink, which genkit lacks", "f": "names where pictures go; that is given to the command",
}  # fmt: skip
_READERS: dict[str, Reader] = {
    "a1111-lines": _a1111_lines, "infotext": _infotext, "kohya": _kohya, "comfyui": _comfyui,
}  # fmt: skip
