"""Pictures as rows: the settings that each file holds, completed with what lies beside it, and with overrides."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.components.control import network_hash
from genkit.components.weights import hash_once
from genkit.errors import InputError, nearest, shown
from genkit.files import place, user_path
from genkit.pictures.images import list_images
from genkit.pictures.metadata import CHOOSING
from genkit.rows.controls import FLAT
from genkit.rows.found import Found, base_name
from genkit.rows.infotext import read_picture_settings
from genkit.rows.inputs import MASK_DEFAULTS
from genkit.rows.plans import TUNED, is_tuned
from genkit.rows.prompting import scripted
from genkit.rows.prompts import Rows
from genkit.rows.request import ALIASES, Request, canonical, field_name, prepared
from genkit.rows.syntax import lora_tags, weighted
from genkit.rows.typed import typed

_INPUTS = ("image", "mask_image")
_ID = re.compile(r"(?!\.+\Z)[A-Za-z0-9._-]{1,90}")
_HASH = re.compile("[0-9a-fA-F]{8,64}")
# What each of these fields requires; the rows may provide it.
_PARTNERS: dict[str, dict[str, Any]] = {
    "strength": {"image": "-"}, "mask_image": {"image": "-"}, "mask": {"image": "-"},
    **{name: {"image": "-", "mask": "-"} for name in MASK_DEFAULTS}, "keep": {"num_images": 100_000},
    "max_images": {"keep": 1, "gate": "not nan"}, "prune": {"num_images": 100_000},
}  # fmt: skip
_COMPEL = re.compile(r"\)[-+0-9.]|\w\+\+|\w--(?=[\s,]|$)")  # weights in prompts of InvokeAI


@dataclasses.dataclass(frozen=True)
class Pictured:
    """A picture and its row. found: its metadata. lacking: what its settings ask for and the row cannot express.

    changed: fields that were overridden, as "steps: 20 -> 30". inputs: (name, recorded SHA-256, path) of each input
    file whose hash the metadata records.
    """

    path: Path
    row: Request
    found: Found
    lacking: tuple[str, ...]
    changed: tuple[str, ...]
    inputs: tuple[tuple[str, str, Path], ...] = ()

    @property
    def model(self) -> str | None:
        """The name of the model, without folders, as its metadata has it."""
        name = self.found.about.get("model")
        return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if isinstance(name, str) else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed or left out of its settings, without requests for input pictures that the row has."""
        settled = tuple(f"{field}: " for field in _INPUTS if getattr(self.row, field) is not None)
        return tuple(note for note in self.found.notes if not note.startswith(settled))

    @property
    def guessed(self) -> tuple[str, ...]:
        """Fields that the settings do not name; genkit's own record names all of them."""
        if self.found.about["form"] == "genkit":
            return ()
        always = ("seed", "scheduler", "num_inference_steps", "guidance_scale", "width", "height")
        return tuple(name for name in always if getattr(self.row, name) is None)


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return fields of a row written as key=value, for `read_pictures`.

    Paths are relative to the current folder. Raises InputError, naming the field and the nearest known one.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        name = field_name(key)
        if not equals or not key.strip():
            raise InputError(f"{shown(word)}: is no picture, and not like key=value")
        known = [name for name in (*Request.model_fields, *ALIASES, *FLAT, "size", "schedule_type") if name != "id"]
        if name not in known:
            raise InputError(f"{shown(key)}: unknown field{nearest(key, known)}")
        if not value.strip() and name not in ("prompt", "negative_prompt"):
            raise InputError(f"{key}: has no value")
        if name in found:
            raise InputError(f"{name}: given twice")
        found[name] = typed(name, value)
        if name == "seed" and found[name] == -1:
            raise InputError("seed: -1 is any; give the seed, or leave it to the pictures")
    found = prepared(found, Path())
    for name, value in found.items():
        check_alone(name, value)
    return found


def check_alone(name: str, value: Any) -> None:
    """Raise InputError for a value that no row can have, given before the rows are read.

    Fields that it requires are assumed; `gate` and `rank_by`, which may use labels of rows, are not checked.
    """
    if name not in ("gate", "rank_by"):
        Request(**{**_PARTNERS.get(name, {}), name: value})


def is_override(word: str) -> bool:
    """Whether a word of a command is key=value, and not the name of a file that is there."""
    return "=" in word and not user_path(word).exists() and re.match(r"[A-Za-z_][\w -]*=", word) is not None


