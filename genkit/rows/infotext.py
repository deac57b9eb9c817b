"""Settings of a picture, of genkit or another tool: AUTOMATIC1111's infotext, and what stands in a picture file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genkit.errors import InputError, shown
from genkit.files import parse_json, place
from genkit.pictures.edges import PREPROCESSORS
from genkit.pictures.metadata import METADATA_BYTES
from genkit.pictures.written import read_texts
from genkit.rows.comfyui import read_graph
from genkit.rows.controls import read_unit
from genkit.rows.found import Draft, Found
from genkit.rows.invokeai import read_dream, read_invokeai, read_sd_metadata
from genkit.rows.records import read_fields, read_record

SETTINGS = re.compile(r"Steps: *\d+ *,.*\b(?:Sampler|CFG scale|Seed|Size|Model)\b *:")  # how the last line begins
_NEGATIVE = "Negative prompt:"
_SKIP, _KEY = re.compile(r"[\s,]*"), re.compile(r"(\w[\w \-/.()]{0,60}?) *: *")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])*+" *(?=,|$)')


def read_infotext(text: str) -> Found:
    """Return what AUTOMATIC1111's infotext says: the prompt, the negative prompt, and a last line of settings.

    Prompts are as written, with the syntax of that tool. Raises InputError for an empty text and for a value that is
    none of its field.
    """
    prompt, negative, settings, below = _parts(text)
    draft = Draft("infotext")
    draft.text("prompt", prompt)
    draft.text("negative_prompt", negative)
    if below:
        draft.notes.append(f"{below} lines below the settings are not used")
    if settings is None:
        draft.notes.append("no line of settings, as in 'Steps: 20, Sampler: Euler a, Seed: 1': it is a prompt alone")
        return draft.done()
    if "prompt" not in draft.fields:
        draft.notes.append("the prompt is empty")
    values = pairs(settings)
    known = {key.lower(): value for key, value in values.items()}
    draft.put("num_inference_steps", known.get("steps"))
    draft.put("guidance_scale", known.get("cfg scale"))
    draft.seed(known.get("seed"))
    if "sampler" in known:
        others = parse_json(known["sampler options"], "sampler options") if "sampler options" in known else None
        draft.scheduler(known["sampler"], known.get("schedule type"), others)
    hires = any(key.startswith(("hires ", "first pass")) for key in known)
    _size(draft, known)
    _denoising(draft, known.get("denoising strength"), hires)
    _about(draft, known)
    for key, value in values.items():
        _other(draft, key, value)
    if known.get("version", "").startswith("genkit"):
        _own_loras(draft)
        if known.get("row") == "cut":
            draft.lack("row", "the row has fields that are too long for the infotext")
        elif "row" in known:  # fields that AUTOMATIC1111 has no words for
            draft.fields |= {k: v for k, v in parse_json(known["row"], "row").items() if k not in draft.fields}
    if known.get("rng", "GPU").upper() != "CPU" and "seed" in draft.fields and _of_webui(known):
        draft.notes.append("seed: its noise was drawn on a GPU, genkit's is drawn on the CPU: the picture will differ")
    return draft.done()


def is_infotext(text: str) -> bool:
    """Whether a text has a line of settings as AUTOMATIC1111 writes it."""
    return _parts(text, refuse=False)[2] is not None


def _of_webui(known: dict[str, str]) -> bool:
    return not known.get("version", "").startswith(("genkit", "ComfyUI"))


def _parts(text: str, refuse: bool = True) -> tuple[str, str, str | None, int]:
    """Return (prompt, negative prompt, the line of settings, how many lines are below it)."""
    if refuse and not text.strip():
        raise InputError("the infotext is empty")
    lines = [line.strip() for line in text.strip().split("\n")]
    at = next((i for i in reversed(range(len(lines))) if SETTINGS.match(lines[i])), None)
    if at is None and {"steps", "sampler", "seed", "size"} & {key.lower() for key in pairs(lines[-1])}:
        at = len(lines) - 1 if len(pairs(lines[-1])) >= 3 else None  # three, as AUTOMATIC1111 has it
    above = lines if at is None else lines[:at]
    start = next((i for i, line in enumerate(above) if line.startswith(_NEGATIVE)), len(above))
    # Each further line that begins so is one more line of it, as in AUTOMATIC1111.
    negative = [line.removeprefix(_NEGATIVE).strip() for line in above[start:]]
    below = [] if at is None else [line for line in lines[at + 1 :] if line]
    return "\n".join(above[:start]), "\n".join(negative), None if at is None else lines[at], len(below)


def pairs(line: str) -> dict[str, str]:
    """Return the "Key: value" pairs of a line of settings; values may be quoted, or JSON, and then hold commas."""
    found: dict[str, str] = {}
    at = 0
    while at < len(line):
        at = _SKIP.match(line, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        key = _KEY.match(line, at)
        if key is None:
            at = (line.find(",", at) + 1) or len(line)
        else:
            found[key[1]], at = _value(line, key.end())
    return found


def _value(line: str, at: int) -> tuple[str, int]:
    end = line.find(",", at)
    end = len(line) if end < 0 else end
    quoted = _QUOTED.match(line, at)
    if quoted:
        try:
            return str(json.loads(quoted[0])), quoted.end()
        except ValueError:
            return quoted[0].strip()[1:-1], quoted.end()  # escapes of another kind
    if line[at : at + 1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            end = json.JSONDecoder().raw_decode(line, at)[1]
    return line[at:end].strip(), end


def _own_loras(draft: Draft) -> None:
    """Take the tags that genkit wrote behind the prompt out of it: one for each LoRA, whose hashes follow."""
    names = list(draft.about.get("lora_hashes", ()))
    text = draft.fields.get("prompt", "")
    found: list[dict[str, Any]] = []
    while (tag := _TAG.search(text)) is not None and tag[1] in names:
        weight = float(tag[3] if tag[3] is not None else tag[2])
        found.insert(0, {"file": f"{tag[1]}.safetensors", "weight": weight, "text_weight": float(tag[2])})
        text = text[: tag.start()]
    if found:
        draft.fields["loras"] = found
        draft.fields.pop("prompt")
        draft.text("prompt", text)


def _size(draft: Draft, known: dict[str, str]) -> None:
    first, size = known.get("first pass size"), known.get("size")
    if first is not None:  # of 2022: `Size` is what it was enlarged to
        draft.notes.append(f"the picture was drawn at {shown(first)} and enlarged to {shown(size)}")
        size = None if first == "0x0" else first
    if size is not None:
        sides = re.fullmatch(r"(\d{1,5}) ?[x×] ?(\d{1,5})", size)
        if sides is None:
            raise InputError(f"size: {shown(size)} is not like 512x768")
        draft.put("width", sides[1])
        draft.put("height", sides[2])


def _denoising(draft: Draft, strength: str | None, hires: bool) -> None:
    if strength is None:
        return
    if hires:  # it is of the second pass
        draft.notes.append(f"denoising strength {shown(strength)} is of the hires fix")
    elif re.fullmatch(r"0(\.0*)?", strength.strip()):
        draft.notes.append("denoising strength 0 is not used")
    else:
        draft.strength(strength)


def _about(draft: Draft, known: dict[str, str]) -> None:
    for key, name in _ABOUT.items():
        draft.tell(name, known.get(key))
    for key, name in (("lora hashes", "lora_hashes"), ("ti hashes", "ti_hashes")):
        if known.get(key):
            parts = (part.strip().rpartition(":") for part in known[key].split(","))
            draft.tell(name, {word.strip(): value.strip() for word, _, value in parts if word})
    if "clip skip" in known:
        draft.clip_skip(known["clip skip"])
    if "ti_hashes" in draft.about:
        words = ", ".join(draft.about["ti_hashes"])
        draft.notes.append(f"{shown(words)} in the prompts are learned words, of the model or of --embedding-dir")


def _other(draft: Draft, key: str, value: str) -> None:
    low = key.lower()
    if low in _READ or low in _SILENT or low.startswith(("lora hashes", "ti hashes")):
        return
    if re.fullmatch(r"controlnet \d+", low):
        draft.about.setdefault("controls", []).append(read_unit(value))
        module = re.search(r"Module: ([^,]{1,80})", value)
        if module and module[1].lower() not in PREPROCESSORS:
            draft.notes.append(
                f"ControlNet: there is no preprocessor {shown(module[1])}: give what it made of the picture"
            )
    lacked = next((name for start, name in _LACKING if low.startswith(start)), None)
    if lacked is None:
        draft.notes.append(f"not used: {shown(f'{key}: {value}')}")
    elif value.strip().lower() not in ("false", "none", ""):
        draft.lack(lacked)


def read_picture_settings(path: str | Path) -> Found:
    """Return the settings in a picture file: of genkit, AUTOMATIC1111, ComfyUI, InvokeAI, or plain JSON of fields.

    genkit's own record is the exact row; `about` then has the id, index and seed of this picture. No pixel is decoded.
    Raises InputError, naming the file, for one that is no whole picture, holds no settings, or damaged ones.
    """
    texts = _named(read_texts(path))
    for key, reader in _READERS.items():
        if key in texts:
            try:
                found = reader(texts[key])
                return _completed(found, texts) if key == "genkit" else found
            except InputError as error:
                raise InputError(f"{place(path)}: {key}: {error}") from None
    if "workflow" in texts:
        raise InputError(f"{place(path)}: holds a workflow of ComfyUI's editor, and not the graph that drew it")
    seen = f"its metadata is {shown(', '.join(texts), 200)}" if texts else "it has no metadata"
    raise InputError(f"{place(path)}: holds no settings of genkit, AUTOMATIC1111, ComfyUI or InvokeAI: {seen}")


def _named(texts: dict[str, str]) -> dict[str, str]:
    """Return the texts by what they are, the first of a kind."""
    found: dict[str, str] = {}
    for name, text in texts.items():
        told = _TOLD.match(text)
        if told and name in (*_COMMENTS, "Make", "Model"):
            found.setdefault(told[1].lower(), text[told.end() :])
        else:
            found.setdefault(_kind(name, text), text)
    return found


def _kind(name: str, text: str) -> str:
    """Return the kind of a text by its content, where the field's name does not determine it, as in EXIF."""
    braced = text.lstrip().startswith("{")
    if name == "ImageDescription" and braced and '"request"' in text:
        return "genkit"
    if name in _COMMENTS and braced:
        return "prompt" if '"class_type"' in text else "json"
    # A camera's comment is no prompt; what is named `parameters` may be a prompt alone.
    return "parameters" if name in _COMMENTS and is_infotext(text) else name