def find_pictures(places: Sequence[str | Path]) -> list[Path]:
    """Return the pictures that are named, and those of named folders; of a run folder those in its images/.

    In the order in which they are named, once each; within a folder in natural order (2.png before 10.png). Raises
    InputError for what is not there, and for a folder without pictures.
    """
    found: list[Path] = []
    for name in places:
        path = user_path(name)
        if not path.is_dir():
            found.append(path)
            continue
        inside = list_images(path / "images" if (path / "run.json").is_file() else path)
        if not inside:
            raise InputError(f"{place(path)}: holds no picture")
        found += inside
    return list(dict.fromkeys(found))


def check_apart(pictures: Sequence[Path], out: Path) -> None:
    """Raise InputError if pictures lie in the run folder: a run writes there, and moves pictures aside."""
    whole = out.resolve()
    inside = next((path for path in pictures if path.resolve().is_relative_to(whole)), None)
    if inside is not None:
        raise InputError(f"--out: {place(out)} holds {place(inside)}, which is to be read; name another folder")


def read_pictures(
    pictures: Sequence[Path],
    overrides: Mapping[str, Any] | None = None,
    lora_dir: str | Path | None = None,
    skip: bool = False,
    control_dir: str | Path | None = None,
) -> tuple[list[Pictured], Rows]:
    """Return each picture with its row, and the rows with notes; a row's id is the name of the file.

    overrides: fields, under genkit's names and checked, which win over those of the pictures. lora_dir, control_dir:
    where LoRAs and ControlNets are looked for by name if they do not lie beside the picture. skip: leave pictures
    without settings out, with a note, if any has some; else each of them is named in an error. Raises InputError naming
    the picture and what is wrong with its settings. Of paths in metadata only the name is used.
    """
    read, bad = _read_all(pictures)
    if bad and not (skip and read):
        more = "" if len(bad) == 1 else f"{len(bad)} of {len(pictures)} pictures cannot be read: "
        reasons: dict[str, list[str]] = {}
        for path, message in bad:
            reasons.setdefault(message, []).append(place(path))
        raise InputError(more + "; ".join(f"{', '.join(names)}: {message}" for message, names in reasons.items()))
    rows, found, taken = Rows(), [], set[str]()
    notes = [f"left out: {place(path)}: {message}" for path, message in bad[:10]]
    notes += [f"left out: {len(bad)} of {len(pictures)} pictures, which hold no settings"] if bad else []
    said: dict[str, list[Path]] = {}
    for path, settings in read:
        try:
            shot = _pictured(path, settings, dict(overrides or {}), (lora_dir, control_dir), _free_id(path, taken))
        except InputError as error:
            message = str(error)
            raise InputError(message if message.startswith(place(path)) else f"{place(path)}: {message}") from None
        found.append(shot)
        rows.append(shot.row)
        for note in shot.notes:
            said.setdefault(note, []).append(path)
    rows.notes = (*notes, *(f"{first_of(paths)}: {note}" for note, paths in said.items()))
    return found, rows