def _completed(found: Found, texts: dict[str, str]) -> Found:
    """Return a record, if it was cut, with the missing prompts taken from the infotext, unless that was cut too."""
    if not found.about.pop("cut", False):
        return found
    beside = texts.get("parameters", "")
    whole = bool(beside) and len(beside.encode("utf-8", "replace")) < METADATA_BYTES // 3 - 8
    other = read_infotext(beside).fields if whole else {}
    missing = [name for name in ("prompt", "negative_prompt") if name not in found.fields]
    fields = found.fields | {name: other[name] for name in missing if name in other}
    lost = tuple(name for name in missing if name not in fields)
    notes = tuple(f"{name}: its end was cut when the picture was written; the row is without it" for name in lost)
    return Found(fields, found.about, found.notes + notes, found.lacking + lost)


def _read_prompt(text: str) -> Found:
    return read_graph(parse_json(text, "graph", gaps=True))


_READERS: dict[str, Callable[[str], Found]] = {
    "genkit": read_record, "parameters": read_infotext, "invokeai_metadata": read_invokeai,
    "sd-metadata": read_sd_metadata, "Dream": read_dream, "prompt": _read_prompt, "json": read_fields,
}  # fmt: skip
_COMMENTS = ("parameters", "UserComment", "ImageDescription", "Comment", "settings")  # used by several tools
_TOLD = re.compile(
    r"(?i)(prompt|workflow):(?=\s*\{)"
)  # how ComfyUI begins the values that it writes into Make and Model
_NUMBER = r"(-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:e-?[0-9]{1,2})?)"
_TAG = re.compile(rf" ?<lora:([^<>:]+):{_NUMBER}(?::{_NUMBER})?>$")
_ABOUT = {"model": "model", "model hash": "model_hash", "vae": "vae", "vae hash": "vae_hash", "version": "version"}
_READ = {
    "steps", "sampler", "schedule type", "cfg scale", "seed", "size", "denoising strength", "clip skip",
    "sampler options", "row", *_ABOUT,
}  # fmt: skip
# Keys without an effect on the row
_SILENT = {
    "hashes", "rng", "user", "init image hash", "downcast alphas_cumprod", "pad conds", "pad conds v0",
    "civitai resources", "civitai metadata", "variation seed strength", "created date", "script",
}  # fmt: skip
# Beginnings of keys, and the feature that each of them asks for
_LACKING = (
    ("hires ", "hires fix"), ("first pass", "hires fix"), ("controlnet", "ControlNet"),
    ("variation seed", "variation seed"),
    ("seed resize", "seed resize"), ("face restoration", "face restoration"), ("tiling", "tiling"),
    ("refiner", "refiner"), ("ensd", "ENSD"), ("eta", "eta"), ("adetailer", "ADetailer"), ("hypernet", "hypernetwork"),
    ("addnet", "Additional Networks"), ("token merging", "token merging"), ("ngms", "NGMS"),
    ("skip early cfg", "Skip Early CFG"), ("image cfg scale", "image CFG scale"),
    ("distilled cfg", "distilled CFG scale"), ("mask", "mask_image"), ("inpaint", "mask_image"),
    ("conditional mask", "mask_image"), ("dynthres", "dynamic thresholding"), ("dynamic thres", "dynamic thresholding"),
    ("rp ", "regional prompts"), ("regional", "regional prompts"), ("freeu", "FreeU"), ("sigma ", "sigma churn"),
    ("schedule m", "limits of the schedule"), ("schedule rho", "rho of the schedule"), ("extra noise", "extra noise"),
    ("discard penultimate", "discarded penultimate sigma"), ("ultimate sd upscale", "tiled upscaling"),
    ("hypertile", "Hypertile"), ("noise multiplier", "noise multiplier"), ("ip-adapter", "IP-Adapter"),
)  # fmt: skip