def first_of(paths: Sequence[Path]) -> str:
    """Return the first path, and how many more there are, for a line on all of them."""
    return place(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _read_all(pictures: Sequence[Path]) -> tuple[list[tuple[Path, Found]], list[tuple[Path, str]]]:
    """Return each picture with its settings, and each that has none with the reason."""
    read, bad = [], []
    for path in pictures:
        try:
            read.append((path, read_picture_settings(path)))
        except InputError as error:
            bad.append((path, str(error).removeprefix(f"{place(path)}: ")))
    return read, bad


def _free_id(path: Path, taken: set[str]) -> str:
    """Return an id for the row of a picture: its file's name, numbered where several share it, in any case."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem)[:90]
    stem = stem if _ID.fullmatch(stem) else f"picture-{stem}"[:90]
    try:
        Request(id=stem)
    except InputError:  # a reserved name
        stem = f"picture-{stem}"[:90]
    number, name = 1, stem
    while name.lower() in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.lower())
    return name


def _pictured(
    path: Path, found: Found, overrides: dict[str, Any], folders: Sequence[str | Path | None], row_id: str
) -> Pictured:
    about, (lora_dir, control_dir) = found.about, folders
    fields = drawing(canonical(found.fields))
    if about["form"] == "genkit" and "seed" in about:
        fields["seed"] = about["seed"]  # the picture's own; the row may have had several, or one derived for it
    lacking = [name for name in found.lacking if name not in _INPUTS]
    if about["form"] in ("infotext", "comfyui", "invokeai") and not str(about.get("version")).startswith("genkit"):
        lacking += plain_prompts(fields, about["form"])
    for name in ("prompt", "negative_prompt"):
        if not str(fields.get(name, "-")).strip():  # of a model without prompts
            del fields[name]
    steered = _place_controls(path, found, fields, overrides, control_dir)
    new = overrides | steered if "controls" in overrides else overrides
    changed = [
        f"{k}: {_brief(fields.get(k))} -> {_brief(v)}" for k, v in new.items() if _named(fields.get(k)) != _named(v)
    ]
    fields |= overrides | steered
    inputs = _place_pictures(path, found, fields, overrides, lacking)
    if fields.get("loras") and "loras" not in overrides:
        fields["loras"] = _placed_loras(fields["loras"], path.parent, lora_dir)
        inputs += [_input(about, lora["file"]) for lora in fields["loras"]]
    for number, control in enumerate(steered.get("controls") or ()):
        inputs += [_input(about, control[name], f"controls[{number}].{name}") for name in ("file", "image")]
    if is_tuned(fields.get("scheduler")) and fields["scheduler"] != TUNED and "scheduler" not in overrides:
        fields["scheduler"] = str(_beside(path, "scheduler", fields["scheduler"]))
    row = Request(**{**prepared(fields, path.parent), "id": row_id})
    row._source = place(path)
    lacking = [name for name in lacking if not _given(name, overrides)]
    if about["form"] == "genkit" and not overrides and not _is_whole(row, found):
        lacking.append("all of its row: the record's fingerprint is another")
    kept = tuple(entry for entry in inputs if entry is not None)
    return Pictured(path, row, found, tuple(dict.fromkeys(lacking)), tuple(changed), kept)


def drawing(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row that affect pixels, without those that select among several images."""
    return {k: v for k, v in fields.items() if k not in CHOOSING}


def _named(value: Any) -> Any:
    """Return a value with the names alone of the files of ControlNets, which lie elsewhere now."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return value
    return [{k: os.path.basename(v) if k in ("file", "image") else v for k, v in one.items()} for one in value]


def _given(lacked: str, overrides: Mapping[str, Any]) -> bool:
    """Whether an entry of `lacking` no longer matters, because its field (a prompt, the scheduler) is overridden."""
    field = {"ControlNet": "controls"}.get(lacked, lacked.removeprefix("syntax of ").split(":")[0])
    return field in overrides or ("scheduler" in overrides and field.startswith(("sampler ", "schedule ")))


def _is_whole(row: Request, found: Found) -> bool:
    """Whether the row's fingerprint, which covers its input files, is the recorded one; True if none is recorded."""
    recorded = found.about.get("fingerprint")
    if not isinstance(recorded, str) or (is_tuned(row.scheduler) and row.scheduler != TUNED):
        return True
    own = {name: getattr(row, name) for name in row.model_fields_set}
    seed = found.fields.get("seed")
    images = {"num_images": len(seed)} if isinstance(seed, list) else {}
    return Request(**{**own, "seed": seed, **images}).fingerprint() == recorded


def _brief(value: Any) -> str:
    return "none" if value is None else shown(value, 40)


def plain_prompts(fields: dict[str, Any], form: str) -> list[str]:
    """Convert prompts of another tool in `fields`; return a line for each whose syntax is not supported.

    Prompts of AUTOMATIC1111 keep its syntax, and their LoRA tags become `loras`. The weights of ComfyUI and InvokeAI
    are not supported: their prompts become plain text.
    """
    lacking = []
    for name in ("prompt", "negative_prompt"):
        text = fields.get(name)
        if not text:
            continue
        lacked = f"syntax of {name}: drawn as plain text"
        if form == "invokeai":
            lacking += [lacked] if _COMPEL.search(text) else []
            continue
        try:
            if form == "infotext":
                fields["template"] = {**fields.get("template", {}), name: text}
                text, tags = lora_tags(text)
                loras = [{"file": n if n.endswith(".safetensors") else f"{n}.safetensors", "weight": w,
                          "text_weight": t} for n, w, t in tags if w or t]  # fmt: skip
                if loras and name == "prompt":  # those of a negative prompt are not used there either
                    fields["loras"] = [*(fields.get("loras") or []), *loras]
                fields |= {"syntax": "a1111", name: text.strip()}
                scripted(text if name == "prompt" else "", text if name != "prompt" else "", 20, 20)
                continue
            chunks = weighted(text)
        except InputError as error:
            lacking.append(f"{lacked} ({error})")
            continue
        if len(chunks) == 1 and all(weight == 1 for _, weight in chunks[0]):
            text = chunks[0][0][0]  # without the backslashes of \( and \)
        else:
            lacking.append(lacked)
        fields[name] = text.strip()
    return lacking


def _place_pictures(
    path: Path, found: Found, fields: dict[str, Any], overrides: dict[str, Any], lacking: list[str]
) -> list[tuple[str, str, Path] | None]:
    """Check that the input pictures are beside the picture, or given; return those whose hash is recorded."""
    inputs = []
    for name in _INPUTS:
        if name in overrides:
            continue
        if fields.get(name) is None:
            if name == "image" and name in found.lacking:
                raise InputError(f"{name}: it was drawn from a picture that its settings do not hold; give {name}=FILE")
            if name in found.lacking and found.about["form"] == "genkit":
                raise InputError(f"{name}: it was drawn with a mask that its settings do not hold; give {name}=FILE")
            lacking += [name] if name in found.lacking else []
            continue
        fields[name] = str(_beside(path, name, fields[name]))  # not its own path, which leads anywhere
        inputs.append(_input(found.about, fields[name], name))
    if fields.get("image") is None and "strength" in fields:
        raise InputError("strength: needs `image`, the picture to start from; give image=FILE")
    return inputs


def _place_controls(
    path: Path, found: Found, fields: Mapping[str, Any], overrides: Mapping[str, Any], control_dir: str | Path | None
) -> dict[str, Any]:
    """Return {"controls": …} of a picture's own ControlNets, changed by an override; {} without any.

    Networks and pictures that are not given lie beside the picture, or networks in control_dir.
    """
    own = fields.get("controls") or found.about.get("controls") or []
    given = overrides.get("controls")
    if given == [] or (given is None and not fields.get("controls")):
        return {}
    if len(own) > 1 and given and len(given) != len(own):
        raise InputError(f"controls: the picture has {len(own)}, and {len(given)} are given")
    given = given or [{} for _ in own]
    own = own or [{} for _ in given]
    pairs = zip(own, given, strict=True)
    return {"controls": [{**_beside_control(path, *pair, control_dir), **pair[1]} for pair in pairs]}


def _beside_control(
    path: Path, control: Mapping[str, Any], given: Mapping[str, Any], control_dir: str | Path | None
) -> dict[str, Any]:
    found = dict(control)
    if "image" not in given and "image" in control:
        found["image"] = str(_beside(path, "control_image", control["image"]))
    if "file" not in given and "file" in control:
        name = base_name("control", control["file"])
        places = [path.absolute().parent, *([user_path(control_dir)] if control_dir is not None else [])]
        file = next((at / name for at in places if (at / name).exists()), None)
        if file is None:
            raise InputError(f"control: {shown(name)} is not beside the picture; give control=NETWORK or --control-dir")
        found["file"] = str(file.absolute())
    return found


def _beside(path: Path, field: str, name: Any) -> Path:
    """Return the file of that name beside a picture. Raises InputError if there is none."""
    file = path.absolute().parent / base_name(field, name)
    if not file.is_file():
        raise InputError(f"{field}: {shown(file.name)} is not beside the picture; give {field}=FILE")
    return file


def _placed_loras(loras: Any, folder: Path, lora_dir: str | Path | None) -> list[dict[str, Any]]:
    if not isinstance(loras, list) or not all(isinstance(lora, str | dict) for lora in loras):
        raise InputError(f"loras: {shown(loras)} is not a list of LoRAs")
    return [_with_place(lora, folder, lora_dir) for lora in loras]


def _with_place(lora: Any, folder: Path, lora_dir: str | Path | None) -> dict[str, Any]:
    """Return a LoRA with the path of its file, which lies beside the picture or in lora_dir."""
    lora = {"file": lora} if isinstance(lora, str) else dict(lora)
    name = base_name("loras", lora.get("file"))
    places = [folder, *([user_path(lora_dir)] if lora_dir is not None else [])]
    for parent in places:
        if (parent / name).is_file():
            return {**lora, "file": str((parent / name).absolute())}
    where = f"nor in {place(places[1])}" if lora_dir is not None else "; --lora-dir names a folder that has it"
    raise InputError(f"loras: {shown(name)} is not beside the picture{' ' if lora_dir is not None else ''}{where}")


def _input(about: Mapping[str, Any], file: str, field: str | None = None) -> tuple[str, str, Path] | None:
    """Return (field or name, recorded hash, path) of a file that a row names, if the picture has its hash."""
    path = Path(file)
    recorded = about.get("inputs", {}).get(field or path.name) or about.get("lora_hashes", {}).get(path.stem)
    return (field or path.name, str(recorded), path) if recorded and _HASH.fullmatch(str(recorded)) else None


def other_inputs(shot: Pictured) -> list[str]:
    """Return a line for each file of a row that has another hash than the picture says."""
    lines = []
    for name, recorded, path in shot.inputs:
        if name.startswith("controls[") and name.endswith(".file"):  # which may be a folder
            known = [network_hash(str(path))]
        else:
            kinds = (False, True) if path.suffix == ".safetensors" else (False,)  # of the file, or its weights alone
            known = [str(hash_once(path, weights_only=alone)) for alone in kinds]
        if not any(digits.startswith(recorded.lower()) for digits in known):
            lines.append(f"{name}: {place(path)} has SHA-256 {known[0][:12]}…, and the picture says {recorded[:12]}…")
    return lines
